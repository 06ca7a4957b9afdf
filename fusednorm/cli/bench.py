"""`bench`: a layer as the user describes it, against the stock modules and torch.compile of them, and what to do."""

import argparse
import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _observe, functional, modules, noises
from ..convert.compare import differ
from . import info, plot, timing
from .output import Failed, Line, Outcome, Refused, first_line
from .saved import saved_bytes, vectors

QUIET = 0.5  # load average above which another program is taking a share of the cores
MATTERS = 1.03  # a ratio: less is no difference, as another process has others
_ARGUMENTS = ("act", "p", "order", "noise", "granularity")
NAMES = {"fused": "fused", "eager": "eager", "compile": "torch.compile"}


def run(asked: argparse.Namespace) -> Outcome:
    load = os.getloadavg()[0]  # before this command is a part of it
    plot.check(asked.plot)
    device = _device(asked.device)
    if asked.threads:
        if asked.threads > (os.cpu_count() or 1):
            raise Refused(
                f"--threads: expected at most {os.cpu_count()}, the CPUs of this machine, but got {asked.threads}"
            )
        torch.set_num_threads(asked.threads)
    try:
        facts = _measured(asked, device)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):
            raise  # only on a GPU has the other one a class of its own
        raise Refused(f"--shape: {first_line(error)}") from error
    facts |= {"load_average": round(load, 2), "busy": load > QUIET}
    facts["glibc_tunables"] = os.environ.get("GLIBC_TUNABLES")
    if asked.plot:
        plot.draw(facts, NAMES, "\n".join(_header(facts)), asked.plot)
    return Outcome(0, facts, _lines(facts))


