"""`bench` takes every layer, compares before it times, takes turns, and says what they come to."""

import os
import shutil

import pytest
import torch
from terminal import TINY, environment, facts_of, run

from fusednorm.cli import bench, timing

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("16,4,6,6", "--act relu --p 0.1"),
        ("16,4,6,6", "--act relu --p 0.1 --channels-last --dtype bfloat16"),
        ("16,4,6", "--act leaky_relu,0.2 --p 0.1 --granularity channel --dtype float64"),
        ("16,4", "--act gelu,tanh --p 0.5 --granularity channel"),
        ("4,4,3,3,3", "--act prelu --p 0.1 --noise uniform --order act-drop-norm"),
        ("16,4,6,6", "--p 1.5 --noise gaussian --granularity channel --order drop-norm"),
        ("16,4,6,6", "--act silu --p 0.2 --granularity sample --order norm-drop-add-act"),
        ("16,4,6,6", "--dtype float16"),
    ],
)
def test_bench_takes_every_layer(called, shape, options):
    status, facts = facts_of(called(f"bench --shape {shape} {options} --no-compile --json", *TINY))
    assert status == 0
    assert facts["shape"] == [int(size) for size in shape.split(",")] and facts["threads"] == 1
    assert list(facts["contestants"]) == ["fused", "eager"] and list(facts["ratio"]) == ["eager"]
    for row in facts["contestants"].values():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] == facts["rounds"] >= 5
        assert row["kept_bytes_per_element"] > 0
    assert facts["decision"] in ("fuse", "leave", "even") and "bytes an element" in facts["verdict"]


def test_the_bytes_kept_are_those_of_the_layer(called):
    """Of a large enough tensor: the input and a bit, against the input, the activation's result and the noise."""
    _, facts = facts_of(called("bench --shape 64,8,32,32 --act relu --p 0.1 --no-compile --json", *TINY))
    kept = {name: row["kept_bytes_per_element"] for name, row in facts["contestants"].items()}
    assert kept["fused"] == pytest.approx(4 + 1 / 8, abs=0.01)
    assert kept["eager"] >= 9


def test_evaluation_keeps_nothing(called):
    status, facts = facts_of(called("bench --shape 16,4,6,6 --act relu --eval --no-compile --json", *TINY))
    assert status == 0 and facts["mode"] == "evaluation"
    assert all(row["kept_bytes_per_element"] is None for row in facts["contestants"].values())
    assert "bytes" not in facts["verdict"]
    # What is too little for statistics is enough for this.
    assert called("bench --shape 1,4 --eval --no-compile", *TINY)[0] == 0


def test_a_layer_that_is_wrong_is_not_timed(called, monkeypatch):
    results = bench._results

    def wrong(module, inputs, training):
        found = results(module, inputs, training)
        if type(module).__name__.startswith("Fused"):
            found[1].mul_(1.1)  # the input's gradient
        return found

    monkeypatch.setattr(bench, "_results", wrong)
    status, out, err = called("bench --shape 16,4,6,6 --no-compile", *TINY)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert "differs from the stock modules in training" in err


def test_a_compiler_that_fails_is_named_and_the_rest_is_timed(called, monkeypatch):
    def compile(*_, **__):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", compile)
    status, out, _ = called("bench --shape 16,4,6,6", *TINY)
    assert status == 0
    assert "torch.compile could not run: RuntimeError: no compiler here\n" in out
    assert out.splitlines()[-1].split(":")[0] in ("fuse it", "leave it") or "no difference" in out


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("CUDA out of memory.\nand more"), 2, "--shape: CUDA out of memory."),
    ],
)
def test_what_ends_a_measurement(called, monkeypatch, error, status, said):
    def take_turns(*_):
        raise error

    monkeypatch.setattr(timing, "take_turns", take_turns)
    assert called("bench --shape 16,4 --no-compile") == (status, "", f"fusednorm bench: {said}\n")


@pytest.mark.parametrize("load", [0.1, 3.25])
def test_a_busy_machine_is_told_of(called, monkeypatch, load):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    _, out, _ = called("bench --shape 16,4 --no-compile", *TINY)
    assert f"load average {load:.2f}\n" in out
    assert ("may be wrong by as much as a factor of two" in out) == (load > 1)


