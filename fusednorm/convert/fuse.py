"""`fuse`: the BatchNorms of a model, with what stands around them, as fused layers."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from .. import modules
from .chains import NORMS, Chain, find, is_leaf
from .record import observe, study
from .report import Report, Row
from .rewire import fuse_chain

Pick: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


def fuse(
    model: nn.Module, example: Any = None, *, include: Pick = None, exclude: Pick = None, inplace: bool = False
) -> nn.Module:
    """A model's BatchNorms as fused layers, with the activations and dropouts around them where these can come along.

    Modules that follow one another in an nn.Sequential are found without an example. With one, a forward is observed,
    and modules called from a module's own code are found, too. A chain is fused where each tensor in it has one use.
    The keys of state dicts, the order of parameters, names and lengths stay; parameters and buffers are shared with
    the stock modules in the model that is changed. :func:`unfuse` is the way back.

    Args:
        model: any module. It is copied, unless `inplace`.
        example: an input of the model, a tuple of its arguments, or a dict of its keywords. One forward runs without
            gradients, in the modes that the model is in; then buffers, modes and random generators are as before.
        include: names of BatchNorms, as in `named_modules()`, with "*" and "?"; or a function of name and module. None:
            all.
        exclude: those not to touch, in the same way.
        inplace: change `model` itself.

    Returns:
        The model. Its `fusednorm_report` says of each BatchNorm what became of it, and why.

    Raises:
        TypeError: `model` is no module, is scripted or compiled; `include` or `exclude` is neither.
        ValueError: `model` is lazy, and has seen no input yet.
        What the model raises with `example`; it is unchanged then.
    """
    wanted = _picker("include", include, True), _picker("exclude", exclude, False)
    model, names, record = study(model, example, inplace, is_leaf)
    norms = [module for module in model.modules() if type(module) in NORMS]
    picked = [m for m in norms if wanted[0](names[id(m)], m) and not wanted[1](names[id(m)], m)]
    # What the model had before, so that nothing here hangs on the modules that are about to move.
    rows = {id(m): Row(names[id(m)], m.order) for m in model.modules() if isinstance(m, modules._FusedBatchNorm)} | {
        id(m): Row(names[id(m)], None, (), "left out as asked") for m in norms
    }
    done: list[tuple[Chain, nn.Module, Callable[[], None]]] = []
    for chain in find(record, picked):
        name = names[id(chain.norm)]
        if not record.calls_of(chain.norm):
            where = "outside nn.Sequential only an example shows who calls it" if example is None else "not called"
            rows[id(chain.norm)] = Row(name, None, (), where)
            continue
        try:
            model, layer, undo = fuse_chain(model, chain)
        except (TypeError, ValueError) as error:
            rows[id(chain.norm)] = Row(name, None, (), str(error))
            continue
        done.append((chain, layer, undo))
        taken = tuple(f"{names[id(s.place[0])]}.{s.place[1]}".lstrip(".") for s in chain.stages)
        rows[id(chain.norm)] = Row(name, chain.order, taken, chain.reason)
    if example is not None:
        _take_back_strays(model, example, done, rows)
    model.fusednorm_report = Report(list(rows.values()))  # type: ignore[assignment]
    return model


def _picker(argument: str, pick: Pick, nothing: bool) -> Callable[[str, nn.Module], bool]:
    if pick is None:
        return lambda name, module: nothing
    if callable(pick):
        return pick
    patterns = [pick] if isinstance(pick, str) else list(pick) if isinstance(pick, Iterable) else [pick]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument}: expected names, a function of name and module, or None, but got {pick!r}")
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def _take_back_strays(
    model: nn.Module, example: Any, done: list[tuple[Chain, nn.Module, Callable[[], None]]], rows: dict[int, Row]
) -> None:
    """A forward of the fused model has to call each layer, where the model has no other reference to its norm."""
    try:
        record, failure = observe(model, example, is_leaf), None
    except Exception as error:  # of the model: it looked at what it calls
        record, failure = None, f"the model's own code fails with it: {error}"
    for chain, layer, undo in reversed(done):
        if record is None or not record.calls_of(layer):
            undo()
            reason = failure or "the model calls it by a reference of its own"
            rows[id(chain.norm)] = Row(rows[id(chain.norm)].name, None, (), reason)
