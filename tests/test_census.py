"""The census: its file, how chains are read off a model, how rows are chosen, what becomes of them in a benchmark."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusednorm import functional, reference

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (ROOT / "benchmarks" / "census.json").is_file(), reason="needs the source tree"),
]


class TestFile:
    def test_rows(self, benchmarks):
        census = benchmarks("workloads").CENSUS
        assert len(census) >= 250
        assert len({workload.name for workload in census}) == len(census)
        for workload in census:
            before, after = reference.parse_order(workload.order)
            assert ("act" in (*before, *after)) == (workload.act is not None)
            assert ("drop" in (*before, *after)) == (workload.p > 0)
            assert set(workload.inplace) <= {*before, *after}
            assert workload.granularity in functional.GRANULARITIES
            assert workload.channels < workload.numel <= 50_000_000
            assert workload.layout != "rows" or not workload.channels_last
            reference.resolve_activation(workload.act)

    def test_every_row_builds(self, benchmarks):
        build = benchmarks("providers").build
        for workload in benchmarks("workloads").CENSUS:
            names = [
                [name for name, _ in build(who, workload, workload.p).named_parameters()] for who in ("eager", "fused")
            ]
            assert [len(parameters) for parameters in names] == [2, 2], workload.name

    def test_the_smallest_row_of_each_order_runs(self, benchmarks):
        """Checked against the reference, and at p = 0 against the stock layers."""
        smallest = {}
        for workload in benchmarks("workloads").CENSUS:
            key = workload.order, workload.layout
            smallest[key] = min(smallest.get(key, workload), workload, key=lambda workload: workload.numel)
        assert len(smallest) > 8
        for workload in smallest.values():
            case = benchmarks("case").Case(workload, workload.p, ("eager", "fused"), sample=1 << 16)
            assert case.error and not case.missing
            for provider in case.providers:
                for mode in ("both", "eval", "both_cold"):
                    assert case.step(provider, mode).shape == workload.shape


class TestSelection:
    def test_the_census_is_a_run_of_its_own(self, benchmarks):
        workloads = benchmarks("workloads")
        assert not {row[0] for row in workloads.rows()} & set(workloads.CENSUS)
        picked = workloads.rows(census=True)
        assert {row[0] for row in picked} == set(workloads.CENSUS)
        assert len(picked) == 2 * len(workloads.CENSUS) and {row[2] for row in picked} == {"both", "eval"}
        assert all(p == workload.p for workload, p, _ in picked)
        one = workloads.CENSUS[0]
        assert workloads.rows(only=[one.name], modes=["forward"]) == [(one, one.p, "forward")]

    def test_cold(self, benchmarks):
        workloads = benchmarks("workloads")
        assert not [row for row in workloads.rows() if row[2] == "both_cold"]
        cold = [row for row in workloads.rows(cold=True) if row[2] == "both_cold"]
        assert cold == [(workload, workload.p, "both_cold") for workload in workloads.HEADLINE]
        assert len(workloads.rows(census=True, cold=True)) == 3 * len(workloads.CENSUS)

    def test_a_cold_turn_is_one_step_after_a_walk(self, benchmarks, monkeypatch):
        workload = benchmarks("workloads").CENSUS[0]
        case = benchmarks("case").Case(workload, workload.p, ("eager", "fused"))
        walks = []
        monkeypatch.setattr(benchmarks("cold"), "walk", lambda: walks.append(1))
        row, seconds = benchmarks("measure").time_row(case, "both_cold", 0.01)
        assert {entry["steps_per_round"] for entry in row["providers"].values()} == {1}
        contestants, untimed = 4, 3  # rounds: two to calibrate, one to warm up
        assert len(walks) == contestants * (len(seconds) + untimed)

    def test_portions(self, benchmarks):
        workloads, run = benchmarks("workloads"), benchmarks("run")
        portions = run.portions([*workloads.HEADLINE, *workloads.CENSUS])
        assert portions[: len(workloads.HEADLINE)] == [[workload.name] for workload in workloads.HEADLINE]
        shared = portions[len(workloads.HEADLINE) :]
        assert max(map(len, shared)) == run.TOGETHER
        sizes = [workloads.BY_NAME[name].numel for names in shared for name in names]
        assert len(sizes) == len(workloads.CENSUS) and sizes == sorted(sizes)


def orders(benchmarks, model, *inputs, fake=True):
    recorder = benchmarks("census_record").Recorder()
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            model(*(torch.randn(shape) for shape in inputs))
    else:
        with recorder:
            model(*(torch.randn(shape) for shape in inputs))
    return [(chain.order, chain.act, chain.p, chain.inplace) for chain in recorder.chains()]


def norm():
    return nn.BatchNorm2d(8)


class TestRecorder:
    shape = (4, 8, 6, 6)

    @pytest.mark.parametrize(
        "layers, expected",
        [
            ([norm()], ("norm", None, 0.0, ())),
            ([norm(), nn.ReLU(inplace=True)], ("norm-act", ("relu",), 0.0, ("act",))),
            ([norm(), nn.LeakyReLU(0.2)], ("norm-act", ("leaky_relu", 0.2), 0.0, ())),
            ([norm(), nn.ReLU6()], ("norm-act", ("relu6",), 0.0, ())),
            ([norm(), nn.GELU("tanh")], ("norm-act", ("gelu_tanh",), 0.0, ())),
            ([norm(), nn.SELU()], ("norm", None, 0.0, ())),
            ([norm(), nn.PReLU()], ("norm", None, 0.0, ())),
            ([norm(), nn.ELU(), nn.Dropout(0.1)], ("norm-act-drop", ("elu",), 0.1, ())),
            ([norm(), nn.Dropout2d(0.1), nn.Tanh()], ("norm-drop-act", ("tanh",), 0.1, ())),
            ([norm(), nn.Dropout(0.0), nn.SiLU()], ("norm-act", ("silu",), 0.0, ())),
            ([norm(), nn.Dropout(0.5).eval(), nn.SiLU()], ("norm-act", ("silu",), 0.0, ())),
            ([nn.Conv2d(8, 8, 1), nn.ReLU(), norm(), nn.Dropout(0.3)], ("act-norm-drop", ("relu",), 0.3, ())),
            ([nn.Conv2d(8, 8, 1), nn.ReLU(), norm(), nn.Tanh()], ("norm-act", ("tanh",), 0.0, ())),
            ([norm(), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)], ("norm-act", ("relu",), 0.0, ())),
        ],
    )
    @pytest.mark.parametrize("fake", [True, False])
    def test_rows_of_layers(self, benchmarks, layers, expected, fake):
        assert orders(benchmarks, nn.Sequential(*copy.deepcopy(layers)), self.shape, fake=fake) == [expected]

    def test_evaluation_is_not_counted(self, benchmarks):
        assert orders(benchmarks, norm().eval(), self.shape) == []

    def test_residual(self, benchmarks):
        first, second = norm(), norm()

        def block(x):
            out = first(x)
            out += x
            return F.relu(second(F.relu(out, inplace=True)) + x)

        assert orders(benchmarks, block, self.shape) == [
            ("norm-add-act", ("relu",), 0.0, ("add", "act")),
            ("norm-add-act", ("relu",), 0.0, ()),
        ]

    def test_an_addition_of_two_norms_is_the_first_operands(self, benchmarks):
        one, other = norm(), norm()
        found = orders(benchmarks, lambda x: F.relu(one(x) + other(x)), self.shape)
        assert [order for order, *_ in found] == ["norm-add-act", "norm"]
        found = orders(benchmarks, lambda x: torch.add(other=one(x), input=other(x)), self.shape)
        assert [order for order, *_ in found] == ["norm", "norm"]  # spelt as no model does

    def test_a_result_that_two_take_ends_a_chain(self, benchmarks):
        one = norm()

        def block(x):
            y = one(x)
            return F.relu(y), y.sum()

        assert orders(benchmarks, block, self.shape) == [("norm", None, 0.0, ())]

    def test_what_asks_for_a_shape_takes_nothing(self, benchmarks):
        one = norm()

        def block(x):
            y = one(x)
            assert y.shape[1] == y.size(1) and y.dim() == 4
            return F.relu(y.contiguous())

        assert orders(benchmarks, block, self.shape) == [("norm-act", ("relu",), 0.0, ())]

    def test_layouts(self, benchmarks):
        record = benchmarks("census_record")
        for module, x, layout in (
            (nn.BatchNorm1d(8), torch.randn(4, 8), "rows"),
            (nn.BatchNorm1d(8), torch.randn(4, 8, 5), "channels-first"),
            (nn.BatchNorm1d(8), torch.randn(4, 5, 8).transpose(1, 2), "channels-last"),
            (nn.BatchNorm2d(8), torch.randn(4, 8, 1, 1).to(memory_format=torch.channels_last), "channels-first"),
        ):
            with record.Recorder() as recorder:
                module(x)
            assert [chain.layout for chain in recorder.chains()] == [layout]


class TestThinning:
    def entries(self, benchmarks, *kinds):
        record = benchmarks("census_record")
        found = []
        for shape, order, calls in kinds:
            act = ("relu",) if "act" in order else None
            found += [("model", record.Chain(shape, "channels-first", order, act, 0.0, "element", ()))] * calls
        return benchmarks("census").kinds(found)

    def test_shares_go_with_the_square_root(self, benchmarks):
        common = [((8, c, 14, 14), "norm-act", 25) for c in range(1, 101)]
        rare = [((8, c, 14, 14), "norm", 1) for c in range(1, 101)]
        kept = benchmarks("census").thinned(self.entries(benchmarks, *common, *rare), 60)
        assert sorted(sum(entry["order"] == order for entry in kept) for order in ("norm-act", "norm")) == [10, 50]

    def test_too_large_and_too_short(self, benchmarks):
        kinds = ((8, 64, 512, 512), "norm", 9), ((1, 64, 1, 1), "norm", 9), ((2, 64, 1, 1), "norm", 1)
        kept = benchmarks("census").thinned(self.entries(benchmarks, *kinds))
        assert [entry["shape"] for entry in kept] == [[2, 64, 1, 1]]

    def test_the_usual_probability(self, benchmarks):
        record, census = benchmarks("census_record"), benchmarks("census")
        chain = record.Chain((8, 4, 3, 3), "channels-first", "norm-drop", None, 0.1, "element", ())
        other = record.Chain((8, 4, 3, 3), "channels-first", "norm-drop", None, 0.5, "element", ())
        (entry,) = census.kinds([("b", chain), ("a", other), ("a", other), ("c", chain), ("d", chain)])
        assert entry["p"] == 0.1 and entry["count"] == 5 and entry["models"] == ["a", "b", "c", "d"]


class TestReport:
    def rows(self, benchmarks):
        describe, workloads = benchmarks("measure").describe, benchmarks("workloads")
        rows = [describe(*row) for row in workloads.rows(census=True)]
        for i, row in enumerate(rows):
            row |= {"ratio": {"eager": 2.0 if i else 0.5}, "providers": {"fused": {"median_ms": 1.0}}}
        rows[1] = {key: value for key, value in rows[1].items() if key != "ratio"} | {"failed": "AssertionError: off"}
        return rows

    def test_table(self, benchmarks, capsys):
        table, rows = benchmarks("table"), self.rows(benchmarks)
        facts = {"cpu": "", "cores": 2, "level": "", "threads": 2, "torch": "", "commit": "", "load_average": [0]}
        table.show(rows, facts, table.console())
        text = capsys.readouterr().out
        assert f"0.50x both {rows[0]['workload']}" in text and "FAILED eval" in text
        assert len(text.splitlines()) < 40  # not a line per row

    def test_picture(self, benchmarks, tmp_path):
        facts = {"cpu": "", "level": "", "threads": 2, "torch": ""}
        (path,) = benchmarks("plot").draw(self.rows(benchmarks), facts, tmp_path)
        assert path.name == "census.png" and path.stat().st_size > 10_000

    def test_classes(self, benchmarks):
        classes = benchmarks("census_classes")
        assert [
            classes.pixel_class((2, 3, math.isqrt(s), math.isqrt(s))) for s in (1, 25, 64, 121, 256, 1600, 1681)
        ] == [
            0,
            0,
            1,
            2,
            3,
            4,
            5,
        ]
        assert classes.pixel_class((8, 4)) == 0
        named = {"norm": "bare", "act-norm": "act", "norm-add-act": "add", "norm-act-add-drop": "dropout"}
        assert {order: classes.pattern_class(order) for order in named} == named
