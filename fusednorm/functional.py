"""The operator as a function: arguments are resolved here, gradients defined here, and torch.ops called once each way.

`torch.ops.fusednorm` holds the kernels; `_BatchNormActDrop` is their autograd Function; `batch_norm_act_drop` is the
public face, with the arguments of `torch.nn.functional.batch_norm` first.
"""

import math

import torch
import torch.nn.functional as F

from . import reference

_draw_seed = torch.ops.fusednorm.draw_seed.default
_forward = torch.ops.fusednorm.forward.default
_backward = torch.ops.fusednorm.backward.default
_update_stats_ = torch.ops.fusednorm.update_stats_.default
_noise = torch.ops.fusednorm.noise.default

ORDERS = ("norm-act-drop",)
NOISES = ("bernoulli",)
GRANULARITIES = ("element", "channel")

# Whether backward reads the noise's bits, saved by forward, or draws them again. On the CPU drawing costs more than
# memory. On CUDA (None) it is a matter of instructions: about 11 an element to draw, where a GPU has time for 30 while
# it moves a 16-bit element in and its gradient, and for 60 with float32. So 16-bit types save, others draw again.
# Not part of the interface: for measuring.
SAVE_MASK = {"cpu": True, "cuda": None}


def _saves_mask(input):
    saves = SAVE_MASK.get(input.device.type, False)
    return input.element_size() == 2 if saves is None else saves


def activations():
    """Names of the fused activations, as `act` takes them."""
    return tuple(reference.ACTIVATIONS)


# ---- shapes and strides of the operators' results, for torch.compile ------------------------------------------------
def _is_channels_last(x):
    expected, ok = 1, True
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        ok = ok and (x.size(d) == 1 or x.stride(d) == expected)
        expected = expected * x.size(d)
    return ok


def _check_devices(like, *tensors):
    # With one meta tensor among its arguments an operator call comes here, whatever the others are.
    for t in tensors:
        if t is not None and t.device != like.device:
            raise RuntimeError(f"expected all tensors on {like.device}, but got one on {t.device}")


@torch.library.register_fake("fusednorm::draw_seed")
def _(like):
    return like.new_empty((), dtype=torch.int64)


