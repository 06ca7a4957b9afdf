"""How a row is timed: the providers take turns, round by round, on the same tensors.

Each round is one turn of every contestant (two plain copies of the tensor, then the providers), so that whatever else
the machine does falls on all of them alike, and ratios taken within a round cancel it. A turn is several steps where a
step is too short for the clock, and begins with an untimed one, so that nobody works in caches that another contestant
has left. A cold turn is a single step, with other data in the caches. The timer is a parameter:
pytest-benchmark in the benchmarks, a stopwatch in the demo.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import cold, machine, rivals
from benchmarks.case import Case
from benchmarks.workloads import COLD
from fusednorm.cli.timing import SHORTEST_TURN, summary

ROUNDS = 5, 100
COPIES = ("copy_", "clamp_min")

Step = Callable[[], None]
Timer = Callable[[Callable[[Step], None], Callable[[], tuple], int, int], Sequence[float]]


class Turn:
    """One contestant's part in a round: `prepare` untimed, `run` timed, `forget` untimed before the next one."""

    inner = 1  # steps per turn
    steps = 1  # of the run that is prepared

    def __init__(self, name: str, mode: str = ""):
        self.name, self.cold = name, mode == COLD

    def prepare(self, steps: int = 1) -> None:
        """The last thing before the clock starts."""
        self.steps = steps
        if self.cold:
            cold.walk()

    def run(self) -> None: ...

    def forget(self) -> None: ...

    def facts(self) -> dict:
        """What is known of it beside its time."""
        return {}


class CopyTurn(Turn):
    """The yardstick: one pass over the activation into memory that is already there."""

    def __init__(self, name: str, case: Case, mode: str = ""):
        super().__init__(name, mode)
        self.x, self.out = case.x.detach(), case.out

    def run(self) -> None:
        x, out = self.x, self.out
        for _ in range(self.steps):
            out.copy_(x) if self.name == "copy_" else torch.clamp_min(x, 0, out=out)


class LayerTurn(Turn):
    def __init__(self, name: str, case: Case, mode: str):
        super().__init__(name, mode)
        self.case, self.mode, self.module, self.grad = case, mode, case.modules[name], case.grads[name]
        self.inputs = case.inputs_of(name)
        self.leaves = [*self.inputs, *self.module.parameters()]
        self.outputs = []

    def prepare(self, steps: int = 1) -> None:
        self.module.train(self.mode != "eval")
        self.case.clear()
        self.outputs = [self.module(*self.inputs) for _ in range(steps)] if self.mode == "backward" else []
        super().prepare(steps)

    # Gradients are handed on, as in the midst of a network. Accumulated in .grad, one that another tensor holds, too
    # (the residual's, where the addition comes last), would be copied.
    def run(self) -> None:
        module, inputs, grad, leaves, outputs = self.module, self.inputs, self.grad, self.leaves, self.outputs
        if self.mode == "eval":
            with torch.no_grad():
                for _ in range(self.steps):
                    outputs[:] = (module(*inputs),)
        elif self.mode == "forward":
            for _ in range(self.steps):
                outputs[:] = (module(*inputs),)
        elif self.mode == "backward":
            for y in outputs:
                torch.autograd.grad(y, leaves, grad)
        else:
            for _ in range(self.steps):
                torch.autograd.grad(module(*inputs), leaves, grad)

    def facts(self) -> dict:
        return {"saved_bytes_per_element": self.case.saved[self.name] / self.case.workload.numel}

    def forget(self) -> None:
        # Memory of one provider must be free before the next one starts, or that one pays for fresh pages.
        self.outputs = []


class RivalTurn(Turn):
    """Another library's layer, bare: no autograd, results into tensors that are there already (rivals/__init__.py)."""

    def __init__(self, name: str, case: Case, mode: str):
        super().__init__(name)
        self.layer, self.mode, self.elements = case.rivals[name], mode, case.workload.numel

    def prepare(self, steps: int = 1) -> None:
        super().prepare(steps)
        if self.mode == "backward":  # as for the others: what a forward leaves in the caches is there
            self.layer.forward()

    def run(self) -> None:
        forward, backward = self.layer.forward, self.layer.backward
        for _ in range(self.steps):
            if self.mode != "backward":
                forward()
            if self.mode != "forward":
                backward()

    def facts(self) -> dict:
        layer = self.layer
        return {
            "saved_bytes_per_element": layer.saved_bytes / self.elements,
            "version": layer.version,
            "implementation": layer.implementation,
            "check": layer.error,
        }


