"""The command line as a whole: where there is no library, wrong arguments, help, and what a terminal shows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from terminal import PACKAGE, SCRIPT, TINY, Session, environment, facts_of, run

import fusednorm
from fusednorm.cli import output

pytestmark = pytest.mark.cpu


# ---- info ------------------------------------------------------------------------------------------------------------
def test_info_says_the_same_to_people_and_to_programs():
    told, (status, facts) = run("info"), facts_of(run("info --json"))
    assert told.returncode == status == 0
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
    script.write_text(SCRIPT)
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
    status, out, err = called("bench --shape 8,4 --device cuda")
    assert (status, out, err) == (2, "", "fusednorm bench: --device: torch sees no GPU 'cuda' here\n")


def test_hostile_arguments_of_a_process():
    done = run("bench --shape 64x64 --json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fusednorm bench: --shape: expected two to five integers, but got '64x64'\n"


def test_an_unknown_command_and_none(called):
    status, out, err = called("bnech")
    assert (status, out) == (2, "") and err.startswith("fusednorm: ") and "'bnech'" in err and err.count("\n") == 1
    status, out, _ = called("")
    assert status == 0 and all(name in out for name in ("info", "doctor", "bench", "report"))
    assert called("--version") == (0, f"{fusednorm.__version__}\n", "")


@pytest.mark.parametrize("command", ["info", "doctor", "bench", "report"])
def test_help_has_examples_and_names_every_key_of_the_json(called, command):
    arguments = {"bench": ["--shape", "16,4", "--no-compile", *TINY], "report": ["torch.nn:Identity"]}.get(command, [])
    _, told, _ = called(f"{command} --help")
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


@pytest.mark.parametrize("width", [10, 40, 80])
def test_wrapping_loses_nothing(width):
    text = "norm-act-drop with layer1.0.relu, layer1.0.drop: a/path/that/has/no/end and the rest of it"
    for front in ("", "  ", "a name       "):
        lines = output.wrapped(front, text, width).splitlines()
        assert max(map(len, lines)) <= width
        assert "".join("".join(lines).split()) == "".join((front + text).split())


@pytest.mark.parametrize(
    "broken", ["OSError('libcublas.so.12: cannot open')", "RuntimeError('no')", "ImportError('no')"]
)
def test_info_of_a_torch_that_is_broken(tmp_path, broken):
    (tmp_path / "torch.py").write_text(f"raise {broken}\n")
    done = run("info", env=environment(tmp_path))
    assert done.returncode == 1 and "which does not import here" in done.stdout and not done.stderr


def test_who_reads_no_further_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m fusednorm info | true", shell=True, env=environment(), capture_output=True, text=True
    )
    assert not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_result_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fusednorm", "info"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
    assert done.returncode == 1 and done.stderr.startswith("fusednorm info: the result cannot be written: ")
    assert done.stderr.count("\n") == 1
