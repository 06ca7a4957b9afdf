"""The operator's stages in plain torch: when that runs instead of the kernels, and how.

`why_plain` decides, for all of the package, and `REASONS` says why. Two renderings follow. `exact` is the formula of
the kernels with their own noise, for whatever differentiates in ways of its own. `stock` calls what the stock layers
call, noise included, for programs that leave this process: what is exported or traced needs no fusednorm to run.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import _operators, _running, reference
from ._operators import NO_EXTRAS, Chain

REASONS = {
    "export": "an exported program (torch.export, ONNX, AOTInductor) runs where fusednorm is not",
    "trace": "and so does a traced one (torch.jit.trace, make_fx)",
    "transform": "torch.func's transforms differentiate and batch each operation by rules of torch's own",
    "forward mode": "tangents pass through torch's operations only",
    "compiled evaluation": "without noise the compiler fuses the stages with their neighbours, which is faster",
    "double backward": "a gradient that is differentiated again has to be a graph, from the input on",
}
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_LEAVING = ("export", "trace", "compiled evaluation")


def why_plain(training: bool = True, draws: bool = True, backward_of: Sequence[Tensor | None] = ()) -> str | None:
    """The reason to run in plain torch, a key of REASONS, or None: the kernels do it.

    Args:
        training: whether statistics are those of the batch.
        draws: whether noise is live.
        backward_of: in a backward, the tensors that its result depends on.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and torch.compiler.is_exporting():
        return "export"
    # While compiling too: what requires_grad says of the arguments of a compiled torch.func.grad is not true.
    if torch._C._are_functorch_transforms_active():
        return "transform"
    if compiling:
        return None if training or draws or backward_of else "compiled evaluation"
    if forward_ad._current_level >= 0:  # before the next, as torch.func.linearize traces it
        return "forward mode"
    if torch.jit.is_tracing() or torch._C._get_dispatch_mode(_PROXY) is not None:  # type: ignore[attr-defined]
        return "trace"
    if backward_of and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in backward_of):
        return "double backward"
    return None


def leaves_process(reason: str | None) -> bool:
    """Whether that reason asks for `stock`: the program may run without fusednorm, and has the stock layers' noise."""
    return reason in _LEAVING


def act_of(chain: Chain, act_weight: Tensor | None) -> reference.Activation:
    """The activation as `reference` takes it."""
    return (chain.act, *chain.act_params) if act_weight is None else (chain.act, act_weight)


def multiplier(input: Tensor, seed: Tensor | None, chain: Chain, strength: Tensor | None = None) -> Tensor | None:
    """The kernels' noise as a tensor to multiply by, None where there is none."""
    if not chain.drops():
        return None
    if not chain.draws():
        return input.new_zeros(())
    dtype = _operators.opmath(input)
    if strength is None:
        return _operators.noise(seed, input.shape, chain.p, chain.noise, chain.granularity, dtype)
    assert seed is not None
    return varying(seed, input.shape, strength, chain.noise, chain.granularity).to(dtype)


def multiplier_ahead(input: Tensor, seed: Tensor | None, chain: Chain, strength: Tensor | None) -> Tensor | None:
    """The same where a norm's statistics see it; None, and nothing drawn, where all noise is behind the norm."""
    return multiplier(input, seed, chain, strength) if "drop" in reference.parse_order(chain.order)[0] else None


def varying(seed: Tensor, shape: Sequence[int], strength: Tensor, kind: str, granularity: str) -> Tensor:
    """The kernels' noise at a strength that is a tensor, from that at the strength 1, in float64."""
    p = strength.double()
    unit = _operators.noise(seed, shape, 1.0, "gaussian" if kind == "gaussian" else "uniform", granularity, p.dtype)
    if kind == "gaussian":
        return 1 + p.sqrt() * (unit - 1)
    if kind == "uniform":
        return 1 + p * (unit - 1)
    draw = (unit * 65536 - 1) / 2  # which is 1 + ((2 draw + 1) / 65536 - 1)
    threshold = ((1 - p) * 65536 + 0.5).floor().clamp(1, 65535)
    kept = torch.where(p <= 0, 1.0, torch.where(p >= 1, 0.0, 65536 / threshold))
    return torch.where((draw < threshold) | (p <= 0), kept, 0.0)


