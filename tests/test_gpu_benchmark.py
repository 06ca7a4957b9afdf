"""`make gpu` without a GPU: a dry run goes through all of its parts, and its decisions are tried on made-up data."""

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "benchmarks" / "gpu.py"

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not DRIVER.is_file(), reason="needs the source tree")]


def drive(out, *arguments, timeout=300, **environment):
    return subprocess.run(
        [sys.executable, str(DRIVER), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Every part, and a sanitizer that knows only the second spelling of an option."""
    tool = """#!/bin/sh
case "$*" in *--kernel-name*) echo "unrecognised option"; exit 1;; esac
echo "========= ERROR SUMMARY: 0 errors"
echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
"""
    executable(tmp_path / "compute-sanitizer", tool)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    out = tmp_path / "out"
    child = drive(out, "--dry-run", PATH=path)
    report = (out / "report.txt").read_text()
    assert child.returncode == 0, report + child.stdout[-3000:] + child.stderr[-3000:]
    stages = ("main", "small", "rest", "orders")
    parts = ("library", "quick check", "tests", "memcheck", "racecheck", *(f"{stage} rows" for stage in stages))
    for part in parts:
        assert any(line.startswith("ok ") and part in line for line in report.splitlines()), part
    data = json.loads((out / "results.json").read_text())
    assert {row["stage"] for row in data["rows"]} == {"main", "rest", "orders"}
    ordered = {row["order"]: row["floor"]["streaming"] for row in data["rows"]}
    assert ordered["norm-act-drop"] == [3, 5]
    assert ordered["drop"] == [2, 2]
    assert any(order.endswith("-add") for order in ordered)
    assert {row["provider"] for row in data["small"]} == {"eager", "compile", "fused"}
    for row in data["rows"]:
        peers = {"eager", "compile"} if row["stage"] == "main" else {"eager"}
        assert set(row["modes"]["both"]) == {"copy_", "fused"} | peers
        assert not row["wrong"]
        assert not row["errors"]
        assert "running" not in row
    if importlib.util.find_spec("matplotlib"):
        assert (out / "speed.png").stat().st_size > 1000
    assert len(list(out.iterdir())) <= 8


def test_without_a_gpu(tmp_path):
    child = drive(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert child.returncode == 1
    assert "sees no GPU" in child.stdout


class TestDriver:
    @pytest.fixture
    def driver(self, benchmarks, tmp_path):
        args = type("Args", (), {"out": tmp_path, "dry_run": False, "seconds": 100.0})
        return benchmarks("gpu").Driver(args)

    @pytest.mark.parametrize(
        ("script", "limit", "grace", "code"),
        [
            ("print('fine')", 60, 60, 0),
            ("import sys; sys.exit(7)", 60, 60, 7),
            ("import time; time.sleep(60)", 1, 60, 124),
            ("import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", 4, 1, 137),
        ],
        ids=["fine", "fails", "late", "hangs"],
    )
    def test_processes_end(self, driver, script, limit, grace, code, monkeypatch, tmp_path, benchmarks):
        monkeypatch.setattr(benchmarks("gpu_process"), "GRACE", grace)
        assert driver.run([sys.executable, "-c", script], tmp_path / "log", limit) == code

    def test_a_part_that_raises_is_reported(self, driver):
        with driver.part("broken"):
            raise OSError("no such thing")
        with driver.part("fine") as part:
            part.status = "ok"
        text = (driver.out / "report.txt").read_text()
        assert "FAILED   broken" in text
        assert "no such thing" in text
        assert "ok       fine" in text

    def test_logs_stay_small(self, tmp_path, monkeypatch, benchmarks):
        process = benchmarks("gpu_process")
        monkeypatch.setattr(process, "MOST_TEXT", 1000)
        log = tmp_path / "log"
        log.write_text("a" * 5000 + "end")
        process.shorten(log)
        assert log.stat().st_size < 1000
        assert log.read_text().endswith("end")

    @pytest.mark.parametrize(
        ("says", "status"),
        [
            ("echo '= ERROR SUMMARY: 0 errors'; echo '= RACECHECK SUMMARY: 0 hazards'", "ok"),
            ("echo '= ERROR SUMMARY: 3 errors'; echo '= RACECHECK SUMMARY: 3 hazards'; exit 9", "FAILED"),
            ("echo 'Device not supported'; exit 1", "skipped"),
        ],
        ids=["clean", "errors", "no device"],
    )
    def test_sanitizer(self, driver, says, status, tmp_path, monkeypatch):
        executable(tmp_path / "compute-sanitizer", f"#!/bin/sh\n{says}\n")
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        driver.sanitizer(60)
        assert [part.status for part in driver.parts] == [status] * 2

    def test_no_part_gets_nothing(self, benchmarks, monkeypatch, tmp_path):
        """What is left is shared out by the budget, also where a build has taken most of the time."""
        gpu, given = benchmarks("gpu"), {}
        monkeypatch.setattr(gpu.Driver, "library", lambda self: True)
        monkeypatch.setattr(gpu.Driver, "left", lambda self: 180.0 - sum(given.values()))
        monkeypatch.setattr(gpu.Driver, "measure", lambda self, stage, seconds: given.update({stage: seconds}))
        for name in ("check", "tests", "sanitizer"):
            monkeypatch.setattr(gpu.Driver, name, lambda self, seconds, name=name: given.update({name: seconds}))
        assert gpu.main(["--out", str(tmp_path)]) == 0
        assert list(given) == list(gpu.BUDGET)
        assert sum(given.values()) == pytest.approx(180)
        assert given["orders"] == pytest.approx(180 * gpu.BUDGET["orders"] / sum(gpu.BUDGET.values()))

    def test_the_budget_is_within_the_time(self, benchmarks):
        gpu = benchmarks("gpu")
        assert sum(gpu.BUDGET.values()) <= gpu.TOTAL - 20 <= 540


@pytest.mark.parametrize(
    ("marks", "found"),
    [
        # Of two runs, each between two marks; what lies outside prepares them.
        ((1, 4, 6, 9), [["second"], ["third"]]),
        ((1, 2, 6, 9), [[], ["third"]]),
        ((1, 4, 6), [[], []]),
        ((), [[], []]),
    ],
)
def test_kernels_of_a_trace(benchmarks, marks, found):
    kernels = [("third", 8.5), ("first", 0.5), ("second", 3.0), ("spoils the caches", 5.0)]
    kernels += [("at::cuda::(anonymous namespace)::spin_kernel(long)", mark) for mark in marks]
    events = [{"cat": "kernel", "name": name, "ts": ts, "dur": 3} for name, ts in kernels]
    events += [
        {"cat": "gpu_user_annotation", "name": "a region", "ts": 3.5, "dur": 100},
        {"cat": "cpu_op", "name": "aten::add", "ts": 3.5, "dur": 1},
        {"ph": "M", "name": "process_name"},
    ]
    runs = benchmarks("gpu_clock").traced({"traceEvents": events}, 2)
    assert runs == [[{"name": name, "us": 3.0} for name in names] for names in found]


def test_rows_are_what_was_promised(benchmarks):
    rows = benchmarks("gpu_rows")
    main = {(w.shape, w.dtype, w.layout) for w in rows.MAIN}
    assert {w.layout for w in rows.MAIN} == {"channels-first", "channels-last", "rows"}
    assert len(main) == len(rows.MAIN)
    keys = [rows.key(w, w.p) for w in rows.MAIN + rows.REST]
    assert len(set(keys)) == len(keys)
    first = {(str(w.dtype), w.layout) for w in rows.MAIN[:4]}  # what a run that is cut off has
    assert len(first) == 4
    assert len({w.shape for w in rows.MAIN[:4]}) == 1
    assert all(w.numel * w.dtype.itemsize >= rows.LARGE for w in rows.MAIN)
    assert all(w.numel * w.dtype.itemsize <= rows.SMALL for w in rows.SMALL_ROWS)


@pytest.mark.parametrize(
    ("order", "forward", "backward"),
    [
        ("norm-act-drop", 3, 5),
        ("drop-norm-act", 3, 5),
        ("norm-act-drop-add", 4, 5),
        ("norm-add-act-drop", 4, 6),
        ("drop", 2, 2),
    ],
)
def test_floors(benchmarks, order, forward, backward):
    rows = benchmarks("gpu_rows")
    found = [rows.floors(w)["streaming"] for w in rows.ORDERS if w.order == order]
    assert found
    assert set(found) == {(forward, backward)}


class TestLibrary:
    """Which library is used: one that runs on the GPU, wherever it lies, else one built for that GPU."""

    @pytest.fixture
    def tree(self, benchmarks, tmp_path, monkeypatch):
        gpu = benchmarks("gpu")
        monkeypatch.setattr(gpu, "ROOT", tmp_path)
        monkeypatch.setattr(gpu, "DEVICE", "print('9.0'); print('a GPU')")
        # A library "runs" if it says so; the package that Python would import is the one that is asked.
        probe = """
import os, sys
package = os.environ["PYTHONPATH"].split(os.pathsep)[0]
said = open(package + "/fusednorm/_ops.so").read()
sys.exit(None if said == "runs" else said)
"""
        monkeypatch.setattr(gpu, "PROBE", probe)
        args = type("Args", (), {"out": tmp_path / "out", "dry_run": False, "seconds": 100.0})
        return gpu.Driver(args), tmp_path

    @staticmethod
    def library(folder, text):
        (folder / "fusednorm").mkdir(parents=True, exist_ok=True)
        (folder / "fusednorm" / "_ops.so").write_text(text)

    def test_a_carried_one(self, tree):
        driver, root = tree
        self.library(root, "built for another torch")
        self.library(root / "build" / "cuda", "runs")
        assert driver.library()
        assert driver.packages == root / "build" / "cuda"
        assert "built for another torch" in str(driver.parts[0])

    def test_none_that_runs(self, tree):
        driver, root = tree
        self.library(root, "built for another torch")
        setup = """
import os, pathlib
wishes = [os.environ[name] for name in ("FUSEDNORM_CUDA", "TORCH_CUDA_ARCH_LIST")]
pathlib.Path("fusednorm/_ops.so").write_text("runs" if wishes == ["1", "9.0"] else f"built with {wishes}")
"""
        (root / "setup.py").write_text(setup)
        assert driver.library(), str(driver.parts[0])
        assert driver.packages == root
        assert driver.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(root)

    def test_no_way_to_build(self, tree):
        driver, root = tree
        (root / "setup.py").write_text("raise SystemExit('nvcc is missing')")
        assert not driver.library()
        assert driver.parts[0].status == "FAILED"
        assert "nvcc is missing" in str(driver.parts[0])
