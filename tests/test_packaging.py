"""What packages are named, hold and say; `make packages` builds, installs and uses them."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fusednorm

ROOT = Path(__file__).resolve().parents[1]
TOLD = f"+torch{torch.__version__.replace('+', '.')}"
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


def setup(*arguments, cwd=ROOT, **variables):
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=True
    ).stdout


def test_a_build_is_named_after_its_torch():
    assert setup("--version").strip().splitlines()[-1] == fusednorm.__version__ + TOLD


def test_the_source_distribution_holds_all_that_building_and_testing_needs(tmp_path):
    setup("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    archive = tmp_path / f"fusednorm-{fusednorm.__version__}.tar.gz"  # compiled for no torch yet
    with tarfile.open(archive) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = [
        p for folder in ("csrc", "tests", "benchmarks", "examples", "fusednorm") for p in (ROOT / folder).rglob("*")
    ]
    needed = {str(p.relative_to(ROOT)) for p in needed if p.is_file()}
    built = {p for p in needed if re.search(r"__pycache__|\.so$|_built_for\.py$", p)}
    assert needed - held == built
    assert {"Makefile", "setup.py", "pyproject.toml", "requirements-dev.txt", "LICENSE", "README.md"} <= held
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", ".pre-commit-config.yaml"} <= held
    assert {".github/ISSUE_TEMPLATE/bug.yml", "docs/pictures/before-after.svg", "docs/how-it-works.md"} <= held


@pytest.mark.parametrize("place", ["checkout", "installed"])
def test_the_error_for_another_torch_gives_a_command_for_where_the_package_stands(tmp_path, place):
    package = tmp_path / "fusednorm"
    package.mkdir()
    for name in ("_library.py", "__init__.py"):
        (package / name).write_text((ROOT / "fusednorm" / name).read_text())
    (package / "_ops.so").touch()
    (package / "_built_for.py").write_text('TORCH = "1.2.3"\n')
    if place == "checkout":
        (tmp_path / "setup.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "import fusednorm"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(
        f"ImportError: fusednorm was built for torch 1.2.3 but torch {torch.__version__} is running"
    )
    wanted = f"-e {tmp_path}`" if place == "checkout" else "--no-cache-dir --no-binary=fusednorm fusednorm`"
    assert "pip install --no-build-isolation" in error and error.endswith(wanted)
