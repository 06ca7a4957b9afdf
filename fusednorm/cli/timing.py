"""Contestants take turns, round by round, so that what else the machine does falls on all of them alike.

A turn begins with an untimed step, as the one before has left other data in the caches, and is several steps where one
is too short for the clock. Ratios are taken within a round.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from .. import _observe

Step: TypeAlias = Callable[[], object]
Clock: TypeAlias = Callable[[Step], float]  # the seconds that a call takes

SHORTEST_TURN = 1e-3  # seconds
ROUNDS = 5, 200


def stopwatch(run: Step) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gpu_events(run: Step) -> float:
    """By events of the GPU's current stream, as a call returns before its work is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def take_turns(steps: Mapping[str, Step], seconds: float, clock: Clock = stopwatch) -> dict[str, list[float]]:
    """The seconds of one step of each contestant, round by round; in all about `seconds`, or five rounds."""
    for step in steps.values():  # the first one meets compilers and fresh memory
        step()
    single = {name: min(clock(step) for _ in range(3)) for name, step in steps.items()}
    repeats = {name: min(100, max(1, math.ceil(SHORTEST_TURN / t))) for name, t in single.items()}
    of_a_round = sum((repeats[name] + 1) * t for name, t in single.items())
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(seconds / of_a_round)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in _observe.shown(range(rounds), "Timing", True, between=True):
        for name, step in steps.items():
            step()
            taken[name].append(clock(partial(_repeat, step, repeats[name])) / repeats[name])
    return taken


def _repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return cuts[0], statistics.median(values), cuts[3]


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread: p20 and p80, in milliseconds."""
    low, median, high = (value * 1e3 for value in spread(seconds))
    return {"median_ms": median, "p20_ms": low, "p80_ms": high, "rounds": len(seconds)}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Of the times of the same round, theirs over ours."""
    low, median, high = spread([a / b for a, b in zip(theirs, ours, strict=True)])
    return {"median": median, "p20": low, "p80": high}
