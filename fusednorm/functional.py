"""The operator as a function: arguments are checked and resolved here, once, and handed on to `_autograd.py`.

`batch_norm_act_drop` is the public face, with the arguments of `torch.nn.functional.batch_norm` first; `dropout` and
`noise` are its noise alone. `apply` takes what modules have read from their children.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from . import _autograd, _operators, _plain, _rows, _running, reference
from ._operators import DEFAULT_ORDER as DEFAULT_ORDER  # for modules
from ._operators import NO_EXTRAS as NO_EXTRAS
from ._operators import Chain as Chain
from ._operators import Extras as Extras

__all__ = ["activations", "batch_norm_act_drop", "dropout", "noise"]

Device: TypeAlias = torch.device | str | int | None
_Function = TypeVar("_Function", bound=Callable[..., Tensor])

# Kind of noise -> the name of its strength, and the largest one.
NOISES = {"bernoulli": ("dropout probability", 1.0), "uniform": ("beta", 1.0), "gaussian": ("alpha", math.inf)}
GRANULARITIES = ("element", "channel", "sample")
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


def activations() -> tuple[str, ...]:
    """Names of the fused activations, as `act` takes them."""
    return tuple(reference.ACTIVATIONS)


def as_number(value: Any) -> float | None:
    """A number of Python, numpy or torch as a float; None for what is none (a bool, a string, several numbers)."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and not torch.is_complex(value) else None
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def check_noise(p: Any, noise: str = "bernoulli", granularity: str = "element") -> float:
    """Returns `p` as a float, or raises ValueError unless that noise exists and `p` is a strength that it can have."""
    if noise not in NOISES:
        raise ValueError(f"noise: expected one of {', '.join(NOISES)}, but got {noise!r}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, but got {granularity!r}")
    name, largest = NOISES[noise]
    value = as_number(p)
    if value is None or not 0 <= value <= largest or value == math.inf:
        at_most = f"between 0 and {largest:g}" if largest < math.inf else "0 or more"
        raise ValueError(f"{name} has to be {at_most}, but got {type(p) if value is None else p}")
    return value


def check_strength(p: Any, noise: str = "bernoulli", granularity: str = "element") -> tuple[float, Tensor | None]:
    """(strength, None) as :func:`check_noise`; of a floating-point scalar tensor, a live strength and its value now.

    A tensor is not looked at: kernels read it, and refuse what is no strength.
    """
    if not isinstance(p, Tensor) or not p.is_floating_point() or p.numel() != 1:
        return check_noise(p, noise, granularity), None
    check_noise(0.0, noise, granularity)
    if p.requires_grad:
        raise ValueError(
            "p: expected a tensor that requires no gradient, as noise has none with respect to its strength"
        )
    return _operators.LIVE, p.detach().reshape(()).to(torch.float64, copy=True)


def check_renorm(renorm: Any) -> tuple[float, float] | None:
    """Returns `renorm` as two floats or None, or raises ValueError unless it is None or (r_max, d_max)."""
    if renorm is None:
        return None
    limits = [as_number(v) for v in renorm] if isinstance(renorm, (tuple, list)) else []
    if len(limits) != 2 or None in limits or not limits[0] >= 1 or not limits[1] >= 0:  # type: ignore[operator]
        raise ValueError(f"renorm: expected (r_max, d_max) with r_max >= 1 and d_max >= 0, or None, but got {renorm!r}")
    return limits[0], limits[1]  # type: ignore[return-value]


def check_ghost_batch_size(size: Any) -> int | None:
    """Returns `size` as an int or None, or raises ValueError unless it is None or a positive integer."""
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(f"ghost_batch_size: expected a positive int or None, but got {size!r}")
    return int(size)


def world_size(group: Any) -> int:
    """Processes of a `process_group` as layers have it; 1 without one, or where none were started."""
    if group is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(None if isinstance(group, str) else group)


