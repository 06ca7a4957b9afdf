"""Where a call goes: to the kernels and their place in autograd's graph, or to plain torch where `why_plain` says so.

`run` and `run_dropout` take a resolved call. An eager one is a single operator, which knows its gradients
(csrc/autograd.cpp); `_BatchNormActDrop` says the same to compilers, and for tensors with a dispatch of their own.
"""

import math

import torch
from torch import Tensor

from . import _operators, _plain, _running, reference
from ._operators import NO_EXTRAS, Chain, Extras

# Whether backward reads the noise's bits, saved by forward, or draws them again. On the CPU drawing costs more than
# memory. On CUDA (None) it is a matter of instructions: about 11 an element to draw, where a GPU has time for 30 while
# it moves a 16-bit element in and its gradient, and for 60 with float32. So 16-bit types save, others draw again.
# Not part of the interface: for measuring.
SAVE_MASK = {"cpu": True, "cuda": None}


def _saves_mask(input):
    saves = SAVE_MASK["cpu"] if input.is_cpu else SAVE_MASK.get(input.device.type, False)
    return input.element_size() == 2 if saves is None else saves


class _BatchNormActDrop(torch.autograd.Function):
    """(output, save_mean, save_invstd, stat_var, stat_mean, mask); only the output is differentiable.

    The twin of csrc/autograd.cpp.

    `settings` are (training, *Chain).
    """

    @staticmethod
    def forward(
        ctx,
        input,
        weight,
        bias,
        running_mean,
        running_var,
        residual,
        act_weight,
        seed,
        settings,
        eval_matched_stats,
        valid,
        strength,
    ):
        tensors = (input, weight, bias, running_mean, running_var, residual, act_weight, seed)
        results = _operators.forward(
            *(*tensors, *settings, eval_matched_stats, _saves_mask(input)), valid=valid, strength=strength
        )
        _, mean, invstd, *others, mask = results
        ctx.mark_non_differentiable(mean, invstd, *others, mask)
        ctx.set_materialize_grads(False)
        if residual is not None and not _operators.reads_residual(Chain(*settings[1:]), mask):
            residual = None
        # Never the running statistics themselves: the next forward overwrites them.
        ctx.save_for_backward(input, weight, bias, residual, act_weight, mean, invstd, mask, seed, valid, strength)
        ctx.settings = settings
        return results

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 12
        (*saved, valid, strength), inputs = ctx.saved_tensors, ctx.needs_input_grad
        needed = [inputs[0], inputs[1], inputs[2], inputs[5], inputs[6]]
        if _plain.why_plain(backward_of=(grad_output, *saved)):
            grads = _plain.differentiable_backward(grad_output, *saved, ctx.settings, needed, valid, strength)
        else:
            passes = needed[3] and valid is None and _ends_with_add(ctx.settings)
            computed = [*needed[:3], needed[3] and not passes, needed[4]]
            extras = {"valid": valid, "strength": strength}
            grads = [*_operators.backward(grad_output, *saved, *ctx.settings, computed, **extras)]
            if passes:
                grads[3] = grad_output
        gx, gw, gb, gr, ga = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
        return gx, gw, gb, None, None, gr, ga, None, None, None, None, None


@torch.library.impl("fusednorm::differentiable_backward", "CompositeImplicitAutograd")
def _(*arguments):
    tensors, settings, wanted = arguments[:10], arguments[10:19], arguments[19]
    grads = _plain.differentiable_backward(*tensors, settings, wanted)
    return tuple(tensors[1].new_empty(0) if g is None else g for g in grads)


def _ends_with_add(settings):
    # As a word: stages behind it that do nothing this time make no difference worth a second rule.
    return settings[2].endswith("-add")


def _apply(function, *args):
    if torch.compiler.is_compiling():
        return function.apply(*args)
    # Function.apply looks for what is left of transforms in every argument; where they are active, nothing comes here.
    return super(torch.autograd.Function, function).apply(*args)


def _requires_grad(*tensors):
    if torch.is_grad_enabled():
        for t in tensors:  # a loop, as a generator costs a microsecond
            if t is not None and t.requires_grad:
                return True
    return False


def values_per_channel(input: Tensor, ghost_batch_size: int) -> tuple[int, int]:
    """In a group of the batch, and in the last one."""
    shape = input.shape  # asked once: each costs a third of a microsecond
    samples, count = shape[0], math.prod(shape[2:], start=shape[0])
    if not 0 < ghost_batch_size < samples:
        return count, count
    values = count // samples
    return ghost_batch_size * values, (samples - 1) % ghost_batch_size * values + values


