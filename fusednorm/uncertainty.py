"""What a model does not know: stochastic passes over the same input, as one batch, and what they disagree about.

Passes differ by the noise that stays on (Monte-Carlo dropout, Gal & Ghahramani, arXiv 1506.02142), by the statistics
that its BatchNorm layers normalise with (Monte-Carlo batch normalisation, Teye et al., arXiv 1802.06455), or by both.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from . import _observe, functional, reference

__all__ = ["Prediction", "batch_statistics", "effective_batch_size", "predict"]

# {layer's name: (means, variances)} of as many batches for every layer.
Bank: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]


class Prediction(NamedTuple):
    """Over the passes of :func:`predict`, of the probabilities, or of the outputs where these are none.

    Entropies are in nats, and None where the outputs are no probabilities. `mutual_information` is what the passes
    disagree about: the entropy of the mean less the mean of the entropies (BALD, Houlsby et al., arXiv 1112.5745).
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None


@torch.no_grad()
def predict(
    model: nn.Module,
    input: Tensor,
    samples: int = 32,
    seed: int | None = None,
    *,
    output: str | None = "logits",
    dim: int = 1,
    statistics: Bank | int | None = None,
    batch_size: int = 2048,
    noises: Iterable[nn.Module] | None = None,
) -> Prediction:
    """Runs `model` several times over `input`, with noise, and tells the mean and what the passes disagree about.

    The passes are one batch, each row with noise of its own, and what an `nn.Sequential` computes before the first
    noise is computed once. Everything but the noise is in eval mode meanwhile; modes and statistics are as before when
    it returns, and when the model raises, and with a `seed` so are torch's generators. Noise that a module draws once
    for a batch, as stochastic depth may, differs between passes only where these run one by one: `batch_size=1`.

    Args:
        model: takes a batch and gives a tensor whose first dimension is the batch.
        input: (N, ...).
        samples: passes, T.
        seed: of all that is drawn; the same seed and `batch_size` give the same result. None: drawn from torch's
            default generator.
        output: what the model gives: "logits" of classes along `dim`, "probabilities" of classes along `dim`, "binary"
            for logits each of an event of its own, or None for other numbers (regression).
        dim: of the classes.
        statistics: what BatchNorm layers normalise with. None: their running statistics. A bank, as
            :func:`batch_statistics` gathers it: in each pass the statistics of one batch of training, drawn at random,
            the same one for all layers (Teye et al.). An int m >= 2: the running statistics with the noise that batches
            of m values per channel would put on them, independently in each channel: mean N(mu, var / m), variance
            var chi2(m - 1) / m, which is exact for values that are normal and independent. Passes then run one by one.
        batch_size: rows of a batch at most, where a pass has no more by itself.
        noises: the modules that stay on, with all that is in them but BatchNorms; None: torch's and this package's
            dropouts, and the attention and recurrent layers of torch that have a dropout of their own.

    Returns:
        mean and variance (of the passes, divided by T): (N, ...) as the model's output, in float32 for a narrower one;
        entropy and mutual_information: the same without `dim`, or in full for "binary".

    Raises:
        ValueError: nothing in the model is random, a bank that lacks a layer or has batches of other numbers or sizes,
            `statistics` where layers share them with other processes, an argument outside its domain.
        TypeError: an input or an output that is no tensor, or a model that is no module.
    """
    _check(model, input, samples, batch_size, output)
    layers = _moving(model) if statistics is not None else {}
    if noises is None:
        live = [m for m in model.modules() if _is_noise(m)]
    else:
        live = [m for noise in noises for m in noise.modules() if not isinstance(m, _BatchNorm)]
    if not live and statistics is None:
        raise ValueError("model: expected noise in it, or `statistics`, as nothing in it is random")
    draw = _drawer(layers, statistics)
    # Without running statistics a norm would see all passes as one batch.
    alone = draw is not None or any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())
    passes = 1 if alone else max(1, batch_size // max(len(input), 1))
    head, tail = _split(model, {*live, *(layers.values() if draw is not None else ())})
    with _modes([*model.modules(), *live], live), _generators(seed), _without_fast_paths():
        x = _through(head, input)
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != len(input):  # rows are rows at its end only
            x, tail = input, [model]
        results = []
        for first in range(0, samples, passes):
            count = min(passes, samples - first)
            with draw() if draw is not None else contextlib.nullcontext():
                given = _through(tail, x.repeat(count, *[1] * (x.dim() - 1)))
            results.append(_rows(given, count * len(input)).unflatten(0, (count, len(input))))
    return _summary(torch.cat(results), output, dim)


def _split(model: nn.Module, random: set[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The model as modules that are called one after another, before and from the first one with something random."""

    def flat(module: nn.Module) -> Iterator[nn.Module]:
        own = "forward" in module.__dict__ or any(getattr(module, name) for name in _HOOKS)
        if type(module) is nn.Sequential and not own:
            for child in module:
                yield from flat(child)
        else:
            yield module

    parts = list(flat(model))
    first = next((i for i, part in enumerate(parts) if not random.isdisjoint(part.modules())), 0)
    return parts[:first], parts[first:]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")


def _through(modules: Iterable[nn.Module], x: Any) -> Any:
    for module in modules:
        x = module(x)
    return x


def _rows(given: Any, count: int) -> Tensor:
    if not isinstance(given, Tensor) or given.dim() == 0 or len(given) != count or not given.is_floating_point():
        what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        what = f"{what} of {given.dtype}" if isinstance(given, Tensor) else what
        raise TypeError(f"model: expected it to give floats with a row for each of the input's, but got {what}")
    return given


@contextlib.contextmanager
def _generators(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


def _is_noise(module: nn.Module) -> bool:
    """Whether nothing but noise depends on the module's `training`, and there is some."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    return isinstance(module, _DropoutNd)


@contextlib.contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Transformer layers in eval mode would not call the dropouts in them."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _check(model: Any, input: Any, samples: Any, batch_size: Any, output: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
    if not isinstance(input, Tensor) or input.dim() == 0:
        raise TypeError(f"input: expected a tensor (N, ...), but got {type(input).__name__}")
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive int, but got {value!r}")
    if output not in ("logits", "probabilities", "binary", None):
        raise ValueError(f"output: expected 'logits', 'probabilities', 'binary' or None, but got {output!r}")


def _summary(outputs: Tensor, output: str | None, dim: int) -> Prediction:
    """Of (T, N, ...)."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if output is None:
        return Prediction(outputs.mean(0), outputs.var(0, correction=0), None, None)
    sizes = outputs.dim() - 1
    if output != "binary" and not (-sizes < dim < sizes and dim != 0):
        raise ValueError(f"dim: expected one of the {sizes} dimensions of an output, not its first, but got {dim}")
    along = dim + 1 if dim >= 0 else dim
    p = outputs.softmax(along) if output == "logits" else outputs.sigmoid() if output == "binary" else outputs
    mean = p.mean(0)

    def entropy(p: Tensor, along: int) -> Tensor:
        each: Tensor = -torch.special.xlogy(p, p)
        return each - torch.special.xlogy(1 - p, 1 - p) if output == "binary" else each.sum(along)

    total = entropy(mean, dim)
    disagreement = (total - entropy(p, along).mean(0)).clamp_min(0)  # not less than 0 but for rounding
    return Prediction(mean, p.var(0, correction=0), total, disagreement)


@contextlib.contextmanager
def _modes(modules: Iterable[nn.Module], live: Iterable[nn.Module]) -> Iterator[None]:
    flags = [(module, module.training) for module in modules]
    try:
        _observe.set_flags((module, False) for module, _ in flags)
        _observe.set_flags((module, True) for module in live)
        yield
    finally:
        _observe.set_flags(flags)


# ---- statistics of batches -------------------------------------------------------------------------------------------
def batch_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: functional.Device = None,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean and variance that every BatchNorm normalises with in each of some batches of training (Teye et al.).

    The model runs as it trains, noise and all, without gradients; its statistics and modes do not change. Frozen layers
    are left out, as they normalise with what they have.

    Args:
        model, batches, device, forward, progress: as in :func:`recalibrate`. Batches as large as in training.

    Returns:
        {layer's name: (means, variances)}, each (B, C) for B batches, variances without Bessel's correction as the norm
        divides by them: what :func:`predict` takes as `statistics`.

    Raises:
        ValueError: no batches, one with a single value per channel, a layer that a batch reaches more than once or not
            at all, ghost batches, no BatchNorm with running statistics.
        TypeError: `batches` is a tensor or not iterable, or `model` not a module.
    """
    layers = _moving(model)
    if not layers:
        raise ValueError("model: expected a BatchNorm with running statistics in it")
    groups = [name for name, layer in layers.items() if getattr(layer, "ghost_batch_size", None)]
    if groups:
        raise ValueError(
            f"model: expected no ghost batches, but {', '.join(map(repr, groups))} take statistics of parts"
        )
    _observe.check_batches(batches)
    names = {layer: name for name, layer in layers.items()}
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in layers}

    def watch(layer: nn.Module, values: Tensor) -> None:
        if values.numel() <= values.shape[1]:
            raise ValueError("batches: expected more than one value per channel in each")
        for to, value in zip(found[names[layer]], reference.moments(values.double()), strict=True):
            to.append(value.to(layers[names[layer]].running_var.dtype))

    count = 0
    with _observe.borrowed(model, layers.values(), watch):
        _observe.set_flags((module, True) for module in model.modules() if not getattr(module, "frozen", False))
        call = _observe.forward_of(model, forward, device)
        for batch in _observe.shown(batches, "Gathering statistics", progress):
            call(batch)
            count += 1
    if count == 0:
        raise ValueError("batches: expected at least one")
    for name, (means, _) in found.items():
        if len(means) != count:
            raise ValueError(f"model: {name or 'the layer'} was called {len(means)} times in {count} batches")
    return {name: (torch.stack(means), torch.stack(variances)) for name, (means, variances) in found.items()}


def _moving(model: nn.Module) -> dict[str, Any]:
    """The layers whose statistics are a batch's in training."""
    return {name: layer for name, layer in _observe.batch_norms(model).items() if not getattr(layer, "frozen", False)}


def _drawer(layers: Mapping[str, Any], statistics: Any) -> Callable[[], Any] | None:
    """A context in which all layers have statistics that were drawn for one pass; None: they keep their own."""
    if statistics is None:
        return None
    if not layers:
        raise ValueError("statistics: expected None, as the model has no BatchNorm with running statistics")
    if isinstance(statistics, Mapping):
        return _from_bank(layers, statistics)
    if isinstance(statistics, bool) or not isinstance(statistics, int) or statistics < 2:
        raise ValueError(f"statistics: expected a bank, an int of 2 or more, or None, but got {statistics!r}")
    m = statistics

    def of_normal_values() -> Any:
        drawn = {}
        for layer in layers.values():
            mean, var = layer.running_mean, layer.running_var
            chi2 = torch._standard_gamma(torch.full_like(var, (m - 1) / 2, dtype=torch.float64)) * 2
            mean = mean + torch.randn_like(mean) * (var / m).sqrt()
            drawn[layer] = mean, (var * chi2 / m).to(var.dtype)
        return _borrowed_statistics(drawn)

    return of_normal_values


def _from_bank(layers: Mapping[str, Any], bank: Bank) -> Callable[[], Any]:
    missing = [name for name in layers if name not in bank]
    if missing:
        raise ValueError(f"statistics: expected those of {', '.join(map(repr, missing))} too")
    sizes = {len(bank[name][0]) for name in layers}
    for name, layer in layers.items():
        shapes = [list(t.shape) for t in bank[name]]
        if len(sizes) != 1 or shapes != [[*sizes, layer.num_features]] * 2:
            raise ValueError(
                f"statistics: expected means and variances (B, {layer.num_features}) of {name!r}, and as many batches "
                f"for each layer, but got {shapes}"
            )
    count = sizes.pop()
    if count == 0:
        raise ValueError("statistics: expected those of a batch at least")

    def of_a_batch() -> Any:
        i = int(torch.randint(count, ()))
        return _borrowed_statistics({layer: [t[i] for t in bank[name]] for name, layer in layers.items()})

    return of_a_batch


@contextlib.contextmanager
def _borrowed_statistics(drawn: Mapping[Any, Iterable[Tensor]]) -> Iterator[None]:
    own = {layer: (layer.running_mean, layer.running_var) for layer in drawn}
    try:
        for layer, (mean, var) in drawn.items():
            layer.running_mean, layer.running_var = mean.to(layer.running_mean), var.to(layer.running_var)
        yield
    finally:
        for layer, (mean, var) in own.items():
            layer.running_mean, layer.running_var = mean, var


def effective_batch_size(bank: Bank) -> float:
    """The m with which :func:`predict` puts as much noise on means as a bank's batches have, over all channels.

    Values of one sample at neighbouring places are alike, so it is less than the values of a batch. Of m independent
    values the variances' mean is var (m - 1) / m, and the means' variance var / m: m is their ratio and one more.

    Raises:
        ValueError: fewer than two batches.
    """
    if not bank or any(len(means) < 2 for means, _ in bank.values()):
        raise ValueError("bank: expected two batches at least")
    half = torch.tensor((min(len(means) for means, _ in bank.values()) - 1) / 2, dtype=torch.float64)
    bias = float(half.digamma() - half.log())  # of the logarithm of a variance from so many means
    ratios = [(v.double().mean(0) / m.double().var(0)).flatten() for m, v in bank.values()]
    log = torch.cat(ratios).log()
    log = log[log.isfinite()]
    return 1 + math.exp(float(log.mean()) + bias) if len(log) else math.inf
