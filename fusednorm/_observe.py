"""Runs a model over batches and watches what its BatchNorm layers normalise; then puts everything back.

What `analysis.measure_variance_shift` and `recalibration.recalibrate` share. Noise is switched by the flag that every
kind of noise obeys, a module's own or that of a function called inside a forward: `training`. No list of noise classes
has to be complete. A BatchNorm gets its flag apart from the rest.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _rows
from .functional import Device, world_size


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of every BatchNorm in `model` that has running statistics, the fused ones among them.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a lazy layer that does not know its size yet, or one that shares statistics with other processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }
    for name, layer in layers.items():
        if nn.parameter.is_lazy(layer.running_mean):
            raise ValueError(f"model: {name or 'the layer'} is lazy; run the model once before")
        group = getattr(layer, "process_group", None)
        group = "world" if group is None and isinstance(layer, nn.SyncBatchNorm) else group
        if world_size(group) > 1:
            raise ValueError(f"model: {name or 'the layer'} shares statistics with other processes; use one")
        if getattr(layer, "domains", 1) != 1:
            raise ValueError(f"model: {name or 'the layer'} has several domains, whose values are not told apart here")
    return layers


class Moments:
    """Count, mean and sum of squared deviations per channel, in float64, merged batch by batch (Chan et al. 1983).

    The result does not depend on how the values are split into batches, up to the rounding of float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0  # tensors from the first batch on
        self.squares: Any = 0.0

    def add(self, x: Tensor) -> None:
        """x: (N, C, ...), any floating dtype."""
        count = x.numel() // max(x.size(1), 1)
        if count == 0:
            return
        var, mean = torch.var_mean(x.detach().double(), [0, *range(2, x.dim())], correction=0)
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + var * count + delta.square() * (self.count * count / total)
        self.count = total

    def var(self) -> Any:
        """(C,) the unbiased variance, as torch keeps it in `running_var`."""
        return self.squares / (self.count - 1)


def quotient(new: Tensor, old: Tensor) -> Tensor:
    """new / old, and 1 where both are zero: nothing varies there, so nothing has shifted."""
    return torch.where((new == 0) & (old == 0), 1.0, new / old)


def normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """What `layer` takes its statistics of: x after the stages that a fused layer's order puts before the norm.

    Noise there is drawn anew: the same distribution as in the layer, not the same numbers.
    """
    order = getattr(layer, "order", None)
    stages = order.split("-") if isinstance(order, str) else []
    before = [getattr(layer, stage) for stage in (stages[: stages.index("norm")] if "norm" in stages else [])]
    if any(child is not None for child in before):
        x = x.clone()  # any of them may work in place, and the layer is to find its input as it was
    for child in before:
        x = x if child is None else child(x)
    return x


@contextlib.contextmanager
def borrowed(
    model: nn.Module, layers: Iterable[nn.Module], watch: Callable[[nn.Module, Tensor], None]
) -> Iterator[None]:
    """Calls `watch(layer, values)` with what each of `layers` normalises; no gradients, and all flags come back.

    Meanwhile no layer updates its running statistics. Hooks do not reach into compiled code, so that runs uncompiled.
    """
    flags = [(module, module.training) for module in model.modules()]
    tracking = [(layer, layer.track_running_stats) for layer in batch_norms(model).values()]
    handles = []

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        valid, weights = _rows.resolve(x, *(kwargs.get(name) for name in ("mask", "lengths", "weights")))
        if weights is not None:
            raise ValueError(f"model: {type(layer).__name__} is called with weights, which are not known here")
        values = normalised(layer, x)
        watch(layer, values if valid is None else values.movedim(1, -1)[valid])

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for layer, _ in tracking:
                layer.track_running_stats = False
            for layer in layers:
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, track in tracking:
                layer.track_running_stats = track
            set_flags(flags)


def set_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    # Not train() and eval(): people override those to keep layers frozen, or to merge weights.
    for module, training in flags:
        module.training = training


def check_batches(batches: Any) -> None:
    if isinstance(batches, torch.Tensor) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(f"batches: expected an iterable of batches, but got {type(batches).__name__}; one batch is [x]")


def forward_of(model: nn.Module, forward: Callable[[Any], Any] | None, device: Device) -> Callable[[Any], Any]:
    """The function of a batch that runs the model: `forward` if given, else the model on the batch's first element."""
    if forward is not None:
        return forward

    def call(batch: Any) -> Any:
        if isinstance(batch, (list, tuple)):
            batch = batch[0]
        return model(batch if device is None else batch.to(device))

    return call


def shown(batches: Iterable[Any], description: str, progress: bool, between: bool = False) -> Any:
    """`batches` with a progress bar on standard error, by rich or tqdm; without one where neither is installed.

    It is drawn by a thread of its own, or `between` the batches only, where that would disturb what is measured.
    """
    if not progress:
        return batches
    with contextlib.suppress(ImportError):
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        visible = console.is_terminal or console.is_jupyter
        options: dict[str, Any] = {"console": console, "transient": True, "disable": not visible}
        return track(batches, description, auto_refresh=not between, **options)
    with contextlib.suppress(ImportError):
        from tqdm.auto import tqdm

        return tqdm(batches, desc=description, leave=False, disable=None)
    return batches
