"""A model whose BatchNorm layers share the statistics of several processes."""

from typing import Any

from torch import nn

from ..modules import _FusedBatchNorm
from .chains import NORMS
from .rewire import fused_class


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, for CPUs too, and in place: all its BatchNorms.

    Fused layers get the `process_group`; torch's become fused ones, which share their parameters, buffers and hooks, so
    optimizers and state dicts stay valid. SyncBatchNorm, lazy layers and subclasses with behaviour of their own stay as
    they are, and layers with ghost batches, whose statistics are those of a part of a batch by intent.

    Args:
        module: a model, or a layer.
        process_group: of :mod:`torch.distributed`; None: all processes.

    Returns:
        `module`, or the layer in its place if it is a BatchNorm itself.

    Raises:
        TypeError: `module` is no module.
        ValueError: a BatchNorm that `from_torch` does not take, with attributes or a forward of its own; another string
            than "world". Nothing is converted then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, but got {type(module).__name__}")
    group = "world" if process_group is None else process_group
    if isinstance(group, str) and group != "world":
        raise ValueError(f"process_group: expected a group of torch.distributed, 'world' or None, but got {group!r}")
    parents = list(module.modules())
    fused = {m: fused_class(m).from_torch(m, process_group=group) for m in parents if type(m) in NORMS}
    for parent in parents:
        for name, child in list(parent._modules.items()):
            if child in fused:
                setattr(parent, name, fused[child])
        if isinstance(parent, _FusedBatchNorm) and not parent.ghost_batch_size:
            parent.process_group = group
    converted: nn.Module = fused.get(module, module)
    return converted
