"""Who is timed: the stock layers run eagerly, the same under torch.compile, and the fused layer.

All three start from the same parameters. torch.compile runs with fullgraph=True, so that it can never fall back to
eager in silence and be timed as something that it is not. Orders and noises meet a fourth: the fused layer in its
default order, with Bernoulli noise.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

import fusednorm
from benchmarks.workloads import CENSUS, FAMILY, Workload
from fusednorm._children import make_act

PROVIDERS = ("eager", "compile", "fused")


def _dimension(workload: Workload) -> int:
    return max(len(workload.shape) - 2, 1)


class Noise(nn.Module):
    """What people write for noises that torch has no module for."""

    def __init__(self, kind: str, p: float, granularity: str):
        super().__init__()
        self.kind, self.p, self.granularity = kind, p, granularity

    def forward(self, x):
        if not self.training:
            return x
        kept = {"element": x.dim(), "channel": 2, "sample": 1}[self.granularity]
        m = x.new_empty([*x.shape[:kept], *[1] * (x.dim() - kept)])
        if self.kind == "bernoulli":
            m = m.bernoulli_(1 - self.p).div_(1 - self.p)
        elif self.kind == "uniform":
            m = m.uniform_(1 - self.p, 1 + self.p)
        else:
            m = m.normal_(1, math.sqrt(self.p))
        return x * m


class Stages(nn.Module):
    """The stock layers one after the other, with an addition among them, in place where a model has it so."""

    def __init__(self, order: str, modules: dict[str, nn.Module], inplace: bool):
        super().__init__()
        self.order, self.inplace = order.split("-"), inplace
        for stage in self.order:
            if stage != "add":
                self.add_module(stage, modules[stage])

    def forward(self, x, residual=None):
        for stage in self.order:
            if stage != "add":
                x = getattr(self, stage)(x)
            elif self.inplace:
                x += residual
            else:
                x = x + residual
        return x


class Alone(nn.Module):
    """The noise without a norm, by the functional."""

    def __init__(self, kind: str, p: float, granularity: str):
        super().__init__()
        self.p, self.chain = p, {"noise": kind, "granularity": granularity}

    def forward(self, x, seed=None):
        return fusednorm.functional.dropout(x, self.p, self.training, **self.chain, seed=seed)


def _drop(workload: Workload, p: float) -> nn.Module:
    if workload.noise == "bernoulli" and workload.granularity == "channel":
        return getattr(nn, f"Dropout{_dimension(workload)}d")(p)
    if workload.noise == "bernoulli" and workload.granularity == "element":
        return nn.Dropout(p)
    return Noise(workload.noise, p, workload.granularity)


def _fused_drop(workload: Workload, p: float) -> nn.Module:
    if workload.noise == "uniform":
        return fusednorm.UniformDropout(p, workload.granularity)
    if workload.noise == "gaussian":
        return fusednorm.GaussianDropout(p, workload.granularity)
    return fusednorm.DropPath(p) if workload.granularity == "sample" else _drop(workload, p)


def _act(workload: Workload) -> nn.Module:
    act = make_act(workload.act)  # torch's own module
    # Ahead of the norm it would write to the input, which here is a leaf.
    if "act" in workload.inplace and workload.order.index("act") > workload.order.index("norm"):
        act.inplace = True
    return act


def eager(workload: Workload, p: float) -> nn.Module:
    if workload.order == "drop":
        return _drop(workload, p)
    stages = {"norm": getattr(nn, f"BatchNorm{_dimension(workload)}d")(workload.channels, **workload.norm)}
    if workload.act is not None:
        stages["act"] = _act(workload)
    stages["drop"] = _drop(workload, p)
    if workload.adds:
        return Stages(workload.order, stages, "add" in workload.inplace)
    return nn.Sequential(*(stages[stage] for stage in workload.order.split("-") if stage in stages))


def fused(workload: Workload, p: float) -> nn.Module:
    if workload.order == "drop":
        return Alone(workload.noise, p, workload.granularity)
    layer = getattr(fusednorm, f"FusedBatchNorm{_dimension(workload)}d")
    drop = _fused_drop(workload, p) if "drop" in workload.order else None
    return layer(workload.channels, **workload.norm, act=workload.act, drop=drop, order=workload.order)


def compiled(workload: Workload, p: float, **how) -> nn.Module:
    return torch.compile(eager(workload, p), fullgraph=True, dynamic=False, **how)


def default(workload: Workload, p: float) -> nn.Module:
    names = "act", "order", "noise", "granularity"
    return fused(replace(workload, **{name: getattr(FAMILY[0], name) for name in names}), FAMILY[0].p)


def providers_of(workload: Workload) -> tuple[str, ...]:
    if workload in CENSUS:
        return "eager", "fused"  # hundreds of graphs take too long to compile
    return (*PROVIDERS, "default") if workload in FAMILY else PROVIDERS


BUILDERS = {"eager": eager, "compile": compiled, "fused": fused, "default": default}


def build(provider: str, workload: Workload, p: float, device="cpu") -> nn.Module:
    """The layer in training mode, with affine parameters away from 1 and 0 and equal for every provider."""
    module = BUILDERS[provider](workload, p)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter, low in zip(module.parameters(), (0.5, -0.5), strict=False):  # weight, bias
            parameter.uniform_(low, low + 1, generator=generator)
    return module.to(device).train()
