"""The benchmarks' rivals: what they give, on which threads, and what a run says where they are absent."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "rivals" / "onednn.cpp"

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not SOURCE.is_file(), reason="needs the source tree")]

SHAPES = {
    "pictures": ((4, 32, 6, 5), False),
    "odd": ((3, 21, 7), False),
    "volumes": ((2, 16, 3, 4, 5), False),
    "last": ((4, 32, 6, 5), True),
    "volumes last": ((2, 24, 3, 4, 5), True),
    "rows": ((50, 48), False),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """onednn.cpp compiled as `make rivals` does, but without installing anything."""
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler) and shutil.which("make")):
        pytest.skip("needs a C++ compiler and make")
    header = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <dnnl.hpp>",
        text=True,
        capture_output=True,
    )
    if header.returncode:
        pytest.skip("oneDNN is not installed (`make rivals` installs it)")
    path = tmp_path_factory.mktemp("rivals") / "libonednn_rival.so"
    subprocess.run(["make", "-s", "-C", str(ROOT), f"RIVAL={path}", str(path)], check=True, capture_output=True)
    return path


@pytest.fixture
def onednn(benchmarks, library, monkeypatch):
    module = benchmarks("rivals.onednn")
    monkeypatch.setattr(module, "LIBRARY", library)
    try:
        module.load()
    except benchmarks("rivals").Unavailable as error:  # with some other torch
        pytest.skip(str(error))
    return module


def layer_of(benchmarks, onednn, name, workload):
    """The layer is checked as it is made."""
    stock = benchmarks("providers").build("eager", workload, 0.0)
    return onednn.OneDNN(name, workload, workload.randn(0), workload.randn(1), stock), stock


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gives_what_the_stock_layers_give(benchmarks, onednn, shape, dtype, act):
    size, last = SHAPES[shape]
    workload = benchmarks("workloads").Workload("made up", size, 0.0, act, dtype, last)
    names = benchmarks("rivals").of(workload, 0.0)
    assert ("onednn_blocked" in names) == (workload.layout == "channels-first")
    for name in names:
        layer, _ = layer_of(benchmarks, onednn, name, workload)
        assert set(layer.error) == {"output", "grad_x", "grad_weight", "grad_bias"}


def test_a_wrong_one_is_found(benchmarks, onednn):
    workload = benchmarks("workloads").Workload("made up", (4, 32, 6, 5), 0.0)
    layer, stock = layer_of(benchmarks, onednn, "onednn", workload)
    given = {name: getattr(layer, name) for name in ("grad_x", "grad_weight", "grad_bias")}
    given["output"] = layer.y * 1.01
    with pytest.raises(AssertionError, match="onednn is wrong, not timed: output is off by"):
        benchmarks("check").against_stock("onednn", given, stock, workload, layer.x, layer.grad_y)


def test_row(benchmarks, onednn):
    workload = benchmarks("workloads").Workload("made up", (4, 32, 6, 5), 0.0)
    names = benchmarks("rivals").RIVALS
    case = benchmarks("case").Case(workload, 0.0, ("eager", "fused"), against=names)
    assert not case.missing
    for mode in benchmarks("workloads").MODES:
        row, _ = benchmarks("measure").time_row(case, mode, 0.01)
        assert all((name in row["ratio"]) == (mode != "eval") for name in names)
    table = benchmarks("table")
    console = table.Console(width=250, record=True)
    row, _ = benchmarks("measure").time_row(case, "both", 0.01)
    table.show([row], benchmarks("machine").facts(), console)
    said = console.export_text()
    assert "vs onednn" in said
    assert f"{min(row['ratio'][name] for name in names):.2f}x" in said


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's account of threads")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_works_on_the_threads_of_torch(benchmarks, onednn):
    """By the CPU time of each thread: the same ones, and as many as torch was told to use."""
    workload = benchmarks("workloads").Workload("made up", (64, 64, 28, 28), 0.0)

    def times():
        return {
            task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()
        }

    def workers(call):
        call()
        time.sleep(0.1)  # idle threads spin for a while, and that is no work
        before = times()
        for _ in range(30):
            call()
        spent = {thread: now - before.get(thread, 0) for thread, now in times().items()}
        return {thread for thread, ns in spent.items() if ns > 0.1 * max(spent.values())}

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer, _ = layer_of(benchmarks, onednn, "onednn_blocked", workload)
        out = torch.empty_like(layer.x)
        theirs, ours = workers(layer.forward), workers(lambda: torch.clamp_min(layer.x, 0, out=out))
    finally:
        torch.set_num_threads(threads)
    assert len(theirs) == 2
    assert theirs == ours


def test_absent_says_so_once(benchmarks, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks("rivals.onednn"), "LIBRARY", tmp_path / "none.so")
    workload = benchmarks("workloads").Workload("made up", (4, 32, 6, 5), 0.0)
    case = benchmarks("case").Case(workload, 0.0, ("eager", "fused"), against=benchmarks("rivals").RIVALS)
    rows = [benchmarks("measure").time_row(case, mode, 0.01)[0] for mode in ("forward", "both")]
    rows.append(rows[0] | {"workload": "another"})
    assert all(set(row["providers"]) == {"eager", "fused"} for row in rows)
    said = "onednn could not run (its library is not built: `make rivals` builds it)"
    assert benchmarks("table").remarks(rows) == [f"made up, another: {said}"]


def test_who_can_do_what(benchmarks):
    of, workload = benchmarks("rivals").of, benchmarks("workloads").BY_NAME
    assert of(workload["cnn_f32"], 0.0) == ("onednn", "onednn_blocked")
    assert of(workload["dense"], 0.0) == of(workload["cnn_bf16_last"], 0.0) == ("onednn",)
    assert (
        of(workload["cnn_f32"], 0.1)
        == of(workload["tacotron2_postnet"], 0.0)
        == of(workload["norm-add-act"], 0.0)
        == ()
    )
