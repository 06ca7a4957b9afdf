"""`torch.compile(model, backend="fusednorm")`: the graph that is captured, with its batch norms as fused calls.

What torch.compile captures has functional calls and additions in it as well as modules, so it finds more than
:func:`fuse` does, and changes nothing of the model. What is not fused runs as it is, or goes on to another compiler.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .measure import SMALL, check_small
from .report import Report

if TYPE_CHECKING:
    from torch.fx import GraphModule


def backend(
    gm: "GraphModule", inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """A backend of torch.compile, by the name of "fusednorm" where the package is installed.

    Batch norm, activation, dropout and addition become one call wherever each value between them has one reader and
    their shapes and dtypes are equal, in every order that :func:`fusednorm.functional.batch_norm_act_drop` has. Guards,
    graph breaks and recompilations are those of `backend="eager"`.

    Args:
        options: of `torch.compile(..., options=...)`:
            "inner": what compiles the graph then, a backend's name or function; "eager" (default) runs it as it is.
            Evaluation without noise is left to others than that, which fuse it with its neighbours.
            "report": a :class:`fusednorm.convert.Report`, to which the batch norms of each graph are added.
            "small": as in :func:`fuse`, where "inner" is "eager"; otherwise everything is fused.

    Raises:
        ValueError: another option, or a `mode`, which is the inner compiler's.
        TypeError: a report that is none.
    """
    from torch._dynamo.backends.registry import lookup_backend

    from . import graph_chains  # slow to import, as torch.fx's symbolic shapes are

    inner, report, small = _checked(dict(options or {}), mode)
    rows = graph_chains.fuse_graphs(gm, small if inner == "eager" else "always", evaluation=inner == "eager")
    if report is not None:
        report.add(rows)
    compile_inner: Any = lookup_backend(inner)
    return compile_inner(gm, inputs)  # type: ignore[no-any-return]


def _checked(options: dict[str, Any], mode: Any) -> tuple[Any, Report | None, str]:
    inner, report, small = options.pop("inner", "eager"), options.pop("report", None), options.pop("small", SMALL)
    if mode is not None:
        raise ValueError(f"mode: expected None, as modes are the inner compiler's, but got {mode!r}")
    if options:
        raise ValueError(f"options: expected 'inner', 'report' and 'small', but got {', '.join(map(repr, options))}")
    if report is not None and not isinstance(report, Report):
        raise TypeError(f"options['report']: expected a fusednorm.convert.Report, but got {type(report).__name__}")
    if not isinstance(inner, str) and not callable(inner):
        raise TypeError(f"options['inner']: expected a backend's name or function, but got {inner!r}")
    return inner, report, check_small(small, "options['small']")
