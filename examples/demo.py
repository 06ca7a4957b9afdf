"""Train the same small net twice, with the stock layers and with the fused one, and compare what comes out.

    python examples/demo.py [--out DIR] [--seeds 5] [--epochs 12] [--no-compile]

The data are the 8x8 handwritten digits that scikit-learn ships. Both nets of a pair start from the same weights and see
the same batches in the same order; only their dropped units differ, as those of any two runs do. So the learning curves
must agree within the noise of the seeds, and whether they do is computed. The tensors of this net are small and its
convolutions take their share: what the layer itself gains shows in the three lines of the benchmark that follow. All of
it runs under the allocator settings of the benchmarks (benchmarks/machine.py), for both nets alike. Where another
program was at work when it began, every ratio of times says "busy", and the picture shows no times.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found through the line above, or by it)
import torch  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import Progress  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import fusednorm  # noqa: E402
from benchmarks import machine, table  # noqa: E402
from benchmarks.case import Case  # noqa: E402
from benchmarks.measure import time_row  # noqa: E402
from benchmarks.memory import saved_bytes  # noqa: E402
from benchmarks.workloads import BY_NAME  # noqa: E402
from examples import common  # noqa: E402

NAMES = {"stock": "BatchNorm2d + ReLU + Dropout", "fused": "FusedBatchNorm2d"}
COLOURS = {"stock": "C3", "fused": "C0"}
P = 0.2
BATCH = 64
BENCH = ("pointnet_head", "dense", "cnn_f32")


def options():
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="pairs of nets (at least 3)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the benchmark: faster")
    arguments = parser.parse_args()
    if arguments.seeds < 3:
        parser.error("--seeds must be at least 3: the comparison needs a spread")
    return arguments


def block(channels: int, kind: str):
    """What this library replaces: three layers by one."""
    if kind == "fused":
        return fusednorm.FusedBatchNorm2d(channels, act="relu", drop=P)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(P))


def net(kind: str, seed: int):
    """Layers draw their initial weights in the same order for both kinds: the same seed gives the same weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        block(32, kind),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        block(64, kind),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        block(64, kind),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


class Run:
    """One net in training."""

    def __init__(self, kind: str, seed: int):
        self.net = net(kind, seed)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.order = torch.Generator().manual_seed(seed)  # of the batches: alike in a pair, whatever dropout draws
        self.loss, self.accuracy, self.seconds = [], [], []

    def epoch(self, images, labels, test_images, test_labels) -> None:
        batches = torch.randperm(len(images), generator=self.order).split(BATCH)
        self.net.train()
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            cross_entropy(self.net(images[batch]), labels[batch]).backward()
            self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.net.eval()
        with torch.no_grad():
            scores = self.net(test_images)
        self.loss.append(cross_entropy(scores, test_labels).item())
        self.accuracy.append(common.accuracy(scores, test_labels))


def train(seeds: int, epochs: int, console) -> dict[str, list[Run]]:
    """Every pair epoch by epoch, one after the other, so that the machine's noise falls on both."""
    data = common.digits()
    runs = {kind: [] for kind in NAMES}
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=seeds * epochs)
        for seed in range(seeds):
            pair = {kind: Run(kind, seed) for kind in NAMES}
            weights = [[p for p in run.net.parameters() if p.dim() > 1] for run in pair.values()]
            if not all(torch.equal(a, b) for a, b in zip(*weights, strict=True)):
                raise RuntimeError("the two nets of a pair do not start from the same weights")
            for epoch in range(epochs):
                # Whoever goes first meets the colder caches: take turns.
                for kind in list(NAMES) if epoch % 2 else reversed(NAMES):
                    pair[kind].epoch(*data)
                last = ", ".join(f"{kind} {run.accuracy[-1]:.1%}" for kind, run in pair.items())
                progress.update(task, advance=1, description=f"pair {seed + 1} of {seeds}, test accuracy: {last}")
            for kind in NAMES:
                runs[kind].append(pair[kind])
    return runs


