"""What packages are named, require, hold and say; `make packages` builds, installs and uses them."""

import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
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


def test_a_build_requires_its_torch(tmp_path):
    setup("egg_info", "--egg-base", str(tmp_path))
    required = (tmp_path / "fusednorm.egg-info" / "requires.txt").read_text().split()
    assert required == [f"torch=={metadata.version('torch')}"]


def tiny_wheel(folder, name, version, requires=None):
    """A wheel of one module that pip installs."""
    info = f"{name}-{version}.dist-info"
    told = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    told += f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", told)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class TestIndex:
    """`pip --find-links` takes the page, and among its wheels the one for the torch that is asked for."""

    @pytest.fixture
    def page(self, tmp_path):
        torches = tmp_path / "torches"
        torches.mkdir()
        dist = tmp_path / "dist"
        dist.mkdir()
        for torch_version in ("2.12.0", "2.13.0", "2.14.0"):
            tiny_wheel(torches, "torch", torch_version)
            if torch_version != "2.14.0":
                tiny_wheel(dist, "fusednorm", f"0.1.0+torch{torch_version}", f"torch=={torch_version}")
        subprocess.run([sys.executable, ROOT / "tools" / "index.py", dist], check=True, capture_output=True)
        return dist / "index.html"

    def download(self, page, *asked):
        command = [sys.executable, "-m", "pip", "download", "--no-index", "--find-links", page, "--find-links"]
        command += [page.parents[1] / "torches", "--dest", page.parents[1] / "got", *asked]
        env = os.environ | {"PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    @pytest.mark.parametrize("torch_version", ["2.12.0", "2.13.0"])
    def test_pip_picks_the_wheel_for_its_torch(self, page, torch_version):
        done = self.download(page, f"torch=={torch_version}", "fusednorm")
        assert done.returncode == 0, done.stderr
        got = {path.name for path in (page.parents[1] / "got").glob("fusednorm*")}
        assert got == {f"fusednorm-0.1.0+torch{torch_version}-py3-none-any.whl"}

    def test_no_wheel_is_taken_for_a_torch_that_has_none(self, page):
        done = self.download(page, "torch==2.14.0", "fusednorm")
        assert done.returncode and "torch==2.13.0" in done.stdout + done.stderr

    def test_the_source_distribution_is_listed(self, page):
        (page.parent / "fusednorm-0.1.0.tar.gz").touch()
        subprocess.run([sys.executable, ROOT / "tools" / "index.py", page.parent], check=True, capture_output=True)
        assert len(re.findall(r'<a href="fusednorm-0.1.0.tar.gz#sha256=[0-9a-f]{64}">', page.read_text())) == 1

    def test_the_hash_is_checked(self, page):
        for wheel in page.parent.glob("*.whl"):
            wheel.write_bytes(wheel.read_bytes() + b"more")
        done = self.download(page, "torch==2.13.0", "fusednorm")
        assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr.upper()


def test_the_matrix_has_every_torch_from_the_oldest_on():
    matrix = runpy.run_path(str(ROOT / "tools" / "matrix.py"))
    said = "torch (2.14.0)\nAvailable versions: 2.14.0, 2.13.0+cpu, 2.13.0, 2.11.0, 2.10.9, 1.13.1\n"
    assert matrix["on_index"](said, matrix["oldest"]()) == ["2.11.0", "2.13.0", "2.13.0+cpu", "2.14.0"]
    with pytest.raises(SystemExit, match="no torch"):
        matrix["on_index"]("", matrix["oldest"]())


def test_the_source_distribution_holds_all_that_building_and_testing_needs(tmp_path):
    setup("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    archive = tmp_path / f"fusednorm-{fusednorm.__version__}.tar.gz"  # compiled for no torch yet
    with tarfile.open(archive) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "tests", "benchmarks", "examples", "fusednorm", "tools")
    needed = [p for folder in folders for p in (ROOT / folder).rglob("*")]
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
