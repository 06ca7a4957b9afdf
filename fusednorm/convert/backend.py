"""`torch.compile(model, backend="fusednorm")`: the graph that is captured, with its batch norms as fused calls.

What torch.compile captures has functional calls and additions in it as well as modules, so it finds more than
:func:`fuse` does, and changes nothing of the model. What is not fused runs as it is, or goes on to another compiler.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .measure import SMALL, Small, check_small
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
            "report": a function that is called with the :class:`fusednorm.convert.Report` of each graph, as `print`, or
            as the `add` of a Report that collects them.
            "small": as in :func:`fuse`, where "inner" is "eager"; otherwise everything is fused.
            "dropouts": as in :func:`fuse`; calls of `torch.nn.functional.dropout` are meant as well.

    Raises:
        ValueError: another option, or a `mode`, which is the inner compiler's.
        TypeError: a "report" that is no function, an "inner" that is neither.
    """
    from torch._dynamo.backends.registry import lookup_backend

    from . import graph_fuse  # slow to import, as torch.fx's symbolic shapes are

    inner, report, small, dropouts = _checked(dict(options or {}), mode)
    eager = inner == "eager"
    found = graph_fuse.fuse_graphs(gm, small if eager else "always", dropouts, evaluation=eager)
    if report is not None:
        report(found)
    compile_inner: Any = lookup_backend(inner)
    compiled = compile_inner(gm, inputs)
    # Where torch compiles ahead of time, it is an object that can be stored, and has to come back as that.
    roomy = eager and found.fused and inspect.ismethod(compiled)
    return _with_room(compiled, len(gm.graph.nodes)) if roomy else compiled


def _with_room(function: Callable[..., Any], variables: int) -> Callable[..., Any]:
    """A function of so many variables, and a piece of Python's stack that holds them and what it calls.

    Where a piece ends, a call maps a new one and unmaps it: 20 us, each time that it is made from there
    (python/cpython#142183, mended in later releases only). Fused calls go some functions deep.
    """

    def call(*inputs: Any) -> Any:
        return function(*inputs)

    # A frame that fits into no ordinary piece gets one of twice its size or more.
    call.__code__ = call.__code__.replace(co_stacksize=2 ** (variables + 1024).bit_length())
    return call


def _checked(options: dict[str, Any], mode: Any) -> tuple[Any, Callable[[Report], Any] | None, Small, bool]:
    inner, report = options.pop("inner", "eager"), options.pop("report", None)
    small, dropouts = options.pop("small", SMALL), options.pop("dropouts", False)
    if mode is not None:
        raise ValueError(f"mode: expected None, as modes are the inner compiler's, but got {mode!r}")
    if options:
        others = ", ".join(map(repr, options))
        raise ValueError(f"options: expected 'inner', 'report', 'small' and 'dropouts', but got {others}")
    if report is not None and not callable(report):
        raise TypeError(f"options['report']: expected a function, but got {type(report).__name__}")
    if not isinstance(inner, str) and not callable(inner):
        raise TypeError(f"options['inner']: expected a backend's name or function, but got {inner!r}")
    return inner, report, check_small(small, "options['small']"), bool(dropouts)
