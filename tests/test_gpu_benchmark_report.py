"""What `make gpu` reports of a run on a GPU, on made-up data: targets, rows in part, and predictions beside times."""

from pathlib import Path

import pytest

MODES = ["forward", "backward", "both"]
ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (ROOT / "benchmarks" / "gpu.py").is_file(), reason="needs the source tree"),
]


def row(resident, ms, shape=(128, 256, 56, 56), dtype="bfloat16"):
    """A row at 4000 GB/s: 205.5 MB are 51.4 us a unit."""
    kernels = [{"name": f"void fusednorm::cuda::first{'_resident' * resident}_forward<float>(int)", "us": 9.0}]
    unit = 2 * 128 * 256 * 56 * 56
    times = {"eager": 1.0, "compile": 0.6, "fused": ms, "copy_": 0.1}
    return {
        "key": "a",
        "workload": "a",
        "label": "a",
        "stage": "main",
        "shape": list(shape),
        "dtype": dtype,
        "layout": "channels-first",
        "act": "relu",
        "p": 0.1,
        "unit_bytes": unit,
        "floor": {"streaming": [3, 5], "resident": [2, 3]},
        "wrong": None,
        "errors": {},
        "ended": [],
        "modes": {mode: {k: {"median_ms": v} for k, v in times.items()} for mode in MODES},
        "launches": {"fused": {"forward": kernels, "backward": kernels}, "eager": {"forward": [], "backward": []}},
        "saved_bytes_per_element": {"fused": 2.0},
        "peak_mb": {"fused": 500.0},
    }


def data(*rows):
    small = [
        {
            **{k: row(False, 1.0)[k] for k in ("workload", "shape", "dtype", "layout", "act", "p", "wrong")},
            "unit_bytes": 1000,
            "key": provider,
            "errors": {},
            "provider": provider,
            "host_us": {"forward": us, "both": us},
            "graph_us": {"forward": us, "both": us},
            "launches": {"forward": 3, "both": 5},
        }
        for provider, us in (("eager", 30.0), ("fused", 20.0))
    ]
    return {
        "machine": {"gpu": "a GPU", "torch": "2.11"},
        "copy": {"bandwidth": {"bytes": 1 << 30, "gb_per_s": 4000.0}},
        "switches": {"residency": True},
        "rows": list(rows),
        "small": small,
        "not reached": {"rest": 3},
    }


