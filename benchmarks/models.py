"""Whole models, stock and fused in every way: `make models`.

For each: how many chains it has and how many each way fuses, whether it is still the same model (in float64, see
`models_convert.py`), what a training step keeps for backward, and how long it takes: forward, backward and SGD of the
stock model, of `fusednorm.fuse` and of the stock model under the backend of torch.compile, both with `dropouts=True`;
then of torch.compile itself beside stock. They take turns of one step each, and ratios are of one round. Nothing is
fused that `small="measure"` finds slower.
`--checks` counts and compares only; `--census` does that for all the models of `make census`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (found through the line above, as is what follows)
from torch._inductor.async_compile import AsyncCompile, shutdown_compile_workers  # noqa: E402

from benchmarks import census_packages, machine, memory, models_convert, models_table, models_zoo, plot, publish, table  # noqa: E402

STARTS_IN = 45  # seconds at most that each has to be converted or compiled, and for two steps
CHECKED_FOR = 400  # and one model's check
SAMPLES = 4  # of a batch, where models are compared in float64


class Trained:
    """A model and its optimizer: one call is one step.

    Args:
        run: what is called.
        model: whose parameters are trained.
    """

    def __init__(self, run: Callable, model: torch.nn.Module, inputs: tuple):
        self.run, self.model, self.inputs = run, model.train(), inputs
        # Small steps: times do not depend on what is learned, and nothing runs away.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def __call__(self) -> float:
        """Seconds of the step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss, _ = models_convert.loss_of(self.run, self.inputs)
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


@contextlib.contextmanager
def at_most(seconds: int, what: str) -> Iterator[None]:
    def stop(*_):
        raise TimeoutError(f"{what} took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 3)  # again, if somebody on the way has caught it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def contestants(names: Iterable[str], stock: torch.nn.Module, inputs: tuple, failed: dict) -> dict[str, Trained]:
    """Those of `names` that this model can be; of others `failed` has the reason. Each has made two steps."""
    made: dict[str, Trained] = {}
    for name in names:
        ours = copy.deepcopy(stock)
        try:
            with at_most(STARTS_IN, "to get it started"):
                if name == "fuse":
                    ours = models_convert.fused(ours, inputs, dropouts=True)
                run = ours
                if name == "backend":
                    run, _ = models_convert.compiled(ours, dropouts=True)
                elif name == "compile":
                    AsyncCompile.warm_pool()  # again, if stop_compiling has ended the last one
                    run = torch.compile(ours)
                step = Trained(run, ours, inputs)
                step(), step()
            made[name] = step
        except Exception as error:
            failed[name] = models_convert.sentence(error)
    return made


def stop_compiling() -> None:
    """Ends Inductor's processes, which may still compile what nobody waits for, beside what is timed next."""
    working = list(descendants(os.getpid()))
    shutdown_compile_workers()
    for process in working:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while any(descendants(os.getpid())):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.1)


