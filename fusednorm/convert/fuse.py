"""`fuse`: the BatchNorms of a model, with what stands around them, as fused layers."""

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from .. import _children, modules, noises
from .chains import Chain, find, is_leaf, kind, order_of, outermost
from .compare import differ
from .measure import SMALL, Small, check_small, why_not
from .record import Call, Record, observe
from .report import Report, Row
from .rewire import fuse_chain, layer_of
from .study import study

Done: TypeAlias = tuple[Chain, nn.Module, Callable[[], None]]  # a chain, its layer, and the way back
Pick: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


def fuse(
    model: nn.Module,
    example: Any = None,
    *,
    include: Pick = None,
    exclude: Pick = None,
    inplace: bool = False,
    small: Small = SMALL,
    dropouts: bool = False,
) -> nn.Module:
    """A model's BatchNorms as fused layers, with the activations and dropouts around them where these can come along.

    Modules that follow one another in an nn.Sequential are found without an example. With one, a forward is observed,
    and modules called from a module's own code are found, too. A chain is fused where each tensor in it has one use,
    and all is as it was where the fused model gives anything else with the example, training or evaluated.
    The keys of state dicts, the order of parameters, names and lengths stay; parameters and buffers are shared with
    the stock modules in the model that is changed. :func:`unfuse` is the way back.

    Args:
        model: any module. It is copied, unless `inplace`.
        example: an input of the model, a tuple of its arguments, or a dict of its keywords; best of the sizes that it
            will see. Some forwards run, in the modes that the model is in and in the other one, without gradients and
            noise. Then buffers, modes, random generators and what modules keep are as before; parameters that a
            forward writes are not. Without one, nn.Sequentials are taken to be called, and not looked into.
        include: names of BatchNorms, as in `named_modules()`, with "*" and "?"; or a function of name and module. None:
            all.
        exclude: those not to touch, in the same way.
        inplace: change `model` itself.
        small: what becomes of a chain whose tensor in the example has at most 2^20 values, where a call's fixed cost
            counts. "measure": it is timed, for some milliseconds, once for each kind and shape, and left as it is where
            stock is faster; "always": it is fused; "never": it is left.
        dropouts: make a :class:`fusednorm.Dropout` of each nn.Dropout that is in no chain, too.

    Returns:
        The model. Its `fusednorm_report` says of each BatchNorm what became of it, and why.

    Raises:
        TypeError: `model` is no module, is scripted or compiled; `include` or `exclude` is neither.
        ValueError: `model` is lazy, and has seen no input yet; `small` is none of these.
        What the model raises with `example`, which does not ask for gradients; it is unchanged then.
        What `copy.deepcopy` raises, as for the old `weight_norm`: convert such a model `inplace`.
    """
    wanted = _picker("include", include, True), _picker("exclude", exclude, False)
    check_small(small)
    model, names, record = study(model, example, inplace, is_leaf)
    norms = [m for m in outermost(model) if kind(m) in ("norm", "whole")]
    picked = [m for m in norms if wanted[0](names[id(m)], m) and not wanted[1](names[id(m)], m)]
    # What the model had before, so that nothing here hangs on the modules that are about to move.
    rows = {id(m): Row(names[id(m)], m.order) for m in model.modules() if isinstance(m, modules._FusedBatchNorm)} | {
        id(m): Row(names[id(m)], None, (), "left out as asked") for m in norms
    }
    again = None if example is None else partial(observe, example=example, is_leaf=is_leaf)
    other = None if again is None or not picked else _other_mode(again, model)
    original, left = model, dict[int, str]()
    while True:  # with less and less, as what cannot be fused may leave its neighbours' stages with other readers
        chains = find(record, [norm for norm in picked if id(norm) not in left])
        refused = {
            id(c.norm): why for c in chains if (why := _why_not(c, record, example is None, small, model.training))
        }
        done: list[Done] = []
        if not refused:
            model, done, refused = _fused(model, chains)
        if not refused and again is not None and done:
            refused = _found_wrong(again, model, done, record, other)
        if not refused:
            break
        for _, _, undo in reversed(done):
            undo()
        model, left = original, left | refused
    rows |= {norm: Row(rows[norm].name, None, (), reason) for norm, reason in left.items()}
    for chain, layer, _ in done:
        taken = tuple(f"{names[id(s.place[0])]}.{s.place[1]}".lstrip(".") for s in chain.stages)
        order = chain.order if taken else order_of(layer)
        rows[id(chain.norm)] = Row(names[id(chain.norm)], order, taken, chain.reason)
    swapped = [names[id(m)] for m in _lone_dropouts(model)] if dropouts else []
    model.fusednorm_report = Report(rows.values(), swapped)  # type: ignore[assignment]
    return model