# ---- as the kernels compute it ---------------------------------------------------------------------------------------
def rows_of(valid: Tensor | None) -> Tensor | None:
    """As `reference` takes them."""
    return None if valid is None else valid.unsqueeze(1)


def entering(tensors: Sequence[Any], chain: Chain, valid: Tensor | None, m: Tensor | None) -> Tensor:
    """u: what enters the norm, with zeros where rows do not count."""
    input, act_weight = reference.in_opmath(tensors[0]), tensors[6]
    rows = rows_of(valid)
    if rows is not None:
        input = torch.where(rows, input, 0)
    return reference.run_stages(reference.parse_order(chain.order)[0], input, act_of(chain, act_weight), m)


def exact(tensors, training, chain, eval_matched_stats, extras=NO_EXTRAS):
    """(output, mean, variance for the running statistics), differentiable any number of times in any mode."""
    input, _, _, running_mean, running_var, *_, seed = tensors
    if not training and any(forward_ad.unpack_dual(t).tangent is not None for t in (running_mean, running_var)):
        raise RuntimeError("batch_norm is not differentiable wrt running_mean and running_var, but one has a tangent")
    m = multiplier(input, seed, chain, extras.strength)
    output = _by_reference(tensors, training, chain, extras.valid, m)
    if not training or running_mean is None:
        return output, None, None
    with torch.no_grad():
        u = entering(tensors, chain, extras.valid, None if eval_matched_stats else m)
        moments = [reference.moments(*group) for group in in_groups(u, extras.valid, chain)]
    moments = moments[0] if len(moments) == 1 else [torch.stack(parts) for parts in zip(*moments, strict=True)]
    return output, *(forward_ad.unpack_dual(t).primal for t in moments)  # no_grad lets tangents pass


def _by_reference(tensors, training, chain, valid, m):
    input, weight, bias, running_mean, running_var, residual, act_weight, _ = tensors
    return reference.batch_norm_act_drop(
        *(input, running_mean, running_var, weight, bias, training),
        eps=chain.eps,
        act=act_of(chain, act_weight),
        order=chain.order,
        residual=residual,
        noise=m,
        ghost_batch_size=chain.ghost_batch_size,
        mask=rows_of(valid),
    )


def in_groups(u: Tensor, valid: Tensor | None, chain: Chain) -> list[tuple[Tensor, Tensor | None]]:
    """`u` and the rows of it that count, by ghost batch."""
    groups = reference.ghosts(u, chain.ghost_batch_size)
    rows = rows_of(valid)
    counting = [None] * len(groups) if rows is None else reference.ghosts(rows, chain.ghost_batch_size)
    return list(zip(groups, counting, strict=True))


def differentiable_backward(
    grad_output,
    input,
    weight,
    bias,
    residual,
    act_weight,
    mean,
    invstd,
    mask,
    seed,
    settings,
    needed,
    valid=None,
    strength=None,
):
    """The gradients as a graph.

    In training the statistics are recomputed from `input`: the saved ones are constants here, and with them the first
    derivative would be right and the second one wrong.
    """
    training, *chain = settings
    chain = Chain(*chain)
    before, after = reference.parse_order(chain.order)
    m = multiplier(input, seed, chain, strength)
    order, factor = chain.order, None
    if "add" in after and residual is None:
        # It was not saved, as it has no say in the derivative of what follows: a constant factor (an activation there
        # is piecewise linear), which is the residual's gradient for a gradient of ones.
        with torch.no_grad():
            factor = _operators.backward(
                *(torch.ones_like(input), input, weight, bias, residual, act_weight, mean, invstd, mask, seed),
                *settings,
                [False, False, False, True, False],
                *(valid, strength),
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
            act=act_of(chain, act_weight),
            order=order,
            residual=residual,
            noise=m,
            ghost_batch_size=chain.ghost_batch_size,
            mask=rows_of(valid),
        )
        return y if factor is None else y * factor

    parts = [t for t, w in zip(leaves, wanted, strict=True) if w]
    if torch._C._are_functorch_transforms_active():
        grads = torch.func.vjp(output, *parts)[1](grad_output)
    else:
        again = torch.is_grad_enabled()  # or else only tangents are to pass
        with torch.enable_grad():
            # Aliases: a weight that was itself computed from the input must not lead back to it.
            parts = [t.view_as(t) for t in parts]
            grads = torch.autograd.grad(output(*parts), parts, grad_output, create_graph=again, allow_unused=True)
    grads = iter(grads)
    grads = [next(grads) if w else None for w in wanted]
    if needed[3] and factor is not None:
        grads[3] = grad_output * factor
    return grads


