"""Rows of a batch that count, as users say it: a mask, lengths of padded samples, or weights.

A row is a place of a sample, with a value in every channel: one of N * S. What does not count is not looked at, and
zero in the output. Weights give values a share in the statistics, as sample weights give them one in a loss; those of 0
and 1 are a mask.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _plain, reference
from ._operators import Chain


def resolve(input: Tensor, mask: Any, lengths: Any, weights: Any) -> tuple[Tensor | None, Tensor | None]:
    """(valid, weights) of shape (N, ...) without C; None where all rows count, and count alike.

    Raises:
        ValueError: lengths beside one of the others, one of another shape or device, lengths beyond the last axis,
            negative weights, or some that require a gradient.
        TypeError: one of another dtype or kind.
    """
    given = [name for name, value in (("mask", mask), ("lengths", lengths), ("weights", weights)) if value is not None]
    if len(given) > 1 and given != ["mask", "weights"]:
        raise ValueError(f"{given[0]}: expected None beside {given[1]}; a mask can say what lengths do")
    valid = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a tensor of bool, True where rows count, but got {got}")
        valid = _by_row("mask", mask, input)
    elif lengths is not None:
        valid = _of_lengths(lengths, input)
    if weights is None:
        return valid, None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: expected a floating-point tensor, but got {got}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("weights: expected a tensor that requires no gradient, as statistics have none for them")
    weights = _by_row("weights", weights, input)
    if _can_look(weights) and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("weights: expected finite values of 0 or more")
    counting = weights > 0
    return counting if valid is None else valid & counting, weights


def _by_row(name: str, rows: Tensor, input: Tensor) -> Tensor:
    """(N,), (N, ...) or (N, 1, ...) as (N, ...), dense."""
    own = (input.shape[0], *input.shape[2:])
    if rows.device != input.device:
        raise ValueError(f"{name}: expected a tensor on {input.device}, but got one on {rows.device}")
    if rows.shape == (own[0], 1, *own[1:]) and rows.dim() == input.dim():
        rows = rows.squeeze(1)
    elif rows.dim() == 1 and rows.shape[0] == own[0]:
        rows = rows.reshape(-1, *[1] * (len(own) - 1)).expand(own)
    if rows.shape != own:
        raise ValueError(
            f"{name}: expected shape {list(own)}, {list(own[:1])} or {[own[0], 1, *own[1:]]} for an input of "
            f"{list(input.shape)}, but got {list(rows.shape)}"
        )
    return rows.contiguous()


def _of_lengths(lengths: Any, input: Tensor) -> Tensor:
    if input.dim() < 3:
        raise ValueError(f"lengths: expected None for an input of shape {list(input.shape)}, which has no length")
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Sequence) or isinstance(lengths, str):
            raise TypeError(f"lengths: expected integers, one for each sample, but got {type(lengths).__name__}")
        if not all(isinstance(length, numbers.Integral) for length in lengths):
            raise TypeError(f"lengths: expected integers, but got {lengths!r}")
        lengths = torch.tensor(lengths, dtype=torch.int64, device=input.device)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, but got {lengths.dtype}")
    N, L = input.shape[0], input.shape[-1]
    if lengths.shape != (N,):
        raise ValueError(f"lengths: expected shape {[N]}, one for each sample, but got {list(lengths.shape)}")
    if lengths.device != input.device:
        raise ValueError(f"lengths: expected a tensor on {input.device}, but got one on {lengths.device}")
    if _can_look(lengths) and bool(((lengths < 0) | (lengths > L)).any()):
        raise ValueError(f"lengths: expected numbers from 0 to {L}, but got {lengths.tolist()}")
    counts: Tensor = torch.arange(L, device=input.device) < lengths.reshape(-1, *[1] * (input.dim() - 2))
    return counts.expand(N, *input.shape[2:]).contiguous()


def _can_look(values: Tensor) -> bool:
    """Whether looking at values waits for no device, and leaves no trace in a graph."""
    return values.is_cpu and type(values) is Tensor and not torch.compiler.is_compiling() and _plain.why_plain() is None


def weighted(
    input: Tensor, act_weight: Tensor | None, valid: Tensor, weights: Tensor, chain: Chain, strength: Any, seed: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, var, count) of what enters the norm, differentiable; the count is the effective one, (sum w)^2 / sum w^2.

    It is what makes the variance unbiased for weights that say how reliable a value is (Kish 1965), and the number of
    rows for those of 0 and 1.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError("weights: expected None in forward mode, as the statistics carry tangents")
    m = _plain.multiplier_ahead(input, seed, chain, strength)
    u = _plain.entering((input, *[None] * 5, act_weight), chain, valid, m)
    weights = torch.where(valid, weights, 0).double()
    weights = weights / weights.amax().clamp_min(torch.finfo(torch.float64).tiny) if weights.numel() else weights
    mean, var = reference.moments(u, _plain.rows_of(weights))
    count = weights.sum().square() / weights.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return mean, var, count
