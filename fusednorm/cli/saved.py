"""What a training step keeps for its backward, counted in bytes of tensors by autograd's own hooks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def vectors(channels: int) -> Callable[[Tensor], bool]:
    """Selects per-channel vectors and scalars (statistics, the seed): nothing beside the activations, not counted."""
    return lambda tensor: tensor.numel() <= channels and sum(size != 1 for size in tensor.shape) <= 1


def saved_bytes(module: nn.Module, *inputs: Any, ignore: Callable[[Tensor], bool] = lambda tensor: False) -> int:
    """Bytes that one training forward keeps for its backward.

    Storages are counted once, whole; the input counts when it is saved; parameters and buffers do not, nor `ignore`.
    """
    owned = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and not ignore(tensor):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Alive until the sum is taken: a freed block could come back as another tensor's and count once for two.
        output = module(*inputs)
    total = sum(kept.values())
    del output
    return total
