"""What the operators' library tells of itself by plain C names (csrc/cpu/hooks.h): how it was built, and its kernels.

For `python -m fusednorm info`, benchmarks and tests. Through ctypes, so that no part of the package is for one Python.
"""

import ctypes
import functools
import importlib
from typing import Any

from . import _library

# Of channels-first calls on CUDA: as the library decides, never resident, resident wherever it fits.
RESIDENCIES = ("automatic", "never", "always")


@functools.cache
def library() -> ctypes.CDLL:
    """The library that torch has loaded. ImportError where it cannot be: `_library.load` checks before it loads."""
    _library.load()
    hooks = ctypes.CDLL(str(_library.ops_path))
    for name in ("fusednorm_cpu_level", "fusednorm_cpu_levels_compiled", "fusednorm_compiler"):
        getattr(hooks, name).restype = ctypes.c_char_p
    return hooks


def level() -> str:
    """The CPU level in use: default, avx2 or avx512."""
    return str(library().fusednorm_cpu_level().decode())


def build_info() -> dict[str, Any]:
    """torch's version, compiler, C++ standard, OpenMP's date, CPU levels; nvcc's CUDA (or None) and architectures."""
    hooks = library()
    try:
        record = vars(importlib.import_module("._built_for", __package__))
    except ImportError:  # the library was put here by other means than setup.py
        record = {}
    return {
        "torch": record.get("TORCH"),
        "compiler": hooks.fusednorm_compiler().decode(),
        "cxx_standard": hooks.fusednorm_cxx_standard(),
        "openmp": hooks.fusednorm_openmp(),
        "levels": hooks.fusednorm_cpu_levels_compiled().decode().split(","),
        "cuda": record.get("CUDA"),
        "cuda_architectures": list(record.get("CUDA_ARCHITECTURES", ())),
    }


def set_residency(name: str) -> bool:
    """Which kernels channels-first calls on CUDA get, one of RESIDENCIES; False in a build without CUDA."""
    choice = RESIDENCIES.index(name)
    try:
        library().fusednorm_cuda_set_residency(choice)
    except AttributeError:
        return False
    return True
