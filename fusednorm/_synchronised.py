"""One step of training whose statistics are those of several processes: the operator's passes apart, and what stands
between them exchanged.

Forward, one all_gather of (mean, var * n, n) of each process, merged by Chan's formula in float64; backward, one
all_reduce of two sums. Gradients of weight, bias and PReLU's weight are of this process's values, as of any parameter
before DistributedDataParallel averages them. Numbers of values stay tensors, so nothing waits for a device.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from . import _operators, _plain, reference
from ._operators import Chain

# The newer name of the two.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


def run(
    tensors: tuple[Tensor | None, ...],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    chain: Chain,
    seed: Tensor | None,
    eval_matched_stats: bool,
    group: Any,
    saves_mask: bool,
) -> Tensor:
    """As `_autograd.run` while training. Every process of the group comes here, one without samples too.

    Args:
        group: of torch.distributed, or "world".

    Raises:
        RuntimeError: where the operator would run in plain torch, as under torch.func's transforms.
    """
    input, weight, bias, running_mean, running_var, residual, act_weight = tensors
    assert input is not None
    reason = _plain.why_plain(True, chain.draws())
    if reason:
        raise RuntimeError(f"process_group: expected none here ({reason}: {_plain.REASONS[reason]})")
    # Before anything is exchanged: who raises here leaves the others waiting for no longer than the group's timeout.
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is not None and vector.numel() != input.shape[1]:
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {vector.numel()}")
    group = dist.group.WORLD if isinstance(group, str) else group
    seed = _operators.seed_for(chain, input, seed)
    with torch.no_grad():
        ahead = chain.order[: chain.order.index("norm") + 4]
        own = _operators.statistics(input, act_weight, seed, ahead, *chain[2:7], eval_matched_stats)
        mean, var, quiet_mean, quiet_var = own
        moments = [(mean, var)]
        if eval_matched_stats and quiet_mean.size(0):
            moments.append((quiet_mean, quiet_var))
        merged, count = _merge(moments, input.numel() // max(input.shape[1], 1), group)
        mean, var = (t.to(mean.dtype) for t in merged[0])
        if running_mean is not None and running_var is not None:
            _update(running_mean, running_var, num_batches_tracked, *merged[-1], count, momentum)
    arguments = (input, weight, bias, residual, act_weight, mean, var, seed, count, chain, group, saves_mask)
    output: Tensor = _Step.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _merge(moments: list[tuple[Tensor, Tensor]], n: int, group: Any) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(mean, var) of all processes' values for those of this one's, in float64, and how many they are."""
    parts = [moments[0][0].new_full((1,), n, dtype=torch.float64)]
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


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
) -> None:
    """torch's running statistics; none of a batch without a value."""
    factor: Any = momentum
    if batches is not None:
        batches.add_(1)
        if momentum is None:
            factor = 1 / batches.double()
    factor = factor * (count > 0).double()
    unbiased = var * (count / (count - 1).clamp_min(1))
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(running.double() * (1 - factor) + batch * factor)


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
        chain: Chain,
        group: Any,
        saves_mask: bool,
    ) -> Tensor:
        tensors = (input, weight, bias, mean, var, residual, act_weight, seed)
        output, mean, invstd, _, _, mask = _operators.forward(*tensors, False, *chain, False, saves_mask)
        ctx.set_materialize_grads(False)
        if residual is not None and not _operators.reads_residual(chain, mask):
            residual = None
        ctx.save_for_backward(input, weight, bias, residual, act_weight, mean, invstd, mask, seed, count)
        ctx.chain, ctx.group = chain, group
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        results: list[Tensor | None] = [None] * 12
        if grad_output is None:  # of no process, as they all compute the same
            return tuple(results)
        *saved, count = ctx.saved_tensors
        weight, bias, invstd = saved[1], saved[2], saved[6]
        needs, chain = ctx.needs_input_grad, ctx.chain
        settings = chain[:7]
        own = _operators.gradient_sums(grad_output, *saved, *settings)
        wanted = [needs[0], needs[3] and not chain.order.endswith("-add"), needs[4]]
        # What decides here is the same in all processes: a residual, and an activation behind the norm, may be fused
        # in one and not in another, by their shapes, and need no sums.
        sums = own
        if needs[0] or (needs[4] and "act" in reference.parse_order(chain.order)[0]):
            reduced = collectives.wait_tensor(collectives.all_reduce(own[:2], "sum", ctx.group))
            sums = torch.cat([reduced, own[2:]])
        if any(wanted):
            given = _operators.backward_given(grad_output, *saved, sums, count, *settings, wanted)
            for at, wants, gradient in zip((0, 3, 4), wanted, given, strict=True):
                results[at] = gradient if wants else None
        if needs[3] and not wanted[1]:
            results[3] = grad_output
        if needs[1]:
            results[1] = (own[1] * invstd).to(weight.dtype)
        if needs[2]:
            results[2] = own[0].to(bias.dtype)
        return tuple(results)