def descendants(process: int) -> Iterator[int]:
    """The processes that a process has begun, and those that these have."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from descendants(child)


def timed(turns: dict[str, Trained], seconds: float) -> dict:
    """Median milliseconds of each, and the median ratio of stock's to it."""
    first = sum(step() for step in turns.values())
    rounds = max(9, min(100, int(seconds / first)))
    names, taken = list(turns), []
    for i in range(rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        taken.append({name: turns[name]() for name in order})
    return {
        "rounds": rounds,
        "ms": {name: statistics.median(times[name] for times in taken) * 1e3 for name in names},
        "ratio": {name: statistics.median(times["stock"] / times[name] for times in taken) for name in names},
    }


def measure(build: Callable[[], torch.nn.Module], inputs: tuple, seconds: float) -> dict:
    """One model's row; `seconds` bounds the timed turns."""
    with at_most(CHECKED_FOR, "to compare it"):
        row = models_convert.checked(build, inputs, SAMPLES)
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock, given = build().train(), models_convert.tensors(inputs)
    row["shapes"] = [list(x.shape) for x in given]
    row["failed"] = {}
    turns = contestants(("stock", *models_table.WAYS), stock, given, row["failed"])
    row |= timed(turns, seconds)
    row["left"] = left(turns["fuse"].model) if "fuse" in turns else {}
    saved = {name: memory.saved_bytes(turns[name].model, *given) for name in ("stock", "fuse") if name in turns}
    if "backend" in turns:
        saved["backend"] = memory.saved_bytes(OfModel(turns["backend"]), *given)
    row["saved_bytes"] = saved
    # Last, and beside stock alone: where it fails it may leave compilers at work.
    compiled = contestants(["compile"], stock, given, row["failed"])
    if compiled:
        beside = timed({"stock": turns["stock"]} | compiled, seconds / 2)
        for what in ("ms", "ratio"):
            row[what] |= {"compile": beside[what]["compile"]}
    stop_compiling()
    return row


class OfModel(torch.nn.Module):
    """A compiled model, as a module of the same parameters."""

    def __init__(self, step: Trained) -> None:
        super().__init__()
        self.model, self.run = step.model, step.run

    def forward(self, *inputs):
        return self.run(*inputs)


def left(fused: torch.nn.Module) -> dict[str, int]:
    """Why `fuse` left norms as they are, and how many of them."""
    reasons: dict[str, int] = {}
    for row in fused.fusednorm_report.rows:
        if row.order is None:
            reason = (row.reason or "").split(" for (")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def rows_of(entries: Iterable[models_zoo.Entry], work: Callable[[Callable, tuple], dict]) -> Iterator[dict]:
    """A row of each model, with the reason where there is nothing else to say of it."""
    for name, build, inputs in entries:
        start = time.perf_counter()
        try:
            row = work(build, inputs)
        except Exception as error:
            row = {"reason": models_convert.sentence(error)}
        yield {"model": name, **row, "seconds": round(time.perf_counter() - start, 1)}


def surveyed(build: Callable[[], torch.nn.Module], inputs: tuple) -> dict:
    with at_most(CHECKED_FOR, "to compare it"):
        return models_convert.checked(build, inputs, SAMPLES)


def options():
    parser = argparse.ArgumentParser(description="Training steps of whole models, stock and fused.")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="models with this in their name")
    parser.add_argument("--quick", action="store_true", help="six small models, a second each")
    parser.add_argument("--checks", action="store_true", help="count and compare, time nothing")
    parser.add_argument("--census", action="store_true", help="that, for the models of the census")
    parser.add_argument("--seconds", type=float, default=12.0, help="of timed steps per model")
    parser.add_argument("--json", metavar="F", help="write the rows and the machine's facts")
    parser.add_argument("--plot", metavar="F", help="draw them")
    parser.add_argument("--force", action="store_true", help="run although the machine is busy")
    return parser.parse_args()


def main() -> int:
    args = options()
    if not machine.tuned():
        machine.restart_tuned(sys.argv)
    reason = None if args.force or args.checks or args.census else machine.busy()
    if reason:
        print(f"Not measured: {reason}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    census_packages.stand_in()
    # Graph models ask how many edges there are: without this, torch.compile leaves their loops, whatever the backend.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    seconds = min(1.0, args.seconds) if args.quick else args.seconds
    entries = models_zoo.QUICK if args.quick else models_zoo.MODELS
    work = surveyed if args.checks or args.census else partial(measure, seconds=seconds)
    if args.census:
        from benchmarks.census_models import every_model

        entries = every_model()
    entries = [entry for entry in entries if not args.only or any(word in entry[0] for word in args.only)]
    console, facts, rows = table.console(), machine.facts(), []
    for row in rows_of(entries, work):
        rows.append(row)
        console.print(models_table.line(row), markup=False, highlight=False)
        if args.json:
            Path(args.json).write_text(publish.compact({"machine": facts, "rows": rows}))
    console.print(models_table.render(rows))
    if args.plot:
        plot.models([row for row in rows if "ratio" in row], facts, Path(args.plot))
    return int(bool(models_table.wrong(rows)))


if __name__ == "__main__":
    sys.exit(main())
