"""Whole models: what `make models` counts, compares and says, and a look at six public ones where they are there."""

import copy
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusednorm

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (ROOT / "benchmarks" / "models.py").is_file(), reason="needs the source tree"),
]


class Residual(nn.Module):
    """A chain that both ways take, and one that only a graph shows."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU()
        self.last, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x):
        return F.relu(self.last(self.conv(self.drop(self.act(self.bn(x))))) + x)


SHAPES = ((4, 3, 8, 8),)


class TestChecks:
    def test_a_row(self, benchmarks):
        row = benchmarks("models_convert").checked(Residual, SHAPES)
        assert row.keys() == {"chains", "fuse", "backend"} and row["chains"] == 2
        assert (row["fuse"]["fused"], row["fuse"]["whole"]) == (1, 1)
        assert (row["backend"]["fused"], row["backend"]["whole"]) == (2, 2)
        assert row["fuse"]["error"] < 1e-8 and row["backend"]["error"] < 1e-8

    @pytest.mark.parametrize("way", ["fuse", "backend"])
    def test_a_way_that_fails_or_changes_something(self, benchmarks, monkeypatch, way):
        convert, table = benchmarks("models_convert"), benchmarks("models_table")
        right = getattr(convert, "fused" if way == "fuse" else "compiled")

        def wrong(model, *arguments, **options):
            model = copy.deepcopy(model) if way == "fuse" else model
            with torch.no_grad():
                model.bn.bias += 1e-3
            return right(model, *arguments, **options)

        monkeypatch.setattr(convert, right.__name__, wrong)
        row = convert.checked(Residual, SHAPES)
        assert row[way]["error"] > 1e-4 and table.wrong([{"model": "m", **row}]) == ["m"]

        def fails(*_, **__):
            raise KeyError("lost")

        monkeypatch.setattr(convert, right.__name__, fails)
        row = {"model": "m", "seconds": 1.0, **convert.checked(Residual, SHAPES)}
        assert row[way] == {"failed": "KeyError: 'lost'"} and table.wrong([row]) == []
        assert "KeyError: 'lost'" in table.line(row)

    def test_noise_is_off_and_comes_back(self, benchmarks):
        model, x = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5)), torch.ones(2, 3, 4, 4)
        with benchmarks("models_convert").silent(model):
            assert torch.equal(model(F.dropout(x, 0.5)), x)
        assert not torch.equal(F.dropout(x, 0.5), x)

    def test_a_difference_that_is_nan(self, benchmarks):
        convert, nan = benchmarks("models_convert"), torch.tensor([float("nan"), 1.0])
        assert convert.difference({"outputs": [nan]}, {"outputs": [nan]}) == 0
        assert convert.difference({"outputs": [nan.nan_to_num(2.0)]}, {"outputs": [nan]}) == 1
        assert convert.difference({"outputs": [torch.ones(3)]}, {"outputs": [torch.ones(3) * 1.5]}) == 0.5


class TestRun:
    def test_timed_rows(self, benchmarks, tmp_path):
        models, table = benchmarks("models"), benchmarks("models_table")
        entries = [("one", Residual, SHAPES), ("none", lambda: nn.Linear("a", 2), SHAPES)]
        rows = list(models.rows_of(entries, lambda build, inputs: models.measure(build, inputs, 0.1)))
        assert rows[0]["ratio"].keys() == rows[0]["ms"].keys() == {"stock", "fuse", "backend", "compile"}
        assert rows[0]["ratio"]["stock"] == 1 and rows[0]["failed"] == {}
        assert rows[0]["saved_bytes"].keys() == {"stock", "fuse", "backend"}
        assert "reason" in rows[1] and "Error" in rows[1]["reason"]
        text = "\n".join(table.markdown(rows))
        assert "| one | 2: 1, 2 |" in text and f"| none | {rows[1]['reason']} |" in text
        table.render(rows)
        drawn = benchmarks("plot").models(
            rows[:1], {"cpu": "x", "threads": 2, "level": "y", "torch": "z"}, tmp_path / "m.png"
        )
        assert drawn.read_bytes().startswith(b"\x89PNG")

    def test_what_takes_too_long_is_a_reason(self, benchmarks):
        models = benchmarks("models")

        def slow(build, inputs):
            with models.at_most(1, "to compare it"):
                time.sleep(5)

        (row,) = models.rows_of([("slow", Residual, SHAPES)], slow)
        assert row["reason"] == "TimeoutError: to compare it took more than 1 s"

    def test_saved_bytes_of_a_compiled_model(self, benchmarks):
        models, convert, memory = benchmarks("models"), benchmarks("models_convert"), benchmarks("memory")
        torch._dynamo.reset()
        model, x = Residual(), (torch.randn(*SHAPES[0]),)
        step = models.Trained(convert.compiled(model, "always")[0], model, x)
        step()
        fused = memory.saved_bytes(fusednorm.fuse(Residual(), x, small="always"), *x)
        assert 0 < memory.saved_bytes(models.OfModel(step), *x) <= fused

    def test_reasons_of_norms_that_are_left(self, benchmarks):
        fused = fusednorm.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)), exclude="1")
        assert benchmarks("models").left(fused) == {"left out as asked": 1}


@pytest.mark.slow
def test_six_public_models(models_python, tmp_path):
    out = tmp_path / "rows.json"
    command = [models_python, ROOT / "benchmarks" / "models.py", "--quick", "--checks", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        if "reason" in row:
            assert row["reason"].startswith("ModuleNotFoundError"), row
            continue
        assert row["fuse"]["error"] < 1e-6 and row["backend"]["error"] < 1e-6, row
        assert row["backend"]["fused"] == row["chains"], row