@torch.library.register_fake("fusednorm::forward")
def _(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    residual,
    seed,
    training,
    eps,
    order,
    act,
    act_params,
    noise,
    p,
    granularity,
    groups,
    save_mask,
):
    # Twin of check_forward in csrc/ops.cpp, which says why.
    _check_devices(input, weight, bias, running_mean, running_var, residual, seed)
    output = torch.empty_like(input)
    N, C, S = input.size(0), input.size(1), math.prod(input.shape[2:])
    vector = input.new_empty(C, dtype=_opmath(input))
    size, on_cuda = (0,), input.device.type == "cuda"
    if save_mask and 0 < p < 1 and granularity == "element":
        last = C != 1 and (S == 1 or (not output.is_contiguous() and _is_channels_last(output)))
        if on_cuda:
            calls = (N * S + 7) // 8
            if N * S >= 512:
                size = (calls, C, 1) if last else (C, calls)
        elif last:
            if C % 32 == 0 or C >= 512:
                size = (N, S, (C + 31) // 32)
        else:
            pieces, length = (N, S) if S >= 512 and N > 1 and C > 1 else (1, N * S)
            if length >= 512:
                size = (C, pieces * ((length + 31) // 32))
    mask = input.new_empty(size, dtype=torch.uint8 if on_cuda else torch.int32)
    return output, vector, torch.empty_like(vector), torch.empty_like(vector), mask


@torch.library.register_fake("fusednorm::backward")
def _(
    grad_output,
    input,
    weight,
    bias,
    residual,
    save_mean,
    save_invstd,
    mask,
    seed,
    training,
    eps,
    order,
    act,
    act_params,
    noise,
    p,
    granularity,
    groups,
    output_mask,
):
    _check_devices(input, grad_output, weight, bias, residual, save_mean, save_invstd, mask, seed)

    def gradient(of, wanted):
        return torch.empty_like(of) if wanted and of is not None else input.new_empty(0)

    return (
        gradient(input, output_mask[0]),
        gradient(weight, output_mask[1]),
        gradient(bias, output_mask[2]),
        gradient(residual, output_mask[3]),
    )


@torch.library.register_fake("fusednorm::update_stats_")
def _(running_mean, running_var, num_batches_tracked, mean, var, count, momentum):
    _check_devices(mean, running_mean, running_var, num_batches_tracked, var)


@torch.library.register_fake("fusednorm::noise")
def _(seed, size, p, kind, granularity, dtype):
    return seed.new_empty([*size[:2], *([1] * len(size[2:]) if granularity == "channel" else size[2:])], dtype=dtype)


# ---- gradients ------
class _BatchNormActDrop(torch.autograd.Function):
    """(output, save_mean, save_invstd, save_var, mask); only the output is differentiable.

    `settings` are the operator's trailing arguments up to `groups`: (training, eps, order, act, act_params, noise, p,
    granularity, groups).
    """

    @staticmethod
    def forward(input, weight, bias, running_mean, running_var, residual, seed, settings):
        return _forward(input, weight, bias, running_mean, running_var, residual, seed, *settings, _saves_mask(input))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        input, weight, bias, _, _, residual, seed, settings = inputs
        _, mean, invstd, var, mask = outputs
        ctx.mark_non_differentiable(mean, invstd, var, mask)
        ctx.set_materialize_grads(False)
        # Never the running statistics themselves: the next forward overwrites them.
        ctx.save_for_backward(input, weight, bias, residual, mean, invstd, mask, seed)
        ctx.settings = settings

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 8
        input, weight, bias, residual, mean, invstd, mask, seed = ctx.saved_tensors
        inputs = ctx.needs_input_grad
        needed = [inputs[0], inputs[1], inputs[2], inputs[5]]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(grad_output, input, weight, bias, mean, invstd, seed, ctx.settings, needed)
        else:
            grads = _backward(
                grad_output, input, weight, bias, residual, mean, invstd, mask, seed, *ctx.settings, needed
            )
        gx, gw, gb, gr = (g if wanted else None for g, wanted in zip(grads, needed, strict=True))
        return gx, gw, gb, None, None, gr, None, None


def _opmath(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _multiplier(input, seed, p, kind, granularity):
    """The noise as a tensor, for the plain-torch paths; None where nothing is dropped."""
    if p == 0:
        return None
    return input.new_zeros(()) if p == 1 else _noise(seed, input.shape, p, kind, granularity, _opmath(input))


def _differentiable_backward(grad_output, input, weight, bias, mean, invstd, seed, settings, needed):
    """The gradients as a graph (create_graph=True).

    In training the statistics are recomputed from `input`: the saved ones are constants here, and with them the first
    derivative would be right and the second one wrong.
    """
    training, eps, order, act, act_params, kind, p, granularity, _ = settings
    m = _multiplier(input, seed, p, kind, granularity)
    # Aliases: a weight that was itself computed from the input must not lead back to it.
    parts = [t.view_as(t) if wanted else t for t, wanted in zip((input, weight, bias), needed[:3], strict=True)]
    y = reference.batch_norm_act_drop(
        parts[0], mean, invstd**-2 - eps, *parts[1:], training, eps=eps, act=(act, *act_params), order=order, noise=m
    )
    wanted = [t for t, w in zip(parts, needed[:3], strict=True) if w]
    grads = iter(torch.autograd.grad(y, wanted, grad_output, create_graph=True))
    return [next(grads) if w else None for w in needed]


def _differentiable(*args):
    # Function.apply binds its arguments through inspect.signature, which costs more than a small layer's kernels, and
    # only the transforms need it.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _BatchNormActDrop.apply(*args)
    return super(torch.autograd.Function, _BatchNormActDrop).apply(*args)


# ---- arguments ------
def _check_drop(p, noise="bernoulli", granularity="element"):
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if noise not in NOISES:
        raise ValueError(f"noise: expected one of {', '.join(NOISES)}, but got {noise!r}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, but got {granularity!r}")


def _check_order(order):
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, but got {order!r}")


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


def _in_forward_mode():
    return torch.autograd.forward_ad._current_level >= 0


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
    order="norm-act-drop",
    residual=None,
    seed=None,
):
    """Batch norm (Ioffe & Szegedy 2015), activation and dropout (Srivastava et al. 2014) in one pass each way.

    The leading arguments are those of :func:`torch.nn.functional.batch_norm`, and mean what they mean there.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, float64, bfloat16 or float16; either
            memory format, any strides.
        running_mean, running_var: (C,) of any floating dtype, updated in place when `training`; or None.
        weight, bias: (C,) of any floating dtype, or None.
        training: normalise with the statistics of the batch.
        act: an activation's name (see :func:`activations`), `(name, *parameters)` in torch's order, or None.
        p: strength of the noise; for "bernoulli" the probability of dropping, in [0, 1].
        granularity: "element", or "channel": a draw per (n, c), as in dropout2d.
        drop_training: whether the noise is on; None follows `training`.
        seed: int, or int64 scalar tensor on the input's device; None draws one from torch's default generator, and
            only when noise is live. The same seed gives the same noise on every device and in every memory format.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: an argument outside its domain, or one value per channel in training.
        RuntimeError: per-channel vectors whose size is not C.
    """
    _check_order(order)
    _check_drop(p, noise, granularity)
    if residual is not None:
        raise ValueError(f"residual: expected None for order {order!r}")
    name, parameters = reference.resolve_activation(act)
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
        (eps, order, name, parameters, noise, float(p) if live else 0.0, granularity, 1),
        seed,
    )


def apply(input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, chain, seed):
    """The operator with everything resolved; what modules call.

    `chain` is (eps, order, act, act_params, noise, p, granularity, groups). Running statistics, where given, are
    updated if `training`; with `num_batches_tracked` that is incremented and `momentum` may be None.
    """
    eps, p = chain[0], chain[5]
    if (training and math.prod(input.shape[2:], start=input.shape[0]) == 1) or eps <= 0 or input.size(1) == 0:
        # torch's own checks, with its words: F.batch_norm raises, or has no objection.
        F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.0, eps)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("Expected running_mean and running_var to be defined when training=False")
    if seed is not None:
        seed = _seed_tensor(seed, input.device)
    if not 0 < p < 1:
        seed = None  # nothing to draw; the generator stays as it is, as with stock dropout
    elif seed is None:
        if torch._C._functorch.is_batchedtensor(input):
            raise RuntimeError("vmap over live noise needs a seed: pass seed=, one for all examples or one for each")
        seed = _draw_seed(input)
    settings = (training, *chain)
    tensors = (input, weight, bias, running_mean, running_var, None, seed)
    if _in_forward_mode():
        output, mean, var = _forward_mode(tensors, settings)
    elif torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        output, mean, _, var, _ = _differentiable(*tensors, settings)
    else:
        output, mean, _, var, _ = _forward(*tensors, *settings, False)
    if training and running_mean is not None:
        count = input.numel() // input.size(1)
        _update_stats_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum)
    return output


