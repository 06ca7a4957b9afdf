"""Who is timed: the stock layers run eagerly, the same under torch.compile, and the fused layer.

All three start from the same parameters. torch.compile runs with fullgraph=True, so that it can never fall back to
eager in silence and be timed as something that it is not.
"""

from __future__ import annotations

import torch
from torch import nn

import fusednorm
from benchmarks.workloads import Workload

PROVIDERS = ("eager", "compile", "fused")

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def _dimension(workload: Workload) -> int:
    return max(len(workload.shape) - 2, 1)


def _drop(workload: Workload, p: float) -> nn.Module:
    if workload.granularity == "channel":
        return getattr(nn, f"Dropout{_dimension(workload)}d")(p)
    return nn.Dropout(p)


def eager(workload: Workload, p: float) -> nn.Module:
    layers = [getattr(nn, f"BatchNorm{_dimension(workload)}d")(workload.channels, **workload.norm)]
    if workload.act is not None:
        name, *parameters = workload.act if isinstance(workload.act, tuple) else (workload.act,)
        layers.append(ACTIVATIONS[name](*parameters))
    return nn.Sequential(*layers, _drop(workload, p))


def fused(workload: Workload, p: float) -> nn.Module:
    layer = getattr(fusednorm, f"FusedBatchNorm{_dimension(workload)}d")
    drop = p if workload.granularity == "element" else _drop(workload, p)
    return layer(workload.channels, **workload.norm, act=workload.act, drop=drop)


def compiled(workload: Workload, p: float, **how) -> nn.Module:
    return torch.compile(eager(workload, p), fullgraph=True, dynamic=False, **how)


BUILDERS = {"eager": eager, "compile": compiled, "fused": fused}


def build(provider: str, workload: Workload, p: float, device="cpu") -> nn.Module:
    """The layer in training mode, with affine parameters away from 1 and 0 and equal for every provider."""
    module = BUILDERS[provider](workload, p)
    generator = torch.Generator().manual_seed(2)
    weight, bias = module.parameters()
    with torch.no_grad():
        weight.uniform_(0.5, 1.5, generator=generator)
        bias.uniform_(-0.5, 0.5, generator=generator)
    return module.to(device).train()