# ---- as the stock layers compute it ----------------------------------------------------------------------------------
def stock(tensors, num_batches_tracked, training, momentum, chain, eval_matched_stats, extras=NO_EXTRAS):
    """The output, by the functions behind the stock layers; updates the running statistics as they do."""
    if extras.valid is not None or (extras.strength is not None and chain.drops()):
        return _stock_extras(tensors, num_batches_tracked, training, momentum, chain, eval_matched_stats, extras)
    input, weight, bias, running_mean, running_var, residual, act_weight, _ = tensors
    act, (before, after) = act_of(chain, act_weight), reference.parse_order(chain.order)

    def norm(u, mean, var, weight=None, bias=None):
        if not training or mean is None:
            return F.batch_norm(u, mean, var, weight, bias, training, 0.0, chain.eps)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average, whose factor F.batch_norm cannot take from a tensor
            batch_mean, batch_var = reference.moments(u)
            factor, count = 1 / num_batches_tracked.to(mean.dtype), u.numel() // u.size(1)
            mean.lerp_(batch_mean.to(mean.dtype), factor)
            var.lerp_((batch_var * (count / (count - 1))).to(var.dtype), factor)
            mean = var = None
        return F.batch_norm(u, mean, var, weight, bias, True, 0.0 if mean is None else momentum, chain.eps)

    def noise(v):
        return stock_noise(v, chain.p, chain.noise, chain.granularity)

    u = reference.run_stages(before, input, act, noise if chain.drops() else None)
    if not training:
        z = norm(u, running_mean, running_var, weight, bias)
    else:
        clean = eval_matched_stats and chain.drops() and "drop" in before
        groups = reference.ghosts(u, chain.ghost_batch_size)
        if clean:
            for group in reference.ghosts(reference.run_stages(before, input, act), chain.ghost_batch_size):
                norm(group, running_mean, running_var)
            running_mean = running_var = None
        z = [norm(group, running_mean, running_var, weight, bias) for group in groups]
        z = z[0] if len(z) == 1 else torch.cat(z)
    return reference.run_stages(after, z, act, noise if chain.drops() else None, residual)


def _stock_extras(tensors, num_batches_tracked, training, momentum, chain, eval_matched_stats, extras):
    """What no stock layer has, by torch's operations and generators."""
    input, _, _, running_mean, running_var, *_ = tensors
    valid, m = extras.valid, None
    if chain.drops():
        ones = input.new_ones(_operators.noise_shape(input.shape, chain.granularity), dtype=_operators.opmath(input))
        p = chain.p if extras.strength is None else extras.strength
        m = stock_noise(ones, p, chain.noise, chain.granularity)
    if training and running_mean is not None:
        with torch.no_grad():
            u = entering(tensors, chain, valid, None if eval_matched_stats else m)
            for group, counting in in_groups(u, valid, chain):
                mean, var = reference.moments(group, counting)
                count = _running.values(group, counting)
                _running.update_in_torch(running_mean, running_var, num_batches_tracked, mean, var, count, momentum)
    return _by_reference(tensors, training, chain, valid, m)


def stock_noise(v: Tensor, p: float | Tensor, kind: str, granularity: str) -> Tensor:
    """`v` times noise of torch's own generators: F.dropout's at the noise's granularity, torch.rand, torch.randn."""
    if kind == "bernoulli" and granularity == "element" and not isinstance(p, Tensor):
        return F.dropout(v, p)
    ones = v.new_ones(_operators.noise_shape(v.shape, granularity))
    if isinstance(p, Tensor):
        p = p.to(v.dtype)
    if kind == "bernoulli":
        return v * (_kept(ones, p) if isinstance(p, Tensor) else F.dropout(ones, p))
    if kind == "uniform":
        return v * (ones + p * (2 * torch.rand_like(ones) - 1))
    return v * (ones + p**0.5 * torch.randn_like(ones))


def _kept(ones: Tensor, p: Tensor) -> Tensor:
    """F.dropout of ones at a probability that is a tensor."""
    scale = torch.where(p < 1, 1 / (1 - p).clamp_min(torch.finfo(p.dtype).tiny), 0)
    return torch.where(torch.rand_like(ones) >= p, scale, 0)