def ratio(low, median, high):
    return {"p20": low, "median": median, "p80": high}


@pytest.mark.parametrize(
    ("eager", "compiled", "decision", "sentence"),
    [
        (
            (5, 6.11, 7),
            (2, 3, 4),
            "fuse",
            "fuse it: 6.1 times faster than eager and 3.0 times faster than torch.compile",
        ),
        ((1.01, 1.04, 1.1), None, "fuse", "fuse it: 1.04 times faster than eager"),
        ((5, 6, 7), (0.6, 0.8, 0.9), "leave", "leave it: torch.compile is 1.25 times faster"),
        ((0.4, 0.5, 0.6), (0.9, 1.0, 1.1), "leave", "leave it: eager is 2.0 times faster"),
        ((1.001, 1.004, 1.1), None, "even", "no difference beyond noise"),
        ((0.9, 0.98, 0.99), None, "even", "no difference beyond noise"),
        ((0.9, 1.1, 1.3), None, "even", "no difference beyond noise"),
        ((3, 4, 5), (0.99, 1.2, 1.3), "even", "no difference beyond noise"),
    ],
)
def test_verdicts(eager, compiled, decision, sentence):
    ratios = {"eager": ratio(*eager)} | ({"compile": ratio(*compiled)} if compiled else {})
    assert bench.judge(ratios, {}) == (decision, sentence)
    kept = bench.judge(ratios, {"fused": 4.125, "eager": 12.0})[1]
    assert kept == f"{sentence}; fused keeps 4.1 bytes an element for backward, eager 12.0"


def test_turns_are_taken_round_by_round():
    """Each turn after an untimed step of the same contestant; ratios are of the same round."""
    steps, timed = [], []

    def clock(run):
        before = len(steps)
        run()
        timed.append(steps[before:])
        return 1.0 if steps[-1] == "a" else 2.0 * len(timed)

    taken = timing.take_turns({name: (lambda name=name: steps.append(name)) for name in "ab"}, 0.0, clock)
    assert {name: len(values) for name, values in taken.items()} == {"a": 5, "b": 5}
    assert timed[-10:] == [["a"], ["b"]] * 5  # a second is long enough to be timed alone
    assert steps[-20:] == ["a", "a", "b", "b"] * 5
    assert timing.ratio([2.0, 8.0, 9.0], [1.0, 2.0, 3.0])["median"] == 3.0


def test_short_steps_are_repeated():
    seen = []

    def clock(run):
        before = len(seen)
        run()
        return 1e-4 * (len(seen) - before)

    taken = timing.take_turns({"a": lambda: seen.append(1)}, 0.0, clock)
    assert taken["a"] == pytest.approx([1e-4] * 5)
    assert len(seen) == 1 + 3 + 5 * 11


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot(called, tmp_path, kind):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"layer.{kind}"
    status, _, err = called("bench --shape 16,4 --no-compile --plot", file, *TINY)
    assert status == 0, err
    head = file.read_bytes()[:300]
    assert head.startswith(b"\x89PNG") if kind == "png" else b"<svg" in head or b"<?xml" in head


@pytest.fixture
def alone(tmp_path):
    """An environment with the package and torch, and without what only makes the command line prettier."""
    for name in ("rich", "tqdm", "matplotlib", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('no {name}')\n")
    return environment(tmp_path)


def test_without_rich_and_matplotlib(alone, tmp_path):
    arguments = "bench --shape 16,4 --no-compile", *TINY
    done = run(*arguments, env=alone, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "over fused" in done.stdout
    done = run(*arguments, "--plot", "layer.png", env=alone, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fusednorm bench: --plot: needs matplotlib") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_bench_against_torch_compile():
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    status, facts = facts_of(run("bench --shape 16,4,6,6 --act relu --p 0.1 --json", *TINY))
    assert status == 0 and facts["missing"] == {}
    assert list(facts["contestants"]) == ["fused", "eager", "compile"]