def _forward_mode(tensors, settings):
    """Output, batch mean and batch variance through plain torch, which carries tangents. Same noise."""
    input, weight, bias, running_mean, running_var, _, seed = tensors
    training, eps, order, act, act_params, kind, p, granularity, _ = settings
    m = _multiplier(input, seed, p, kind, granularity)
    output = reference.batch_norm_act_drop(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        eps=eps,
        act=(act, *act_params),
        order=order,
        noise=m,
    )
    var, mean = torch.var_mean(input.detach().to(_opmath(input)), [0, *range(2, input.dim())], correction=0)
    return output, mean, var


def noise(shape, p, *, seed, kind="bernoulli", granularity="element", device=None, dtype=torch.float32):
    """The multiplier m that a layer applies to a tensor of `shape` (N, C, ...) at this seed, broadcast to `shape`.

    m = 65536/T where kept and 0 elsewhere, T = floor((1-p)*65536 + 0.5): its mean is exactly 1. The 16-bit draws are
    those of Philox4x32-7 (Salmon et al., SC'11) at counter (row div 8, channel), key = seed.

    Raises:
        ValueError: p outside [0, 1], fewer than two dimensions, an unknown kind or granularity, a bad seed.
    """
    _check_drop(p, kind, granularity)
    if isinstance(seed, torch.Tensor) and device is None:
        device = seed.device
    else:  # through a tensor: "cuda" alone is the current one, and an int its index
        device = torch.empty(0, device="cpu" if device is None else device).device
    m = _noise(_seed_tensor(seed, device), list(shape), float(p), kind, granularity, dtype)
    return m.expand(shape)
