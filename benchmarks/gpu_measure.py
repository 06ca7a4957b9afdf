"""Measures one stage of rows on the GPU and keeps the results file complete after every mode of every row.

Rows that the file holds already are not measured again, and one that it holds in part goes on with what is missing,
less the contestants that failed: an error on a GPU can end the process, and the next one begins where it stopped.
What the figures mean is in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import gpu_predicted, gpu_rows, gpu_variants, machine, providers
from benchmarks.case import Case
from benchmarks.gpu_attempts import Attempts
from benchmarks.gpu_clock import Clock, Dry, Gpu, host, rotate
from benchmarks.gpu_results import LOST, MODES, ROWS_FAILED, Lost, Place, Results
from benchmarks.measure import CopyTurn, LayerTurn, summary
from benchmarks.memory import saved_bytes, vectors

ROUNDS = 25


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
        forward, backward = clock.kernels(
            lambda: kept.append(turn.module(*turn.inputs)),
            lambda: torch.autograd.grad(kept.pop(), turn.leaves, turn.grad),
        )
    return {"forward": forward, "backward": backward}


def memory_of(case: Case, turn: LayerTurn) -> tuple[float, float]:
    """Saved bytes per element and peak MB of forward + backward, of one contestant."""
    with gpu_variants.use(getattr(turn, "variant", gpu_variants.DEFAULT)):
        ignore = vectors(case.workload.channels)
        saved = saved_bytes(turn.module.train(), *turn.inputs, ignore=ignore) / case.workload.numel
        provider = "fused" if isinstance(turn, VariantTurn) else turn.name
        return saved, case.peak_mb(provider, "both")


def measure(clock: Clock, workload, p: float, rounds: int, attempts: Attempts, row: dict) -> None:
    """Fills the row, step by step; what it has already is not measured again."""
    peers = gpu_rows.PEERS[row["stage"]]
    names = [name for name in (*peers, "fused") if not attempts.out(name, "setup")]
    setup = functools.partial(attempts.attempt, step="setup")
    case = Case(workload, p, tuple(names), device=clock.device, strict=False, attempt=setup)
    if "fused" in names:
        row.update(check=case.error, wrong=case.wrong)
    if "fused" not in case.grads:  # as users get it, it has failed; its variants may not
        case.grads["fused"] = case.grad_like(case.x)
    for kept in ("modes", "launches", "saved_bytes_per_element", "peak_mb"):
        row.setdefault(kept, {})
    variants = gpu_variants.available(workload, p)
    told = gpu_variants.profiled(variants, case.x)
    if row["stage"] == "main":  # a peer's launches are much the same everywhere
        told.update(peers)

    def contestants(mode: str, step: str) -> list[LayerTurn]:
        turns = [LayerTurn(name, case, mode) for name in peers if not attempts.out(name, step)]
        return turns + [VariantTurn(v, case, mode) for v in variants if not attempts.out(v.name, step)]

    for mode in MODES:
        if mode not in row["modes"]:
            turns = [CopyTurn("copy_", case), *contestants(mode, mode)]
            seconds = rotate(clock, turns, rounds, functools.partial(attempts.attempt, step=mode))
            row["modes"][mode] = {name: summary(values) for name, values in seconds.items()}
            case.clear()
            attempts.results.write()
        if mode == "backward":
            for turn in contestants(mode, "profile"):
                if turn.name in told and turn.name not in row["launches"]:
                    with attempts.attempt(turn.name, "profile"):
                        row["launches"][turn.name] = launches(clock, turn)
            attempts.results.write()
    for turn in contestants("both", "memory"):
        with attempts.attempt(turn.name, "memory"):
            row["saved_bytes_per_element"][turn.name], row["peak_mb"][turn.name] = memory_of(case, turn)


def measure_small(clock: Clock, workload, p: float, rounds: int, attempts: Attempts, row: dict) -> None:
    """One provider of one small row: per step in a CUDA graph, and the host's time for it without one. Alone in its
    row, it fails with it."""
    provider = row["provider"]
    at = functools.partial(attempts.place.write, row["key"], provider)
    at("setup")
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
    row.update(host_us={}, graph_us={}, launches={}, wrong=case.wrong)
    for name, step in (("forward", forward), ("both", both)):
        at(name)
        for _ in range(3):
            step()
        row["host_us"][name] = host(clock, step, *(() if rounds > 2 else (2, 2))) * 1e6
        row["launches"][name] = len(clock.kernels(step)[0])
        case.clear()
        at(f"{name} in a graph")
        replay = clock.captured(step, steps)
        replay()
        times = [clock.seconds(replay, 1e-4, cold=False) / steps for _ in range(rounds)]
        row["graph_us"][name] = statistics.median(times) * 1e6
        case.clear()


def copy_bandwidth(clock: Clock, size: int) -> dict:
    """Bytes read and written per second by `copy_` of one large tensor."""
    generator = torch.Generator(clock.device).manual_seed(0)
    source = torch.randn(size // 4, device=clock.device, generator=generator)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [clock.seconds(lambda: target.copy_(source), 1e-4) for _ in range(21)]
    return {"bytes": size, "gb_per_s": 2 * source.nbytes / statistics.median(seconds) / 1e9}


def lines(row: dict, facts: dict) -> Iterator[str]:
    """What is said of a row as soon as it is there."""
    for who, steps in row["errors"].items():
        yield from (f"  FAILED {row['key']}: {who} at {step}: {error}" for step, error in steps.items())
    if "failed" in row:
        yield f"  FAILED {row['key']}: {row['failed']}"
        return
    if row.get("wrong"):
        yield f"  FAILED {row['key']}: timed, but {row['wrong']}"
    if "modes" not in row:
        host_us, graph_us = row["host_us"]["both"], row["graph_us"]["both"]
        yield f"  {row['key']}: {row['provider']} {graph_us:.1f} us in a graph, {host_us:.0f} us of host"
        return
    both = {name: s["median_ms"] for name, s in row["modes"]["both"].items() if name != "copy_"}
    yield f"  {row['key']}: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in both.items())
    yield from gpu_predicted.worst([row], facts, 1)


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
    results, place = Results(args.json), Place(args.json)
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
        part, work = "small", measure_small
        jobs = [(w, {"provider": provider}) for provider in ("eager", "fused", "compile") for w in rows]
    else:
        part, work = "rows", measure
        jobs = [(w, {}) for w in rows]
    failed = unreached = 0
    for workload, more in jobs:
        key = " ".join((gpu_rows.key(workload, workload.p), *more.values()))
        if results.done(part, key):
            continue
        if time.monotonic() - start > args.seconds:
            unreached += 1
            continue
        known = describe(workload, workload.p) | {"key": key, "stage": args.stage} | more

        def fill(row, workload=workload):
            work(clock, workload, workload.p, args.rounds, Attempts(clock, results, place, row), row)

        try:
            row = results.run(part, known, fill)
        except Lost as error:
            print(f"  the GPU's context is lost: {error}")
            return LOST
        print("\n".join(lines(row, data["machine"])), flush=True)
        failed += has_failed(row)
        if not clock.recover():
            print("  the GPU's context is lost")
            return LOST
    data.setdefault("not reached", {})[args.stage] = unreached
    results.write()
    if unreached:
        print(f"  {unreached} rows not reached in {args.seconds:.0f} s")
    return ROWS_FAILED if failed else 0


def has_failed(row: dict) -> bool:
    """A peer that cannot be compiled or captured is told, and no failure of this program."""
    failed = "failed" in row and row.get("provider") != "compile"
    return failed or bool(row.get("wrong")) or any(who != "compile" for who in row["errors"])


if __name__ == "__main__":
    sys.exit(main())
