"""Running statistics of batches whose number of values is a tensor: of rows that count, or of several processes."""

from typing import Any

import torch
from torch import Tensor

from . import _operators


def values(u: Tensor, valid: Tensor | None) -> Tensor:
    """How many values of a channel of `u` (N, C, ...) are in rows (N, 1, ...) that count, as a float64 scalar."""
    if valid is None:
        return u.new_full((), u.numel() // max(u.size(1), 1), dtype=torch.float64)
    return valid.sum(dtype=torch.float64)


def update(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    counts: Tensor,
    momentum: float | None,
) -> None:
    """torch's running statistics; none of a batch without a value.

    Args:
        mean, var: (C,), or (G, C) of groups that follow one another; the biased variance.
        counts: of the values that they are of, (G,) or a scalar, float64.
        momentum: None for the plain average of all batches, as counted by `batches`.
    """
    _operators.update_stats_(running_mean, running_var, batches, mean, var, 0, 0, momentum, counts)


def update_in_torch(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
) -> None:
    """The same of one group by torch's operations, for programs that leave the process."""
    factor: Any = momentum
    if batches is not None:
        batches.add_(1)
        if momentum is None:
            factor = 1 / batches.double()
    factor = factor * (count > 0).double()
    unbiased = var.double() * (count / (count - 1).clamp_min(1))
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(running.double() * (1 - factor) + batch.double() * factor)
