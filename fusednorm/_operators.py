"""The operators' handles, the chain that they are told, and the shapes of their results for torch.compile.

Everything that is said of an operator beside its kernels: what may be traced (fake kernels), and how it behaves under
`vmap`. What is differentiated is in `_autograd.py`, what users may pass in `functional.py`.
"""

import math
from typing import NamedTuple

import torch

from . import reference

draw_seed = torch.ops.fusednorm.draw_seed.default
forward = torch.ops.fusednorm.forward.default
backward = torch.ops.fusednorm.backward.default
update_stats_ = torch.ops.fusednorm.update_stats_.default
noise = torch.ops.fusednorm.noise.default
dropout = torch.ops.fusednorm.dropout.default

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

    def drops(self):
        """Whether there is noise, or everything is dropped."""
        return self.p > 0 and "drop" in self.order

    def draws(self):
        """Whether a seed is needed."""
        return self.drops() and is_live(self.noise, self.p)


def is_live(noise, p):
    """Whether noise of that strength draws anything; dropping nothing, and everything, needs no draws."""
    return 0 < p < 1 if noise == "bernoulli" else p > 0


def opmath(x):
    """The dtype that everything is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Activations whose derivative is 0 or 1 everywhere: `one_bit` in csrc/math/activations.h.
ONE_BIT = ("identity", "relu", "hardtanh", "relu6")


def add_precedes_act(chain):
    after = reference.parse_order(chain.order)[1]
    return chain.act != "identity" and "add" in after and "act" in after[after.index("add") :]


def noise_shape(shape, granularity):
    """(N, C, ...) of the multiplier itself, before it is broadcast to `shape`."""
    own = list(shape)
    if granularity != "element":
        own[2:] = [1] * len(own[2:])
    if granularity == "sample":
        own[1] = min(own[1], 1)
    return own


# ---- fake kernels ----------------------------------------------------------------------------------------------------
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


def _saves_bits(chain):
    # Twin of saves_pass and saves_keep in csrc/call.h.
    if add_precedes_act(chain) and chain.act in ONE_BIT:
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
    vector = input.new_empty(shape, dtype=opmath(input))
    clean = eval_matched_stats and training and p > 0 and "drop" in reference.parse_order(order)[0]
    stat_mean = input.new_empty(shape if clean else (0,), dtype=opmath(input))
    size, on_cuda = (0,), input.device.type == "cuda"
    if save_mask and not ghosts and _saves_bits(chain):
        last = C != 1 and (S == 1 or (not output.is_contiguous() and _is_channels_last(output)))
        if on_cuda:
            calls = (N * S + 7) // 8
            size = (calls, C, 1) if last else (C, calls)
        elif not last:
            pieces, length = (N, S) if S >= 512 and N > 1 and C > 1 else (1, N * S)
            size = (C, pieces * ((length + 31) // 32))
        elif C % 32 == 0 or C >= 512:
            size = (N, S, (C + 31) // 32)
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
    return seed.new_empty(noise_shape(size, granularity), dtype=dtype)


@torch.library.register_fake("fusednorm::dropout")
def _(input, seed, p, kind, granularity):
    _check_devices(input, seed)
    return torch.empty_like(input)


# ---- vmap ------------------------------------------------------------------------------------------------------------
# Under vmap everything runs in plain torch (_autograd.py), which has rules of its own, but for these two.
@torch.library.register_vmap("fusednorm::draw_seed")
def _(info, in_dims, like):
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
            "randomness flags on vmap, or give the noise of fusednorm a seed="
        )
    if info.randomness == "same":
        return draw_seed(like), None
    return torch.stack([draw_seed(like) for _ in range(info.batch_size)]), 0


@torch.library.register_vmap("fusednorm::update_stats_")
def _(info, in_dims, *args):
    names = ("running_mean", "running_var", "num_batches_tracked")
    for name, tensor, dim in zip(names, args[:3], in_dims[:3], strict=True):
        if tensor is not None and dim is None:
            raise RuntimeError(
                f"vmap: {name} is to be updated in place by statistics of a batched input, but is not batched itself; "
                "stack the buffers of the ensemble (torch.func.stack_module_state), or use track_running_stats=False"
            )
    for example in range(info.batch_size):
        update_stats_(*(a if d is None else a.select(d, example) for a, d in zip(args, in_dims, strict=True)))
    return None, None
