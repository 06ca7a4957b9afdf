"""The operators' handles, the chain that they are told, and the shapes of their results for torch.compile.

Everything that is said of an operator beside its kernels: what may be traced (fake kernels), and how it behaves under
`vmap`. What is differentiated is in `_autograd.py`, what users may pass in `functional.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

batch_norm_act_drop: Callable[..., Tensor] = torch.ops.fusednorm.batch_norm_act_drop.default
forward: Callable[..., tuple[Tensor, ...]] = torch.ops.fusednorm.forward.default
backward: Callable[..., tuple[Tensor, ...]] = torch.ops.fusednorm.backward.default
statistics: Callable[..., tuple[Tensor, ...]] = torch.ops.fusednorm.statistics.default
gradient_sums: Callable[..., Tensor] = torch.ops.fusednorm.gradient_sums.default
backward_given: Callable[..., tuple[Tensor, ...]] = torch.ops.fusednorm.backward_given.default
update_stats_: Callable[..., None] = torch.ops.fusednorm.update_stats_.default
noise: Callable[..., Tensor] = torch.ops.fusednorm.noise.default
dropout: Callable[..., Tensor] = torch.ops.fusednorm.dropout.default
_draw_seed: Callable[[Tensor], Tensor] = torch.ops.fusednorm.draw_seed.default

DEFAULT_ORDER = "norm-act-drop"


class Chain(NamedTuple):
    """What surrounds the norm: the operator's arguments behind `training`."""

    eps: float
    order: str = DEFAULT_ORDER
    act: str = "identity"
    act_params: Sequence[Any] = ()
    noise: str = "bernoulli"
    p: float = 0.0
    granularity: str = "element"
    ghost_batch_size: int = 0

    def drops(self) -> bool:
        """Whether there is noise, or everything is dropped."""
        return self.p > 0 and "drop" in self.order

    def draws(self) -> bool:
        """Whether a seed is needed."""
        return self.drops() and is_live(self.noise, self.p)


class Extras(NamedTuple):
    """What few calls have: whose statistics normalise, and noise whose strength is a tensor."""

    valid: Tensor | None = None  # (N, S...) bool, the rows that count; None: all
    strength: Tensor | None = None  # one value in the place of `Chain.p`, which is LIVE then
    process_group: Any = None  # of processes that share statistics
    renorm: tuple[float, float] | None = None  # the largest r and d of batch renormalisation
    global_noise: bool = False  # that of the whole batch of a process_group


NO_EXTRAS = Extras()
LIVE = 0.5  # a strength with which noise of every kind is live


def is_live(noise: str, p: float) -> bool:
    """Whether noise of that strength draws anything; dropping nothing, and everything, needs no draws."""
    return 0 < p < 1 if noise == "bernoulli" else p > 0


def check_vectors(channels: int, vectors: dict[str, Tensor | None]) -> None:
    """Raises RuntimeError, as the operators do, for a per-channel vector of another size: where none has looked yet."""
    for name, vector in vectors.items():
        if vector is not None and vector.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")


def opmath(x: Tensor) -> torch.dtype:
    """The dtype that everything is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Activations whose derivative is 0 or 1 everywhere: `one_bit` in csrc/math/activations.h.
ONE_BIT = ("identity", "relu", "hardtanh", "relu6")


def add_precedes_act(chain: Chain) -> bool:
    after = reference.parse_order(chain.order)[1]
    return chain.act != "identity" and "add" in after and "act" in after[after.index("add") :]


def reads_residual(chain: Chain, mask: Tensor) -> bool:
    """Whether backward asks for what entered an activation behind an addition: unless a bit says all about it."""
    # Twin of reads_residual in csrc/ops.cpp.
    return add_precedes_act(chain) and not (chain.act in ONE_BIT and _has_bits(mask))


def _has_bits(mask: Tensor) -> bool:
    if torch.compiler.is_compiling():  # without pinning a compiled graph to batches on one side of a limit
        return torch.fx.experimental.symbolic_shapes.statically_known_true(mask.numel() > 0)
    return mask.numel() > 0


def noise_shape(shape: Sequence[int], granularity: str) -> list[int]:
    """(N, C, ...) of the multiplier itself, before it is broadcast to `shape`."""
    own = list(shape)
    if granularity != "element":
        own[2:] = [1] * len(own[2:])
    if granularity == "sample":
        own[1] = min(own[1], 1)
    return own


# ---- DTensor ---------------------------------------------------------------------------------------------------------
def beside(input: Tensor, seed: Tensor | None) -> Tensor | None:
    """`seed` as operators take it beside `input`. With the first DTensor come its rules, which are slow to import."""
    if type(input).__name__ != "DTensor":
        return seed
    from ._sharding import replicated

    return replicated(seed, input)


def draw_seed(like: Tensor) -> Tensor:
    """A seed from the default generator of `like`'s device."""
    if type(like) is not Tensor:
        beside(like, None)
    if torch.compiler.is_compiling():
        # Two draws beside one tensor are two seeds, but equal calls to AOTAutograd, which knows torch's own random
        # operators only by their names. It leaves what is made by `empty` apart.
        like = torch.empty((), device=like.device)
    return _draw_seed(like)