class TestReport:
    @pytest.mark.parametrize(
        ("resident", "ms", "met"),
        [
            # 3 units are 0.154 ms, 5 are 0.257; 85 % of the copy's bandwidth 0.181 and 0.302.
            (False, 0.17, {"forward fraction of copy": True, "backward fraction of copy": True}),
            (False, 0.19, {"forward fraction of copy": False, "backward fraction of copy": True}),
            (False, 0.41, {"both vs eager": True, "both vs compile": True}),
            (False, 0.45, {"both vs eager": False, "both vs compile": True}),
            # 2.3 units are 0.118 ms, 3.5 are 0.180.
            (True, 0.11, {"forward units": True, "backward units": True}),
            (True, 0.15, {"forward units": False, "backward units": True}),
            (True, 0.34, {"both vs eager": False, "both vs compile": False}),
        ],
    )
    def test_targets(self, benchmarks, resident, ms, met):
        found = {entry["what"]: entry for entry in benchmarks("gpu_report").targets(row(resident, ms), "fused", 4000.0)}
        assert {what: found[what]["met"] for what in met} == met

    def test_small_pictures_are_reported_only(self, benchmarks):
        found = benchmarks("gpu_report").targets(row(True, 9.0, (128, 2048, 7, 7)), "fused", 4000.0)
        assert [entry["met"] for entry in found if "units" in entry["what"]] == [None, None]

    def test_orders_have_floors_and_no_targets(self, benchmarks):
        report = benchmarks("gpu_report")
        other = row(False, 1.0) | {"stage": "orders", "floor": {"streaming": [4, 6], "resident": [3, 4]}}
        assert report.targets(other, "fused", 4000.0) == []
        assert report.floor(other, "fused", "both") == 10

    def test_text(self, benchmarks):
        failed = {k: row(False, 1.0)[k] for k in ("workload", "shape", "dtype", "layout", "act", "p", "unit_bytes")}
        failed |= {"key": "broken row", "failed": "RuntimeError: no", "errors": {}}
        wrong = row(True, 0.15) | {"wrong": "output is off", "key": "wrong row"}
        text = benchmarks("gpu_report").text(data(row(False, 0.17), wrong, failed))
        for expected in (
            "3 rows of stage 'rest' not reached",
            "failed: broken row",
            "failed: wrong row",
            "WRONG, output",
        ):
            assert expected in text
        assert "(>=0.85 met)" in text
        assert "(<=2.3 MISSED)" in text
        assert "kernels of fused, us: first_forward 9.0, first_forward 9.0" in text

    @pytest.mark.parametrize("empty", [["forward"], ["backward"], ["forward", "backward"]], ids=" ".join)
    def test_an_empty_trace_is_not_judged(self, benchmarks, empty):
        """Neither the floors nor the targets that depend on which kernels ran."""
        report, unknown = benchmarks("gpu_report"), row(False, 0.3)
        for mode in empty:
            unknown["launches"]["fused"] = unknown["launches"]["fused"] | {mode: []}
            assert report.kind(unknown, "fused", mode) == "unknown"
            assert report.floor(unknown, "fused", mode) is None
        assert report.kind(unknown, "fused", "both") == "unknown"
        found = {entry["what"]: entry for entry in report.targets(unknown, "fused", 4000.0)}
        assert found["both vs eager"]["met"] is None
        assert found["both vs eager"]["value"] == pytest.approx(1 / 0.3)
        judged = {f"{mode} fraction of copy" for mode in ("forward", "backward") if mode not in empty}
        assert {what for what, entry in found.items() if entry["met"] is not None} == judged
        assert "fused [unknown]" in report.text(data(unknown))

    @pytest.mark.parametrize(
        ("launches", "variant", "kind"),
        [
            ({"streaming+bits": False}, "streaming", "streaming"),
            ({"resident": True}, "resident+bits", "resident"),
            ({"resident": True}, "streaming", "unknown"),
            ({"resident": True}, "fused", "unknown"),
        ],
    )
    def test_saved_bits_run_the_same_kernels(self, benchmarks, launches, variant, kind):
        found = {name: row(resident, 1.0)["launches"]["fused"] for name, resident in launches.items()}
        assert benchmarks("gpu_report").kind({"launches": found}, variant, "both") == kind

    @pytest.mark.parametrize("gone", ["fused", "eager", "compile", "copy_"])
    @pytest.mark.parametrize("kept", [0, 1, 2])
    def test_rows_in_part(self, benchmarks, gone, kept):
        """A row that ended in its first, second or third mode, and a contestant that was out by then."""
        part = row(False, 0.17) | {"running": True, "saved_bytes_per_element": {}, "peak_mb": {}}
        modes = MODES[:kept]
        part["modes"] = {mode: {k: v for k, v in part["modes"][mode].items() if k != gone} for mode in modes}
        part["errors"] = {gone: {"setup": "RuntimeError: no"}}
        text = benchmarks("gpu_report").text(data(part, row(False, 0.17)))
        assert f"a: unfinished; {gone} failed at setup: RuntimeError: no" in text
        table = [line.split() for line in benchmarks("gpu_report").row_text(part, 4000.0, None)]
        for name in ("eager", "compile", "fused"):
            listed = [words[0] for words in table if words[1:2] == [name] and words[0] in MODES]
            assert listed == ([] if name == gone else modes)

    def test_before_any_row(self, benchmarks):
        empty = data() | {"small": []}
        assert "Targets: 0 of 0" in benchmarks("gpu_report").text(empty)


