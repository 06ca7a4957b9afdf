import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("fusednorm") is None:
    # An interpreter that only borrows its torch runs the package from the source tree, built in place.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import DEVICE  # noqa: E402  (it imports the package)
from terminal import words  # noqa: E402

from fusednorm import _operators, cli  # noqa: E402

# The compiler's cache on disk knows an operator by its name, and not by the fake kernel that told the sizes of its
# results: graphs compiled with another one must not be found.
_told = hashlib.sha256(Path(_operators.__file__).read_bytes()).hexdigest()[:12]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/fusednorm-inductor-{os.getuid()}-{_told}")

# Tensors in the arguments of parametrize are part of a test's name, which several processes must agree on.
torch.manual_seed(0)

if DEVICE.type != "cpu":
    # At import, so that tensors in the arguments of parametrize are created there too.
    torch.set_default_device(DEVICE)
    # Tests that put a convolution before the layer compare to float32 accuracy.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: about the CPU backend itself; skipped on another device")
    config.addinivalue_line("markers", "kernel: depends on the vector level in use; rerun at every level")
    config.addinivalue_line("markers", "slow: takes more than five seconds")


def pytest_collection_modifyitems(items):
    # Where several processes share the tests, the last ones should be short.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    if DEVICE.type != "cpu":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="about the CPU backend"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Set the number of threads in a test; the old number comes back after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks' modules by name, found in the source tree."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def models_python():
    """An interpreter that has public models: this one, or that of `make models`."""
    if importlib.util.find_spec("torchvision") is not None:
        return sys.executable
    own = Path(__file__).resolve().parent.parent / ".venv-census"
    if not (own / ".models-installed").is_file():
        pytest.skip("public models are not installed: make models does that")
    return str(own / "bin" / "python")


@pytest.fixture
def called(capfd, monkeypatch, threads):
    """Calls the command line in this process, with the words of `command` and then `more`: (status, stdout, stderr)."""

    def call(command, *more):
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            status = cli.main(words(command, *more))
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return call
