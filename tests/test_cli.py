"""The command line: what it says, at a terminal and in JSON, its exit status, and what it does with wrong arguments."""

import json
import math
import os
import shutil
import sys

import definition
import numpy as np
import pytest
import torch
from terminal import PACKAGE, Session, environment, run, words

import fusednorm.cli
from fusednorm.cli import answers, bench, output, threads, timing

pytestmark = pytest.mark.cpu

NETS = """
from torch import nn
print("said while it is imported")
def row():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 4, 3))
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    def forward(self, x):
        return self.act(self.norm(self.conv(x)))
class Two(nn.Module):
    def forward(self, x, y):
        return x + y
plain = nn.Linear(3, 3)
seven = 7
def gives_seven():
    return 7
def fails():
    raise ValueError("no such luck\\nand more of it")
"""
TINY = ("--seconds", "0.1", "--threads", "1")


@pytest.fixture
def called(capfd, monkeypatch, threads):
    """Calls the command line in this process: (status, stdout, stderr)."""

    def call(command, *more):
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            status = fusednorm.cli.main(words(command, *more))
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with models, which is the one that the process is in."""
    name = "nets_of_test_cli"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name
    sys.modules.pop(name, None)


def facts_of(result):
    """Of the one object on stdout."""
    status, out, _ = result
    assert out.count("\n") == 1, out
    return status, json.loads(out)


# ---- info ------------------------------------------------------------------------------------------------------------
def test_info_says_the_same_to_people_and_to_programs():
    told, data = run("info"), run("info", "--json")
    facts = json.loads(data.stdout)
    assert told.returncode == data.returncode == 0
    assert facts["command"] == "info" and facts["usable"] is True
    assert facts["torch"] == facts["torch_built_for"] == torch.__version__
    assert facts["level"]["in_use"] in facts["level"]["compiled"]
    for text in (facts["fusednorm"], facts["torch"], facts["cpu"], facts["level"]["in_use"], *facts["missing"]):
        assert text in told.stdout


@pytest.fixture
def unbuilt(tmp_path):
    """A package whose library was never compiled: its folder, its environment, and the script that pip writes."""
    shutil.copytree(PACKAGE, tmp_path / "fusednorm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = tmp_path / "bin" / "fusednorm"
    script.parent.mkdir()
    script.write_text("import sys\nfrom fusednorm.cli import main\nsys.exit(main())\n")
    return tmp_path, environment(tmp_path), [str(script)]


@pytest.mark.parametrize("way", ["module", "script"])
def test_without_a_library(unbuilt, way):
    folder, env, script = unbuilt
    start = ["-m", "fusednorm"] if way == "module" else script
    for command in ("info", "doctor"):
        done = run(command, start=start, env=env, cwd=folder)
        assert done.returncode == 1 and not done.stderr
        assert "are not built" in done.stdout and "pip install" in done.stdout
    done = run("bench --shape 8,4", start=start, env=env, cwd=folder)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("fusednorm bench: fusednorm's operators are not built")
    assert done.stderr.count("\n") == 1


# ---- doctor ----------------------------------------------------------------------------------------------------------
def test_the_known_answers_are_those_of_the_definition():
    kept = definition.bernoulli((16, 4), 0.5, answers.SEED, "element").reshape(-1) != 0
    assert int("".join(map(str, kept.astype(int))), 2) == answers.KEPT
    draws = definition.draw16(answers.SEED, np.arange(9)[:, None], np.arange(2)[None, :])
    assert list(answers.DRAWS) == draws.reshape(-1).tolist()
    normal = definition.gaussian((9, 2), 1.0, answers.SEED, "element").reshape(-1)
    np.testing.assert_allclose(answers.NORMAL, normal, rtol=0, atol=1e-7)


def test_doctor_finds_nothing_where_nothing_is_wrong():
    done = run("doctor", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["healthy"] is True
    status = {check["name"]: check["status"] for check in facts["checks"]}
    wanted = {"library", "CPU level", "Bernoulli noise", "uniform noise", "Gaussian noise"}
    assert all(status[name] == "ok" for name in wanted | {"gradients, NCHW", "gradients, NHWC"})
    assert status["GPU"] == ("ok" if torch.cuda.is_available() else "absent")


def broken(name):
    """The checks that have failed, and what else there is to see of them."""
    status, facts = facts_of(name)
    assert status == 1 and facts["healthy"] is False
    return {check["name"]: check for check in facts["checks"] if check["status"] == "FAILED"}


@pytest.mark.parametrize(
    ("constant", "value", "name"),
    [
        ("KEPT", answers.KEPT ^ 1 << 20, "Bernoulli noise"),
        ("DRAWS", (*answers.DRAWS[:-1], answers.DRAWS[-1] ^ 1), "uniform noise"),
        ("NORMAL", (answers.NORMAL[0] + 1e-5, *answers.NORMAL[1:]), "Gaussian noise"),
    ],
)
def test_doctor_finds_a_wrong_number(called, monkeypatch, constant, value, name):
    monkeypatch.setattr(answers, constant, value)
    found = broken(called("doctor", "--json"))
    assert list(found) == [name]
    assert "build it again" in found[name]["advice"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_doctor_finds_a_wrong_gradient(called, monkeypatch, channels_last):
    """Of one element, in one layout."""
    grad = torch.autograd.grad

    def wrong(y, leaves, grad_output):
        gradients = grad(y, leaves, grad_output)
        if y.dtype == torch.float32 and leaves[0].is_contiguous() != channels_last:
            gradients[0][2, 3, 4, 5] += 1e-3
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    found = broken(called("doctor", "--json"))
    assert list(found) == ["gradients, NHWC" if channels_last else "gradients, NCHW"]


@pytest.mark.parametrize("error", [math.nan, math.inf, 2 * answers.GRADIENT_ERROR])
def test_what_is_no_number_is_wrong_too(called, monkeypatch, error):
    monkeypatch.setattr(answers, "gradients", lambda device, channels_last: error)
    assert list(broken(called("doctor", "--json"))) == ["gradients, NCHW", "gradients, NHWC"]


def test_a_check_that_raises_has_failed(called, monkeypatch):
    def raises(device):
        raise RuntimeError("an illegal instruction\nand more")

    monkeypatch.setattr(answers, "bernoulli", raises)
    status, out, _ = called("doctor")
    assert status == 1
    assert "FAILED  Bernoulli noise       RuntimeError: an illegal instruction; expected a known answer" in out
    assert "1 of" in out.splitlines()[-1]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="torch starts no second thread")
def test_doctor_counts_the_threads_that_work():
    """torch says two, and OpenMP starts one."""
    done = run("doctor", "--json", env=environment(OMP_NUM_THREADS="2", OMP_THREAD_LIMIT="1"))
    found = broken((done.returncode, done.stdout, done.stderr))
    assert found["threads at work"]["got"].startswith("1 of 2")
    assert "OMP_THREAD_LIMIT" in found["threads at work"]["advice"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs the threads of /proc")
def test_one_thread_is_one_thread():
    done = run("doctor", "--json")
    check = next(c for c in json.loads(done.stdout)["checks"] if c["name"] == "threads at work")
    assert check["status"] == "ok" and check["got"].startswith("1 of 1")
    assert ("could give it" in check["advice"]) == (threads.processors() >= 2)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.25),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
    ids=["v2", "v2-unlimited", "v1", "v1-unlimited", "none"],
)
def test_the_share_of_a_container(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    everything = threads.processors(tmp_path / "nothing")
    assert everything >= 1
    assert threads.processors(tmp_path) == (everything if quota is None else quota)


def test_a_compiler_that_is_not_here_is_no_failure():
    done = run("doctor", env=environment(CXX="/nowhere/g++"))
    assert done.returncode == 0
    assert "absent  torch.compile" in done.stdout and "apt-get install g++" in done.stdout


# ---- bench -----------------------------------------------------------------------------------------------------------
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
    status, facts = facts_of(called("bench", "--shape", shape, *options.split(), "--no-compile", "--json", *TINY))
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


def test_a_layer_that_is_wrong_is_not_timed(called, monkeypatch):
    results = bench._results

    def wrong(module, inputs, training):
        found = results(module, inputs, training)
        if type(module).__name__.startswith("Fused"):
            found[1].mul_(1.1)  # the input's gradient
        return found

    monkeypatch.setattr(bench, "_results", wrong)
    status, out, err = called("bench", "--shape", "16,4,6,6", "--no-compile", *TINY)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert "differs from the stock modules in training" in err


def test_a_compiler_that_fails_is_named_and_the_rest_is_timed(called, monkeypatch):
    def compile(*_, **__):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", compile)
    status, out, _ = called("bench", "--shape", "16,4,6,6", *TINY)
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
    _, out, _ = called("bench", "--shape", "16,4", "--no-compile", *TINY)
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
    status, _, err = called("bench", "--shape", "16,4", "--no-compile", "--plot", file, *TINY)
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
    arguments = "bench", "--shape", "16,4", "--no-compile", *TINY
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
    done = run("bench --shape 16,4,6,6 --act relu --p 0.1 --json", *TINY)
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["missing"] == {}
    assert list(facts["contestants"]) == ["fused", "eager", "compile"]


# ---- report ----------------------------------------------------------------------------------------------------------
def test_report_of_a_row_needs_no_example(called, nets):
    status, out, err = called("report", f"{nets}:row")
    assert status == 0
    assert "norm-act-drop with 2, 3" in out and "1 of 1 BatchNorms fused (1 norm-act-drop)" in out
    assert "said while it is imported" in err and "said" not in out


def test_report_with_an_example(called, nets):
    status, facts = facts_of(called("report", f"{nets}:Own", "--example", "4,3,16,16", "--small", "always", "--json"))
    assert status == 0 and facts["orders"] == {"norm-act": 1}
    assert facts["rows"] == [{"name": "norm", "order": "norm-act", "taken": ["act"], "reason": None}]
    assert 0 < facts["kept_bytes"]["fused"] < facts["kept_bytes"]["stock"]
    assert "MiB for its backward" in facts["summary"]


def test_report_says_why_not(called, nets):
    _, facts = facts_of(called("report", f"{nets}:Own", "--json"))
    assert (facts["norms"], facts["fused"], facts["kept_bytes"]) == (1, 0, None)
    assert "1 left: outside nn.Sequential only an example shows who calls it" in facts["summary"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_report_of_another_type(called, nets, dtype):
    arguments = "--example", "4,3,16,16", "--dtype", dtype, "--small", "always", "--json"
    status, facts = facts_of(called("report", f"{nets}:Own", *arguments))
    single = facts_of(called("report", f"{nets}:Own", *arguments[:2], *arguments[4:]))[1]
    assert status == 0
    share = torch.finfo(getattr(torch, dtype)).bits / 32
    assert facts["kept_bytes"]["fused"] == pytest.approx(share * single["kept_bytes"]["fused"], rel=0.05)


@pytest.mark.parametrize(("model", "examples"), [("plain", ["2,3"]), ("Two", ["2,3", "2,3"])])
def test_report_of_what_has_no_norm(called, nets, model, examples):
    status, out, _ = called("report", f"{nets}:{model}", *(a for e in examples for a in ("--example", e)))
    assert (status, out) == (0, "no BatchNorm in this model\n")


def test_report_finds_modules_of_the_folder(tmp_path):
    (tmp_path / "of_here.py").write_text(NETS)
    script = tmp_path / "elsewhere" / "fusednorm"
    script.parent.mkdir()
    script.write_text("import sys\nfrom fusednorm.cli import main\nsys.exit(main())\n")
    done = run("report", "of_here:row", "--json", start=[str(script)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fused"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("NETS:fails", 2, "NETS:fails: ValueError: no such luck ("),
        ("NETS:seven", 2, "NETS:seven: expected a factory or a module, but got int"),
        ("NETS:gives_seven", 2, "NETS:gives_seven: expected it to give a torch.nn.Module, but got int"),
        ("NETS:nothing", 2, "NETS:nothing: NETS has no nothing"),
        ("nowhere.at_all:row", 2, "nowhere.at_all:row: there is no module nowhere here, nor installed"),
        ("NETS", 2, "package.module:factory: expected package.module:factory, but got 'NETS'"),
        ("NETS:row --example 4,3", 1, "NETS:row: the model does not run or cannot be fused: RuntimeError: "),
        ("NETS:row --example 4,3,0,5", 2, "--example: expected sizes of 1 and more, but got '4,3,0,5'"),
        ("NETS:row --dtype int7", 2, "--dtype: invalid choice: 'int7'"),
    ],
)
def test_report_of_what_is_no_model(called, nets, arguments, status, said):
    found, out, err = called("report", *arguments.replace("NETS", nets).split())
    ours = [line for line in err.splitlines() if not line.startswith("said while")]
    assert (found, out, len(ours)) == (status, "", 1)
    assert ours[0].startswith(f"fusednorm report: {said}".replace("NETS", nets))


def test_a_module_that_breaks_is_named_with_its_line(called, tmp_path, monkeypatch):
    (tmp_path / "broken_of_test_cli.py").write_text("import math\nmath.nothing\n")
    monkeypatch.chdir(tmp_path)
    status, _, err = called("report", "broken_of_test_cli:x")
    assert status == 2
    assert err.endswith(f"has no attribute 'nothing' ({tmp_path}/broken_of_test_cli.py, line 2)\n")


# ---- arguments -------------------------------------------------------------------------------------------------------
HOSTILE = [
    ("bench", "--shape: expected two to five integers, but got '64x64'", "--shape", "64x64"),
    ("bench", "--shape: expected two to five integers, but got '64'", "--shape", "64"),
    ("bench", "--shape: expected two to five integers, but got '1,2,3,4,5,6'", "--shape", "1,2,3,4,5,6"),
    ("bench", "--shape: expected two to five integers, but got ''", "--shape", ""),
    ("bench", "--shape: expected two to five integers, but got '4,-1'", "--shape", "4,-1"),
    ("bench", "--shape: expected two to five integers, but got '4,1e3'", "--shape", "4,1e3"),
    ("bench", "--shape: expected sizes of 1 and more, but got '0,4'", "--shape", "0,4"),
    ("bench", "--shape: expected a tensor that fits", "--shape", "999999,999999,9"),
    ("bench", "--shape: Expected more than 1 value per channel", "--shape", "1,4"),
    ("bench", "the following arguments are required: --shape"),
    ("bench", "--act: ", "--shape", "8,4", "--act", "reelu"),
    ("bench", "--act: ", "--shape", "8,4", "--act", "relu,1,2"),
    ("bench", "--act: ", "--shape", "8,4", "--act", ""),
    ("bench", "--p: expected a number of 0 or more, but got 'nan'", "--shape", "8,4", "--p", "nan"),
    ("bench", "--p: expected a number of 0 or more, but got 'much'", "--shape", "8,4", "--p", "much"),
    ("bench", "--p: dropout probability has to be between 0 and 1", "--shape", "8,4", "--p", "1.5"),
    ("bench", "--order: ", "--shape", "8,4", "--order", "act-act-norm"),
    ("bench", "--act: ", "--shape", "8,4", "--act", "relu", "--order", "norm"),
    ("bench", "--p: ", "--shape", "8,4", "--p", "0.1", "--order", "norm-act"),
    ("bench", "--dtype: invalid choice: 'int8'", "--shape", "8,4", "--dtype", "int8"),
    ("bench", "--channels-last: expected a shape of three to five", "--shape", "8,4", "--channels-last"),
    ("bench", "--threads: expected an integer between 1 and 4096, but got '0'", "--shape", "8,4", "--threads", "0"),
    ("bench", f"--threads: expected at most {os.cpu_count()}", "--shape", "8,4", "--threads", "4000"),
    ("bench", "--seconds: expected a number between 0.1 and 3600, but got 'inf'", "--shape", "8,4", "--seconds", "inf"),
    ("bench", "--device: expected cpu, cuda or cuda:0, but got 'moon'", "--shape", "8,4", "--device", "moon"),
    ("bench", "--plot: expected a name that ends with .png, .svg, .pdf, but got 'a'", "--shape", "8,4", "--plot", "a"),
    ("bench", "--plot: the folder /nowhere does not exist", "--shape", "8,4", "--plot", "/nowhere/a.png"),
    ("bench", "unrecognized arguments: --no-such", "--shape", "8,4", "--no-such"),
    ("bench", "unrecognized arguments: --chan", "--shape", "8,4", "--chan"),
    ("info", "unrecognized arguments: more", "more"),
    ("report", "the following arguments are required: package.module:factory"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "said", "arguments"), [(c, s, a) for c, s, *a in HOSTILE])
def test_hostile_arguments(called, command, said, arguments):
    status, out, err = called(command, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    # What no command knows is found by the parser of all of them.
    assert err.startswith((f"fusednorm {command}: {said}", f"fusednorm: {said}"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_and_not_imitated(called):
    status, out, err = called("bench", "--shape", "8,4", "--device", "cuda")
    assert (status, out, err) == (2, "", "fusednorm bench: --device: torch sees no GPU 'cuda' here\n")


def test_hostile_arguments_of_a_process():
    done = run("bench", "--shape", "64x64", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fusednorm bench: --shape: expected two to five integers, but got '64x64'\n"


def test_an_unknown_command_and_none(called):
    status, out, err = called("bnech")
    assert (status, out) == (2, "") and err.startswith("fusednorm: ") and "'bnech'" in err and err.count("\n") == 1
    status, out, _ = called("")
    assert status == 0 and all(name in out for name in ("info", "doctor", "bench", "report"))
    assert called("--version") == (0, f"{fusednorm.__version__}\n", "")


@pytest.mark.parametrize("command", ["info", "doctor", "bench", "report"])
def test_help_has_examples_and_names_every_key_of_the_json(called, nets, command):
    arguments = {"bench": ["--shape", "16,4", "--no-compile", *TINY], "report": [f"{nets}:row"]}.get(command, [])
    _, told, _ = called(command, "--help")
    assert "examples:\n  " in told and f"fusednorm {command}" in told and "exit status: 0" in told
    _, facts = facts_of(called(command, *arguments, "--json"))
    assert all(key in told for key in set(facts) - {"command"})


# ---- at a terminal ---------------------------------------------------------------------------------------------------
COLUMNS = pytest.mark.parametrize("columns", [80, 100])


@COLUMNS
@pytest.mark.parametrize("command", ["info", "doctor", "--help", "bench --help", "report --help"])
def test_lines_fit_the_terminal(columns, command):
    pytest.importorskip("pyte")
    session = Session(columns, command)
    assert session.status == 0
    assert 40 < session.widest <= columns
    assert len(session.lines) > 5


@COLUMNS
def test_bench_at_a_terminal(columns):
    """A bar while it measures, and no trace of it behind."""
    pytest.importorskip("pyte")
    pytest.importorskip("rich")
    session = Session(columns, "bench --shape 64,8,16,16 --act relu --p 0.1 --no-compile", *TINY)
    assert session.status == 0
    assert b"Timing" in session.written and b"Preparing" in session.written
    shown = "\n".join(session.lines)
    assert "Timing" not in shown and "Preparing" not in shown
    assert session.lines[0].startswith("FusedBatchNorm2d(8, ReLU(), Dropout(p=0.1")
    assert session.widest <= columns and not session.cursor_hidden


@COLUMNS
def test_report_at_a_terminal(columns, tmp_path):
    """A reason that is longer than the line goes on behind its beginning."""
    pytest.importorskip("pyte")
    (tmp_path / "of_here.py").write_text(NETS)
    session = Session(columns, "report", "of_here:Own", cwd=tmp_path, env=environment(tmp_path))
    assert session.status == 0 and session.widest <= columns
    assert "outside nn.Sequential only an example shows who calls it" in " ".join(" ".join(session.lines).split())


@pytest.mark.parametrize("width", [10, 40, 80])
def test_wrapping_loses_nothing(width):
    text = "norm-act-drop with layer1.0.relu, layer1.0.drop: a/path/that/has/no/end and the rest of it"
    for front in ("", "  ", "a name       "):
        lines = output.wrapped(front, text, width).splitlines()
        assert max(map(len, lines)) <= width
        assert "".join("".join(lines).split()) == "".join((front + text).split())