class TestPredictions:
    """For a row that was counted, on a GPU that the model knows."""

    KERNEL = (
        "void fusednorm::cuda::channels_first_{}<__nv_bfloat16, {}>(fusednorm::cuda::ForwardArguments<__nv_bfloat16>)"
    )
    LABEL = "(128, 256, 56, 56) bfloat16 channels-first, relu"

    def measured(self, **us):
        """Those kernels, and one that is nobody's."""
        kernels = [{"name": self.KERNEL.format(name, 8), "us": time} for name, time in us.items()]
        launches = {"fused": {"forward": [*kernels, {"name": "Memset (Device)", "us": 1.0}], "backward": kernels[:1]}}
        return row(False, 0.17) | {"label": self.LABEL, "launches": launches}

    @staticmethod
    def of(name="NVIDIA H200", multiprocessors=132):
        return {"gpu": name, "multiprocessors": multiprocessors}

    @pytest.mark.parametrize(
        ("name", "multiprocessors", "found"),
        [
            ("NVIDIA H200", 132, "H200"),
            ("NVIDIA H100 80GB HBM3", 132, "H100"),
            ("NVIDIA H100 PCIe", 114, None),
            ("NVIDIA A100-SXM4-80GB", 108, "A100"),
            ("NVIDIA L40S", 142, None),
            ("NVIDIA L4", 58, "L4"),
            ("NVIDIA GeForce RTX 4090", 128, "RTX 4090"),
            (None, None, None),
        ],
    )
    def test_which_gpu(self, benchmarks, name, multiprocessors, found):
        gpu = benchmarks("gpu_predicted").gpu_of(self.of(name, multiprocessors))
        assert (gpu and gpu.name) == found

    def test_beside_the_measured(self, benchmarks):
        module, model = benchmarks("gpu_predicted"), benchmarks("cuda_model")
        gpu = model.GPUS["H200"]
        pairs = module.pairs([self.measured(statistics=200.0, apply=0.0)], gpu)
        assert [pair.kernel for pair in pairs] == ["channels_first_statistics<BFloat16,8>"] * 2
        # 205.5 MB read at nine tenths of 4.8 TB/s.
        assert pairs[0].predicted == pytest.approx(205.58e6 / 4.32e12 * 1e6, rel=0.01)
        assert (pairs[0].bound, pairs[0].measured) == ("memory", 200.0)
        assert module.pairs([self.measured(statistics=200.0)], None) == []

    @pytest.mark.parametrize(
        ("label", "kernel", "values", "found"),
        [
            (LABEL, "statistics", 8, True),
            (LABEL, "statistics", 4, False),  # other code than was counted
            (LABEL, "noise", 8, False),
            ("(6, 8, 5, 5) bfloat16 channels-first, relu", "statistics", 8, False),
        ],
    )
    def test_which_launch(self, benchmarks, label, kernel, values, found):
        counted = benchmarks("gpu_predicted").counted(label, self.KERNEL.format(kernel, values))
        assert (counted is not None) == found

    def test_the_worst_come_first(self, benchmarks):
        """Near the top, too slow and too fast alike, each kernel of a row once."""
        measured = data(self.measured(statistics=470.0, apply=30.0, gradient_sums=100.0))
        measured["machine"] |= self.of()
        lines = benchmarks("gpu_report").text(measured).splitlines()
        top = next(i for i, line in enumerate(lines) if "over the time predicted" in line)
        assert top < 6
        assert "of 4 launches" in lines[top]
        assert "for the H200" in lines[top]
        assert "measured 4000 GB/s, the prediction assumes 4320" in lines[top + 1]
        named = [line.split(": ")[1].split("<")[0] for line in lines[top + 2 : top + 5]]
        assert named == [f"channels_first_{name}" for name in ("statistics", "apply", "gradient_sums")]
        assert "channels_first_statistics 470.0 (predicted 47.6)" in "\n".join(lines)
        assert "Memset 1.0," in "\n".join(lines)

    def test_an_unknown_gpu(self, benchmarks):
        text = benchmarks("gpu_report").text(data(self.measured(statistics=470.0)))
        assert "Nothing is predicted for this GPU" in text
        assert "(predicted" not in text
