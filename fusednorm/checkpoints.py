"""State dicts of a model whose stock layers became fused ones: the keys stay those of the stock model.

A fused layer has the keys of its BatchNorm, and nothing else has any, but for PReLU: its weight moves from the slot
where it stood into the layer. `keep_act_keys` lets the parent write and read it under the old name.
"""

from collections.abc import MutableMapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def keep_act_keys(parent: nn.Module, layer: str, slot: str) -> None:
    """Keeps the state dict's keys of an activation that moved from `parent.slot` into the fused `parent.layer`.

    From now on `parent.state_dict()` has `slot.weight` where it had `layer.act.weight`, and loads either. Optimizers go
    by the order of parameters: an activation behind the norm keeps its place, one ahead of it comes behind the norm::

        net[1] = FusedBatchNorm2d.from_torch(net[1], act=net[2])   # net[2] is an nn.PReLU
        net[2] = nn.Identity()
        fusednorm.keep_act_keys(net, "1", "2")

    Args:
        parent: the module that holds both, for instance an nn.Sequential.
        layer: the name in it of the fused layer.
        slot: the name where the activation stood, and now an nn.Identity stands.

    Raises:
        ValueError: `parent` has no such children, or `layer` no activation.
    """
    children = dict(parent.named_children())
    for argument, name in (("layer", layer), ("slot", slot)):
        if name not in children:
            raise ValueError(
                f"{argument}: expected the name of a child, one of {', '.join(children)}, but got {name!r}"
            )
    if not isinstance(getattr(children[layer], "act", None), nn.Module):
        raise ValueError(f"layer: expected a fused layer with an activation, but {layer!r} has none")
    rename_keys(parent, f"{layer}.act.", f"{slot}.")


def rename_keys(parent: nn.Module, new: str, old: str) -> list[RemovableHandle]:
    """Keys that begin with `new` are called `old` in state dicts; the handles end that."""
    return [
        parent.register_state_dict_post_hook(partial(_rename, begin=new, to=old)),
        parent.register_load_state_dict_pre_hook(partial(_rename, begin=old, to=new)),
    ]


def _rename(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any, begin: str, to: str) -> None:
    begin, to = prefix + begin, prefix + to
    if any(key.startswith(begin) for key in state):
        for key in list(state):  # all of them, so that their order stays
            value = state.pop(key)
            state[to + key.removeprefix(begin) if key.startswith(begin) else key] = value