def agreement(runs: dict[str, list[Run]], what: str, form: str) -> tuple[bool, str]:
    """Paired comparison over the seeds of a figure averaged over the last third of the epochs.

    The difference must be within the 99 % interval of Student's t around zero: of a hundred comparisons of a layer with
    itself, one falls outside.
    """

    def final(run):
        values = getattr(run, what)
        return statistics.mean(values[-max(1, len(values) // 3) :])

    pairs = [(final(stock), final(fused)) for stock, fused in zip(runs["stock"], runs["fused"], strict=True)]
    stock, fused = np.array(pairs).T
    mean, low, high = common.interval(fused - stock, level=0.99)
    agree = low <= 0 <= high
    verdict = "agree within seed noise" if agree else "DIFFER by more than seed noise"
    return agree, (
        f"test {what}: stock {stock.mean():{form}}, fused {fused.mean():{form}}, difference {mean:+{form}} "
        f"(99 % interval {low:+{form}} to {high:+{form}}): {verdict}"
    )


def saved_kb(kind: str) -> float:
    """Memory that one training step keeps between forward and backward, in kB: the whole net's."""
    return saved_bytes(net(kind, 0).train(), torch.randn(BATCH, 1, 8, 8)) / 1e3


def benchmark(compiled: bool, console) -> list[dict]:
    """Three rows of the benchmark: a tiny, a medium and a large tensor, forward + backward."""
    providers = ("eager", "compile", "fused") if compiled else ("eager", "fused")
    rows = []
    with console.status("benchmark") as status:
        for name in BENCH:
            status.update(f"benchmark: {name}{' (torch.compile takes a while)' if compiled else ''}")
            workload = BY_NAME[name]
            rows.append(time_row(Case(workload, workload.p, providers), "both", 1.5)[0])
    return rows


def draw(figure, runs, saved: dict[str, float], epoch_ms: dict[str, float] | None) -> None:
    """`epoch_ms`: None where times are not to be shown."""
    bars = {"kept for the backward pass\nof a step, kB": saved}
    if epoch_ms is not None:
        bars[f"time of an epoch, ms\n{machine.facts()['cpu']}"] = epoch_ms
    curves, *axes = figure.subplots(1, 1 + len(bars), width_ratios=(2.4, *[1] * len(bars)))
    for kind, name in NAMES.items():
        losses = np.array([run.loss for run in runs[kind]])
        epochs, mean, spread = range(1, losses.shape[1] + 1), losses.mean(0), losses.std(0, ddof=1)
        curves.plot(epochs, mean, color=COLOURS[kind], label=name)
        curves.fill_between(epochs, mean - spread, mean + spread, color=COLOURS[kind], alpha=0.25, linewidth=0)
    curves.set(xlabel="epoch", ylabel="loss on the test images", yscale="log")
    curves.set_title(f"mean and standard deviation of {len(runs['stock'])} nets")
    curves.legend()
    for axis, (title, values) in zip(axes, bars.items(), strict=True):
        drawn = axis.bar(["three layers", "one layer"], [values[kind] for kind in NAMES], color=list(COLOURS.values()))
        axis.bar_label(drawn, fmt="{:.0f}", fontsize="small")
        axis.set_title(title)


def main() -> int:
    arguments = options()
    if not machine.tuned():
        machine.restart_tuned(sys.argv)
    console = table.console(piped=100)
    started = time.perf_counter()
    # Asked here: soon the load is our own.
    busy = machine.busy()
    console.print("1. Training on 8x8 digits, every pair from the same weights and batches", style="bold")
    runs = train(arguments.seeds, arguments.epochs, console)
    agreements = [agreement(runs, "accuracy", ".2%"), agreement(runs, "loss", ".4f")]
    for agree, text in agreements:
        console.print(f"   {escape(text)}", style=None if agree else "bold red", highlight=False)
    # The first epoch of each net also pays for one-time set-up.
    epoch_ms = {kind: statistics.median(s for run in runs[kind] for s in run.seconds[1:]) * 1e3 for kind in NAMES}
    saved = {kind: saved_kb(kind) for kind in NAMES}
    for text, values, unit, form in (
        ("time per epoch", epoch_ms, "ms", table.Form(busy=bool(busy))),
        ("kept for backward per step", saved, "kB", table.Form()),
    ):
        line = f"{text}: stock {values['stock']:.0f} {unit}, fused {values['fused']:.0f} {unit}"
        ratio = form.ratio(values["stock"] / values["fused"], "x")
        console.print(f"   {line} ({ratio}; convolutions included)", highlight=False)

    console.print("2. Three lines of the benchmark, forward + backward (make bench for all)", style="bold")
    rows = benchmark(not arguments.no_compile, console)
    table.show(rows, machine.facts(), console, busy=bool(busy))
    if busy:
        console.print(f"   not a quiet machine: when this began, {busy.partition(' (')[0]}", style="yellow")

    shown = None if busy else epoch_ms
    common.pictures("demo", arguments.out, (9, 3.6), lambda figure: draw(figure, runs, saved, shown))
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
