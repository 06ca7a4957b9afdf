"""The variance shift of dropout before batch normalisation: predicted in closed form, and measured on a model.

Noise of mean 1 and variance alpha leaves the mean of what it multiplies alone and raises the variance; at evaluation
the noise is gone and the variance falls back. The ratio of the two, evaluation over training, is the Delta of Li, Chen,
Hu & Yang, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift" (arXiv 1801.05134,
CVPR 2019). They derive it for Bernoulli noise and equal, equally correlated inputs; here it is exact for any inputs::

    noise, norm          train = v + alpha (v + c^2)                       evaluation = v      (their eq. 8 and 15)
    noise, linear, norm  train = w'S w + alpha sum_i w_i^2 (S_ii + c_i^2)  evaluation = w'S w  (their eq. 12)

with mean c, variance v, covariance S of the values that the noise multiplies. A convolution is the linear case at each
output position, averaged over them: alpha mean(conv(x^2, w^2)), padding and stride included. Noise drawn per channel
multiplies what a whole channel contributes: alpha mean(sum_c conv(x_c, w_c)^2). A bias changes nothing. A nonlinearity
between noise and norm ends it, but one that scales, as ReLU, may be taken before the noise instead.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from . import _observe, functional

__all__ = ["VarianceShift", "alpha_of", "measure_variance_shift", "variance_shift", "variances"]

# Kind -> variance of the multiplier of mean 1. The names and units are those of the functional's `noise` and `p`;
# "alpha" is any noise of that variance.
_ALPHA: dict[str, Callable[[float], float]] = {
    "bernoulli": lambda p: p / (1 - p),
    "uniform": lambda beta: beta * beta / 3,
    "gaussian": lambda alpha: alpha,
    "alpha": lambda alpha: alpha,
}
Noise: TypeAlias = nn.Module | tuple[str, float]  # a module, or (kind, strength)
Moment: TypeAlias = float | Sequence[float] | Tensor  # a number, or (C,)
_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def alpha_of(noise: Noise) -> float:
    """The variance alpha of a multiplicative noise of mean 1: one scale for all kinds.

    Bernoulli p/(1-p) (Srivastava et al. 2014), uniform on (1-beta, 1+beta) beta^2/3 (the Uout of Li et al. 2018),
    Gaussian N(1, alpha). At equal alpha they shift variances equally.

    Args:
        noise: a dropout module, one of torch's or one whose class has an `alpha` property; or (kind, strength) with
            kind "bernoulli", "uniform", "gaussian" or "alpha". Not a bare number: is it a probability or an alpha?

    Raises:
        TypeError: not a noise, or one that does not multiply (alpha dropout).
        ValueError: an unknown kind, a strength outside its range, a probability of 1.
    """
    if isinstance(noise, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        raise TypeError(f"noise: {type(noise).__name__} adds as well as multiplies; expected a multiplicative noise")
    strength: Any
    if isinstance(getattr(type(noise), "alpha", None), property):  # nn.ELU has an alpha too, which is no property
        kind, strength = "alpha", noise.alpha  # type: ignore[union-attr]
    elif isinstance(noise, _DropoutNd):
        kind, strength = "bernoulli", noise.p
    elif isinstance(noise, (tuple, list)) and len(noise) == 2:
        kind, strength = noise
    else:
        raise TypeError(f"noise: expected a dropout module or (kind, strength), but got {noise!r}")
    if kind not in _ALPHA:
        raise ValueError(f"noise: expected one of {', '.join(_ALPHA)}, but got {kind!r}")
    _, largest = functional.NOISES["gaussian" if kind == "alpha" else kind]
    closed = kind == "uniform"  # the others' alpha is infinite there
    strength = float(strength)
    if not (0 <= strength < largest or (closed and strength == largest)):
        raise ValueError(f"noise: {kind} strength {strength} is outside [0, {largest:g}{']' if closed else ')'}")
    return _ALPHA[kind](strength)


def variance_shift(
    noise: Noise,
    input: Tensor | None = None,
    layer: nn.Module | None = None,
    *,
    mean: Moment | None = None,
    var: Moment | None = None,
    cov: Tensor | Sequence[Sequence[float]] | None = None,
    granularity: str | None = None,
) -> Tensor:
    """Predicts evaluation over training variance of what a norm sees behind `noise` (Delta of Li et al. 2018)::

        variance_shift(nn.Dropout(0.5))                        # 0.5: mean 0, noise directly before the norm
        variance_shift(nn.Dropout(0.5), x)                     # the same for a sample of the noise's input
        variance_shift(nn.Dropout2d(0.5), x, conv)             # conv between noise and norm
        variance_shift(("uniform", 0.1), layer=linear, cov=S)  # from moments instead of a sample

    Args:
        noise: as :func:`alpha_of` takes it; whether it is on does not matter.
        input: (N, C, ...) what goes into the noise. The result is exact for these values in the mean over the noise.
        layer: None, or the `nn.Linear` (whose input may have any number of dimensions, features last), convolution or
            transposed convolution between noise and norm. Groups, dilation, stride and padding count; padding that
            repeats values inside one window of the kernel (reflect, replicate) only for noise per channel or sample.
        mean, var, cov: moments of the noise's input, where no sample is given: means c (default 0) and variances v
            (default 1), each a number or (C,), or for a convolution (K,) with K = C * kernel size; or cov, (C, C) or
            (K, K), instead of var. Variances alone mean uncorrelated inputs. For a convolution they describe a window.
        granularity: "element", "channel" (a draw per sample and channel) or "sample"; None takes that of the module.

    Returns:
        float64 in [0, 1], 1 where nothing varies: (C,), or (out_channels,) with a layer, or () from scalar moments.

    Raises:
        TypeError: `noise` is not one, or `layer` is none of the above.
        ValueError: a sample and moments together, sizes that do not match, impossible moments, or a layer for which the
            moments do not say enough (padding, groups).
    """
    clean, added = variances(noise, input, layer, mean, var, cov, granularity)
    return _observe.quotient(clean, clean + added)


@torch.no_grad()
def variances(
    noise: Noise,
    input: Tensor | None = None,
    layer: nn.Module | None = None,
    mean: Moment | None = None,
    var: Moment | None = None,
    cov: Tensor | Sequence[Sequence[float]] | None = None,
    granularity: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(variance without the noise, what the noise adds), float64: the two parts of :func:`variance_shift`."""
    alpha = alpha_of(noise)
    if granularity is None:
        granularity = _granularity(noise, input, layer)
    if granularity not in functional.GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(functional.GRANULARITIES)}, but got {granularity!r}")
    if layer is not None and not isinstance(layer, (nn.Linear, _ConvNd)):
        raise TypeError(f"layer: expected a linear layer, a convolution or None, but got {type(layer).__name__}")
    if input is None:
        clean, added = _from_moments(layer, mean, var, cov, granularity)
    elif mean is not None or var is not None or cov is not None:
        raise ValueError("mean, var, cov: expected None beside a sample of the input")
    else:
        clean, added = _from_sample(input, layer, granularity)
    return clean, alpha * added


