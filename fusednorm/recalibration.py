"""Running statistics for evaluation, without the noise that training put into them.

Noise that meets a BatchNorm later in the network raises the variance there; the running variance learns the raised one,
and evaluation, without noise, divides by it (Li et al., arXiv 1801.05134). Two remedies: `recalibrate` looks at data
again with the noise off (theirs; before them Hendrycks & Gimpel, arXiv 1607.02488), and `restore_running_var` takes out
of the running variance what a known noise put in, without data.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _observe, functional
from .analysis import Moment, Noise, alpha_of, variances

__all__ = ["recalibrate", "restore_running_var"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    normalize: Literal["batch", "running"] = "batch",
    passes: int | None = None,
    layers: Iterable[nn.Module] | None = None,
    device: functional.Device = None,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Re-estimates the running statistics of every BatchNorm, stock or fused, with all noise off.

    What :func:`torch.optim.swa_utils.update_bn` does, but for the noise, which stays on there, and for the estimator:
    mean and unbiased variance of all values that the layer normalises (Wu & Johnson, arXiv 2105.07576), accumulated in
    float64, and not a mean over batches. For a layer with no BatchNorm before it they are those of the whole data in
    one batch, however it is split. `num_batches_tracked` becomes the number of batches. All else stays: every
    `training` flag, and when a batch raises the statistics too.

    Deeper layers see what the earlier ones give out, which `normalize` decides:

    - "batch": earlier layers normalise by the statistics of the batch. One pass, the usual approximation.
    - "running": earlier layers normalise by their re-estimated statistics, as they will at evaluation. A pass settles
      one more layer of the longest path, so this takes several; then every layer is exact on any split, and a batch may
      be a single sample.

    Args:
        model: noise that obeys no `training` flag of a module in it, its own or a parent's, stays on.
        batches: iterable of tensors, or of tuples and lists whose first element is the model's input.
        normalize: "batch" or "running".
        passes: how often to go through `batches`. None: once with "batch"; with "running" until nothing changes, at
            most as often as there are layers.
        layers: the BatchNorm modules to re-estimate, None for all in the model that have running statistics and are not
            frozen. The others normalise by their own running statistics.
        device: where to put each input; None leaves it where it is.
        forward: function of a batch that runs the model, for other batches than the above; its result is ignored.
        progress: show a bar, if rich or tqdm is installed.

    Returns:
        {layer's name: (C,) new running variance over the old one}, float64: the real_var / moving_var of Li et al.

    Raises:
        ValueError: no batches, a generator to be gone through twice, fewer than two values per channel, values that
            are not finite, `layers` that are not in the model, layers that share statistics with other processes.
        TypeError: `batches` is a tensor or not iterable, or `model` not a module.

    Warns:
        UserWarning: layers that no batch reached; they keep their statistics.
    """
    available = _observe.batch_norms(model)
    chosen = _choose({n: m for n, m in available.items() if not getattr(m, "frozen", False)}, layers)
    _observe.check_batches(batches)
    if normalize not in ("batch", "running"):
        raise ValueError(f"normalize: expected 'batch' or 'running', but got {normalize!r}")
    if passes is not None and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise ValueError(f"passes: expected a positive int or None, but got {passes!r}")
    limit = passes or (len(chosen) if normalize == "running" else 1)
    if limit > 1 and isinstance(batches, Iterator):
        raise ValueError("batches: expected a list or a DataLoader for several passes, as a generator gives only one")

    before = {layer: [buffer.clone() for buffer in _statistics(layer)] for layer in chosen.values()}
    moments: dict[nn.Module, _observe.Moments] = {}

    def watch(layer: nn.Module, values: Tensor) -> None:
        moments.setdefault(layer, _observe.Moments()).add(values)

    try:
        with _observe.borrowed(model, chosen.values(), watch):
            _observe.set_flags((module, False) for module in model.modules())
            if normalize == "batch":
                _observe.set_flags((layer, True) for layer in chosen.values())
            call = _observe.forward_of(model, forward, device)
            for k in range(limit if chosen else 0):
                moments.clear()
                description = "Recalibrating" if limit == 1 else f"Recalibrating, pass {k + 1} of at most {limit}"
                count = 0
                for batch in _observe.shown(batches, description, progress):
                    call(batch)
                    count += 1
                changed = _write(chosen, moments, count)
                if passes is None and not changed:
                    break
    except BaseException:
        for layer, buffers in before.items():
            for buffer, old in zip(_statistics(layer), buffers, strict=True):
                buffer.copy_(old)
        raise
    missed = [name for name, layer in chosen.items() if layer not in moments]
    if missed:
        warnings.warn(f"recalibrate: no batch reached {', '.join(missed)}; statistics kept", stacklevel=2)
    return {
        name: _observe.quotient(layer.running_var.double(), before[layer][1].double())
        for name, layer in chosen.items()
        if layer in moments
    }


def _statistics(layer: Any) -> list[Tensor]:
    return [b for b in (layer.running_mean, layer.running_var, layer.num_batches_tracked) if b is not None]


def _choose(available: dict[str, Any], layers: Iterable[nn.Module] | None) -> dict[str, Any]:
    if layers is None:
        return available
    chosen = {id(layer) for layer in layers}
    found = {name: layer for name, layer in available.items() if id(layer) in chosen}
    if len(found) != len(chosen):
        raise ValueError("layers: expected BatchNorm modules of the model, not frozen, that have running statistics")
    return found


