"""The example of a conversion, from end to end, in a small setting."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "finetune.py"

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree")]


def run(python, folder):
    command = [python, SCRIPT, "--out", folder, "--epochs", "1", "--size", "32", "--samples", "200"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_there_and_back(models_python, tmp_path):
    done = run(models_python, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # How many are fused hangs on what fuse finds faster at this size.
    assert "of 20 BatchNorms fused" in done.stdout and "20 of 20 BatchNorms folded" in done.stdout
    assert all("</svg>" in (tmp_path / f"finetune{variant}.svg").read_text() for variant in ("", "-dark"))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_without_torchvision(tmp_path):
    done = run(sys.executable, tmp_path)
    assert done.returncode == 1
    assert "not installed here: torchvision" in done.stderr and "Traceback" not in done.stderr