def check_process_group(group: Any, ghost_batch_size: int | None = None) -> Any:
    """Returns `group`, or None where it is of this process alone.

    Raises:
        ValueError: ghost batches, whose statistics are those of a part of one process's batch, or another string than
            "world".
        TypeError: what is no group.
    """
    if ghost_batch_size:
        raise ValueError("ghost_batch_size: expected None with a process_group, whose processes share statistics")
    if isinstance(group, str) and group != "world":
        raise ValueError(f"process_group: expected a group of torch.distributed, 'world' or None, but got {group!r}")
    if not isinstance(group, (str, torch.distributed.ProcessGroup)):
        raise TypeError(f"process_group: expected a group of torch.distributed, 'world' or None, but got {group!r}")
    return group if world_size(group) > 1 else None


def ghost_batches(batch: int, size: int | None, even: bool = False, values: int = 1) -> int:
    """How many samples a group holds of a batch cut into groups of at most `size`; 0 for the whole batch.

    `even` cuts as `x.chunk(ceil(batch / size))` does, into groups of nearly equal size (TabNet). Where the last group
    would be left with one value per channel, of which there is no variance, the nearest size is taken that leaves more.

    Args:
        batch: samples.
        size: of a group, None or 0 for no groups.
        even: see above.
        values: per channel and sample, the product of the spatial sizes.
    """
    if not size or size >= batch:
        return 0
    evenly = -(-batch // -(-batch // size))
    if even:
        size = evenly
    if values > 1 or batch % size != 1:
        return size
    sizes: tuple[int, ...] = (evenly, *range(size, 1, -1), *range(size + 1, batch + 1))
    return next(s for s in sizes if batch % s != 1)


def _check_tensor(name: str, value: Any, optional: bool = True) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        expected = "a tensor or None" if optional else "a tensor"
        raise TypeError(f"{name}: expected {expected}, but got {type(value).__name__}")


def leaf_of_graph(module: nn.Module, input: Any, residual: Any = None, **keywords: Any) -> Any:
    """A call of `module` in the graph that torch.fx is tracing: like torch's own layers, it is not looked into."""
    arguments = (input,) if residual is None else (input, residual)
    keywords = {name: value for name, value in keywords.items() if value is not None}
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, keywords)


def _seed_tensor(seed: Any, device: torch.device) -> Tensor:
    """An int64 scalar tensor on `device` from an int in [-2^63, 2^64) or such a tensor."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected an int64 scalar tensor, but got shape {tuple(seed.shape)} of {seed.dtype}"
            )
        if seed.device != device:
            raise ValueError(f"seed: expected a tensor on {device}, but got one on {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits or an int64 scalar tensor, but got {seed!r}")
    # full, not tensor: that one would synchronise a device and break a graph capture.
    seed = int(seed)
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def _as_torch_function(function: _Function) -> _Function:
    """To torch.fx, and to tensors with ways of their own, one call, as torch's functions are."""
    return cast(_Function, wrap_torch_function(lambda input, *_, **__: (input,))(function))


