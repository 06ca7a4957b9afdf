"""Train the same small net twice, with the stock layers and with the fused one, and compare what comes out.

    python examples/demo.py [--out DIR] [--seeds 5] [--epochs 12] [--no-compile]

The data are the 8x8 handwritten digits that scikit-learn ships. Both nets of a pair start from the same weights and see
the same batches in the same order; only their dropped units differ, as those of any two runs do. So the learning curves
must agree within the noise of the seeds, and whether they do is computed. The tensors of this net are small and its
convolutions take their share: what the layer itself gains shows in the three lines of the benchmark that follow. All of
it runs under the allocator settings of the benchmarks (benchmarks/machine.py), for both nets alike.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine  # noqa: E402  (found through the line above)

NAMES = {"stock": "BatchNorm2d + ReLU + Dropout", "fused": "FusedBatchNorm2d"}
COLOURS = {"stock": "#8c8c8c", "fused": "#4c72b0"}
P = 0.2
BATCH = 64
BENCH = ("pointnet_head", "dense", "cnn_f32")


def options():
    parser = argparse.ArgumentParser(description="Train on digits with the stock layers and with the fused layer.")
    parser.add_argument("--out", default=".", metavar="DIR", help="where demo.png goes")
    parser.add_argument("--seeds", type=int, default=5, help="pairs of nets (at least 3)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the benchmark: faster")
    arguments = parser.parse_args()
    if arguments.seeds < 3:
        parser.error("--seeds must be at least 3: the comparison needs a spread")
    return arguments


def block(channels: int, kind: str):
    """What this library replaces: three layers by one."""
    from torch import nn

    import fusednorm

    if kind == "fused":
        return fusednorm.FusedBatchNorm2d(channels, act="relu", drop=P)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(P))


def net(kind: str, seed: int):
    """Layers draw their initial weights in the same order for both kinds: the same seed gives the same weights."""
    import torch
    from torch import nn

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


def digits():
    """Training images, training labels, test images, test labels; images are (N, 1, 8, 8), standardised."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    parts = train_test_split(found.images, found.target, test_size=0.3, random_state=0, stratify=found.target)
    train, test = (torch.tensor(part, dtype=torch.float32).unsqueeze(1) for part in parts[:2])
    mean, std = train.mean(), train.std()
    labels = [torch.tensor(part) for part in parts[2:]]
    return (train - mean) / std, labels[0], (test - mean) / std, labels[1]


class Run:
    """One net in training."""

    def __init__(self, kind: str, seed: int):
        import torch

        self.net = net(kind, seed)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.order = torch.Generator().manual_seed(seed)  # of the batches: alike in a pair, whatever dropout draws
        self.loss, self.accuracy, self.seconds = [], [], []

    def epoch(self, images, labels, test_images, test_labels) -> None:
        import torch
        from torch.nn.functional import cross_entropy

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
        self.accuracy.append((scores.argmax(1) == test_labels).float().mean().item())


def train(seeds: int, epochs: int, console) -> dict[str, list[Run]]:
    """Every pair epoch by epoch, one after the other, so that the machine's noise falls on both."""
    import torch
    from rich.progress import Progress

    data = digits()
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
    from scipy.stats import t

    def final(run):
        values = getattr(run, what)
        return statistics.mean(values[-max(1, len(values) // 3) :])

    pairs = [(final(stock), final(fused)) for stock, fused in zip(runs["stock"], runs["fused"], strict=True)]
    differences = [fused - stock for stock, fused in pairs]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    limit = float(t.ppf(0.995, len(differences) - 1)) * error
    agree = abs(mean) <= limit
    stock, fused = (statistics.mean(column) for column in zip(*pairs, strict=True))
    verdict = "agree within seed noise" if agree else "DIFFER by more than seed noise"
    return agree, (
        f"test {what}: stock {stock:{form}}, fused {fused:{form}}, difference {mean:+{form}} "
        f"(standard error {error:{form}}, 99 % limit {limit:{form}}): {verdict}"
    )


def saved_kb(kind: str) -> float:
    """Memory that one training step keeps between forward and backward, in kB: the whole net's."""
    import torch

    from benchmarks.memory import saved_bytes

    return saved_bytes(net(kind, 0).train(), torch.randn(BATCH, 1, 8, 8)) / 1e3


def benchmark(compiled: bool, console) -> list[dict]:
    """Three rows of the benchmark: a tiny, a medium and a large tensor, forward + backward."""
    from benchmarks.case import Case
    from benchmarks.measure import time_row
    from benchmarks.workloads import BY_NAME

    providers = ("eager", "compile", "fused") if compiled else ("eager", "fused")
    rows = []
    with console.status("benchmark") as status:
        for name in BENCH:
            status.update(f"benchmark: {name}{' (torch.compile takes a while)' if compiled else ''}")
            workload = BY_NAME[name]
            rows.append(time_row(Case(workload, workload.p, providers), "both", 1.5)[0])
    return rows


def plot(runs, epoch_ms, saved, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, times, memory) = plt.subplots(
        1, 3, figsize=(10, 3.6), width_ratios=(2.4, 1, 1), layout="constrained"
    )
    for kind, name in NAMES.items():
        columns = list(zip(*(run.loss for run in runs[kind]), strict=True))
        epochs = range(1, len(columns) + 1)
        mean = [statistics.mean(column) for column in columns]
        spread = [statistics.stdev(column) for column in columns]
        curves.plot(epochs, mean, color=COLOURS[kind], label=name)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        curves.fill_between(epochs, low, high, color=COLOURS[kind], alpha=0.25, linewidth=0)
    curves.set(xlabel="epoch", ylabel="test loss", yscale="log")
    curves.set_title(f"{len(runs['stock'])} seeds, mean and standard deviation", fontsize=9)
    curves.legend(frameon=False, fontsize=8)
    for axis, values, title in ((times, epoch_ms, "ms per epoch (median)"), (memory, saved, "kB kept per step")):
        bars = axis.bar(list(NAMES), [values[kind] for kind in NAMES], color=list(COLOURS.values()))
        axis.bar_label(bars, fmt="{:.0f}", fontsize=8)
        axis.set_title(title, fontsize=9)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    arguments = options()
    if not machine.tuned():
        machine.restart_tuned(sys.argv)
    from rich.markup import escape

    from benchmarks import table

    console = table.console()
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
    for text, values, unit in (("time per epoch", epoch_ms, "ms"), ("kept for backward per step", saved, "kB")):
        line = f"{text}: stock {values['stock']:.0f} {unit}, fused {values['fused']:.0f} {unit}"
        console.print(f"   {line} ({values['stock'] / values['fused']:.2f}x; convolutions included)", highlight=False)

    console.print("2. Three lines of the benchmark, forward + backward (make bench for all)", style="bold")
    rows = benchmark(not arguments.no_compile, console)
    table.show(rows, machine.facts(), console)
    if busy:
        console.print(f"   not a quiet machine: when this began, {busy.partition(' (')[0]}", style="yellow")

    path = Path(arguments.out) / "demo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(runs, epoch_ms, saved, path)
    console.print(f"wrote {path} ({time.perf_counter() - started:.0f} s)", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
