"""Measures one stage of rows on the GPU and keeps the results file complete after every row.

Rows that the file holds already are not measured again, so that a run that died (an error on a GPU ends the process)
goes on behind the row it died at; the file then says of that row that it failed. What the figures mean is in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks import gpu_rows, gpu_variants, machine, providers
from benchmarks.case import Case
from benchmarks.gpu_clock import Clock, Dry, Gpu, host, rotate
from benchmarks.measure import CopyTurn, LayerTurn, summary
from benchmarks.memory import saved_bytes, vectors

MODES = ("forward", "backward", "both")
ROUNDS = 25
LOST = 3  # exit status: no row can be measured in this process any more


class VariantTurn(LayerTurn):
    def __init__(self, variant: gpu_variants.Variant, case: Case, mode: str):
        super().__init__("fused", case, mode)
        self.name, self.variant = variant.name, variant

    def prepare(self, steps: int = 1) -> None:
        self.chosen = contextlib.ExitStack()
        self.chosen.enter_context(gpu_variants.use(self.variant))
        super().prepare(steps)

    def forget(self) -> None:
        super().forget()
        self.chosen.close()


def describe(workload, p: float) -> dict:
    return {
        "workload": workload.name,
        "label": workload.label,
        "shape": list(workload.shape),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "layout": workload.layout,
        "act": workload.act,
        "order": workload.order,
        "noise": workload.noise,
        "granularity": workload.granularity,
        "p": p,
        "floor": gpu_rows.floors(workload),
        "unit_bytes": workload.numel * workload.dtype.itemsize,
        "source": workload.source,
    }


def launches(clock: Clock, turn: LayerTurn) -> dict:
    """Kernels with their times, forward and backward, of one contestant: those of a timed step."""
    kept = []
    with gpu_variants.use(getattr(turn, "variant", gpu_variants.DEFAULT)):
        forward = clock.kernels(lambda: kept.append(turn.module(*turn.inputs)))
        backward = clock.kernels(lambda: torch.autograd.grad(kept.pop(), turn.leaves, turn.grad))
    return {"forward": forward, "backward": backward}


def memory_of(case: Case, variants) -> tuple[dict, dict]:
    """Saved bytes per element and peak MB of forward + backward, per contestant."""
    numel = case.workload.numel
    saved = {name: count / numel for name, count in case.saved.items() if name != "fused"}
    peak = {name: case.peak_mb(name, "both") for name in saved}
    for variant in variants:
        with gpu_variants.use(variant):
            ignore = vectors(case.workload.channels)
            saved[variant.name] = saved_bytes(case.modules["fused"].train(), *case.inputs, ignore=ignore) / numel
            peak[variant.name] = case.peak_mb("fused", "both")
    return saved, peak


def measure(clock: Clock, workload, p: float, rounds: int) -> dict:
    case = Case(workload, p, device=clock.device, strict=False)
    variants = gpu_variants.available(workload, p)
    peers = [name for name in case.providers if name != "fused"]
    row = describe(workload, p) | {"check": case.error, "wrong": case.wrong, "missing": case.missing}
    row["modes"] = {}
    for mode in MODES:
        turns = [CopyTurn("copy_", case)]
        turns += [LayerTurn(name, case, mode) for name in peers] + [VariantTurn(v, case, mode) for v in variants]
        seconds = rotate(clock, turns, rounds)
        row["modes"][mode] = {name: summary(values) for name, values in seconds.items()}
        case.clear()
        if mode == "backward":
            row["launches"] = {turn.name: launches(clock, turn) for turn in turns[1:]}
    row["saved_bytes_per_element"], row["peak_mb"] = memory_of(case, variants)
    return row


def measure_small(clock: Clock, workload, p: float, provider: str, rounds: int) -> dict:
    """One provider of one small row: per step in a CUDA graph, and the host's time for it without one."""
    case = Case(workload, p, (provider,), device=clock.device, strict=False)
    if provider in case.missing:
        raise RuntimeError(case.missing[provider])
    module, grad = case.modules[provider].train(), case.grads[provider]

    def both():
        case.clear()
        module(*case.inputs).backward(grad)

    def forward():
        return module(*case.inputs)

    steps = 20
    result = {"host_us": {}, "graph_us": {}, "launches": {}, "wrong": case.wrong}
    for name, step in (("forward", forward), ("both", both)):
        for _ in range(3):
            step()
        result["host_us"][name] = host(clock, step, *(() if rounds > 2 else (2, 2))) * 1e6
        result["launches"][name] = len(clock.kernels(step))
        case.clear()
        replay = clock.captured(step, steps)
        replay()
        times = [clock.seconds(replay, 1e-4, cold=False) / steps for _ in range(rounds)]
        result["graph_us"][name] = statistics.median(times) * 1e6
        case.clear()
    return result


