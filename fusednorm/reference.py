"""The operator in plain torch, with an explicit noise tensor.

The same formula as the kernels, one line per stage: oracle of the tests, baseline of the benchmarks, and the graph that
double backward differentiates. Imports only torch.
"""

import itertools
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["activation", "batch_norm_act_drop"]

Activation: TypeAlias = str | tuple[str | float | Tensor, ...] | None

# torch.nn.functional twin and default parameters of every activation of csrc/math/activations.h.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "identity": (lambda z: z, ()),
    "relu": (F.relu, ()),
    "leaky_relu": (F.leaky_relu, (0.01,)),
    "elu": (F.elu, (1.0,)),
    "gelu": (F.gelu, ()),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), ()),
    "silu": (F.silu, ()),
    "tanh": (torch.tanh, ()),
    "sigmoid": (torch.sigmoid, ()),
    "hardtanh": (F.hardtanh, (-1.0, 1.0)),
    "relu6": (F.relu6, ()),
    "hardswish": (F.hardswish, ()),
    "mish": (F.mish, ()),
    "softplus": (F.softplus, (1.0, 20.0)),
}
_APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


def resolve_activation(act: Activation) -> tuple[str, tuple[float | Tensor, ...]]:
    """The operator's name and full parameters of `act`: a name, `(name, *parameters)` or None.

    Parameters left out take torch's defaults. `("gelu", "tanh")` is `gelu_tanh`. The parameter of `("prelu", weight)`
    is a tensor of one element or C.

    Raises:
        ValueError: unknown name, too many parameters, one that is not a number, or limits in the wrong order.
    """
    if act is None:
        return "identity", ()
    name: Any  # until it is checked, and so are they
    given: list[Any]
    name, *given = act if isinstance(act, (tuple, list)) and act else (act,)
    if name == "gelu" and len(given) == 1 and isinstance(given[0], str):
        if given[0] not in _APPROXIMATIONS:
            raise ValueError(f"act: expected 'none' or 'tanh' as the approximation of gelu, but got {given[0]!r}")
        return _APPROXIMATIONS[given[0]], ()
    if name == "prelu":
        if len(given) != 1 or not isinstance(given[0], torch.Tensor):
            raise ValueError(f"act: expected ('prelu', weight) with a tensor, but got {act!r}")
        return name, tuple(given)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, prelu, but got {name!r}")
    defaults = ACTIVATIONS[name][1]
    given = [g.item() if isinstance(g, torch.Tensor) and g.numel() == 1 else g for g in given]
    if len(given) > len(defaults) or not all(isinstance(g, numbers.Real) for g in given):
        raise ValueError(f"act: expected at most {len(defaults)} numbers as parameters of {name!r}, but got {given}")
    parameters = tuple(float(g) for g in given) + defaults[len(given) :]
    if name == "hardtanh" and parameters[0] > parameters[1]:
        raise ValueError(f"act: expected min_val of 'hardtanh' to be at most max_val, but got {given}")
    return name, parameters


def activation(name: str, z: Tensor, *parameters: str | float | Tensor) -> Tensor:
    """The torch twin of an activation at the pre-activation `z`."""
    name, parameters = resolve_activation((name, *parameters))
    if name == "prelu":
        return F.prelu(z, parameters[0].to(z.dtype))  # type: ignore[union-attr]  # resolved: a tensor
    return ACTIVATIONS[name][0](z, *parameters)


# Every order -> the stages before the norm, the stages after it.
ORDERS = {
    "-".join(stages): (stages[: stages.index("norm")], stages[stages.index("norm") + 1 :])
    for count in range(1, 5)
    for stages in itertools.permutations(("norm", "act", "drop", "add"), count)
    if "norm" in stages and "add" not in stages[: stages.index("norm")]
}


