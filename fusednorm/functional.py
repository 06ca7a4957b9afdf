"""The operator as a function: arguments are checked and resolved here, once, and handed on to `_autograd.py`.

`batch_norm_act_drop` is the public face, with the arguments of `torch.nn.functional.batch_norm` first; `dropout` and
`noise` are its noise alone. `apply` takes what modules have read from their children.
"""

import math
import numbers

import torch
import torch.nn.functional as F

from . import _autograd, _operators, reference
from ._operators import DEFAULT_ORDER, Chain

# Kind of noise -> the name of its strength, and the largest one.
NOISES = {"bernoulli": ("dropout probability", 1.0), "uniform": ("beta", 1.0), "gaussian": ("alpha", math.inf)}
GRANULARITIES = ("element", "channel", "sample")


def activations():
    """Names of the fused activations, as `act` takes them."""
    return tuple(reference.ACTIVATIONS)


def check_noise(p, noise="bernoulli", granularity="element"):
    """Raises ValueError unless that noise exists and `p` is a strength that it can have."""
    if noise not in NOISES:
        raise ValueError(f"noise: expected one of {', '.join(NOISES)}, but got {noise!r}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, but got {granularity!r}")
    name, largest = NOISES[noise]
    if not isinstance(p, numbers.Real) or not 0 <= p <= largest or p == math.inf:
        at_most = f"between 0 and {largest:g}" if largest < math.inf else "0 or more"
        raise ValueError(f"{name} has to be {at_most}, but got {p if isinstance(p, numbers.Real) else type(p)}")


def check_ghost_batch_size(size):
    """Raises ValueError unless `size` is None or a positive int."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"ghost_batch_size: expected a positive int or None, but got {size!r}")


def _seed_tensor(seed, device):
    """An int64 scalar tensor on `device` from an int in [-2^63, 2^64) or such a tensor."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected an int64 scalar tensor, but got shape {tuple(seed.shape)} of {seed.dtype}"
            )
        if seed.device != device:
            raise ValueError(f"seed: expected a tensor on {device}, but got one on {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits or an int64 scalar tensor, but got {seed!r}")
    # full, not tensor: that one would synchronise a device and break a graph capture.
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def batch_norm_act_drop(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    act=None,
    p=0.0,
    noise="bernoulli",
    granularity="element",
    drop_training=None,
    order=DEFAULT_ORDER,
    residual=None,
    ghost_batch_size=None,
    eval_matched_stats=False,
    seed=None,
):
    """Batch norm (Ioffe & Szegedy 2015), activation, noise and addition in one pass each way, in any order.

    The leading arguments are those of :func:`torch.nn.functional.batch_norm`, and mean what they mean there.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, float64, bfloat16 or float16; either
            memory format, any strides.
        running_mean, running_var: (C,) of any floating dtype, updated in place when `training`; or None.
        weight, bias: (C,) of any floating dtype, or None.
        training: normalise with the statistics of the batch.
        act: an activation's name (see :func:`activations`), `(name, *parameters)` in torch's order, or None; or
            `("prelu", weight)` with a tensor of one element or C, which gets its gradient too.
        p: strength of the noise: for "bernoulli" the probability of dropping, in [0, 1] (Srivastava et al. 2014); for
            "uniform" beta of the multiplier's range (1 - beta, 1 + beta), in [0, 1] (Uout, Li et al. 2018); for
            "gaussian" alpha, the variance of the multiplier N(1, alpha) (Srivastava et al. 2014, section 10).
        noise: "bernoulli", "uniform" or "gaussian". Its mean is 1; no other scaling takes place.
        granularity: a draw per "element", per "channel" of a sample (as in dropout2d) or per "sample" (drop path).
        drop_training: whether the noise is on; None follows `training`.
        order: "norm", with "act" and "drop" before or after it and "add" after it, joined by "-".
        residual: of the input's shape and dtype, what "add" adds. Needed exactly for an order with "add".
        ghost_batch_size: when training, take statistics over so many samples at a time (the last group may be smaller),
            and update the running ones group by group (Hoffer et al. 2017). None: the whole batch.
        eval_matched_stats: in an order with "drop" before "norm", let the running statistics learn those of the values
            without the noise, which are what evaluation sees. The output while training is the same. In other orders
            it changes nothing.
        seed: int, or int64 scalar tensor on the input's device; None draws one from torch's default generator, and
            only when noise is live. The same seed gives the same noise on every device and in every memory format.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: an argument outside its domain or without a place in `order`, or one value per channel in training.
        RuntimeError: per-channel vectors whose size is not C.
    """
    reference.parse_order(order)
    check_noise(p, noise, granularity)
    check_ghost_batch_size(ghost_batch_size)
    name, parameters = reference.resolve_activation(act)
    for stage, given in (("act", act is not None), ("drop", p != 0)):
        if given and stage not in order:
            raise ValueError(f"{'p' if stage == 'drop' else stage}: given, but order {order!r} has no {stage!r}")
    act_weight, parameters = (parameters[0], ()) if name == "prelu" else (None, parameters)
    live = training if drop_training is None else drop_training
    return apply(
        input,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        training,
        momentum,
        Chain(eps, order, name, parameters, noise, float(p) if live else 0.0, granularity, ghost_batch_size or 0),
        seed,
        residual,
        act_weight,
        eval_matched_stats,
    )


