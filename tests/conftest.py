import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("fusednorm") is None:
    # An interpreter that only borrows its torch runs the package from the source tree, built in place.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "kernel: depends on the vector level in use; rerun at every level")
    config.addinivalue_line("markers", "slow: takes more than five seconds")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Set the number of threads in a test; the old number comes back after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
