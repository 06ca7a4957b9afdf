"""One step of training in which something stands between statistics and output: the operator's passes apart.

Several processes share statistics. Forward, one all_gather of (mean, var * n, n) of each, merged by Chan's formula in
float64; backward, one all_reduce of two sums. Gradients of weight, bias and PReLU's weight are of this process's
values, as of any parameter before DistributedDataParallel averages them. Numbers of values stay tensors, so nothing
waits for a device.

Batch renormalisation corrects the batch's statistics towards the running ones, by an affine map of the normalised
values whose coefficients are constants in backward (Ioffe 2017): it is folded into weight and bias.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from . import _operators, _plain, _running, reference
from ._operators import Chain, Extras

# The newer name of the two.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


def run(
    tensors: tuple[Tensor | None, ...],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    chain: Chain,
    seed: Tensor | None,
    eval_matched_stats: bool,
    extras: Extras,
    saves_mask: bool,
) -> Tensor:
    """As `_autograd.run` while training. Every process of a group comes here, one without samples too.

    Raises:
        RuntimeError: where the operator would run in plain torch, as under torch.func's transforms, with a group; a
            program that leaves the process.
    """
    group = extras.process_group
    input, weight, bias, running_mean, running_var, residual, act_weight = tensors
    assert input is not None
    reason = _plain.why_plain(True, chain.draws())
    if reason and (group is not None or _plain.leaves_process(reason)):
        name = "process_group" if group is not None else "renorm"
        raise RuntimeError(f"{name}: expected none here ({reason}: {_plain.REASONS[reason]})")
    # Before anything is exchanged: who raises here leaves the others waiting for no longer than the group's timeout.
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _operators.check_vectors(input.shape[1], vectors)
    group = dist.group.WORLD if isinstance(group, str) else group
    seed = _operators.seed_for(chain, input, _operators.beside(input, seed))
    valid, strength = extras.valid, extras.strength
    with torch.no_grad():
        if extras.global_noise and seed is not None and group is not None:
            seed = _numbered(seed, input.shape[0], group)
        count = _running.values(input, _plain.rows_of(valid))
        if reason:
            m = _plain.multiplier_ahead(input, seed, chain, strength)
            moments = [reference.moments(_plain.entering(tensors, chain, valid, m), _plain.rows_of(valid))]
        else:
            ahead = chain.order[: chain.order.index("norm") + 4]
            mean, var, quiet_mean, quiet_var = _operators.statistics(
                *(input, act_weight, seed, ahead, *chain[2:7], eval_matched_stats), valid=valid, strength=strength
            )
            moments = [(mean, var)]
            if eval_matched_stats and quiet_mean.size(0):
                moments.append((quiet_mean, quiet_var))
        if group is not None:
            moments, count = _merge(moments, count, group)
        mean, var = (t.to(_operators.opmath(input)) for t in moments[0])
    if extras.renorm is not None:
        assert running_mean is not None and running_var is not None
        correction = _renorm(mean, var, running_mean, running_var, chain.eps, *extras.renorm)
        weight, bias = _corrected(weight, bias, *correction)
    if reason:
        corrected = (input, weight, bias, *tensors[3:], seed)
        output: Tensor
        output, mean, var = _plain.exact(  # type: ignore[no-untyped-call]
            corrected, True, chain, eval_matched_stats, extras
        )
        moments = [(mean, var)]
    else:
        arguments = (input, weight, bias, residual, act_weight, mean, var, seed, count, valid, strength)
        output = _Step.apply(*arguments, chain, group, saves_mask)  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            _running.update(running_mean, running_var, num_batches_tracked, *moments[-1], count, momentum)
    return output


def _numbered(seed: Tensor, samples: int, group: Any) -> Tensor:
    """The first process's seed, and where in the batch of all processes the samples of this one begin."""
    own = torch.stack([seed.reshape(()), torch.full_like(seed.reshape(()), samples)])
    every = collectives.wait_tensor(_all_gather(own[None], 0, group))
    return torch.stack([every[0, 0], every[: dist.get_rank(group), 1].sum()])


