"""`make gpu` has one chance: a measuring process that hangs, dies or raises costs what it was at, and nothing else."""

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODES = ["forward", "backward", "both"]
OTHERS = {"copy_", "eager", "fused", "streaming", "streaming+bits", "resident", "resident+bits"}

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (ROOT / "benchmarks" / "gpu.py").is_file(), reason="needs the source tree"),
]

# Who does what in which step; the modes that this contestant has afterwards; what is said of it.
FAULTS = [
    ("resident", "forward", "raises", [], "RuntimeError: planted"),
    ("resident", "both", "raises", MODES[:2], "RuntimeError: planted"),
    ("eager", "setup", "raises", [], "RuntimeError: planted"),
    ("fused", "setup", "raises", [], "RuntimeError: planted"),
    ("fused", "profile", "raises", MODES, "RuntimeError: planted"),
    ("fused", "memory", "raises", MODES, "RuntimeError: planted"),
    ("fused", "profile", "traces nothing", MODES, None),
    ("streaming", "backward", "loses the context", MODES[:1], "RuntimeError: CUDA error: planted"),
    ("fused", "both", "exits", MODES[:2], "the process ended with status 9"),
    ("eager", "setup", "is killed", [], f"the process ended with status {-signal.SIGKILL}"),
    ("resident+bits", "backward", "hangs", MODES[:1], "hung: no sign of life for 6 s"),
    ("resident+bits", "both", "exits", MODES[:2], "the process ended with status 9"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One stage whose rows have a fault each, and a last one that has none: the part, and the results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        gpu, process = (importlib.import_module(f"benchmarks.{name}") for name in ("gpu", "gpu_process"))
        patch.setattr(process.Watch, "STEP", 6.0)
        out = tmp_path_factory.mktemp("out")
        driver = gpu.Driver(type("Args", (), {"out": out, "dry_run": True, "seconds": 300.0}))
        plan = {str(i): fault[:3] for i, fault in enumerate(FAULTS)} | {"the last": None}
        options = ["--stage=main", f"--json={out / 'results.json'}"]
        faults = str(Path(__file__).with_name("gpu_faults.py"))
        patch.setattr(driver, "measuring", lambda *_: driver.python(faults, json.dumps(plan), *options))
        patch.setattr(driver, "show", lambda part: None)
        driver.measure("main", 280)
        return driver.parts[0], json.loads((out / "results.json").read_text()), (out / "bench.txt").read_text()


@pytest.mark.slow
def test_the_stage_goes_on(measured):
    part, data, log = measured
    assert len(data["rows"]) == len(FAULTS) + 1, log[-3000:]
    assert all("running" not in row for row in data["rows"])
    assert part.status == "FAILED"
    assert any("at backward of resident+bits" in note for note in part.notes)
    fatal = [fault for _, _, fault, *_ in FAULTS if fault not in ("raises", "traces nothing")]
    assert log.count("$ ") == 1 + len(fatal)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[" ".join(fault[:3]) for fault in FAULTS])
def test_a_fault_costs_its_contestant(measured, benchmarks, index):
    who, step, fault, kept, why = FAULTS[index]
    row = measured[1]["rows"][index]
    assert row["errors"] == ({who: {step: why}} if why else {})
    assert [mode for mode in MODES if who in row["modes"].get(mode, {})] == kept
    assert row["check"]  # of the fused layer, by a process that had it
    if fault == "hangs":
        assert row["failed"] == f"{why} at {step} of {who}"
        assert list(row["modes"]) == MODES[: MODES.index(step)]
    else:
        assert "failed" not in row
        for mode in MODES:
            assert set(row["modes"][mode]) - {who} == OTHERS - {who}
        without = {who} if who not in row["saved_bytes_per_element"] else set()
        assert set(row["saved_bytes_per_element"]) == OTHERS - {"copy_"} - without
        assert without == ({who} if kept != MODES or step == "memory" else set())
    report = benchmarks("gpu_report")
    text = "\n".join(report.row_text(row, 4000.0, None))
    if why:
        assert f"{who} failed at {step}: {why}" in text
    if step == "profile":
        assert report.kind(row, "fused", "both") == "unknown"
        assert report.kind(row, "streaming", "both") == "streaming"


@pytest.mark.slow
def test_who_ends_the_process_twice_is_left_out(measured):
    row = measured[1]["rows"][-1]
    assert row["errors"] == {
        "resident+bits": {"forward": "left out: twice in this layout the process ended at resident+bits"}
    }
    for mode in MODES:
        assert set(row["modes"][mode]) == OTHERS - {"resident+bits"}


@pytest.mark.slow
def test_the_report_has_them_all(measured, benchmarks):
    text = benchmarks("gpu_report").text(measured[1])
    assert "FAILED: hung: no sign of life for 6 s at backward of resident+bits" in text
    assert text.count("resident failed at") == 4  # twice each: among the verdicts and with its row


class TestWatch:
    @pytest.mark.parametrize(
        ("events", "why"),
        [
            # (seconds, row, count of steps)
            ([(89, None, 0)], ""),
            ([(91, None, 0)], "hung: no sign of life for 90 s"),
            ([(80, "a", 1), (105, "a", 2), (130, "a", 3)], ""),
            ([(80, "a", 1), (119, "a", 1)], ""),
            ([(80, "a", 1), (121, "a", 1)], "hung: no sign of life for 40 s"),
            ([(10, "a", 1), (45, "a", 2), (80, "b", 3), (115, "b", 4), (150, "b", 5)], ""),
            ([(10, "a", 1), (45, "a", 2), (80, "a", 3), (101, "a", 4)], "hung: more than 90 s for one row"),
        ],
    )
    def test_overdue(self, benchmarks, tmp_path, monkeypatch, events, why):
        process, now = benchmarks("gpu_process"), [0.0]
        monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
        watch = process.Watch(tmp_path / "results.json")
        said = []
        for seconds, key, count in events:
            now[0] = seconds
            if key:
                watch.place.count = count - 1
                watch.place.write(key, "fused", "both")
            said.append(watch.overdue())
        assert said == [False] * (len(events) - 1) + [bool(why)]
        assert watch.why == why

    @pytest.mark.parametrize(
        ("script", "why"),
        [("import os; os.abort()", "status -6, at no row"), ("import time; time.sleep(60)", "hung: no sign of life")],
        ids=["dies", "hangs"],
    )
    def test_a_process_that_reaches_no_row(self, benchmarks, tmp_path, monkeypatch, script, why):
        """Is started again once."""
        monkeypatch.setattr(benchmarks("gpu_process").Watch, "START", 1.0)
        driver = benchmarks("gpu").Driver(type("Args", (), {"out": tmp_path, "dry_run": True, "seconds": 60.0}))
        monkeypatch.setattr(driver, "measuring", lambda *_: [sys.executable, "-c", script])
        driver.measure("main", 60)
        assert driver.parts[0].status == "FAILED"
        assert sum(why in note for note in driver.parts[0].notes) == 2


class TestResults:
    @pytest.fixture
    def results(self, benchmarks, tmp_path):
        return benchmarks("gpu_results").Results(tmp_path / "results.json")

    @staticmethod
    def begun(results, part="rows", **more):
        row = {"key": "a", "layout": "rows", "errors": {}, "ended": [], "running": True} | more
        results.data[part].append(row)
        results.write()

    def test_rows_that_fail_or_are_cut_short(self, results, benchmarks):
        def fail(row):
            raise RuntimeError("bad row\nsecond line")

        def out_of_time(row):
            raise KeyboardInterrupt

        results.run("rows", {"key": "whole"}, lambda row: row.update(modes={}))
        results.run("rows", {"key": "bad"}, fail)
        with pytest.raises(KeyboardInterrupt):
            results.run("rows", {"key": "not begun"}, out_of_time)
        with pytest.raises(KeyboardInterrupt):
            results.run("rows", {"key": "in part", "modes": {"forward": {}}}, out_of_time)
        again = benchmarks("gpu_results").Results(results.path)
        assert [row["key"] for row in again.data["rows"]] == ["whole", "bad", "in part"]
        assert again.find("rows", "bad")["failed"] == "RuntimeError: bad row"
        assert [key for key in ("whole", "bad", "in part") if again.done("rows", key)] == ["whole", "bad"]

    @pytest.mark.parametrize(
        ("part", "who", "step", "hung", "failed", "errors"),
        [
            ("rows", "fused", "both", False, None, {"fused": {"both": "died"}}),
            ("rows", "fused", "both", True, "died at both of fused", {"fused": {"both": "died"}}),
            ("rows", "", "beginning", False, "died at beginning of the row", {}),
            ("small", "fused", "both", False, "died at both of fused", {"fused": {"both": "died"}}),
        ],
    )
    def test_how_a_process_ended(self, results, benchmarks, part, who, step, hung, failed, errors):
        module = benchmarks("gpu_results")
        self.begun(results, part)
        module.Place(results.path).write("a", who, step)
        assert "died" in module.ended(results.path, "died", hung)
        row = module.Results(results.path).find(part, "a")
        assert row.get("failed") == failed
        assert row["errors"] == errors
        assert row.get("running", False) == (failed is None)

    def test_it_said_why_before_it_fell(self, results, benchmarks):
        module = benchmarks("gpu_results")
        self.begun(results, errors={"fused": {"both": "CUDA error"}}, ended=["fused"])
        module.Place(results.path).write("a", "fused", "both")
        module.ended(results.path, "died", False)
        row = module.Results(results.path).find("rows", "a")
        assert (row["errors"], row["ended"]) == ({"fused": {"both": "CUDA error"}}, ["fused"])

    @pytest.mark.parametrize(
        ("ends", "layout", "given_up"),
        [
            ([("fused", "both")], "rows", set()),
            ([("fused", "both"), ("fused", "setup")], "rows", {"fused"}),
            ([("fused", "both"), ("fused", "setup")], "channels-last", set()),
            ([("fused", "both"), ("fused", "profile")], "rows", set()),
            ([("fused", "profile"), ("eager", "profile")], "rows", {"profile"}),
        ],
    )
    def test_what_is_given_up(self, results, benchmarks, ends, layout, given_up):
        module = benchmarks("gpu_results")
        for end in ends:
            self.begun(results, ended=[module.blamed(*end)])
        assert results.given_up(layout) == given_up

    def test_no_row_was_under_way(self, results, benchmarks):
        """The process had none yet, or was between two; one that an earlier stage left unfinished is no part of it."""
        module = benchmarks("gpu_results")
        self.begun(results)
        assert module.ended(results.path, "died", False) is None
        results.run("rows", {"key": "b"}, lambda row: None)
        module.Place(results.path).write("b", "fused", "memory")
        assert module.ended(results.path, "died", False) is None
        assert "failed" not in module.Results(results.path).find("rows", "a")