def _granularity(noise: Noise, input: Tensor | None, layer: nn.Module | None) -> str:
    if not isinstance(noise, _CHANNEL_DROPOUTS):
        return getattr(noise, "granularity", "element")
    # torch takes these ranks for one sample without a batch dimension: what is dropped there is a whole row.
    rank = input.dim() if input is not None else 2 if isinstance(layer, nn.Linear) else 0
    unbatched = (isinstance(noise, nn.Dropout1d) and rank == 2) or (isinstance(noise, nn.Dropout3d) and rank == 4)
    return "sample" if unbatched else "channel"


# ---- from a sample: (variance without noise, what alpha = 1 adds), per output channel --------------------------------
def _from_sample(x: Tensor, layer: Any, granularity: str) -> tuple[Tensor, Tensor]:
    features = -1 if isinstance(layer, nn.Linear) else 1
    x = x.detach().double()
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"input: expected (N, C, ...) with values, but got shape {tuple(x.shape)}")
    if layer is None:
        return _var(x, features), _mean(x.square(), features)
    weight = layer.weight.detach().double()
    size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    rank = x.dim() if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2
    if x.size(features) != size or x.dim() != rank:
        raise ValueError(f"input: expected what {layer} takes, with a batch dimension, but got shape {tuple(x.shape)}")
    y = _map(layer, x, weight)
    if granularity == "sample":
        added = _mean(y.square(), features)
    elif isinstance(layer, nn.Linear):
        if granularity == "channel" and x.dim() > 2:
            raise ValueError("granularity: 'channel' before a linear layer needs an input (N, C)")
        added = _mean(_map(layer, x.square(), weight.square()), features)
    elif granularity == "channel":
        added = _added_by_channels(layer, x, weight)
    else:
        _check_windows(layer, x)
        added = _mean(_map(layer, x.square(), weight.square(), layer.groups), features)
    return _var(y, features), added


