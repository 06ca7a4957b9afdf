"""Time on a GPU: CUDA events around the work, cold caches before it, and a queue that the host cannot run dry.

Before each turn the L2 is filled with other data: one buffer of twice its size is written, then another one read, since
lines that were only written would have to be stored back during the turn. Then the GPU spins for as long as the host
needs to queue the turn, so that launches on the host are not what is timed; host time is measured by itself (`host`).

`Dry` goes through the same calls on the CPU, without a GPU, to try the program out; its times mean nothing.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE_WORK = ("kernel", "gpu_memset", "gpu_memcpy")
MARK = "spin_kernel"  # of `_sleep`, which no contestant calls


def traced(trace: dict, runs: int) -> list[list[dict]]:
    """Kernels, memsets and copies on the device in a chrome trace, in order, by the run between whose two marks they
    lie: {"name", "us"}. Nothing at all where a mark is missing: what else is missing then, nobody knows."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in DEVICE_WORK]
    parts = [[]]
    for event in sorted(events, key=lambda e: float(e["ts"])):
        if MARK in event["name"]:
            parts.append([])
        else:
            parts[-1].append({"name": event["name"], "us": float(event["dur"])})
    return parts[1::2] if len(parts) == 2 * runs + 1 else [[] for _ in range(runs)]


class Gpu:
    device = torch.device("cuda")

    def __init__(self):
        self.properties = torch.cuda.get_device_properties(self.device)
        size = 2 * max(self.properties.L2_cache_size, 1 << 24)
        self.written, self.read = (torch.zeros(size // 4, device=self.device) for _ in range(2))
        self.sum = torch.zeros((), device=self.device)
        self.cycles_per_second = 1e9
        self.spin(0.1)  # an idle GPU runs at a low clock
        self.cycles_per_second = 1e9 * 1e-2 / self._spun(1e-2)
        for _ in range(2):  # the first record of a process misses what runs while the tracer comes up
            self.kernels(self.written.zero_)

    def _spun(self, seconds: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.spin(0.0)
        start.record()
        self.spin(seconds)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def spin(self, seconds: float) -> None:
        torch.cuda._sleep(max(1, int(seconds * self.cycles_per_second)))

    def flush(self) -> None:
        self.written.zero_()
        torch.sum(self.read, 0, out=self.sum)

    def seconds(self, run: Callable[[], object], head_start: float, cold: bool = True) -> float:
        """Of device time. `head_start`: seconds that the host needs to queue `run`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.flush()
        self.spin(head_start)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def recover(self) -> bool:
        """After an error: frees what the failed call held. False: the context is lost."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def kernels(self, *runs: Callable[[], object]) -> list[list[dict]]:
        """What each of the runs puts on the device: {"name", "us"} each. One record for all of them, as a record takes
        longer than they do."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            for run in runs:
                self.flush()
                self.mark()
                run()
                self.mark()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            record.export_chrome_trace(str(path))
            return traced(json.loads(path.read_text()), len(runs))

    @staticmethod
    def mark() -> None:
        torch.cuda._sleep(1)

    def captured(self, step: Callable[[], object], steps: int) -> Callable[[], object]:
        """Replays `steps` of them as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                step()
        return graph.replay

    def facts(self) -> dict:
        from benchmarks import machine

        p = self.properties
        return machine.gpu() | {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "gpu_memory_gb": round(p.total_memory / 1e9, 1),
            "l2_mb": round(p.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }


class Dry:
    device = torch.device("cpu")

    def seconds(self, run: Callable[[], object], head_start: float, cold: bool = True) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def synchronize(self) -> None: ...

    def recover(self) -> bool:
        return True

    def kernels(self, *runs: Callable[[], object]) -> list[list[dict]]:
        for run in runs:
            run()
        return [[{"name": "dry run", "us": 1.0}] for _ in runs]

    def captured(self, step: Callable[[], object], steps: int) -> Callable[[], object]:
        def replay():
            for _ in range(steps):
                step()

        return replay

    def facts(self) -> dict:
        return {"gpu": "none: a dry run on the CPU, its figures mean nothing", "driver": None}


Clock = Gpu | Dry


def host(clock: Clock, run: Callable[[], object], calls: int = 50, batches: int = 5) -> float:
    """Seconds of host time per call: what a caller waits until its work is queued."""
    spent = []
    for _ in range(batches):
        clock.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        spent.append((time.perf_counter() - start) / calls)
    clock.synchronize()
    return statistics.median(spent)


def rotate(
    clock: Clock,
    turns: Sequence,
    rounds: int,
    attempt: Callable[[str], contextlib.AbstractContextManager],
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Device seconds per turn, the turns dealt in rotation; each has name, prepare(), run(), forget(). One that fails,
    which its `attempt` keeps from the others, is dealt no more and has no times."""
    head_start, seconds = {}, {turn.name: [] for turn in turns}

    def warm(turn) -> None:
        turn.prepare()
        clock.synchronize()
        start = time.perf_counter()
        turn.run()
        head_start[turn.name] = time.perf_counter() - start  # the last one: nothing is compiled or loaded then
        clock.synchronize()

    def timed(turn) -> None:
        turn.prepare()
        wait = min(1.5 * head_start[turn.name] + 5e-5, 5e-3)
        seconds[turn.name].append(clock.seconds(turn.run, wait))

    for index in range(warmup + rounds):
        for turn in [turn for turn in turns if turn.name in seconds]:
            whole = False
            with attempt(turn.name):
                try:
                    (warm if index < warmup else timed)(turn)
                finally:
                    turn.forget()
                whole = True
            if not whole:
                del seconds[turn.name]
    return seconds
