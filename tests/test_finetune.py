"""The example of a conversion, from end to end, in a small setting."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "finetune.py"
NEEDED = "torchvision", "sklearn", "onnxscript", "onnxruntime", "matplotlib", "rich"
# Not importorskip: where torchvision is built for another torch, its import needs the example's help.
MISSING = [module for module in NEEDED if importlib.util.find_spec(module) is None]

pytestmark = pytest.mark.cpu


def run(folder):
    command = [sys.executable, SCRIPT, "--out", folder, "--epochs", "1", "--size", "32", "--samples", "200"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_there_and_back(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # How many are fused hangs on what fuse finds faster at this size.
    assert "of 20 BatchNorms fused" in done.stdout and "20 of 20 BatchNorms folded" in done.stdout
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(MISSING != ["torchvision"], reason="needs all but torchvision")
def test_without_torchvision(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1
    assert "not installed here: torchvision" in done.stderr and "Traceback" not in done.stderr