def seed_for(chain: Chain, input: Tensor, seed: Tensor | None) -> Tensor | None:
    """`seed`, or one that is drawn; None without noise, where the generator stays as it is, as with stock dropout."""
    if not chain.draws():
        return None
    return draw_seed(input) if seed is None else seed


# ---- fake kernels ----------------------------------------------------------------------------------------------------
def _is_channels_last(x: Tensor) -> bool:
    expected, ok = 1, True
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        ok = ok and (x.size(d) == 1 or x.stride(d) == expected)
        expected = expected * x.size(d)
    return ok


def _check_devices(like: Tensor, *tensors: Tensor | None) -> None:
    # With one meta tensor among its arguments an operator call comes here, whatever the others are.
    for t in tensors:
        if t is not None and t.device != like.device:
            raise RuntimeError(f"expected all tensors on {like.device}, but got one on {t.device}")


@torch.library.register_fake("fusednorm::draw_seed")
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


def _saves_bits(chain: Chain) -> bool:
    # Twin of saves_pass and saves_keep in csrc/call.h.
    if add_precedes_act(chain) and chain.act in ONE_BIT:
        return True
    return chain.draws() and chain.noise == "bernoulli" and chain.granularity == "element"


@torch.library.register_fake("fusednorm::forward")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    act_weight: Tensor | None,
    seed: Tensor | None,
    training: bool,
    eps: float,
    order: str,
    act: str,
    act_params: list[float],
    noise: str,
    p: float,
    granularity: str,
    ghost_batch_size: int,
    eval_matched_stats: bool,
    save_mask: bool,
    valid: Tensor | None = None,
    strength: Tensor | None = None,
) -> tuple[Tensor, ...]:
    # Twin of check_forward in csrc/ops.cpp, which says why.
    _check_devices(input, weight, bias, running_mean, running_var, residual, act_weight, seed, valid, strength)
    chain = Chain(eps, order, act, act_params, noise, p, granularity, ghost_batch_size)
    output = torch.empty_like(input)
    N, C, S = input.size(0), input.size(1), math.prod(input.shape[2:])
    ghosts = training and 0 < ghost_batch_size < N
    shape = ((N + ghost_batch_size - 1) // ghost_batch_size, C) if ghosts else (C,)
    vector = input.new_empty(shape, dtype=opmath(input))
    clean = eval_matched_stats and training and p > 0 and "drop" in reference.parse_order(order)[0]
    stat_mean = input.new_empty(shape if clean else (0,), dtype=opmath(input))
    size: tuple[int, ...]
    size, on_cuda = (0,), input.device.type == "cuda"
    if save_mask and not ghosts and _saves_bits(chain):
        last = C != 1 and (S == 1 or (not output.is_contiguous() and _is_channels_last(output)))
        if on_cuda:
            calls = (N * S + 7) // 8
            size = (calls, C, 1) if last else (C, calls)
        elif not last and 0 < S < 512 and C > 1 and not chain.draws() and valid is None:
            most = max(1, 1024 // S)
            block = C if most >= C else -(-C // (-(-C // (2 * most)) * 2))
            size = (N, (C - 1) // block * ((block * S + 31) // 32) + (((C - 1) % block + 1) * S + 31) // 32)
        elif not last:
            pieces, length = (N, S) if S >= 512 and N > 1 and C > 1 else (1, N * S)
            size = (C, pieces * ((length + 31) // 32))
        elif C % 32 == 0 or C >= 512:
            size = (N, S, (C + 31) // 32)
    mask = input.new_empty(size, dtype=torch.uint8 if on_cuda else torch.int32)
    return output, vector, torch.empty_like(vector), torch.empty_like(vector), stat_mean, mask


@torch.library.register_fake("fusednorm::backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act_weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    training: bool,
    eps: float,
    order: str,
    act: str,
    act_params: list[float],
    noise: str,
    p: float,
    granularity: str,
    ghost_batch_size: int,
    output_mask: list[bool],
    valid: Tensor | None = None,
    strength: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_devices(input, grad_output, weight, bias, residual, act_weight, save_mean, save_invstd, mask, seed, valid)
    return (
        _gradient(input, input, output_mask[0]),
        _gradient(input, weight, output_mask[1]),
        _gradient(input, bias, output_mask[2]),
        _gradient(input, input, output_mask[3] and "add" in order),
        _gradient(input, act_weight, output_mask[4]),
    )


def _gradient(input: Tensor, of: Tensor | None, wanted: bool) -> Tensor:
    return torch.empty_like(of) if wanted and of is not None else input.new_empty(0)


@torch.library.register_fake("fusednorm::statistics")
def _(
    input: Tensor,
    act_weight: Tensor | None,
    seed: Tensor | None,
    order: str,
    act: str,
    act_params: list[float],
    noise: str,
    p: float,
    granularity: str,
    eval_matched_stats: bool,
    valid: Tensor | None = None,
    strength: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_devices(input, act_weight, seed, valid, strength)
    vector = input.new_empty((input.size(1),), dtype=opmath(input))
    clean = eval_matched_stats and p > 0 and "drop" in reference.parse_order(order)[0]
    stat_mean = torch.empty_like(vector) if clean else vector.new_empty(0)
    return vector, torch.empty_like(vector), stat_mean, torch.empty_like(vector)


@torch.library.register_fake("fusednorm::gradient_sums")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act_weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    eps: float,
    order: str,
    act: str,
    act_params: list[float],
    noise: str,
    p: float,
    granularity: str,
    valid: Tensor | None = None,
    strength: Tensor | None = None,
) -> Tensor:
    _check_devices(input, grad_output, weight, bias, residual, act_weight, save_mean, save_invstd, mask, seed, valid)
    return input.new_empty((5 if act == "prelu" and "act" in order else 2, input.size(1)), dtype=torch.float64)


@torch.library.register_fake("fusednorm::backward_given")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act_weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    sums: Tensor,
    count: Tensor,
    eps: float,
    order: str,
    act: str,
    act_params: list[float],
    noise: str,
    p: float,
    granularity: str,
    output_mask: list[bool],
    valid: Tensor | None = None,
    strength: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_devices(
        input, grad_output, weight, bias, residual, act_weight, save_mean, save_invstd, mask, seed, sums, count
    )
    return (
        _gradient(input, input, output_mask[0]),
        _gradient(input, input, output_mask[1] and "add" in order),
        _gradient(input, act_weight, output_mask[2]),
    )


@torch.library.register_fake("fusednorm::update_stats_")
def _(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    last_count: int,
    momentum: float | None,
    counts: Tensor | None = None,
) -> None:
    _check_devices(mean, running_mean, running_var, num_batches_tracked, var, counts)


@torch.library.register_fake("fusednorm::noise")
def _(seed: Tensor, size: list[int], p: float, kind: str, granularity: str, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(noise_shape(size, granularity), dtype=dtype)


@torch.library.register_fake("fusednorm::dropout")
def _(input: Tensor, seed: Tensor, p: float, kind: str, granularity: str, strength: Tensor | None = None) -> Tensor:
    _check_devices(input, seed, strength)
    return torch.empty_like(input)


# ---- vmap ------------------------------------------------------------------------------------------------------------
# Under vmap everything runs in plain torch (_autograd.py), which has rules of its own, but for these two.
@torch.library.register_vmap("fusednorm::draw_seed")
def _(info: Any, in_dims: Any, like: Tensor) -> tuple[Tensor, int | None]:
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
            "randomness flags on vmap, or give the noise of fusednorm a seed="
        )
    if info.randomness == "same":
        return draw_seed(like), None
    return torch.stack([draw_seed(like) for _ in range(info.batch_size)]), 0


@torch.library.register_vmap("fusednorm::update_stats_")
def _(info: Any, in_dims: Any, *args: Any) -> tuple[None, None]:
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
