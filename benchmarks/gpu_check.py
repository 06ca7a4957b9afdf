"""Is the library right on this GPU? A minute, no pytest: the same calls on the CPU and on the GPU.

`--short` is a few seconds of every kernel, for compute-sanitizer, under which each launch takes long.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import torch

import fusednorm
from benchmarks import gpu_variants
from fusednorm import functional

# Relative to the largest value of a result; sums of many terms get more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}
DTYPES = tuple(TOLERANCE)
VARIANTS = (gpu_variants.DEFAULT, *gpu_variants.STREAMING, *gpu_variants.RESIDENT)

# (N, C, spatial sizes): one block and several, whole vectors and tails, one channel, few values, rows.
SHAPES = (
    (6, 16, 8, 8),
    (5, 33, 3, 7),
    (16, 64, 7, 7),
    (8, 4, 56, 56),
    (64, 3, 40, 40),
    (3, 2, 1025),
    (2, 1, 64, 64),
    (33, 40),
    (4096, 256),
    (2, 300),
    (2, 6, 3, 2, 5),
)
SHORT = ((4, 8, 6, 6), (3, 33, 7, 7), (2, 4, 40, 40), (40, 36), (5, 3, 129))


def last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(shape, dtype, channels_last: bool) -> dict:
    """On the CPU. Values are spread out: two that lie close together would normalise to anything."""
    draw = torch.Generator().manual_seed(1)
    n, c = shape[0] * torch.Size(shape[2:]).numel(), shape[1]
    x = torch.rand(c, n, generator=draw).argsort(1).double() / n * 3.4 - 1.7
    x = (x + 0.3).reshape(c, shape[0], *shape[2:]).transpose(0, 1).contiguous()
    g = torch.randn(shape, generator=draw)
    place = last if channels_last else torch.Tensor.contiguous
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": place(x.to(dtype)),
        "g": place(g.to(dtype)),
        "weight": (0.5 + torch.rand(c, generator=draw)).to(vector),
        "bias": (torch.rand(c, generator=draw) - 0.5).to(vector),
        "mean": torch.zeros(c, dtype=vector),
        "var": torch.ones(c, dtype=vector),
    }


def call(t: dict, device, **options) -> dict:
    t = {name: value.clone().to(device) for name, value in t.items()}
    # The memory that the results will get holds NaN: what a call leaves unwritten is seen.
    poison = [torch.full_like(t["x"], float("nan")) for _ in range(3)]
    del poison
    leaves = [t[name].requires_grad_() for name in ("x", "weight", "bias")]
    names = ["x", "weight", "bias"]
    if "residual" in t:
        names.append("residual")
        leaves.append(t["residual"].requires_grad_())
        options = options | {"residual": t["residual"]}
    y = functional.batch_norm_act_drop(t["x"], t["mean"], t["var"], t["weight"], t["bias"], seed=11, **options)
    grads = torch.autograd.grad(y, leaves, t["g"])
    results = {"y": y.detach()} | dict(zip(names, grads, strict=True))
    return results | {"mean": t["mean"].detach(), "var": t["var"].detach()}


def differ(ours: dict, theirs: dict, dtype, act: str) -> list[str]:
    wrong = []
    for name, expected in theirs.items():
        got = ours[name].cpu()
        if name == "y" and act == "identity" and not torch.equal(got == 0, expected == 0):
            wrong.append("the noise differs")
        scale = expected.abs().max().double() + 1e-3
        error = ((got.double() - expected.double()).abs().max() / scale).item()
        tolerance = TOLERANCE[dtype] * (20 if name in ("weight", "bias") else 1)
        if got.dtype != expected.dtype or got.stride() != expected.stride() or not error <= tolerance:
            wrong.append(f"{name} is off by {error:.3g} of its largest value (allowed {tolerance:.3g})")
    return wrong


def cases(short: bool):
    """(shape, dtype, channels_last, act, p, granularity, training, variant)"""
    shapes, acts = (SHORT, ("gelu",)) if short else (SHAPES, ("identity", "gelu"))
    modes = ((0.4, "element", True), (0.4, "channel", True), (0.0, "element", False))
    if not short:
        modes += ((0.4, "element", False), (0.0, "element", True), (1.0, "element", True))
    for shape, dtype, channels_last, act in itertools.product(shapes, DTYPES, (False, True), acts):
        if short and dtype not in (torch.float32, torch.bfloat16) and shape != SHORT[1]:
            continue
        for i, (p, granularity, training) in enumerate(modes):
            # Every choice of kernels where all of them have work; elsewhere one of each kind.
            variants = VARIANTS if i == 0 and not channels_last and len(shape) > 2 else VARIANTS[:1] + VARIANTS[2:3]
            for variant in variants:
                yield shape, dtype, channels_last, act, p, granularity, training, variant


def module_step(device) -> list[str]:
    """A module's step: the seed is drawn, the statistics and the counter move, nothing is NaN."""
    layer = fusednorm.FusedBatchNorm2d(8, act="relu", drop=0.5, momentum=None, device=device)
    stock = torch.nn.BatchNorm2d(8, momentum=None)
    masks = []
    for step in range(3):
        x = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(step))
        y = layer(x.to(device))
        y.square().sum().backward()
        stock(x)
        masks.append(y == 0)
    wrong = [] if int(layer.num_batches_tracked) == 3 else ["num_batches_tracked"]
    if torch.equal(masks[0], masks[1]):
        wrong.append("the same noise twice")
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(layer, name).cpu(), getattr(stock, name)
        if not (ours - theirs).abs().max() <= 1e-4:
            wrong.append(name)
    if not torch.isfinite(layer.weight.grad).all():
        wrong.append("weight.grad")
    return wrong