def _renorm(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: float, d_max: float
) -> tuple[Tensor, Tensor]:
    """r and d of Ioffe 2017 (arXiv 1702.03275), algorithm 1; sigma has the epsilon of the layer in it."""
    with torch.no_grad():
        sigma = (running_var.to(var.dtype) + eps).sqrt()
        r = ((var + eps).sqrt() / sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean.to(mean.dtype)) / sigma).clamp(-d_max, d_max)
    return r, d


def _corrected(weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of (xhat * r + d) * weight + bias, as a map of xhat."""
    if weight is None:
        return r, d if bias is None else d + bias
    weight = weight.to(r.dtype)
    return weight * r, weight * d if bias is None else weight * d + bias


def _merge(moments: list[tuple[Tensor, Tensor]], n: Tensor, group: Any) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(mean, var) of all processes' values for those of this one's, in float64, and how many they are."""
    parts = [n.reshape(1)]
    for mean, var in moments:
        parts += [mean.double(), var.double() * n]
    own = torch.cat(parts)
    gathered = collectives.wait_tensor(_all_gather(own[None], 0, group))
    counts, *rows = gathered.split([1] + [len(p) for p in parts[1:]], 1)
    count = counts.sum()
    merged = []
    for mean, squares in zip(rows[::2], rows[1::2], strict=True):
        middle = (counts * mean).sum(0) / count.clamp_min(1)
        squares = squares.sum(0) + (counts * (mean - middle).square()).sum(0)  # Chan, Golub & LeVeque 1983
        merged.append((middle, squares / count.clamp_min(1)))
    return merged, count


class _Step(torch.autograd.Function):
    """The output of an operator whose statistics are given, and its gradients as if it had taken them itself."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        act_weight: Tensor | None,
        mean: Tensor,
        var: Tensor,
        seed: Tensor | None,
        count: Tensor,
        valid: Tensor | None,
        strength: Tensor | None,
        chain: Chain,
        group: Any,
        saves_mask: bool,
    ) -> Tensor:
        tensors = (input, weight, bias, mean, var, residual, act_weight, seed)
        output, mean, invstd, _, _, mask = _operators.forward(
            *(*tensors, False, *chain, False, saves_mask), valid=valid, strength=strength
        )
        ctx.set_materialize_grads(False)
        if residual is not None and not _operators.reads_residual(chain, mask):
            residual = None
        saved = (input, weight, bias, residual, act_weight, mean, invstd, mask, seed)
        ctx.save_for_backward(*saved, count, valid, strength)
        ctx.chain, ctx.group = chain, group
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        results: list[Tensor | None] = [None] * 14
        if grad_output is None:  # of no process, as they all compute the same
            return tuple(results)
        *saved, count, valid, strength = ctx.saved_tensors
        extras = {"valid": valid, "strength": strength}
        weight, bias, invstd = saved[1], saved[2], saved[6]
        needs, chain = ctx.needs_input_grad, ctx.chain
        settings = chain[:7]
        passes = needs[3] and valid is None and chain.order.endswith("-add")
        wanted = [needs[0], needs[3] and not passes, needs[4]]
        if passes:
            results[3] = grad_output
        if ctx.group is None:
            asked = [wanted[0], needs[1], needs[2], *wanted[1:]]
            given = _operators.backward(grad_output, *saved, True, *chain, asked, **extras)
            for at, (wants, gradient) in enumerate(zip(asked, given, strict=True)):
                results[at] = gradient if wants else results[at]
            return tuple(results)
        own = _operators.gradient_sums(grad_output, *saved, *settings, **extras)
        # What decides here is the same in all processes: a residual, and an activation behind the norm, may be fused
        # in one and not in another, by their shapes, and need no sums.
        sums = own
        if needs[0] or (needs[4] and "act" in reference.parse_order(chain.order)[0]):
            reduced = collectives.wait_tensor(collectives.all_reduce(own[:2], "sum", ctx.group))
            sums = torch.cat([reduced, own[2:]])
        if any(wanted):
            given = _operators.backward_given(grad_output, *saved, sums, count, *settings, wanted, **extras)
            for at, wants, gradient in zip((0, 3, 4), wanted, given, strict=True):
                results[at] = gradient if wants else results[at]
        if needs[1]:
            results[1] = (own[1] * invstd).to(weight.dtype)
        if needs[2]:
            results[2] = own[0].to(bias.dtype)
        return tuple(results)
