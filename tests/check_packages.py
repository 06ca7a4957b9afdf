"""Installs what `make wheel` and `make sdist` have put into dist/ as a user would: `make packages` runs this.

Each goes into a fresh environment that has torch and nothing else of ours, is imported from another folder, trains a
step, and has a command line that finds all well. The source distribution first runs tests of its own where it was
unpacked, which compiles it.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

import torch

TRAIN = """
import torch, fusednorm
from torch import nn
from fusednorm import FusedBatchNorm1d
assert {environment!r} in fusednorm.__file__, f"imported {{fusednorm.__file__}}, not what was installed"
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), FusedBatchNorm1d(16, act="relu", drop=0.2), nn.Linear(16, 1))
before = [p.detach().clone() for p in net.parameters()]
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
net(torch.randn(32, 8)).square().mean().backward()
optimizer.step()
assert all((p != b).any() for p, b in zip(net.parameters(), before)), "a parameter did not move"
"""


def run(*command, cwd):
    """Its output; with no variables of this process, but for the PATH on which a compiler and ninja are."""
    command = [str(part) for part in command]
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PATH": path})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def fresh_environment(folder):
    """The python of a new virtual environment that finds torch, and the build tools, where they are here."""
    venv.create(folder, with_pip=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "bin/python"


def check(python, package, elsewhere):
    """Installs `package` and trains with it from the folder `elsewhere`."""
    run(python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", package, cwd=elsewhere)
    run(python, "-c", TRAIN.format(environment=str(python.parents[1])), cwd=elsewhere)
    script = python.with_name("fusednorm")
    run(script, "doctor", cwd=elsewhere)
    run(script, "bench", "--shape", "32,8", "--seconds", "0.1", "--no-compile", cwd=elsewhere)
    version = run(python, "-c", "from importlib.metadata import version as v; print(v('fusednorm'))", cwd=elsewhere)
    told = f"+torch{torch.__version__.replace('+', '.')}"
    assert version.strip().endswith(told), f"version {version.strip()} does not end with {told}"
    return version.strip()


def only(folder, pattern):
    found = list(folder.glob(pattern))
    assert len(found) == 1, f"expected one {pattern} in {folder}, but got {[p.name for p in found]}"
    return found[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dist", type=Path)
    dist = parser.parse_args().dist.resolve()
    wheel, sdist = only(dist, "*.whl"), only(dist, "*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        version = check(fresh_environment(folder / "of-wheel"), wheel, elsewhere)
        assert version in wheel.name, f"{wheel.name} does not tell version {version}"
        print(f"  {wheel.name}: installed, imported and trained")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        unpacked = folder / sdist.name.removesuffix(".tar.gz")
        python = fresh_environment(folder / "of-sdist")
        told = run("make", "test", f"PYTHON={python}", "VENV=", "ARGS=-k TestBatchNorm", cwd=unpacked)
        passed = re.search(r"(\d+) passed", told)
        assert passed, f"no test of the source distribution ran:\n{told[-2000:]}"
        print(f"  {sdist.name}: compiled, {passed[1]} of its own tests passed")
        check(python, unpacked, elsewhere)
        print(f"  {sdist.name}: installed, imported and trained")


if __name__ == "__main__":
    main()
