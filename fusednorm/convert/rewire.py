"""Fused layers into the places of BatchNorms, and back.

Where an activation or a dropout stood, an nn.Identity stays, so that keys, names, order and lengths are the stock
model's; it remembers whose stage it stands for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checkpoints, modules, noises
from . import foreign
from .chains import NORMS, Chain

_MARK = "_fusednorm_stage"  # of a slot: the layers whose stage it stands for, and "act" or "drop"


def places(model: nn.Module, child: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parent that has the child, and its name there."""
    return [(parent, name) for parent in model.modules() for name, c in parent._modules.items() if c is child]


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts `new` wherever `old` stands; the model, which is `new` if it was `old`."""
    for parent, name in places(model, old):
        setattr(parent, name, new)
    return new if model is old else model


def fused_class(norm: nn.Module) -> Any:
    """Of the layers, the one that extends the class of `norm`, which is one of NORMS."""
    return getattr(modules, f"FusedBatchNorm{NORMS[type(norm)]}")


def layer_of(norm: nn.Module, stages: dict[str, Any], order: str) -> nn.Module:
    """A fused layer, which shares the parameters of `norm` and has the stages as children.

    Raises:
        ValueError, TypeError: the layer's own, for a norm that it cannot be made of.
    """
    if foreign.is_whole(norm):
        return foreign.fused(norm)
    layer: nn.Module = fused_class(norm).from_torch(norm, **stages, order=order)
    return layer


def fuse_chain(model: nn.Module, chain: Chain) -> tuple[nn.Module, nn.Module, Callable[[], None]]:
    """The chain as one layer in the model: the model, the layer, and a function that takes it back.

    Raises:
        ValueError, TypeError: the layer's own, for a norm that it cannot be made of; nothing has changed then.
    """
    layer = layer_of(chain.norm, {stage.kind: stage.module for stage in chain.stages}, chain.order)
    keys, order = list(model.state_dict()), list(map(id, model.parameters()))
    homes = places(model, chain.norm)
    renamed: list[Any] = []

    def undo() -> None:
        for handle in renamed:
            handle.remove()
        for parent, name in homes:
            setattr(parent, name, chain.norm)
        for stage in chain.stages:
            setattr(stage.place[0], stage.place[1], stage.module)

    changed = replace(model, chain.norm, layer)
    for stage in chain.stages:
        slot = stage.place[0]._modules[stage.place[1]]
        if slot is None or _MARK not in slot.__dict__:  # as it has, where several norms share the stage
            slot = nn.Identity().train(stage.module.training)
            slot.__dict__[_MARK] = []
            setattr(stage.place[0], stage.place[1], slot)
        slot.__dict__[_MARK].append((layer, stage.kind))
        if next(stage.module.parameters(), None) is not None:
            near = [name for parent, name in homes if parent is stage.place[0]]
            if len(homes) != 1 or not near:
                undo()
                raise ValueError(f"{type(stage.module).__name__} has a weight, and stands in another module")
            renamed += checkpoints.rename_keys(stage.place[0], f"{near[0]}.{stage.kind}.", f"{stage.place[1]}.")
    if list(changed.state_dict()) != keys or list(map(id, changed.parameters())) != order:
        undo()
        raise ValueError("the order of the model's parameters would change, by which optimizers go")
    return changed, layer, undo


def unfuse(model: nn.Module) -> nn.Module:
    """The stock modules back in their places, of layers that :func:`fuse` made and of those built by hand.

    Parameters and buffers stay the same objects. A checkpoint of the fused model loads into what comes out, strictly,
    and for layers that `fuse` made, or that stand in an nn.Sequential with an nn.Identity for each stage, its own keys
    are the stock model's. Any other layer with an activation or a dropout becomes a module that holds its stages.

    Args:
        model: is changed, and is what is returned, unless it is a fused layer itself.

    Raises:
        ValueError: a layer that has no stock counterpart yet, as of its `to_torch`; nothing has changed then.
    """
    stand_ins = [(module, original) for module in model.modules() if (original := foreign.was(module)) is not None]
    inside = {id(module) for stand_in, _ in stand_ins for module in stand_in.modules()}
    layers: list[Any] = [m for m in model.modules() if isinstance(m, modules._FusedBatchNorm) and id(m) not in inside]
    for layer in layers:
        layer.to_torch()  # raises before anything has changed
    for stand_in, original in stand_ins:
        model = replace(model, stand_in, original)
    for module in model.modules():
        if type(module) is noises.Dropout:
            module.__class__ = nn.Dropout  # type: ignore[assignment]
    slots = {
        (id(layer), kind): (parent, name)
        for parent in model.modules()
        for name, slot in parent._modules.items()
        if slot is not None
        for layer, kind in slot.__dict__.get(_MARK, ())
    }
    for layer in layers:
        free = _free_slots(model, layer)
        for kind in ("act", "drop"):
            stage = getattr(layer, kind)
            place = slots.get((id(layer), kind)) or free.get(kind)
            if stage is not None and place is not None:
                _forget_keys(place[0], place[1])
                setattr(layer, kind, None)
                setattr(place[0], place[1], stage)
        model = replace(model, layer, _stock(layer))
    model.__dict__.pop("fusednorm_report", None)
    return model


def _free_slots(model: nn.Module, layer: Any) -> dict[str, tuple[nn.Module, str]]:
    """For the stages of a layer that somebody put into an nn.Sequential: the nn.Identity left of each."""
    homes = places(model, layer)
    if len(homes) != 1 or type(homes[0][0]) is not nn.Sequential:
        return {}
    parent, name = homes[0]
    names = list(parent._modules)
    at, stages = names.index(name), layer.order.split("-")
    norm = stages.index("norm")
    found = {}
    for step, way in ((-1, stages[:norm][::-1]), (1, stages[norm + 1 :])):
        i = at + step
        for kind in way:
            if getattr(layer, kind, None) is None:
                continue
            slot = parent._modules[names[i]] if 0 <= i < len(names) else None
            if type(slot) is not nn.Identity or _MARK in slot.__dict__:
                break
            found[kind] = parent, names[i]
            i += step
    return found


def _forget_keys(parent: nn.Module, slot: str) -> None:
    """Ends what `keep_act_keys` began for this slot."""
    for hooks in (parent._state_dict_hooks, parent._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            inner: Any = getattr(hook, "hook", hook)
            ours = isinstance(inner, partial) and inner.func is checkpoints._rename
            if ours and f"{slot}." in inner.keywords.values():
                del hooks[key]


def _stock(layer: Any) -> nn.Module:
    stock: nn.Module = layer.to_torch()
    if isinstance(stock, nn.Sequential) and len(stock) == 1:
        return stock[0]
    moved = {"": "norm"}  # the layer's own keys, and those of its children, to the names that these have now
    moved |= {kind: kind for kind in ("act", "drop")}
    if isinstance(stock, nn.Sequential):
        by_kind = {"act": layer.act, "drop": layer.drop}
        at = {id(child): name for name, child in stock.named_children()}
        norms = [name for name, child in stock.named_children() if isinstance(child, _BatchNorm)]
        moved = {"": norms[0]} | {kind: at[id(c)] for kind, c in by_kind.items() if c is not None and id(c) in at}
    stock.register_load_state_dict_pre_hook(partial(_load_fused, moved=moved))
    return stock


def _load_fused(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, moved: dict[str, str]) -> None:
    """A fused layer's keys, where a state dict has them, under the names of its stages."""
    own = [key for key in state if key.startswith(prefix)]
    if any(key.startswith(f"{prefix}{moved['']}.") for key in own):
        return  # a state dict of this very module
    for key in own:
        kind, dot, rest = key.removeprefix(prefix).partition(".")
        new = f"{moved[kind]}.{rest}" if dot and kind in moved else f"{moved['']}.{kind}{dot}{rest}"
        state[prefix + new] = state.pop(key)