def apply(
    input,
    running_mean,
    running_var,
    num_batches_tracked,
    weight,
    bias,
    training,
    momentum,
    chain,
    seed,
    residual=None,
    act_weight=None,
    eval_matched_stats=False,
):
    """The operator with everything resolved into a :class:`Chain`; what modules call.

    Running statistics, where given, are updated if `training`; with `num_batches_tracked` that is incremented (once for
    each ghost batch) and `momentum` may be None.
    """
    count = last_count = math.prod(input.shape[2:], start=input.shape[0])  # values per channel
    if training and 0 < chain.ghost_batch_size < input.shape[0]:
        samples, values = chain.ghost_batch_size, count // input.shape[0]
        count, last_count = samples * values, (input.shape[0] - 1) % samples * values + values
        if count == 1 or last_count == 1:
            raise ValueError(
                f"ghost_batch_size: expected more than 1 value per channel in every group when training, but "
                f"{samples} of input size {list(input.shape)} leave a group with 1"
            )
    if (training and count == 1) or chain.eps <= 0 or input.size(1) == 0:
        # torch's own checks, with its words: F.batch_norm raises, or has no objection.
        F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.0, chain.eps)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("Expected running_mean and running_var to be defined when training=False")
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
        count,
        last_count,
    )


def dropout(input, p=0.5, training=True, *, noise="bernoulli", granularity="element", seed=None):
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
    """
    check_noise(p, noise, granularity)
    if not training or p == 0:
        return input
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
    return _autograd.run_dropout(input, float(p), noise, granularity, seed).reshape(shape)


def noise(shape, p, *, seed, kind="bernoulli", granularity="element", device=None, dtype=torch.float32):
    """The multiplier m that a layer applies to a tensor of `shape` (N, C, ...) at this seed, broadcast to `shape`.

    "bernoulli": m = 65536/T where kept and 0 elsewhere, T = floor((1-p)*65536 + 0.5): its mean is exactly 1.
    "uniform": m = 1 + beta t, with 65536 values t symmetric about 0 in (-1, 1). "gaussian": N(1, alpha), by Box &
    Muller 1958. The draws are those of Philox4x32-7 (Salmon et al., SC'11) at counter (row div 8, channel),
    key = seed; the last two are computed in float32, whatever the dtype.

    Raises:
        ValueError: a strength outside its range, fewer than two dimensions, an unknown kind or granularity, a bad one
            as the seed.
    """
    check_noise(p, kind, granularity)
    if isinstance(seed, torch.Tensor) and device is None:
        device = seed.device
    else:  # through a tensor: "cuda" alone is the current one, and an int its index
        device = torch.empty(0, device="cpu" if device is None else device).device
    m = _operators.noise(_seed_tensor(seed, device), list(shape), float(p), kind, granularity, dtype)
    return m.expand(shape)