def noises(device) -> list[str]:
    wrong = []
    for shape, kind, granularity, seed in itertools.product(
        ((513, 5), (7, 33, 9), (3, 2, 1025)), functional.NOISES, functional.GRANULARITIES, (3, -(2**40) - 9)
    ):
        options = {"seed": seed, "kind": kind, "granularity": granularity}
        a, b = (fusednorm.noise(shape, 0.3, device=d, **options).cpu() for d in ("cpu", device))
        if not torch.equal(a, b):
            wrong.append(f"noise {shape} {kind} {granularity} {seed}")
    return wrong


def orders(device) -> list[str]:
    """Every order once, with every noise in turn, one group and several."""
    wrong = []
    kinds = itertools.cycle(itertools.product(functional.NOISES, functional.GRANULARITIES))
    for (order, last), (noise, granularity) in zip(
        itertools.product(fusednorm.reference.ORDERS, (False, True)), kinds, strict=False
    ):
        tensors = inputs((6, 40, 9, 8), torch.float32, last)
        if "add" in order:
            tensors["residual"] = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(8))
        options = {"training": True, "order": order, "ghost_batch_size": 4 if last else None}
        options |= {"act": "elu"} if "act" in order else {}
        options |= {"p": 0.3, "noise": noise, "granularity": granularity} if "drop" in order else {}
        try:
            found = differ(call(tensors, device, **options), call(tensors, "cpu", **options), torch.float32, "elu")
        except RuntimeError as error:
            found = [str(error).splitlines()[0]]
        wrong += [f"{order} {noise} {granularity}{' last' if last else ''}: {what}" for what in found]
    return wrong


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="for compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop there; what was done counts")
    parser.add_argument("--dry-run", action="store_true", help="the CPU against itself")
    args = parser.parse_args(arguments)
    device = torch.device("cpu" if args.dry_run else "cuda:0")
    start, done, failures = time.monotonic(), 0, []

    def judge(name: str, wrong: list[str]) -> None:
        if wrong:
            failures.append(name)
            print(f"WRONG {name}: {'; '.join(wrong)}", flush=True)

    judge("noise", noises(device))
    judge("module", module_step(device))
    judge("orders", orders(device))
    expected, of = None, None
    for case in cases(args.short):
        if time.monotonic() - start > args.seconds:
            print(f"stopped after {args.seconds:.0f} s", flush=True)
            break
        shape, dtype, channels_last, act, p, granularity, training, variant = case
        options = {"training": training, "drop_training": True, "act": act, "p": p, "granularity": granularity}
        tensors = inputs(shape, dtype, channels_last)
        if of != case[:-1]:
            expected, of = call(tensors, torch.device("cpu"), **options), case[:-1]
        try:
            with gpu_variants.use(variant):
                wrong = differ(call(tensors, device, **options), expected, dtype, act)
        except RuntimeError as error:
            wrong = [str(error).splitlines()[0]]
        judge(" ".join(map(str, (*case[:-1], variant.name))), wrong)
        done += 1
        if len(failures) >= 20:
            print("20 failures are enough", flush=True)
            break
    switches = gpu_variants.set_residency("automatic"), gpu_variants.mask_policy() is not None
    print(f"switches of the library: residency {switches[0]}, saved mask {switches[1]}")
    print(f"{done} calls, {len(failures)} wrong, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
