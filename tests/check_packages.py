"""Installs what `make wheel` and `make sdist` have put into dist/ as a user would: `make packages` runs this.

Each goes into a fresh environment that has torch and nothing else of ours, is imported from another folder, trains a
step, and has a command line that finds all well. The wheel does so from an index page and without a compiler, and
refuses another torch. The source distribution first runs tests of its own where it was unpacked, which compiles it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import torch

TRAIN = """
import re
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
# Two OpenMP runtimes in a process have two pools of threads, which fight for the cores.
with open("/proc/self/maps") as maps:
    runtimes = {{line.split()[-1] for line in maps if re.search(r"/lib(gomp|i?omp)[^/]*[.]so", line)}}
assert len(runtimes) == 1, f"OpenMP runtimes in this process: {{runtimes}}"
"""
OTHER_TORCH = "9.9.9"
BUILDERS = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])  # with a compiler and ninja
ROOT = Path(__file__).resolve().parents[1]


def attempt(*command, cwd, path):
    """The finished process; it had none of our variables, and pip knew no place but those that it was given."""
    command = [str(part) for part in command]
    variables = {"PATH": str(path), "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=variables)


def run(*command, cwd, path=BUILDERS):
    """The command's output."""
    done = attempt(*command, cwd=cwd, path=path)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def environment(folder):
    """The python of a new virtual environment, and where its packages are."""
    venv.create(folder, with_pip=True)
    return folder / "bin/python", Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))


def fresh_environment(folder):
    """The python of a new virtual environment that finds torch, and the build tools, where they are here."""
    python, own = environment(folder)
    # Python 3.11 puts an old one there, which would hide the one that torch requires.
    run(python, "-m", "pip", "uninstall", "--yes", "setuptools", cwd=folder)
    (own / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


def other_torch(folder):
    """The python of a new virtual environment with a torch that no package of ours is built for."""
    python, own = environment(folder)
    (own / "torch.py").write_text(f"__version__ = {OTHER_TORCH!r}\n")
    told = own / f"torch-{OTHER_TORCH}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OTHER_TORCH}\n")
    return python


def trains(python, elsewhere, **where):
    """Trains a step with what is installed, from the folder `elsewhere`; the installed version."""
    run(python, "-c", TRAIN.format(environment=str(python.parents[1])), cwd=elsewhere, **where)
    script = python.with_name("fusednorm")
    run(script, "doctor", cwd=elsewhere, **where)
    run(script, "bench", "--shape", "32,8", "--seconds", "0.1", "--no-compile", cwd=elsewhere, **where)
    asked = "from importlib.metadata import version as v; print(v('fusednorm'))"
    version = run(python, "-c", asked, cwd=elsewhere, **where).strip()
    told = f"+torch{torch.__version__.replace('+', '.')}"
    assert version.endswith(told), f"version {version} does not end with {told}"
    return version


def check_wheel(wheel, folder, elsewhere):
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == ["fusednorm/_ops.so"], f"a wheel of ours holds no other's library, but {libraries}"
    alone = folder / "page"  # where pip finds no source distribution instead
    alone.mkdir()
    shutil.copy(wheel, alone)
    run(sys.executable, ROOT / "tools" / "index.py", alone, cwd=elsewhere)
    from_page = ["-m", "pip", "install", "--no-index", "--find-links", alone / "index.html", "fusednorm"]

    python = fresh_environment(folder / "of-wheel")
    bare = {"path": python.parent}  # of all programs, those of the environment
    found = [name for name in ("cc", "c++", "gcc", "g++", "clang", "ninja") if shutil.which(name, path=python.parent)]
    assert not found, f"{python.parent} has {found}"
    run(python, *from_page, cwd=elsewhere, **bare)
    version = trains(python, elsewhere, **bare)
    assert version in wheel.name, f"{wheel.name} does not tell version {version}"
    run(python, "-m", "fusednorm", "info", cwd=elsewhere, **bare)
    print(f"  {wheel.name}: installed from a page without a compiler, imported, trained a step")

    python = other_torch(folder / "of-other-torch")
    done = attempt(python, *from_page, cwd=elsewhere, path=python.parent)
    assert done.returncode and "torch==" in done.stderr, f"pip took a wheel for another torch:\n{done.stderr}"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=elsewhere, path=python.parent)
    done = attempt(python, "-c", "import fusednorm", cwd=elsewhere, path=python.parent)
    said = done.stderr.strip().splitlines()[-1]
    wanted = f"fusednorm was built for torch {torch.__version__} but torch {OTHER_TORCH} is running; rebuild with `"
    assert wanted in said, f"under another torch the import ends with: {said}"
    print(f"  {wheel.name}: for another torch pip takes no wheel, and the import says how to build one")


def check_sdist(sdist, folder, elsewhere):
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    python = fresh_environment(folder / "of-sdist")
    told = run("make", "test", f"PYTHON={python}", "VENV=", "ARGS=-k TestBatchNorm", cwd=unpacked)
    passed = re.search(r"(\d+) passed", told)
    assert passed, f"no test of the source distribution ran:\n{told[-2000:]}"
    print(f"  {sdist.name}: compiled, {passed[1]} of its own tests passed")
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", unpacked]
    run(python, *install, cwd=elsewhere)
    trains(python, elsewhere)
    print(f"  {sdist.name}: installed, imported and trained")


def only(folder, pattern):
    found = list(folder.glob(pattern))
    assert len(found) == 1, f"expected one {pattern} in {folder}, but got {[p.name for p in found]}"
    return found[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dist", type=Path)
    parser.add_argument("--wheel-only", action="store_true")
    arguments = parser.parse_args()
    dist = arguments.dist.resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        check_wheel(only(dist, "*.whl"), folder, elsewhere)
        if not arguments.wheel_only:
            check_sdist(only(dist, "*.tar.gz"), folder, elsewhere)


if __name__ == "__main__":
    main()