@_as_torch_function
def batch_norm_act_drop(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    act: str | tuple[str | float | Tensor, ...] | None = None,
    p: float | Tensor = 0.0,
    noise: str = "bernoulli",
    granularity: str = "element",
    drop_training: bool | None = None,
    order: str = DEFAULT_ORDER,
    residual: Tensor | None = None,
    ghost_batch_size: int | None = None,
    even_ghost_batches: bool = False,
    eval_matched_stats: bool = False,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    weights: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Batch norm (Ioffe & Szegedy 2015), activation, noise and addition in one pass each way, in any order.

    The leading arguments are those of :func:`torch.nn.functional.batch_norm`, and mean what they mean there.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, float64, bfloat16 or float16; either
            memory format, any strides.
        running_mean, running_var: (C,) of any floating dtype, updated in place when `training`; or None. Else they may
            require gradients, as :func:`torch.nn.functional.batch_norm` never lets them.
        weight, bias: (C,) of any floating dtype, or None.
        training: normalise with the statistics of the batch.
        act: an activation's name (see :func:`activations`), `(name, *parameters)` in torch's order, or None; or
            `("prelu", weight)` with a tensor of one element or C, which gets its gradient too.
        p: strength of the noise: for "bernoulli" the probability of dropping, in [0, 1] (Srivastava et al. 2014); for
            "uniform" beta of the multiplier's range (1 - beta, 1 + beta), in [0, 1] (Uout, Li et al. 2018); for
            "gaussian" alpha, the variance of the multiplier N(1, alpha) (Srivastava et al. 2014, section 10). A scalar
            tensor is read by the kernels, so that another value compiles nothing again and waits for no device; with
            one, a seed is drawn even if it is 0.
        noise: "bernoulli", "uniform" or "gaussian". Its mean is 1; no other scaling takes place.
        granularity: a draw per "element", per "channel" of a sample (as in dropout2d) or per "sample" (drop path).
        drop_training: whether the noise is on; None follows `training`.
        order: "norm", with "act" and "drop" before or after it and "add" after it, joined by "-".
        residual: what "add" adds; needed exactly for an order with "add". One that is not of the input's shape and
            dtype is added as `+` adds it, with its result's shape and dtype, and ends what is fused.
        ghost_batch_size: when training, take statistics over so many samples at a time (the last group may be smaller),
            and update the running ones group by group (Hoffer et al. 2017). None: the whole batch.
        even_ghost_batches: cut the batch into groups of nearly equal size, as `input.chunk` does (TabNet, Arik &
            Pfister 2019), and not into full ones and a rest. A rest of a single value is avoided in either case.
        eval_matched_stats: in an order with "drop" before "norm", let the running statistics learn those of the values
            without the noise, which are what evaluation sees. The output while training is the same. In other orders
            it changes nothing.
        mask: bool, True for rows that count: (N, ...), (N, 1, ...), or (N,) for whole samples. Others are not in the
            statistics, are not looked at, have no gradient, and are zero in the output: the result is that of the rows
            that count alone. One value per channel among these is not noticed, and has the variance 0.
        lengths: integers (N,): the same for samples that are padded at the end of their last axis.
        weights: (N,), (N, ...) or (N, 1, ...), of 0 or more: what a row counts in the mean and variance of the batch.
            Those of 0 are as masked. The running variance is made unbiased for the effective number of values,
            (sum w)^2 / sum w^2 (Kish 1965), if these are 2 or more. Statistics are taken in plain torch then, not in
            forward mode, and 16-bit gradients are rounded twice.
        seed: int, or int64 scalar tensor on the input's device; None draws one from torch's default generator, and
            only when noise is live. The same seed gives the same noise on every device and in every memory format.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: an argument outside its domain or without a place in `order`, one value per channel in training, or
            one of the running statistics without the other; a mask, lengths or weights of other shapes, or lengths
            beside another of them; weights with ghost batches, or that require a gradient.
        TypeError: what should be a tensor is none, or one of another dtype.
        RuntimeError: per-channel vectors whose size is not C, or running statistics that require a gradient and are to
            be updated.
    """
    _check_tensor("input", input, optional=False)
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for vector, value in vectors.items():
        _check_tensor(vector, value)
    reference.parse_order(order)
    p, strength = check_strength(p, noise, granularity)
    ghost_batch_size = check_ghost_batch_size(ghost_batch_size)
    name, parameters = reference.resolve_activation(act)
    for stage, given in (("act", act is not None), ("drop", p != 0)):
        if given and stage not in order:
            raise ValueError(f"{'p' if stage == 'drop' else stage}: given, but order {order!r} has no {stage!r}")
    act_weight: Any  # a tensor or None
    act_weight, parameters = (parameters[0], ()) if name == "prelu" else (None, parameters)
    live = training if drop_training is None else drop_training
    extras, groups = NO_EXTRAS, 0
    if mask is not None or lengths is not None or weights is not None:
        valid, weights = _rows.resolve(input, mask, lengths, weights)
        extras = Extras(valid)
    if strength is not None and live:
        extras = extras._replace(strength=strength)
    if training and ghost_batch_size:
        groups = ghost_batches(input.size(0), ghost_batch_size, even_ghost_batches, math.prod(input.shape[2:]))
    return apply(
        input,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        training,
        momentum,
        Chain(eps, order, name, parameters, noise, p if live else 0.0, granularity, groups),
        seed,
        residual,
        act_weight,
        eval_matched_stats,
        extras,
        weights,
    )


def apply(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    chain: Chain,
    seed: int | Tensor | None,
    residual: Tensor | None = None,
    act_weight: Tensor | None = None,
    eval_matched_stats: bool = False,
    extras: Extras = NO_EXTRAS,
    weights: Tensor | None = None,
) -> Tensor:
    """The operator with everything resolved into a :class:`Chain`; what modules call.

    Running statistics, where given, are updated if `training`; with `num_batches_tracked` that is incremented (once for
    each ghost batch) and `momentum` may be None. `weights`: (N, ...) of the rows that `extras.valid` lets count.
    """
    unusual = running_mean is None or running_var is None or running_mean.requires_grad or running_var.requires_grad
    if unusual and _check_statistics(running_mean, running_var, training):
        weight, bias, running_mean, running_var = _through_parameters(
            weight, bias, running_mean, running_var, chain.eps, _operators.opmath(input)
        )
    if extras.strength is not None and extras.strength.device != input.device:
        raise ValueError(f"p: expected a tensor on {input.device}, but got one on {extras.strength.device}")
    if residual is not None or "add" in chain.order:
        _check_residual(input, residual, chain.order)
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        head, tail = _split_at_addition(chain)
        seed = _seed_of(chain, seed, input)
        output = apply(
            *(input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, head, seed),
            *(None, act_weight, eval_matched_stats, extras, weights),
        )
        if extras.global_noise and extras.process_group is not None and "drop" in tail and chain.drops():
            raise ValueError("global_noise: expected False for a residual that is not of the input's shape and dtype")
        added, rows = output + residual, _plain.rows_of(extras.valid)
        if rows is not None:
            if added.shape != input.shape:
                raise ValueError(
                    f"residual: expected a shape that leaves that of the input, {list(input.shape)}, where rows do not "
                    f"count, but got {list(residual.shape)}"
                )
            added = torch.where(rows, added, 0)  # before it meets a derivative, which a NaN would not leave alone
        output = _behind_addition(added, chain, tail, act_weight, seed, extras.strength)
        return output if rows is None else torch.where(rows, output, 0)
    if num_batches_tracked is not None and (
        num_batches_tracked.dtype != torch.int64 or num_batches_tracked.device != input.device
    ):  # averaged with all buffers, or left on another device: counted here
        if 0 < chain.ghost_batch_size < input.shape[0]:  # or, group by group, by one that the kernels can count with
            before = num_batches_tracked.to(input.device, torch.int64)
            counter = before.clone()
            output = apply(
                *(input, running_mean, running_var, counter, weight, bias, training, momentum, chain, seed),
                *(residual, act_weight, eval_matched_stats, extras, weights),
            )
            num_batches_tracked.add_((counter - before).to(num_batches_tracked.device))
            return output
        num_batches_tracked.add_(1)
        momentum = 1.0 / float(num_batches_tracked) if momentum is None else momentum
        num_batches_tracked = None
    if weights is not None and training:
        seed = _seed_of(chain, seed, input)
        seed = None if seed is None else _seed_tensor(seed, input.device)
        (mean, var), learned, count = _weighted_statistics(
            input, chain, seed, act_weight, eval_matched_stats, extras, weights
        )
        output = apply(
            *(input, mean, var, None, weight, bias, False, 0.0, chain, seed, residual, act_weight, False),
            extras._replace(process_group=None, renorm=None),
        )
        if running_mean is not None and running_var is not None:
            _running.update(running_mean, running_var, num_batches_tracked, *learned, count, momentum)
        return output
    counts = _autograd.values_per_channel(input, chain.ghost_batch_size) if training else (0, 0)
    if chain.ghost_batch_size and 1 in counts and chain.ghost_batch_size < input.shape[0]:
        raise ValueError(
            f"ghost_batch_size: expected more than 1 value per channel in every group when training, but "
            f"{chain.ghost_batch_size} of input size {list(input.shape)} leave a group with 1"
        )
    if (counts[0] == 1 and extras.process_group is None) or chain.eps <= 0:
        # torch's own checks, with its words: F.batch_norm raises, or has no objection.
        F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.0, chain.eps)
    if seed is not None:
        seed = _seed_tensor(seed, input.device)
    return _autograd.run(
        (input, weight, bias, running_mean, running_var, residual, act_weight),
        num_batches_tracked,
        training,
        momentum,
        chain,
        seed,
        eval_matched_stats,
        extras,
    )


def _check_statistics(running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> bool:
    """Whether gradients with respect to given statistics are asked for."""
    if running_mean is None or running_var is None:
        if not training:
            raise ValueError("Expected running_mean and running_var to be defined when training=False")
        if running_mean is not running_var:
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        return False
    if not torch.is_grad_enabled() or not (running_mean.requires_grad or running_var.requires_grad):
        return False
    if training:
        name = "running_mean" if running_mean.requires_grad else "running_var"
        raise RuntimeError(f"{name}: expected a tensor that requires no gradient when training, which updates it")
    return True


def _through_parameters(weight: Any, bias: Any, mean: Any, var: Any, eps: float, dtype: torch.dtype) -> Any:
    """(weight, bias, mean, var) of the same values; gradients with respect to mean and var go through the first two.

    (u - mean) / std * w + b is a map of the same u by constants, with w' = w * (their std / std) and
    b' = b - w' * (mean - their mean) / their std.
    """
    vectors = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    _operators.check_vectors(mean.numel(), vectors)
    mean, var = mean.to(dtype), var.to(dtype)
    fixed, scale = mean.detach(), torch.rsqrt(var.detach() + eps)
    ratio = torch.rsqrt(var + eps) / scale
    weight = ratio if weight is None else weight.to(dtype) * ratio
    moved = weight * scale * (fixed - mean)
    return weight, moved if bias is None else bias.to(dtype) + moved, fixed, var.detach()


def _weighted_statistics(
    input: Tensor,
    chain: Chain,
    seed: Tensor | None,
    act_weight: Tensor | None,
    eval_matched_stats: bool,
    extras: Extras,
    weights: Tensor,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """(mean, var) of a batch whose rows have weights, differentiable; what running ones learn; of how many values."""
    for name, value in (
        ("ghost_batch_size", chain.ghost_batch_size or None),
        ("process_group", extras.process_group),
        ("renorm", extras.renorm),
    ):
        if value is not None:
            raise ValueError(f"weights: expected None with {name}")
    assert extras.valid is not None
    arguments = (input, act_weight, extras.valid, weights)
    mean, var, count = _rows.weighted(*arguments, chain, extras.strength, seed)
    learned = mean.detach(), var.detach()
    if eval_matched_stats and "drop" in reference.parse_order(chain.order)[0]:
        with torch.no_grad():
            learned = _rows.weighted(*arguments, chain._replace(p=0.0), None, None)[:2]
    return (mean, var), learned, count


def _check_residual(input: Tensor, residual: Any, order: str) -> None:
    adds = "add" in order
    if adds != (residual is not None) or not (residual is None or isinstance(residual, Tensor)):
        got = residual if residual is None else type(residual).__name__
        raise ValueError(f"residual: expected {'a tensor' if adds else 'None'} for order {order!r}, but got {got}")
    if residual is None or residual.shape == input.shape and residual.device == input.device:
        return
    if residual.device != input.device:
        raise ValueError(f"residual: expected a tensor on {input.device}, but got one on {residual.device}")
    sizes = zip(reversed(residual.shape), reversed(input.shape), strict=False)
    if any(a != b and a != 1 and b != 1 for a, b in sizes):
        raise ValueError(
            f"residual: expected shape {list(input.shape)}, or one that can be added to it, but got "
            f"{list(residual.shape)}"
        )


def _split_at_addition(chain: Chain) -> tuple[Chain, list[str]]:
    """The chain ahead of "add", and the stages behind it."""
    stages = chain.order.split("-")
    at = stages.index("add")
    return chain._replace(order="-".join(stages[:at])), stages[at + 1 :]


def _seed_of(chain: Chain, seed: int | Tensor | None, input: Tensor) -> int | Tensor | None:
    """One seed for a chain that runs in two parts."""
    draws = seed is None and chain.draws() and not _plain.leaves_process(_plain.why_plain())
    return _operators.draw_seed(input) if draws else seed


def _behind_addition(
    v: Tensor,
    chain: Chain,
    stages: list[str],
    act_weight: Tensor | None,
    seed: int | Tensor | None,
    strength: Tensor | None,
) -> Tensor:
    def noise(v: Tensor) -> Tensor:
        return dropout(
            v, chain.p if strength is None else strength, noise=chain.noise, granularity=chain.granularity, seed=seed
        )

    return reference.run_stages(stages, v, _plain.act_of(chain, act_weight), noise if chain.drops() else None)


@_as_torch_function
def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    noise: str = "bernoulli",
    granularity: str = "element",
    seed: int | Tensor | None = None,
) -> Tensor:
    """Multiplicative noise alone: input * m, in one pass each way, with nothing saved for backward.

    The arguments are first those of :func:`torch.nn.functional.dropout`, and then as in :func:`batch_norm_act_drop`;
    at equal seeds and shapes the noise is the same.

    Args:
        input: any shape; (N, C, ...) for granularity "channel", (N, ...) for "sample". float32, float64, bfloat16 or
            float16; any strides.

    Returns:
        The input's shape and dtype, in its memory format (contiguous beyond five dimensions); the input itself where
        there is no noise.

    Raises:
        ValueError: an argument outside its domain, or too few dimensions for the granularity.
        TypeError: an input that is no tensor.
    """
    _check_tensor("input", input, optional=False)
    p, strength = check_strength(p, noise, granularity)
    if not training or p == 0:
        return input
    if strength is not None and strength.device != input.device:
        raise ValueError(f"p: expected a tensor on {input.device}, but got one on {strength.device}")
    dims = {"element": 0, "sample": 1, "channel": 2}[granularity]
    if input.dim() < dims:
        raise ValueError(
            f"input: expected {dims} or more dimensions for granularity {granularity!r}, but got a "
            f"tensor of shape {list(input.shape)}"
        )
    shape = input.shape
    if input.dim() < 2:  # its values are those of one channel, or its samples
        input = input.reshape(-1, 1) if granularity == "sample" else input.reshape(1, 1, -1)
    elif input.dim() > 5:
        input = input.flatten(4)
    if input.numel() == 0:
        return input.clone().reshape(shape)
    if seed is not None:
        seed = _seed_tensor(seed, input.device)
    return _autograd.run_dropout(input, p, noise, granularity, seed, strength).reshape(shape)


def noise(
    shape: Sequence[int],
    p: float,
    *,
    seed: int | Tensor,
    kind: str = "bernoulli",
    granularity: str = "element",
    device: Device = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The multiplier m that a layer applies to a tensor of `shape` (N, C, ...) at this seed, broadcast to `shape`.

    "bernoulli": m = 65536/T where kept and 0 elsewhere, T = floor((1-p)*65536 + 0.5) in [1, 65535]: its
    mean is exactly 1.
    "uniform": m = 1 + beta t, with 65536 values t symmetric about 0 in (-1, 1). "gaussian": N(1, alpha), by Box &
    Muller 1958. The draws are those of Philox4x32-7 (Salmon et al., SC'11) at counter (row div 8, channel),
    key = seed; the last two are computed in float32, whatever the dtype.

    Raises:
        ValueError: a strength outside its range, fewer than two dimensions, an unknown kind or granularity, a bad one
            as the seed.
    """
    p = check_noise(p, kind, granularity)
    # Through a tensor: "cuda" alone is the current one, an int its index, None the default one.
    like = seed if isinstance(seed, Tensor) and device is None else torch.empty(0, device=device)
    m = _operators.noise(_seed_tensor(seed, like.device), list(shape), p, kind, granularity, dtype)
    return m.expand(shape)
