"""Loads the compiled operators, or says in one sentence why they cannot be loaded."""

import functools
import sys
from pathlib import Path

ops_path = Path(__file__).with_name("_ops.so")

_CHECKOUT = ops_path.parents[1] / "setup.py"
# From a checkout, or, where the package stands alone, from the package index. Never from pip's cache: a wheel there was
# built for another torch.
_SOURCE = "--force-reinstall --no-deps --no-cache-dir --no-binary=fusednorm fusednorm"
BUILD = f"python -m pip install --no-build-isolation {f'-e {_CHECKOUT.parent}' if _CHECKOUT.exists() else _SOURCE}"


def built_for() -> str | None:
    """The torch version that the library was compiled against, None if unrecorded."""
    try:
        from ._built_for import TORCH
    except ImportError:
        return None
    return str(TORCH)


@functools.cache
def load() -> None:
    """Makes `torch.ops.fusednorm` available; safe to call any number of times.

    Raises:
        ImportError: torch is missing, or the library is missing, was built for another torch, or does not load.
    """
    try:
        import torch
    except Exception as error:  # OSError where a library of torch's is missing, for one
        raise ImportError(f"fusednorm needs torch, which does not import here ({error})") from error
    if not ops_path.exists():
        raise ImportError(f"fusednorm's operators are not built ({ops_path} is missing); build them with `{BUILD}`")
    # Before loading: a library for another torch may load and crash later, or fail with the name of a mangled symbol.
    running = str(torch.__version__)
    built = built_for()
    if built not in (None, running):
        raise ImportError(
            f"fusednorm was built for torch {built} but torch {running} is running; rebuild with `{BUILD}`"
        )
    try:
        torch.ops.load_library(str(ops_path))
    except OSError as error:
        reason = error.__cause__ or error  # torch's own message names the file only
        raise ImportError(f"fusednorm's operators do not load ({reason}); rebuild them with `{BUILD}`") from error


def reporting() -> bool:
    """Whether the command line is importing the package: it must come up to report that `load` fails."""
    if Path(sys.argv[0]).name == "fusednorm":  # the console script
        return True
    # While runpy imports the package, argv[0] is "-m" and the module's name is still where the interpreter found it.
    return sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "fusednorm"
