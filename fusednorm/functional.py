"""The operator as a function: arguments are resolved here, gradients defined here, and torch.ops called once each way.

`torch.ops.fusednorm` holds the kernels; `_BatchNormActDrop` is their autograd Function; `batch_norm_act_drop` is the
public face, with the arguments of `torch.nn.functional.batch_norm` first.
"""

import math
import numbers
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import reference

_draw_seed = torch.ops.fusednorm.draw_seed.default
_forward = torch.ops.fusednorm.forward.default
_backward = torch.ops.fusednorm.backward.default
_update_stats_ = torch.ops.fusednorm.update_stats_.default
_noise = torch.ops.fusednorm.noise.default
_dropout = torch.ops.fusednorm.dropout.default

# Kind of noise -> the name of its strength, and the largest one.
NOISES = {"bernoulli": ("dropout probability", 1.0), "uniform": ("beta", 1.0), "gaussian": ("alpha", math.inf)}
GRANULARITIES = ("element", "channel", "sample")
DEFAULT_ORDER = "norm-act-drop"


class Chain(NamedTuple):
    """What surrounds the norm: the operator's arguments behind `training`."""

    eps: float
    order: str = DEFAULT_ORDER
    act: str = "identity"
    act_params: tuple = ()
    noise: str = "bernoulli"
    p: float = 0.0
    granularity: str = "element"
    ghost_batch_size: int = 0

    def draws(self):
        """Whether a seed is needed."""
        return is_live(self.noise, self.p) and "drop" in self.order


def is_live(noise, p):
    """Whether noise of that strength draws anything; dropping nothing, and everything, needs no draws."""
    return 0 < p < 1 if noise == "bernoulli" else p > 0


# Whether backward reads the noise's bits, saved by forward, or draws them again. On the CPU drawing costs more than
# memory. On CUDA (None) it is a matter of instructions: about 11 an element to draw, where a GPU has time for 30 while
# it moves a 16-bit element in and its gradient, and for 60 with float32. So 16-bit types save, others draw again.
# Not part of the interface: for measuring.
SAVE_MASK = {"cpu": True, "cuda": None}


def _saves_mask(input):
    saves = SAVE_MASK["cpu"] if input.is_cpu else SAVE_MASK.get(input.device.type, False)
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


# Activations whose derivative is 0 or 1 everywhere: `one_bit` in csrc/math/activations.h.
_ONE_BIT = ("identity", "relu", "hardtanh", "relu6")


def _add_precedes_act(chain):
    after = reference.parse_order(chain.order)[1]
    return chain.act != "identity" and "add" in after and "act" in after[after.index("add") :]


def _saves_bits(chain):
    # Twin of saves_pass and saves_keep in csrc/call.h.
    if _add_precedes_act(chain) and chain.act in _ONE_BIT:
        return True
    return chain.draws() and chain.noise == "bernoulli" and chain.granularity == "element"