def _measured(asked: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = _inputs(asked, device)
    layer = _layer(asked, device)
    _compare(asked, device, inputs)
    contestants, missing = _contestants(asked, layer, inputs)
    kept = {name: _kept(module, inputs) for name, module in contestants.items()} if not asked.eval else {}
    steps = {name: _step(module, inputs, asked.eval) for name, module in contestants.items()}
    clock = timing.gpu_events if device.type == "cuda" else timing.stopwatch
    taken = timing.take_turns(steps, asked.seconds, clock)
    ratios = {name: timing.ratio(taken[name], taken["fused"]) for name in taken if name != "fused"}
    decision, verdict = judge(ratios, kept)
    return {
        "layer": _described(layer),
        "shape": list(asked.shape),
        "dtype": asked.dtype,
        "layout": "channels-last" if asked.channels_last else "channels-first",
        "order": asked.order,
        "mode": "evaluation" if asked.eval else "training step",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": info.cpu_facts()[0],
        "level": info.level()["in_use"],
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "rounds": len(taken["fused"]),
        "contestants": {
            name: timing.summary(seconds) | {"kept_bytes_per_element": kept.get(name)}
            for name, seconds in taken.items()
        },
        "ratio": ratios,
        "missing": missing,
        "decision": decision,
        "verdict": verdict,
    }


# ---- what is asked for ----------------------------------------------------------------------------------------------
def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise Refused(f"--device: expected cpu, cuda or cuda:0, but got {name!r}")
    if device.type == "cuda":
        facts = info.cuda(torch)
        if not facts["gpu"] or (device.index or 0) >= torch.cuda.device_count():
            raise Refused(f"--device: torch sees no GPU {name!r} here")
        if not facts["kernels"]:
            raise Refused("--device: this build of fusednorm has no CUDA kernels; `info` says what is missing")
    return device


def _inputs(asked: argparse.Namespace, device: torch.device) -> tuple[Tensor, ...]:
    """The input, and what an order with "add" adds, in a layout that a model would have them in."""
    dtype, shape = getattr(torch, asked.dtype), torch.Size(asked.shape)
    # Inputs and gradients, results, and what three contestants keep. A process that takes too much is killed, unasked.
    needed, there = 16 * shape.numel() * dtype.itemsize, _available_bytes() if device.type == "cpu" else None
    if there is not None and needed > there:
        sizes = f"about {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} are available"
        raise Refused(f"--shape: expected a tensor that fits, but {','.join(map(str, shape))} takes {sizes}")
    if asked.channels_last and len(shape) == 2:
        raise Refused("--channels-last: expected a shape of three to five integers, as (N, C) has one layout")

    def tensor() -> Tensor:
        x = torch.randn(shape, device=device).to(dtype)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if asked.channels_last else x
        return x.requires_grad_(not asked.eval)

    return tuple(tensor() for _ in range(1 + ("add" in asked.order.split("-"))))


def _available_bytes() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _layer(asked: argparse.Namespace, device: torch.device, noise: bool = True) -> Any:
    """The fused layer, its parameters away from 1 and 0; without `noise` it has no dropout."""
    dims = max(len(asked.shape) - 2, 1)
    act: Any = None if asked.act in ("none", "identity") else tuple(map(_parameter, asked.act.split(",")))
    try:
        p = functional.check_noise(asked.p, asked.noise, asked.granularity)
        drop = None if p == 0 or not noise else _drop(asked, dims)
        cls = getattr(modules, f"FusedBatchNorm{dims}d")
        # A name alone stays one: it may be that of an activation with a weight of its own.
        act = act[0] if act and len(act) == 1 else act
        # Parameters in float32 beside 16-bit inputs, as under autocast.
        dtype = torch.float64 if asked.dtype == "float64" else torch.float32
        layer = cls(asked.shape[1], act=act, drop=drop, order=asked.order, device=device, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise Refused(_in_its_words(error)) from error
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter, low in ((layer.weight, 0.5), (layer.bias, -0.5)):
            parameter.copy_(low + torch.rand(parameter.shape, generator=generator))
    return layer.train(not asked.eval)


def _parameter(text: str) -> str | float:
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value):
        raise Refused(f"--act: expected parameters that are finite, but got {text!r}")
    return value


def _drop(asked: argparse.Namespace, dims: int) -> nn.Module:
    if asked.noise == "uniform":
        return noises.UniformDropout(asked.p, asked.granularity)
    if asked.noise == "gaussian":
        return noises.GaussianDropout(asked.p, asked.granularity)
    if asked.granularity == "sample":
        return noises.DropPath(asked.p)
    if asked.granularity == "channel" and len(asked.shape) > 2:
        return (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[dims - 1](asked.p)
    return nn.Dropout(asked.p)  # of (N, C) a channel is an element


def _in_its_words(error: Exception) -> str:
    """What the layer says of its arguments, which are called as the options are."""
    name, colon, rest = first_line(error).partition(": ")
    if name == "drop":  # as the layer calls it
        name = "p"
    if colon and name in _ARGUMENTS:
        return f"--{name}: {rest}"
    return f"--p: {error}" if "has to be" in str(error) else first_line(error)


# ---- the contestants ------------------------------------------------------------------------------------------------
def _results(module: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> list[Tensor]:
    module.train(training)
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = module(*leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    # The norm's first: a PReLU ahead of it is ahead of it in stock modules' parameters.
    norm: Any = next(m for m in module.modules() if isinstance(m, _BatchNorm))
    others = [p for p in module.parameters() if p is not norm.weight and p is not norm.bias]
    gradients = torch.autograd.grad(y, [*leaves, norm.weight, norm.bias, *others], grad)
    return [y.detach(), *gradients, *(b.detach().clone() for b in module.buffers())]


def _compare(asked: argparse.Namespace, device: torch.device, inputs: tuple[Tensor, ...]) -> None:
    """Raises Failed unless outputs, gradients and running statistics are eager's, the noise off."""
    layer = _layer(asked, device, noise=False)
    stock = copy.deepcopy(layer.to_torch())
    for training in (False,) if asked.eval else (True, False):
        try:
            expected = _results(stock, inputs, training)
        except ValueError as error:  # torch's own: one value per channel
            raise Refused(f"--shape: {first_line(error)}") from error
        if differ(expected, _results(layer, inputs, training)):
            mode = "in training" if training else "in evaluation"
            raise Failed(
                f"the fused layer differs from the stock modules {mode}, and is not timed; `doctor` may say why"
            )


def _contestants(
    asked: argparse.Namespace, layer: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Those that ran once, and why others could not."""
    stock = layer.to_torch()  # type: ignore[operator]
    contestants: dict[str, nn.Module] = {"fused": layer}
    missing: dict[str, str] = {}
    for name in _observe.shown(["eager"] if asked.no_compile else ["eager", "compile"], "Preparing", True):
        module: Any = copy.deepcopy(stock)
        try:
            if name == "compile":
                # One graph of this shape, or an error: it can never be timed as something that it is not.
                module = torch.compile(module, fullgraph=True, dynamic=False)
            _step(module, inputs, asked.eval)()
            contestants[name] = module
        except Exception as error:
            if name == "eager":
                raise
            missing[name] = f"{type(error).__name__}: {first_line(error)}"
    return contestants, missing


def _kept(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Bytes that a training forward keeps for its backward, for each element of the input."""
    return saved_bytes(module, *inputs, ignore=vectors(inputs[0].shape[1])) / inputs[0].numel()


def _step(module: Any, inputs: tuple[Tensor, ...], evaluation: bool) -> Callable[[], object]:
    if evaluation:

        def forward() -> object:
            with torch.no_grad():
                return module(*inputs)

        return forward
    y = module(*inputs)
    # In a model the gradient arrives in the layout of the layer's own output, and is handed on, not accumulated.
    grad, leaves = torch.randn_like(y), [*inputs, *module.parameters()]
    return lambda: torch.autograd.grad(module(*inputs), leaves, grad)


# ---- the verdict ----------------------------------------------------------------------------------------------------
def judge(ratios: dict[str, dict[str, float]], kept: dict[str, float]) -> tuple[str, str]:
    """(fuse, leave or even, a sentence), by the fastest of the others; `kept`: bytes for each element."""
    fastest = min(ratios, key=lambda name: ratios[name]["median"])
    best = ratios[fastest]
    memory = (
        f"; fused keeps {kept['fused']:.1f} bytes an element for backward, eager {kept['eager']:.1f}" if kept else ""
    )
    if best["p20"] > 1 and best["median"] >= MATTERS:
        times = " and ".join(f"{_times(ratios[n]['median'])} faster than {NAMES[n]}" for n in NAMES if n in ratios)
        return "fuse", f"fuse it: {times}{memory}"
    if best["p80"] < 1 and best["median"] <= 1 / MATTERS:
        return "leave", f"leave it: {NAMES[fastest]} is {_times(1 / best['median'])} faster{memory}"
    return "even", f"no difference beyond noise{memory}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio < 2 else f"{ratio:.1f} times"


def _described(layer: Any) -> str:
    children = [repr(child) for child in (layer.act, layer.drop) if child is not None]
    return f"{type(layer).__name__}({', '.join([str(layer.num_features), *children])}, order={layer.order!r})"


def _header(facts: dict[str, Any]) -> list[str]:
    """What was timed, how and where."""
    where = facts["device"] if facts["device"] != "cpu" else f"{facts['cpu']}, {facts['level']}"
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    return [
        facts["layer"],
        f"{facts['mode']} of ({', '.join(map(str, facts['shape']))}) {facts['dtype']}, {facts['layout']}",
        f"{where}, {threads}, torch {facts['torch']}, load average {facts['load_average']:.2f}",
    ]


def _lines(facts: dict[str, Any]) -> list[Line]:
    lines: list[Line] = [("", text) for text in _header(facts)]
    lines.append(("", ""))
    lines.append(("", f"{'':13}  {'ms':>9}  {'20%..80%':>19}  {'over fused':>10}  {'kept B/elem':>11}"))
    for name, row in facts["contestants"].items():
        between = f"{_ms(row['p20_ms'])}..{_ms(row['p80_ms'])}"
        ratio = f"{facts['ratio'][name]['median']:.2f}x" if name in facts["ratio"] else ""
        kept = row["kept_bytes_per_element"]
        kept = "" if kept is None else f"{kept:.2f}"
        lines.append(
            ("", f"{NAMES[name]:13}  {_ms(row['median_ms']):>9}  {between:>19}  {ratio:>10}  {kept:>11}".rstrip())
        )
    lines.append(("", f"medians of {facts['rounds']} rounds"))
    lines += [("", f"{NAMES[name]} could not run: {reason}") for name, reason in facts["missing"].items()]
    lines.append(("", ""))
    if facts["device"] == "cpu" and not facts["glibc_tunables"]:
        mapped = "glibc's allocator is as it is: it maps large tensors anew in each step, at the cost of who makes more"
        lines.append(("", f"{mapped} of them. `--help` has the settings without."))
    if facts["busy"]:
        busy = "The load average says that the cores had other work before: these figures may be wrong by as much as"
        lines.append(("", f"{busy} a factor of two."))
    return [*lines, ("", facts["verdict"])]


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
