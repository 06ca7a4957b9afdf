"""Modules of other packages that are a norm and more, known by their names: none of those packages is imported.

Each becomes a module of its own, with the same keys in a state dict, which remembers what it stands for.
"""

from typing import Any

from torch import nn

from .. import modules

_WAS = "_fusednorm_was"  # of a module that stands for another: that one, in a tuple, so that it is no child
_HOOKS = [name for name in modules._CONTAINERS if "hook" in name]


def _named(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def _norm_act(module: Any) -> nn.Module:
    """timm's BatchNormAct2d, which is a BatchNorm2d with a dropout and an activation behind it."""
    norm = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    norm.__dict__.update(module.__dict__)
    norm.__dict__ |= {"_modules": {}} | {name: {} for name in _HOOKS}
    act, drop = module.act, module.drop
    drop = None if type(drop) is nn.Identity else drop
    layer = modules.FusedBatchNorm2d.from_torch(norm, act=act, drop=drop, order="norm-drop-act")
    # They see what the module takes and gives, as before.
    layer.__dict__ |= {name: module.__dict__[name].copy() for name in _HOOKS}
    return layer


def _norm_act_again(layer: Any, module: Any) -> None:
    nothing = nn.Identity().train(layer.training)
    module._modules = {"drop": nothing if layer.drop is None else layer.drop, "act": layer.act}
    module.__dict__ |= {name: layer.__dict__[name] for name in _HOOKS}
    _hand_over(layer, module)


def _ghost(module: Any) -> nn.Module:
    """TabNet's GBN, which calls its norm on one chunk of the batch after the other."""
    options = {"ghost_batch_size": module.virtual_batch_size, "even_ghost_batches": True}
    layer = modules.FusedBatchNorm1d.from_torch(module.bn, **options)
    row = nn.Sequential().train(module.training)
    row.add_module("bn", layer)
    row.__dict__ |= {name: module.__dict__[name].copy() for name in _HOOKS}
    return row


def _ghost_again(row: Any, module: Any) -> None:
    module.__dict__ |= {name: row.__dict__[name] for name in _HOOKS}
    module.training = row.training
    _hand_over(row.bn, module.bn)


def _hand_over(layer: Any, norm: Any) -> None:
    """Parameters, buffers and mode."""
    norm._parameters, norm._buffers, norm.training = layer._parameters, layer._buffers, layer.training


_WHOLE = {
    ("timm.layers.norm_act", "BatchNormAct2d"): (_norm_act, _norm_act_again),
    ("pytorch_tabnet.tab_network", "GBN"): (_ghost, _ghost_again),
}
# Modules that do nothing but call the norm in them: its name there.
_AROUND = {("torch_geometric.nn.norm.batch_norm", "BatchNorm"): "module"}


def is_whole(module: Any) -> bool:
    """Whether a module is a norm and more."""
    return _named(module) in _WHOLE and "forward" not in module.__dict__


def inner_norm(module: Any) -> str | None:
    """The name of the norm in a module that does nothing but call it."""
    return _AROUND.get(_named(module))


def fused(module: nn.Module) -> nn.Module:
    """What stands for a module that is a norm and more.

    Raises:
        ValueError: from `from_torch`, of its norm.
    """
    stand_in = _WHOLE[_named(module)][0](module)
    stand_in.__dict__[_WAS] = (module,)
    return stand_in


def opened(norm: nn.Module) -> nn.Module:
    """A norm as a BatchNorm or a fused layer, of the same parameters and buffers."""
    if not is_whole(norm):
        return norm
    return next(m for m in fused(norm).modules() if isinstance(m, modules._FusedBatchNorm))


def was(module: nn.Module) -> nn.Module | None:
    """The module that `module` stands for, as it has to be now."""
    (original,) = module.__dict__.get(_WAS, (None,))
    if original is not None:
        _WHOLE[_named(original)][1](module, original)
    return original  # type: ignore[no-any-return]