def parse_order(order: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The stages before and after the norm, as two tuples of "add", "act" and "drop".

    Raises:
        ValueError: an order without "norm", with a stage twice, with "add" before "norm", or with another word.
    """
    if not isinstance(order, str) or order not in ORDERS:
        raise ValueError(
            "order: expected 'norm' and, at most once each, 'act', 'drop' and behind it 'add', joined by '-', "
            f"but got {order!r}"
        )
    return ORDERS[order]


def run_stages(
    stages: Iterable[str],
    v: Tensor,
    act: Activation = None,
    noise: Tensor | Callable[[Tensor], Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`v` (N, C, ...) through activation, noise and addition in the order of `stages`.

    The noise is a multiplier, or a function of `v` that applies one.
    """
    for stage in stages:
        if stage == "act":
            name, parameters = resolve_activation(act)
            v = activation(name, v, *parameters)
        elif stage == "add":
            v = v + residual.to(v.dtype)  # type: ignore[union-attr]  # there is one for "add"
        elif noise is not None:
            v = noise(v) if callable(noise) else v * noise.to(v.dtype)
    return v


def moments(u: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(C,) mean and biased variance of (N, C, ...); each value counts as (N, 1, ...) `weights` say, by 1 without."""
    rows = [0, *range(2, u.dim())]
    if weights is not None:
        weights = weights.double()
        share = (weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)).to(u.dtype)
        mean = (u * share).sum(rows)
        return mean, ((u - per_channel(mean, u)).square() * share).sum(rows)
    if u.numel() == 0:  # NaN without torch's warning, as there is nothing that they are applied to
        return u.mean(rows), u.mean(rows)
    var, mean = torch.var_mean(u, rows, correction=0)
    return mean, var


def ghosts(u: Tensor, size: int | None) -> Sequence[Tensor]:
    """`u` (N, C, ...) in groups of `size` samples; whole where that is None, 0, or N and more."""
    return u.split(size) if size and size < u.size(0) else (u,)


def in_opmath(input: Tensor) -> Tensor:
    """`input` in the type that everything is computed in: float64 for float64, float32 for all others."""
    return input.double() if input.dtype == torch.float64 else input.float()


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), to broadcast against `like` (N, C, ...)."""
    return v.reshape(1, -1, *[1] * (like.dim() - 2))


def batch_norm_act_drop(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: Activation = None,
    order: str = "norm-act-drop",
    residual: Tensor | None = None,
    noise: Tensor | None = None,
    ghost_batch_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch norm with an activation, noise and an addition around it, differentiable any number of times.

    Computes in float32 (float64 for a float64 input) and rounds once, to the input's dtype, as the kernels do. Does not
    update the running statistics; `momentum` is accepted so that the arguments are those of the functional.

    Args:
        input: (N, C, ...), floating point.
        running_mean, running_var: (C,), used when not training.
        weight, bias: (C,) or None.
        act: an activation as :func:`resolve_activation` takes it.
        order: "norm" with "act" and "drop" before or after it and "add" after it, as :func:`parse_order` takes it.
        residual: (N, C, ...) of what "add" adds.
        noise: the multiplier m, broadcastable to `input`; None for none.
        ghost_batch_size: samples that statistics are taken over when training; None for the whole batch.
        mask: (N, 1, ...) bool, the rows that count: others are not in the statistics, and zero in the output. None for
            all.

    Returns:
        (N, C, ...) in the input's dtype.

    Raises:
        ValueError: an order that is none.
    """
    before, after = parse_order(order)
    if training and ghost_batch_size and ghost_batch_size < input.size(0):
        chunks: list[Any] = [
            itertools.repeat(None) if t is None else ghosts(t.expand_as(input), ghost_batch_size)
            for t in (input, residual, noise, mask)
        ]
        return torch.cat(
            [
                batch_norm_act_drop(
                    *(x, None, None, weight, bias, True),
                    **{"eps": eps, "act": act, "order": order, "residual": r, "noise": m},
                    mask=None if rows is None else rows[:, :1],
                )
                for x, r, m, rows in zip(*chunks, strict=False)
            ]
        )
    if mask is not None:  # first, as a NaN there would not stay there
        input, residual = (None if t is None else torch.where(mask, t, 0) for t in (input, residual))  # type: ignore
    u = run_stages(before, in_opmath(input), act, noise)
    if training:
        mean, var = moments(u, mask)
    else:
        mean, var = running_mean.to(u.dtype), running_var.to(u.dtype)  # type: ignore[union-attr]
    z = (u - per_channel(mean, u)) * per_channel(torch.rsqrt(var + eps), u)
    if weight is not None:
        z = z * per_channel(weight.to(u.dtype), u)
    if bias is not None:
        z = z + per_channel(bias.to(u.dtype), u)
    y = run_stages(after, z, act, noise, residual).to(input.dtype)
    return y if mask is None else torch.where(mask, y, 0)