def _write(chosen: Mapping[str, Any], moments: Mapping[nn.Module, _observe.Moments], count: int) -> bool:
    """Moves the estimates of one pass into the layers; returns whether any moved by more than rounding."""
    if count == 0:
        raise ValueError("batches: expected at least one")
    reached = {name: layer for name, layer in chosen.items() if layer in moments}
    for name, layer in reached.items():  # all before any is written
        if moments[layer].count < 2:
            raise ValueError(f"batches: {name or 'the layer'} saw {moments[layer].count} values per channel, needs two")
        if not (moments[layer].mean.isfinite().all() and moments[layer].squares.isfinite().all()):
            raise ValueError(f"batches: {name or 'the layer'} saw values that are not finite")
    changed = False
    for layer in reached.values():
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        layer.running_mean.copy_(moments[layer].mean)
        layer.running_var.copy_(moments[layer].var())
        # Compared as stored: in bfloat16 the estimates themselves never agree with the buffers.
        scale = layer.running_var + layer.eps
        moved = (layer.running_mean - mean).square() > 1e-12 * scale
        changed = changed or bool((moved | ((layer.running_var - var).abs() > 1e-6 * scale)).any())
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(count)
    return changed


@torch.no_grad()
def restore_running_var(
    layer: _BatchNorm,
    noise: Noise | None = None,
    through: nn.Module | None = None,
    *,
    mean: Moment | None = None,
    var: Moment | None = None,
    shift: Moment | None = None,
) -> Tensor:
    """Takes the noise out of a BatchNorm's running variance by a formula, without data; in place.

    Noise of strength alpha directly before the norm made v + alpha (v + c^2) of the variance v of a channel of mean c
    (Li et al. 2018, eq. 8, for any noise); the mean it left alone. So
    v = (running_var + running_mean^2) / (1 + alpha) - running_mean^2.

    With a linear layer between noise and norm, `through`, the noise added alpha sum_i w_i^2 (v_i + c_i^2), whatever the
    correlations, and that is subtracted. Behind a BatchNorm (the IC layer of Chen et al., arXiv 1905.05928) the noise's
    input has c = its bias and v = its weight^2. For any other place give the `shift` that
    :func:`fusednorm.analysis.variance_shift` predicts there from a sample: the running variance is multiplied by it.

    Where the result is not positive, because the noise's part is nearly all and the running statistics are not exact,
    the channel keeps its variance, and a warning tells how many. Call it once: a restored variance does not show it.

    Args:
        layer: a BatchNorm, stock or fused, that was trained with the noise on.
        noise: the noise directly before the norm, as `variance_shift` takes it. None, without a `shift`: that of the
            layer itself, a fused one whose order puts "drop" directly before "norm".
        through: None, or the `nn.Linear` or convolution (no padding, no groups) between noise and norm.
        mean, var: with `through`, as in `variance_shift`: of the noise's input, default 0 and 1.
        shift: (C,) or a number in (0, 1], instead of all that.

    Returns:
        (C,) new running variance over the old one, float64.

    Raises:
        TypeError: not a BatchNorm, or not a noise, or no linear layer.
        ValueError: no running statistics, arguments that do not go together, no noise to be found, a size that does not
            match, a shift outside (0, 1].
    """
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"layer: expected a BatchNorm, but got {type(layer).__name__}")
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("layer: expected one with running statistics")
    if shift is not None and any(v is not None for v in (noise, through, mean, var)):
        raise ValueError("shift: expected None beside a noise")
    if through is None and (mean is not None or var is not None):
        raise ValueError("mean, var: expected None without a layer to go through")
    old = layer.running_var.to(torch.float64, copy=True)  # float64 buffers would be seen through as they change
    if shift is not None:
        shift = torch.as_tensor(shift, dtype=torch.float64, device=old.device)
        if shift.numel() != 1 and shift.shape != old.shape:
            raise ValueError(f"shift: expected a number or shape {tuple(old.shape)}, but got {tuple(shift.shape)}")
        if not ((shift > 0) & (shift <= 1)).all():
            raise ValueError("shift: expected values in (0, 1]")
        new = old * shift
    else:
        if noise is None:
            noise = _own_noise(layer)
        if through is None:
            square = layer.running_mean.double().square()
            new = (old + square) / (1 + alpha_of(noise)) - square
        else:
            added = variances(noise, layer=through, mean=mean, var=var)[1]
            if added.shape != old.shape:
                raise ValueError(f"through: expected {old.numel()} outputs, but got {added.numel()}")
            new = old - added
        keep = (new <= 0) & (old > 0)
        new = torch.where(keep, old, new).clamp_min(0)
        if keep.any():
            warnings.warn(
                f"restore_running_var: {int(keep.sum())} of {keep.numel()} channels kept their running variance, which "
                "is no more than the noise alone would have given them",
                stacklevel=3,  # over the decorator
            )
    layer.running_var.copy_(new)
    return _observe.quotient(new, old)


def _own_noise(layer: nn.Module) -> nn.Module:
    order = getattr(layer, "order", "norm")
    drop: nn.Module | None = getattr(layer, "drop", None)
    if "drop-norm" not in order or drop is None:
        raise ValueError("noise: expected one, as the layer has none of its own directly before the norm")
    if getattr(layer, "eval_matched_stats", False):
        raise ValueError("layer: its running statistics were gathered without the noise (eval_matched_stats)")
    return drop
