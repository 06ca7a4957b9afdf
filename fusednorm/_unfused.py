"""The way back: a fused layer as stock modules, and small ones in plain torch for what stock has none for."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _plain, reference
from .functional import ghost_batches
from .noises import Dropout, _Noise


class AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of (N, C) to (N, C, D, H, W), as an ICLayer is."""

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")


class TorchNoise(nn.Module):
    """`UniformDropout`, `GaussianDropout` or `DropPath` by torch's own generators.

    Args:
        kind: "uniform", "gaussian" or "bernoulli".
        strength: beta, alpha or p.
        granularity: a draw per "element", "channel" or "sample".

    Shape: as that of the noise.
    """

    def __init__(self, kind: str, strength: float, granularity: str) -> None:
        super().__init__()
        self.kind, self.strength, self.granularity = kind, strength, granularity

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.strength == 0:
            return input
        return _plain.stock_noise(input, self.strength, self.kind, self.granularity)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.strength}, granularity={self.granularity!r}"


class Stages(nn.Module):
    """A BatchNorm, an activation and a dropout called one by one in any order, with an addition between them.

    Args:
        norm, act, drop: modules; the last two may be None.
        order, ghost_batch_size, even_ghost_batches, eval_matched_stats: as in :class:`fusednorm.FusedBatchNorm1d`.

    Shape: that of `norm`; a residual is what `+` takes.
    """

    def __init__(
        self,
        norm: nn.modules.batchnorm._BatchNorm,
        act: nn.Module | None,
        drop: nn.Module | None,
        order: str,
        ghost_batch_size: int | None = None,
        even_ghost_batches: bool = False,
        eval_matched_stats: bool = False,
    ) -> None:
        super().__init__()
        self.norm, self.act, self.drop, self.order = norm, act, drop, order
        self.ghost_batch_size, self.even_ghost_batches = ghost_batch_size, even_ghost_batches
        self.eval_matched_stats = eval_matched_stats

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        before, after = reference.parse_order(self.order)
        v = self._normalise(input, before)
        for stage in after:
            child = None if stage == "add" else getattr(self, stage)
            v = v + residual if stage == "add" else v if child is None else child(v)  # type: ignore[operator]
        return v

    def _normalise(self, input: Tensor, before: Iterable[str]) -> Tensor:
        cut = input.size(0), self.ghost_batch_size, self.even_ghost_batches, math.prod(input.shape[2:])
        groups = ghost_batches(*cut) if self.norm.training else None
        u = self._prologue(input, before, noise=True)
        if not (self.eval_matched_stats and self.norm.training and self.drop is not None and self.drop.training):
            return _joined([self.norm(group) for group in reference.ghosts(u, groups)])
        for group in reference.ghosts(self._prologue(input, before, noise=False), groups):
            self.norm(group)  # for its running statistics
        weight, bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        normed = [F.batch_norm(g, None, None, weight, bias, True, 0.0, eps) for g in reference.ghosts(u, groups)]
        return _joined(normed)

    def _prologue(self, v: Tensor, stages: Iterable[str], noise: bool) -> Tensor:
        for stage in stages:
            child = getattr(self, stage)
            if child is not None and (noise or stage == "act"):
                v = child(v.clone() if getattr(child, "inplace", False) else v)
        return v

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


def _joined(groups: list[Tensor]) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def torch_noise(noise: _Noise) -> TorchNoise:
    """The :class:`TorchNoise` of one of this package's noises."""
    return TorchNoise(noise.kind, noise.strength, noise.granularity).train(noise.training)


def unfused(
    norm: nn.modules.batchnorm._BatchNorm,
    act: nn.Module | None,
    drop: nn.Module | None,
    order: str,
    ghost_batch_size: int | None,
    even_ghost_batches: bool,
    eval_matched_stats: bool,
) -> nn.Module:
    """`nn.Sequential` of the modules where that says it all, else :class:`Stages`."""
    drop = torch_noise(drop) if isinstance(drop, _Noise) else drop.to_torch() if isinstance(drop, Dropout) else drop
    children: dict[str, Any] = {"norm": norm, "act": act, "drop": drop}
    names = order.split("-")
    module: nn.Module
    if "add" in names or ghost_batch_size or eval_matched_stats:
        module = Stages(norm, act, drop, order, ghost_batch_size, even_ghost_batches, eval_matched_stats)
    else:
        stages = [children[name] for name in names if children[name] is not None]
        ahead = stages[: stages.index(norm)]
        if any(getattr(child, "inplace", False) for child in ahead):  # it would write the caller's tensor
            module = Stages(norm, act, drop, order)
        else:
            module = nn.Sequential(*stages)
    module.training = norm.training
    return module