@torch.library.register_fake("fusednorm::forward")
def _(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    residual,
    act_weight,
    seed,
    training,
    eps,
    order,
    act,
    act_params,
    noise,
    p,
    granularity,
    ghost_batch_size,
    eval_matched_stats,
    save_mask,
):
    # Twin of check_forward in csrc/ops.cpp, which says why.
    _check_devices(input, weight, bias, running_mean, running_var, residual, act_weight, seed)
    chain = Chain(eps, order, act, act_params, noise, p, granularity, ghost_batch_size)
    output = torch.empty_like(input)
    N, C, S = input.size(0), input.size(1), math.prod(input.shape[2:])
    ghosts = training and 0 < ghost_batch_size < N
    shape = ((N + ghost_batch_size - 1) // ghost_batch_size, C) if ghosts else (C,)
    vector = input.new_empty(shape, dtype=_opmath(input))
    clean = eval_matched_stats and training and p > 0 and "drop" in reference.parse_order(order)[0]
    stat_mean = input.new_empty(shape if clean else (0,), dtype=_opmath(input))
    size, on_cuda = (0,), input.device.type == "cuda"
    if save_mask and not ghosts and _saves_bits(chain):
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
    return output, vector, torch.empty_like(vector), torch.empty_like(vector), stat_mean, mask


@torch.library.register_fake("fusednorm::backward")
def _(
    grad_output,
    input,
    weight,
    bias,
    residual,
    act_weight,
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
    ghost_batch_size,
    output_mask,
):
    _check_devices(input, grad_output, weight, bias, residual, act_weight, save_mean, save_invstd, mask, seed)

    def gradient(of, wanted):
        return torch.empty_like(of) if wanted and of is not None else input.new_empty(0)

    return (
        gradient(input, output_mask[0]),
        gradient(weight, output_mask[1]),
        gradient(bias, output_mask[2]),
        gradient(input, output_mask[3] and "add" in order),
        gradient(act_weight, output_mask[4]),
    )


@torch.library.register_fake("fusednorm::update_stats_")
def _(running_mean, running_var, num_batches_tracked, mean, var, count, last_count, momentum):
    _check_devices(mean, running_mean, running_var, num_batches_tracked, var)


@torch.library.register_fake("fusednorm::noise")
def _(seed, size, p, kind, granularity, dtype):
    own = list(size)
    if granularity != "element":
        own[2:] = [1] * len(own[2:])
    if granularity == "sample":
        own[1] = min(own[1], 1)
    return seed.new_empty(own, dtype=dtype)


@torch.library.register_fake("fusednorm::dropout")
def _(input, seed, p, kind, granularity):
    _check_devices(input, seed)
    return torch.empty_like(input)


# ---- gradients ------
class _BatchNormActDrop(torch.autograd.Function):
    """(output, save_mean, save_invstd, stat_var, stat_mean, mask); only the output is differentiable.

    `settings` are (training, *Chain).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, weight, bias, running_mean, running_var, residual, act_weight, seed, settings, eval_matched_stats
    ):
        tensors = (input, weight, bias, running_mean, running_var, residual, act_weight, seed)
        return _forward(*tensors, *settings, eval_matched_stats, _saves_mask(input))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        input, weight, bias, _, _, residual, act_weight, seed, settings, _ = inputs
        _, mean, invstd, *others, mask = outputs
        ctx.mark_non_differentiable(mean, invstd, *others, mask)
        ctx.set_materialize_grads(False)
        if residual is not None:
            # Backward asks for what entered an activation, unless a bit says all about it.
            chain = Chain(*settings[1:])
            if not _add_precedes_act(chain) or (chain.act in _ONE_BIT and mask.numel() > 0):
                residual = None
        # Never the running statistics themselves: the next forward overwrites them.
        ctx.save_for_backward(input, weight, bias, residual, act_weight, mean, invstd, mask, seed)
        ctx.settings = settings

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 10
        saved, inputs = ctx.saved_tensors, ctx.needs_input_grad
        needed = [inputs[0], inputs[1], inputs[2], inputs[5], inputs[6]]
        if (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and any(t is not None and t.requires_grad for t in (grad_output, *saved))
        ):
            grads = _differentiable_backward(grad_output, *saved, ctx.settings, needed)
        elif needed[3] and _ends_with_add(ctx.settings):
            grads = [*_backward(grad_output, *saved, *ctx.settings, [*needed[:3], False, needed[4]])]
            grads[3] = grad_output
        else:
            grads = _backward(grad_output, *saved, *ctx.settings, needed)
        gx, gw, gb, gr, ga = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
        return gx, gw, gb, None, None, gr, ga, None, None, None


def _ends_with_add(settings):
    # As a word: stages behind it that do nothing this time make no difference worth a second rule.
    return settings[2].endswith("-add")


def _opmath(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _multiplier(input, seed, chain):
    """The noise as a tensor, for the plain-torch paths; None where there is none."""
    if chain.p == 0 or "drop" not in chain.order:
        return None
    if not chain.draws():
        return input.new_zeros(())
    return _noise(seed, input.shape, chain.p, chain.noise, chain.granularity, _opmath(input))


def _act(chain, act_weight):
    return (chain.act, *chain.act_params) if act_weight is None else (chain.act, act_weight)


def _differentiable_backward(
    grad_output, input, weight, bias, residual, act_weight, mean, invstd, mask, seed, settings, needed
):
    """The gradients as a graph (create_graph=True).

    In training the statistics are recomputed from `input`: the saved ones are constants here, and with them the first
    derivative would be right and the second one wrong.
    """
    training, *chain = settings
    chain = Chain(*chain)
    before, after = reference.parse_order(chain.order)
    m = _multiplier(input, seed, chain)
    order, factor = chain.order, None
    if "add" in after and residual is None:
        # It was not saved, as it has no say in the derivative of what follows: a constant factor (an activation there
        # is piecewise linear), which is the residual's gradient for a gradient of ones.
        with torch.no_grad():
            factor = _backward(
                *(torch.ones_like(input), input, weight, bias, residual, act_weight, mean, invstd, mask, seed),
                *settings,
                [False, False, False, True, False],
            )[3]
        order = "-".join([*before, "norm", *after[: after.index("add")]])
    leaves = (input, weight, bias, residual, act_weight)
    wanted = [t is not None and w for t, w in zip(leaves, needed, strict=True)]
    if not any(wanted):
        return [None, None, None, grad_output * factor, None]  # the residual's, which asks for nothing else

    def output(*parts):
        parts = iter(parts)
        x, weight, bias, residual, act_weight = (next(parts) if w else t for t, w in zip(leaves, wanted, strict=True))
        y = reference.batch_norm_act_drop(
            x,
            mean,
            invstd**-2 - chain.eps,
            weight,
            bias,
            training,
            eps=chain.eps,
            act=_act(chain, act_weight),
            order=order,
            residual=residual,
            noise=m,
            ghost_batch_size=chain.ghost_batch_size,
        )
        return y if factor is None else y * factor

    parts = [t for t, w in zip(leaves, wanted, strict=True) if w]
    if _transformed():
        grads = torch.func.vjp(output, *parts)[1](grad_output)
    else:
        # Aliases: a weight that was itself computed from the input must not lead back to it.
        parts = [t.view_as(t) for t in parts]
        grads = torch.autograd.grad(output(*parts), parts, grad_output, create_graph=True, allow_unused=True)
    grads = iter(grads)
    grads = [next(grads) if w else None for w in wanted]
    if needed[3] and factor is not None:
        grads[3] = grad_output * factor
    return grads


def _transformed():
    """Within a torch.func transform, under which a tensor does not always say that it requires a gradient."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _differentiable(function, *args):
    # Function.apply binds its arguments through inspect.signature, which costs more than a small layer's kernels, and
    # only the transforms need it.
    if torch.compiler.is_compiling() or _transformed():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


class _Dropout(torch.autograd.Function):
    """x * m, which is its own derivative; so it may be differentiated any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, seed, p, noise, granularity):
        return _dropout(input, seed, p, noise, granularity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, seed, *ctx.chain = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad_output):
        return _differentiable(_Dropout, grad_output, *ctx.saved_tensors, *ctx.chain), None, None, None, None


# ---- arguments ------
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
    seed = _seed(seed, input, chain.draws())
    settings = (training, *chain)
    tensors = (input, weight, bias, running_mean, running_var, residual, act_weight, seed)
    if _in_forward_mode():
        output, mean, var = _forward_mode(tensors, training, chain, eval_matched_stats)
    else:
        if torch.is_grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
            or (act_weight is not None and act_weight.requires_grad)
            or _transformed()
        ):
            results = _differentiable(_BatchNormActDrop, *tensors, settings, eval_matched_stats)
        else:
            results = _forward(*tensors, *settings, eval_matched_stats, False)
        output, mean, _, var, clean_mean, _ = results
        if eval_matched_stats and clean_mean.size(0):
            mean = clean_mean
    if training and running_mean is not None:
        _update_stats_(running_mean, running_var, num_batches_tracked, mean, var, count, last_count, momentum)
    return output


def _seed(seed, input, draws):
    """The seed as a tensor; drawn if none is given; None if it is not needed."""
    if seed is not None:
        seed = _seed_tensor(seed, input.device)
    if not draws:
        return None  # the generator stays as it is, as with stock dropout
    if seed is None:
        if torch._C._functorch.is_batchedtensor(input):
            raise RuntimeError("vmap over live noise needs a seed: pass seed=, one for all examples or one for each")
        seed = _draw_seed(input)
    return seed


def _forward_mode(tensors, training, chain, eval_matched_stats):
    """Output, mean and variance for the running statistics through plain torch, which carries tangents. Same noise."""
    input, weight, bias, running_mean, running_var, residual, act_weight, seed = tensors
    m, act = _multiplier(input, seed, chain), _act(chain, act_weight)
    output = reference.batch_norm_act_drop(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        eps=chain.eps,
        act=act,
        order=chain.order,
        residual=residual,
        noise=m,
        ghost_batch_size=chain.ghost_batch_size,
    )
    before, _ = reference.parse_order(chain.order)
    with torch.no_grad():
        u = reference.run_stages(before, reference.in_opmath(input), act, None if eval_matched_stats else m)
        groups = u.split(chain.ghost_batch_size) if 0 < chain.ghost_batch_size < u.size(0) else [u]
        moments = [torch.var_mean(g, [0, *range(2, g.dim())], correction=0) for g in groups]
    if len(moments) == 1:
        return output, moments[0][1], moments[0][0]
    return output, torch.stack([mean for _, mean in moments]), torch.stack([var for var, _ in moments])


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
    live = is_live(noise, p)
    seed = _seed(seed, input, live)
    if seed is None:
        seed = _seed_tensor(0, input.device)  # for everything dropped: looked at by nobody
    if _in_forward_mode():  # through plain torch, which carries tangents; torch.compile refuses a jvp of our own
        m = _noise(seed, input.shape, float(p), noise, granularity, _opmath(input))
        output = (reference.in_opmath(input) * m).to(input.dtype)
    elif torch.is_grad_enabled() and (input.requires_grad or _transformed()):
        output = _differentiable(_Dropout, input, seed, float(p), noise, granularity)
    else:
        output = _dropout(input, seed, float(p), noise, granularity)
    return output.reshape(shape)


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
    m = _noise(_seed_tensor(seed, device), list(shape), float(p), kind, granularity, dtype)
    return m.expand(shape)