def _why_not(chain: Chain, record: Record, blind: bool, small: Small, training: bool) -> str | None:
    """The reason to leave a chain alone, before anything is tried."""
    calls = record.calls_of(chain.norm)
    if calls:
        return _too_small(chain, calls[0], small, training)
    return None if blind and kind(chain.norm) == "whole" else record.uncalled


def _too_small(chain: Chain, call: Call, small: Small, training: bool) -> str | None:
    stock = [*(s.module for s in chain.before), chain.norm, *(s.module for s in chain.after)]
    if call.likes is None or not all(map(_children._is_plain, stock)):  # hooks are not to see what is tried here
        return None

    def make() -> tuple[Any, Any, list[Tensor]]:
        parts = dict(zip(chain.order.split("-"), map(copy.deepcopy, stock), strict=True))
        row = nn.Sequential(*parts.values())
        layer = layer_of(parts.pop("norm"), parts, chain.order)
        writes = bool(chain.before) and getattr(row[0], "inplace", False)
        weights = [weight for weight in row.parameters() if weight.requires_grad and training]

        def called(module: nn.Module) -> Callable[..., Any]:
            return lambda x, *_: module(x.clone() if writes else x)

        return called(row), called(layer), [like.filled(training), *weights]

    like = call.likes[0]
    return why_not(small, (repr(stock), *(m.training for m in stock)), like, training, make)


def _lone_dropouts(model: nn.Module) -> list[nn.Module]:
    """Makes a Dropout of this package of each nn.Dropout outside the fused layers; these modules."""
    inside = {id(m) for layer in model.modules() if isinstance(layer, modules._FusedBatchNorm) for m in layer.modules()}
    found: list[nn.Module] = [
        m for m in model.modules() if type(m) is nn.Dropout and id(m) not in inside and not m.inplace
    ]
    for module in found:
        module.__class__ = noises.Dropout
    return found


def _picker(argument: str, pick: Pick, nothing: bool) -> Callable[[str, nn.Module], bool]:
    if pick is None:
        return lambda name, module: nothing
    if callable(pick):
        return pick
    patterns = [pick] if isinstance(pick, str) else list(pick) if isinstance(pick, Iterable) else [pick]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument}: expected names, a function of name and module, or None, but got {pick!r}")
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def _fused(model: nn.Module, chains: list[Chain]) -> tuple[nn.Module, list[Done], dict[int, str]]:
    """The model with layers for all the chains, what was done to it, and the norm that this did not do for."""
    done: list[Done] = []
    for chain in chains:
        try:
            model, layer, undo = fuse_chain(model, chain)
        except (TypeError, ValueError) as error:
            return model, done, {id(chain.norm): str(error)}
        (fused,) = (m for m in layer.modules() if isinstance(m, modules._FusedBatchNorm))
        done.append((chain, fused, undo))
    return model, done, {}


# ---- is it still the same model? -------------------------------------------------------------------------------------
def _other_mode(again: Callable[..., Record], model: nn.Module) -> Record | None:
    """What the model does in the other mode, None if that is not for this example."""
    try:
        return again(model, other_mode=True)
    except Exception:  # of the model
        return None


def _found_wrong(
    again: Callable[..., Record], model: nn.Module, done: list[Done], stock: Record, other: Record | None
) -> dict[int, str]:
    """The norms of which forwards of the fused model show that they are not to be fused, and why."""
    everyone = [chain for chain, _, _ in done]
    try:
        record = again(model)
        strays = [chain for chain, layer, _ in done if not record.calls_of(layer)]
        twice = [chain for chain in everyone if any(record.calls_of(stage.module) for stage in chain.stages)]
        if strays or twice:
            elsewhere = "the model calls it, or a stage of it, by a reference of its own"
            return {id(chain.norm): elsewhere for chain in strays + twice}
        wrong = _differ(stock, record) or (other is not None and _differ(other, again(model, other_mode=True)))
    except Exception as error:  # of the model: it looked at what it calls
        return {id(chain.norm): f"the model's own code fails with {_all(everyone)}: {error}" for chain in everyone}
    return (
        {id(chain.norm): f"the model gives something else with {_all(everyone)}" for chain in everyone} if wrong else {}
    )


def _all(chains: list[Chain]) -> str:
    return "it" if len(chains) == 1 else "it and others"  # and which of them is to blame cannot be told


def _differ(stock: Record, fused: Record) -> bool:
    return differ([*stock.values, *stock.buffers], [*fused.values, *fused.buffers])