def _rows(x: Tensor, features: int) -> list[int]:
    return [d for d in range(x.dim()) if d != features % x.dim()]


def _mean(x: Tensor, features: int) -> Tensor:
    return x.mean(_rows(x, features))


def _var(x: Tensor, features: int) -> Tensor:
    return x.var(_rows(x, features), correction=0)


def _map(layer: Any, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
    """The layer without its bias, with this weight and this number of groups."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    groups = layer.groups if groups is None else groups
    rank, padding = len(layer.kernel_size), layer.padding
    if isinstance(layer, _ConvTransposeNd):
        apply = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return apply(x, weight, None, layer.stride, padding, layer.output_padding, groups, layer.dilation)
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), 0
    return (F.conv1d, F.conv2d, F.conv3d)[rank - 1](x, weight, None, layer.stride, padding, layer.dilation, groups)


def _added_by_channels(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    inner, outer = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    added = x.new_zeros(layer.out_channels)
    for c in range(layer.in_channels):
        outputs = slice(c // inner * outer, (c // inner + 1) * outer)
        w = weight[c : c + 1] if isinstance(layer, _ConvTransposeNd) else weight[outputs, c % inner].unsqueeze(1)
        added[outputs] += _mean(_map(layer, x[:, c : c + 1], w, 1).square(), 1)
    return added


def _check_windows(layer: Any, x: Tensor) -> None:
    # The squares of the weights are right as long as no window of the kernel meets the same draw twice.
    if layer.padding_mode == "zeros" or not _is_padded(layer):
        return
    extents = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding_mode != "circular" or any(e > s for e, s in zip(extents, x.shape[2:], strict=True)):
        raise ValueError(
            f"layer: padding_mode={layer.padding_mode!r} repeats an element inside one window of the kernel; expected "
            "'zeros' for noise per element"
        )


def _is_padded(layer: Any) -> bool:
    return any(layer._reversed_padding_repeated_twice)


# ---- from moments ----------------------------------------------------------------------------------------------------
def _from_moments(layer: Any, mean: Any, var: Any, cov: Any, granularity: str) -> Iterable[Tensor]:
    if var is not None and cov is not None:
        raise ValueError("var: expected None beside cov")
    weight = None if layer is None else _window(layer)
    like = torch.zeros(()) if weight is None else weight
    mean, var = (_moment(v, layer, like, default) for v, default in ((mean, 0.0), (var, 1.0)))
    if cov is not None:
        cov = torch.as_tensor(cov, dtype=torch.float64, device=like.device)
        sizes = tuple(cov.shape)
        if cov.dim() != 2 or sizes[0] != sizes[1] or (weight is not None and sizes[0] != weight.size(1)):
            wanted = "C, C" if weight is None else f"{weight.size(1)}, {weight.size(1)}"
            raise ValueError(f"cov: expected shape ({wanted}), but got {sizes}")
        if not torch.allclose(cov, cov.T, rtol=1e-6):
            raise ValueError("cov: expected a symmetric matrix")
        var = cov.diagonal()
    if not ((var >= 0) & var.isfinite()).all() or not mean.isfinite().all():
        raise ValueError("mean, var, cov: expected finite values and no negative variance")
    try:
        mean, var = torch.broadcast_tensors(mean, var)
    except RuntimeError:
        raise ValueError(f"mean: expected a number or {var.numel()} values, but got {mean.numel()}") from None
    if weight is None:
        return var, var + mean.square()
    size = weight.size(1)
    cov = (torch.diag(var.expand(size)) if cov is None else cov).to(weight.device)
    mean = mean.expand(size)
    # The noises of two elements of a window are one draw, or independent.
    shared = torch.arange(size, device=weight.device)
    shared = {"element": shared, "channel": shared // (size // _inputs(layer)), "sample": shared * 0}[granularity]
    second = (cov + torch.outer(mean, mean)) * (shared == shared[:, None])
    return ((weight @ m * weight).sum(1).clamp_min(0) for m in (cov, second))


def _inputs(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _window(layer: Any) -> Tensor:
    """(O, K): the weights that meet in one output."""
    if not isinstance(layer, nn.Linear) and (
        isinstance(layer, _ConvTransposeNd) or layer.groups != 1 or _is_padded(layer)
    ):
        raise ValueError("input: expected a sample, as moments cannot tell about padding, groups or transposition")
    weight: Tensor = layer.weight
    return weight.detach().double().flatten(1)


def _moment(value: Moment | None, layer: Any, like: Tensor, default: float) -> Tensor:
    value = torch.as_tensor(default if value is None else value, dtype=torch.float64, device=like.device)
    if layer is None or value.dim() == 0:
        return value
    inputs, size = _inputs(layer), like.size(1)
    if value.shape not in ((inputs,), (size,)):
        raise ValueError(f"mean, var: expected a number or ({inputs},), but got shape {tuple(value.shape)}")
    return value.repeat_interleave(size // value.numel())


# ---- on a model ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class VarianceShift:
    """Variances of what one BatchNorm normalises, each (C,) in float64."""

    training: torch.Tensor  # as in training: noise on
    evaluation: torch.Tensor  # as at evaluation: noise off
    running: torch.Tensor  # what evaluation divides by

    @property
    def ratio(self) -> Tensor:
        """(C,) evaluation over training, as :func:`variance_shift` predicts it."""
        return _observe.quotient(self.evaluation, self.training)

    @property
    def ratio_to_running(self) -> Tensor:
        """(C,) evaluation over running, real_var / moving_var of Li et al. 2018; 1 is no harm done."""
        return _observe.quotient(self.evaluation, self.running)

    @property
    def shift(self) -> float:
        """Their number for a layer, at least 1, the larger of the two quotients of the channels' averages."""
        quotient = float(_observe.quotient(self.evaluation.mean(), self.running.mean()))
        return max(quotient, 1 / quotient) if quotient > 0 else math.inf


def measure_variance_shift(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: functional.Device = None,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, VarianceShift]:
    """Measures, for every BatchNorm of a model, stock or fused, what its input varies by with the noise on and off.

    Each batch runs twice. Once as at evaluation: every module in evaluation mode, so all noise off and norms by running
    statistics. Once as in training, noise on: a model in training mode with the flags it has (layers frozen by `eval()`
    stay so), one in evaluation mode with every flag set. Variances are those over all batches, however they are split.
    Nothing of the model changes, except that noise draws from torch's generator, and that modules which an `order` puts
    before the norm of a fused layer are called once more for every batch.

    A layer that several noises reach, or that follows a shifted norm, shows all their effects together.

    Args:
        model: any module.
        batches, device, forward, progress: as in :func:`fusednorm.recalibration.recalibrate`.

    Returns:
        {layer's name: :class:`VarianceShift`}, in the model's order; layers that are not reached in both modes, or have
        no running statistics, are left out.

    Raises:
        ValueError: no batches, or a layer that saw fewer than two values per channel.
        TypeError: `batches` is a tensor or not iterable, or `model` not a module.
    """
    layers = _observe.batch_norms(model)
    _observe.check_batches(batches)
    off = [(module, False) for module in model.modules()]
    on = [(module, module.training or not model.training) for module in model.modules()]
    seen: tuple[dict[nn.Module, _observe.Moments], ...] = {}, {}  # noise off, on
    mode = 0
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def watch(layer: nn.Module, values: Tensor) -> None:
        seen[mode].setdefault(layer, _observe.Moments()).add(values)

    count = 0
    try:
        with _observe.borrowed(model, layers.values(), watch):
            call = _observe.forward_of(model, forward, device)
            for batch in _observe.shown(batches, "Measuring the variance shift", progress):
                mode = 0
                _observe.set_flags(off)
                call(batch)
                mode = 1
                _observe.set_flags(on)
                call(batch)
                count += 1
    finally:
        # Layers other than BatchNorm may update buffers in training mode (spectral norm does).
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)
    if count == 0:
        raise ValueError("batches: expected at least one")
    found = {name: layer for name, layer in layers.items() if layer in seen[0] and layer in seen[1]}
    for name, layer in found.items():
        if seen[0][layer].count < 2:
            raise ValueError(f"batches: {name or 'the layer'} saw {seen[0][layer].count} values per channel, needs two")
    return {
        name: VarianceShift(seen[1][layer].var(), seen[0][layer].var(), layer.running_var.detach().double().clone())
        for name, layer in found.items()
    }
