"""`report`: what `fusednorm.fuse` would do to a model of the user's, BatchNorm by BatchNorm, and what that saves."""

import argparse
import copy
import importlib
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _library
from ..convert import fuse
from ..convert.report import Report
from .output import Failed, Line, Outcome, Refused, first_line
from .saved import saved_bytes


def run(asked: argparse.Namespace) -> Outcome:
    torch.manual_seed(0)
    model = _model(asked.factory)
    dtype = getattr(torch, asked.dtype or "float32")
    if asked.dtype and dtype.is_floating_point:
        model = model.to(dtype)
    example = tuple(_tensor(shape, dtype) for shape in asked.example or ())
    try:
        fused = fuse(model, example or None, small=asked.small)
    except (Exception, SystemExit) as error:
        raise Failed(f"{asked.factory}: the model does not run or cannot be fused: {_where(error)}") from error
    report: Any = fused.fusednorm_report
    kept, why = _kept(model, fused, example)
    facts = {
        "model": asked.factory,
        "norms": len(report.rows),
        "fused": len(report.fused),
        **report.to_dict(),
        "orders": dict(Counter(row.order for row in report.fused)),
        "reasons": dict(Counter(row.reason for row in report.rows if row.reason)),
        "kept_bytes": kept,
    }
    facts["summary"] = _summary(report, facts, why)
    return Outcome(0, facts, [*_lines(report), ("", facts["summary"])])


def _lines(report: Report) -> list[Line]:
    return [("  ", row.removeprefix("  ")) for row in str(report).splitlines()[1:]]  # the first is in the summary


def _summary(report: Report, facts: dict[str, Any], why: str) -> str:
    if not report.rows:
        return str(report)
    orders = ", ".join(f"{count} {order}" for order, count in facts["orders"].items())
    text = report.counted + (f" ({orders})" if orders else "")
    left = Counter(row.reason for row in report.rows if row.order is None)
    if left:
        reason, count = left.most_common(1)[0]
        text += f"; {left.total()} left" + (f", {count} of them" if len(left) > 1 else "") + f": {reason}"
    if facts["kept_bytes"]:
        stock, fused = (facts["kept_bytes"][name] / 2**20 for name in ("stock", "fused"))
        return f"{text}; a training step keeps {fused:.1f} MiB for its backward, {stock:.1f} before"
    return f"{text}; {why}"


# ---- the model ------------------------------------------------------------------------------------------------------
def _model(factory: str) -> nn.Module:
    module_name, _, path = factory.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it; a console script has not
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise Refused(f"{factory}: {_where(error)}") from error  # what it imports itself
        raise Refused(f"{factory}: there is no module {error.name} here, nor installed") from error
    except (Exception, SystemExit) as error:  # a script leaves where its arguments are not ours
        raise Refused(f"{factory}: {_where(error)}") from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise Refused(f"{factory}: {getattr(found, '__name__', 'it')} has no {name}") from error
        except Exception as error:
            raise Refused(f"{factory}: {_where(error)}") from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise Refused(f"{factory}: expected a factory or a module, but got {type(found).__name__}")
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise Refused(f"{factory}: {_where(error)}") from error
    if not isinstance(found, nn.Module):
        raise Refused(f"{factory}: expected it to give a torch.nn.Module, but got {type(found).__name__}")
    return found


def _where(error: BaseException) -> str:
    """The error in a line, with the last place on the way there that is neither torch's nor ours: it is the user's."""
    libraries = [str(Path(file).parent) for file in (torch.__file__, _library.__file__)] + ["<frozen"]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(tuple(libraries))]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Integers are indices, as a rule, and 0 and 1 are indices of anything.
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(2, shape, dtype=dtype)


def _kept(model: nn.Module, fused: nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[dict[str, int] | None, str]:
    """What a training forward of either keeps for its backward, in bytes; None and why that is not known."""
    if not example:
        return None, "what is kept for backward takes an --example"
    try:
        # Copies, as a forward moves running statistics, and both are to begin alike.
        both = {"stock": model, "fused": fused}
        return {name: saved_bytes(copy.deepcopy(m).train(), *example) for name, m in both.items()}, ""
    except (Exception, SystemExit) as error:
        return None, f"what is kept for backward is not known, as training fails with this example: {first_line(error)}"
