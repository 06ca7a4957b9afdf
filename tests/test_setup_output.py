"""What set-up says: each step once, nothing of the compiler's unless it fails or V=1 asks; in a terminal one line."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import written

ROOT = Path(__file__).resolve().parents[1]
QUIET = ROOT / "tools" / "quiet.py"
NINJA = """
rule compile
  command = echo warning: harmless && {then} -c -c $in -o $out
build good.o: compile csrc/good.cpp
build {name}.o: compile csrc/{name}.cpp
"""
pytestmark = pytest.mark.skipif(not QUIET.exists(), reason="not a source tree")


@pytest.fixture
def build(tmp_path):
    """A command that does as setup.py does: a word of its own, then ninja as torch calls it, on stand-in compilers."""
    pytest.importorskip("ninja")

    def make(then="true", name="other"):
        (tmp_path / "csrc").mkdir()
        for source in ("good", name):
            (tmp_path / "csrc" / f"{source}.cpp").touch()
        (tmp_path / "build.ninja").write_text(NINJA.format(then=then, name=name))
        script = "import os, ninja, subprocess, sys; print('fusednorm: decided', flush=True); "
        script += "sys.exit(subprocess.call([os.path.join(ninja.BIN_DIR, 'ninja'), '-v', '-j1']))"
        return [sys.executable, "-c", script]

    return make


def quiet(command, cwd, **variables):
    env = os.environ | {"V": ""} | variables
    return subprocess.run([sys.executable, QUIET, *command], cwd=cwd, env=env, capture_output=True, text=True)


def test_a_build_that_succeeds_is_a_line_for_each_step(build, tmp_path):
    done = quiet(build(), tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.splitlines() == [
        "fusednorm: decided",
        "    [1/2] csrc/good.cpp",
        "    [2/2] csrc/other.cpp",
    ]


def test_a_compiler_that_fails_is_heard_and_its_status_kept(build, tmp_path):
    done = quiet(build("echo bad.cpp:1: error: no such thing && exit 3", "bad"), tmp_path)
    assert done.returncode != 0
    assert "bad.cpp:1: error: no such thing" in done.stdout and "FAILED" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"==> Failed with status {done.returncode}: ")
    assert quiet([sys.executable, "-c", "raise SystemExit(7)"], tmp_path).returncode == 7


def test_everything_is_said_with_v(build, tmp_path):
    done = quiet(build(), tmp_path, V="1")
    assert done.returncode == 0
    assert done.stdout.count("warning: harmless\n") == 2 and "-c -c csrc/good.cpp -o good.o" in done.stdout


def test_a_terminal_has_one_line_that_is_rewritten(build, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, QUIET, *build()]
    child = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"V": "", "COLUMNS": "60"}, stdout=theirs)
    os.close(theirs)
    said = b"".join(written(ours))
    assert child.wait() == 0
    rows = said.decode().replace("\r\n", "\n").split("\n")
    assert rows[0].endswith("fusednorm: decided")
    (row,) = rows[1:]  # no line break behind it
    pictures = [text for text in row.split("\r\x1b[2K") if text]
    seen = [re.sub(r" \(\d+ s\)$", "", text.strip()) for text in pictures]
    assert [text for text in seen if text.startswith("[")] == ["[1/2] csrc/good.cpp", "[2/2] csrc/other.cpp"]
    assert row.endswith("\r\x1b[2K")  # nothing stays behind
    assert all(len(text) < 60 for text in pictures)


def test_lines_of_other_programs_are_no_steps(tmp_path):
    lines = "Collecting torch\n  Downloading torch.whl\n"
    done = quiet([sys.executable, "-c", f"print({lines!r}, end='')"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