def run(
    tensors,
    num_batches_tracked,
    training,
    momentum,
    chain,
    seed,
    eval_matched_stats,
    extras: Extras = NO_EXTRAS,
) -> Tensor:
    """The output of a checked call; updates the running statistics, where given, if `training`.

    Args:
        tensors: input, weight, bias, running_mean, running_var, residual, act_weight.
        seed: None, or a tensor.
    """
    if training and (extras.process_group is not None or extras.renorm is not None):
        from . import _apart  # torch.distributed is slow to import

        return _apart.run(
            *(tensors, num_batches_tracked, momentum, chain, seed, eval_matched_stats, extras), _saves_mask(tensors[0])
        )
    reason = _plain.why_plain(training, chain.draws())
    if _plain.leaves_process(reason):
        return _plain.stock(
            *((*tensors, None), num_batches_tracked, training, momentum, chain, eval_matched_stats, extras)
        )
    input, weight, bias, running_mean, running_var, residual, act_weight = tensors
    if not reason and type(input) is Tensor and extras is NO_EXTRAS and not torch.compiler.is_compiling():
        return _operators.batch_norm_act_drop(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            residual,
            act_weight,
            seed,
            training,
            momentum,
            *chain,
            eval_matched_stats,
            _saves_mask(input),
        )
    seed = _operators.seed_for(chain, input, _operators.beside(input, seed))
    tensors = (*tensors, seed)
    if reason:
        output, mean, var = _plain.exact(tensors, training, chain, eval_matched_stats, extras)
    else:
        if _requires_grad(input, weight, bias, residual, act_weight):
            results = _BatchNormActDrop.apply(
                *(*tensors, (training, *chain), eval_matched_stats, extras.valid, extras.strength)
            )
        else:
            beside = {"valid": extras.valid, "strength": extras.strength}
            results = _operators.forward(*tensors, training, *chain, eval_matched_stats, False, **beside)
        output, mean, _, var, clean_mean, _ = results
        if eval_matched_stats and clean_mean.size(0):
            mean = clean_mean
    if training and running_mean is not None and extras.valid is not None:
        of_groups = [_running.values(*group) for group in _plain.in_groups(input, extras.valid, chain)]
        counts = torch.stack(of_groups) if len(of_groups) > 1 else of_groups[0]
        _running.update(running_mean, running_var, num_batches_tracked, mean, var, counts, momentum)
    elif training and running_mean is not None:
        sizes = values_per_channel(input, chain.ghost_batch_size)
        _operators.update_stats_(running_mean, running_var, num_batches_tracked, mean, var, *sizes, momentum)
    return output


class _Dropout(torch.autograd.Function):
    """x * m, which is its own derivative; so it may be differentiated any number of times."""

    @staticmethod
    def forward(ctx, input, seed, p, noise, granularity, strength):
        ctx.save_for_backward(seed, strength)
        ctx.chain = (p, noise, granularity)
        return _operators.dropout(input, seed, p, noise, granularity, strength=strength)

    @staticmethod
    def backward(ctx, grad_output):
        return run_dropout(grad_output, *ctx.chain, *ctx.saved_tensors), None, None, None, None, None


def run_dropout(input, p, noise, granularity, seed, strength=None) -> Tensor:
    """input * m for an input (N, C, ...) of at most five dimensions, and p > 0."""
    reason = _plain.why_plain()
    if _plain.leaves_process(reason):
        return _plain.stock_noise(input, p if strength is None else strength, noise, granularity)
    if type(input) is not Tensor:
        seed = _operators.beside(input, seed)
    if not _operators.is_live(noise, p):
        seed = torch.zeros((), dtype=torch.int64, device=input.device)  # everything is dropped: looked at by nobody
    elif seed is None:
        seed = _operators.draw_seed(input)
    if reason:
        chain = Chain(0.0, noise=noise, p=p, granularity=granularity)
        m = _plain.multiplier(input, seed, chain, strength)
        assert m is not None
        return (reference.in_opmath(input) * m).to(input.dtype)
    if _requires_grad(input):
        return _apply(_Dropout, input, seed, p, noise, granularity, strength)
    return _operators.dropout(input, seed, p, noise, granularity, strength=strength)