def stopwatch(target, setup, rounds: int, warmup_rounds: int) -> list[float]:
    """The plain twin of pytest-benchmark's pedantic mode: durations of `rounds` calls, in order."""
    durations = []
    for index in range(warmup_rounds + rounds):
        arguments, _ = setup()
        start = time.perf_counter()
        target(*arguments)
        if index >= warmup_rounds:
            durations.append(time.perf_counter() - start)
    return durations


class Rotation:
    """Deals the turns out in order: each call of `deal` gives the next contestant's `run`, made ready."""

    def __init__(self, turns: list[Turn]):
        self.turns, self.dealt = turns, 0

    def deal(self) -> tuple[tuple[Step], dict]:
        self.turns[self.dealt - 1].forget()
        turn = self.turns[self.dealt % len(self.turns)]
        self.dealt = (self.dealt + 1) % len(self.turns)
        if not turn.cold:  # the untimed step
            turn.prepare()
            turn.run()
        turn.prepare(turn.inner)
        return (turn.run,), {}


def _call(run: Step) -> None:
    run()


def _calibrate(turns: list[Turn], budget: float) -> int:
    """Set the steps per turn and return the rounds that fit the budget (seconds, set-up included)."""
    rotation = Rotation(turns)
    for _ in range(2):  # the first round meets cold caches, compilers and fresh memory
        start = time.perf_counter()
        durations = stopwatch(_call, rotation.deal, len(turns), 0)
    round_seconds = time.perf_counter() - start
    turns[-1].forget()
    for turn, duration in zip(turns, durations, strict=True):
        if turn.cold:
            continue
        turn.inner = min(100, max(1, math.ceil(SHORTEST_TURN / duration)))
        round_seconds += (turn.inner - 1) * duration
    least, most = ROUNDS
    if round_seconds > budget:
        least = 3  # the largest tensors take seconds per round and repeat well
    return min(most, max(least, int(budget / round_seconds)))


def describe(workload, p: float, mode: str) -> dict:
    """The part of a row that is known before it is measured, and all that is known of one that failed."""
    return {
        "workload": workload.name,
        "label": workload.label,
        "shape": list(workload.shape),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "layout": workload.layout,
        "act": workload.act,
        "granularity": workload.granularity,
        "noise": workload.noise,
        "order": workload.order,
        "p": p,
        "mode": mode,
        "level": machine.level(),
        "source": workload.source,
        "note": workload.note,
    }


def time_row(case: Case, mode: str, budget: float, timer: Timer = stopwatch) -> tuple[dict, list[float]]:
    """Time one row. Returns the row as plain data and the fused layer's seconds per step, round by round."""
    peaks = {provider: {"peak_mb": case.peak_mb(provider, mode)} for provider in case.providers}
    turns = [CopyTurn(name, case, mode) for name in COPIES] + [LayerTurn(name, case, mode) for name in case.providers]
    if mode in rivals.MODES:
        turns += [RivalTurn(name, case, mode) for name in case.rivals]
    rounds = _calibrate(turns, budget)
    rotation = Rotation(turns)
    durations = timer(_call, rotation.deal, rounds * len(turns), len(turns))
    turns[-1].forget()
    case.clear()
    seconds = {
        turn.name: [duration / turn.inner for duration in durations[i :: len(turns)]] for i, turn in enumerate(turns)
    }

    copy_ms = min(statistics.median(seconds[name]) for name in COPIES) * 1e3
    row = describe(case.workload, case.p, mode) | {"copy_ms": copy_ms, "check": case.error, "missing": case.missing}
    row["providers"] = {
        turn.name: summary(seconds[turn.name])
        | {"steps_per_round": turn.inner, "copies": statistics.median(seconds[turn.name]) * 1e3 / copy_ms}
        | turn.facts()
        | peaks.get(turn.name, {})
        for turn in turns
        if not isinstance(turn, CopyTurn)
    }
    row["ratio"] = {
        name: statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["fused"], strict=True))
        for name in row["providers"]
        if name != "fused"
    }
    return row, seconds["fused"]