def copy_bandwidth(clock: Clock, size: int) -> dict:
    """Bytes read and written per second by `copy_` of one large tensor."""
    generator = torch.Generator(clock.device).manual_seed(0)
    source = torch.randn(size // 4, device=clock.device, generator=generator)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [clock.seconds(lambda: target.copy_(source), 1e-4) for _ in range(21)]
    return {"bytes": size, "gb_per_s": 2 * source.nbytes / statistics.median(seconds) / 1e9}


class Results:
    """The file, rewritten whole after every change."""

    def __init__(self, path: Path):
        self.path = path
        self.data = (
            json.loads(path.read_text()) if path.exists() else {"machine": {}, "copy": {}, "rows": [], "small": []}
        )
        for row in self.data["rows"] + self.data["small"]:
            if row.pop("running", False):
                row["failed"] = "the process ended while this row was measured"
        self.write()

    def write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(new, self.path)

    def has(self, part: str, key: str) -> bool:
        return any(row["key"] == key for row in self.data[part])

    def run(self, part: str, start: dict, work) -> dict:
        """Adds a row: first what is known of it, then what `work()` returns or why it failed."""
        row = start | {"running": True}
        self.data[part].append(row)
        self.write()
        try:
            row.update(work())
        except KeyboardInterrupt:  # out of time, which says nothing about the row
            self.data[part].remove(row)
            self.write()
            raise
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        del row["running"]
        self.write()
        return row


def line(row: dict) -> str:
    if "failed" in row:
        return f"  FAILED {row['key']}: {row['failed']}"
    if row["wrong"]:
        return f"  FAILED {row['key']}: timed, but {row['wrong']}"
    if "modes" not in row:
        host_us, graph_us = row["host_us"]["both"], row["graph_us"]["both"]
        return f"  {row['key']}: {row['provider']} {graph_us:.1f} us in a graph, {host_us:.0f} us of host"
    both = {name: s["median_ms"] for name, s in row["modes"]["both"].items() if name != "copy_"}
    return f"  {row['key']}: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in both.items())


def options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=gpu_rows.STAGES, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row later than this after the start")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry-run", action="store_true", help="tiny rows on the CPU")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    args = options(arguments)
    start = time.monotonic()
    clock = Dry() if args.dry_run else Gpu()
    rows = gpu_rows.STAGES[args.stage]
    if args.dry_run:
        rows, args.rounds = gpu_rows.tiny(rows), 2
        providers.BUILDERS["compile"] = functools.partial(providers.compiled, backend="aot_eager")
    results = Results(args.json)
    data = results.data
    data["machine"] = machine.facts() | clock.facts()
    data["switches"] = {
        "residency": gpu_variants.set_residency("automatic"),
        "saved mask": gpu_variants.mask_policy() is not None,
    }
    data["copy"].setdefault("bandwidth", copy_bandwidth(clock, 1 << (18 if args.dry_run else 30)))
    results.write()
    print(f"copy bandwidth {data['copy']['bandwidth']['gb_per_s']:.0f} GB/s", flush=True)

    if args.stage == "small":
        # torch.compile last: should a capture of its code fail, the others are safe.
        jobs = [(w, provider) for provider in ("eager", "fused", "compile") for w in rows]
    else:
        jobs = [(w, None) for w in rows]
    part = "small" if args.stage == "small" else "rows"
    failed = unreached = 0
    for workload, provider in jobs:
        name = gpu_rows.key(workload, workload.p) + (f" {provider}" if provider else "")
        if results.has(part, name):
            continue
        if time.monotonic() - start > args.seconds:
            unreached += 1
            continue
        known = describe(workload, workload.p) | {"key": name, "stage": args.stage}
        if provider:
            work = functools.partial(measure_small, clock, workload, workload.p, provider, args.rounds)
            known["provider"] = provider
        else:
            work = functools.partial(measure, clock, workload, workload.p, args.rounds)
        row = results.run(part, known, work)
        print(line(row), flush=True)
        # A peer that cannot be captured is told, and no failure of this program.
        failed += ("failed" in row and provider != "compile") or bool(row.get("wrong"))
        if not args.dry_run:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"  the GPU's context is lost: {error}".splitlines()[0])
                return LOST
            torch.cuda.empty_cache()
    data.setdefault("not reached", {})[args.stage] = unreached
    results.write()
    if unreached:
        print(f"  {unreached} rows not reached in {args.seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
