"""Ghost batches: large batches of table rows, with the statistics of small ones.

    python examples/tabular.py [--out DIR] [--seed 0] [--quick]

A large batch keeps the hardware busy, but its statistics carry less noise, and that noise regularises (Hoffer et al.
2017). TabNet (Arik & Pfister 2021) therefore normalises large batches in groups: with `ghost_batch_size=32` a layer
takes the mean and variance of 32 rows at a time, as a BatchNorm called chunk by chunk would, in one call. The net here
is made as TabNet is: steps that each choose columns by a mask, gated blocks, and a sum of what the steps decide. Three
ways see the same number of rows in every epoch; small batches make more steps of it, and ghosts do not change that.
The tables are two that scikit-learn ships: breast cancer (30 columns), and the digits taken as 64 columns.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found through the line above, or by it)
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from examples import common  # noqa: E402
from fusednorm import FusedBatchNorm1d  # noqa: E402

SMALL, LARGE = 32, 256
# Batch and ghost batch.
WAYS = {f"batches of {SMALL}": (SMALL, None), f"batches of {LARGE}": (LARGE, None)}
WAYS[f"batches of {LARGE}, ghosts of {SMALL}"] = (LARGE, SMALL)
BASE, GHOSTS = list(WAYS)[1:]
TABLES = {"breast cancer": "load_breast_cancer", "digits as a table": "load_digits"}


class Gated(nn.Module):
    """A gated linear unit with its norms: half of it is dropped out, half opens and shuts the other."""

    def __init__(self, inputs: int, outputs: int, ghost: int | None):
        super().__init__()
        self.value, self.gate = (nn.Linear(inputs, outputs, bias=False) for _ in range(2))
        self.value_norm = FusedBatchNorm1d(outputs, drop=0.1, ghost_batch_size=ghost)
        self.gate_norm = FusedBatchNorm1d(outputs, act="sigmoid", ghost_batch_size=ghost)

    def forward(self, x):
        return self.value_norm(self.value(x)) * self.gate_norm(self.gate(x))


class Net(nn.Module):
    def __init__(self, columns: int, classes: int, ghost: int | None, width: int = 16, steps: int = 2):
        super().__init__()
        self.first = Gated(columns, 2 * width, ghost)
        self.blocks = nn.ModuleList(Gated(columns, 2 * width, ghost) for _ in range(steps))
        self.choices = nn.ModuleList(nn.Linear(width, columns, bias=False) for _ in range(steps))
        self.choice_norms = nn.ModuleList(FusedBatchNorm1d(columns, ghost_batch_size=ghost) for _ in range(steps))
        self.decide = nn.Linear(width, classes)

    def forward(self, x):
        asks, unused, decided = self.first(x).chunk(2, 1)[1], torch.ones_like(x), 0
        for block, choice, norm in zip(self.blocks, self.choices, self.choice_norms, strict=True):
            mask = (norm(choice(asks)) * unused).softmax(1)  # TabNet has sparsemax here
            unused = unused * (1.3 - mask)
            decides, asks = block(mask * x.shape[1] * x).chunk(2, 1)
            decided = decided + decides.relu()
        return self.decide(decided)


def table(name: str) -> list[torch.Tensor]:
    """Training rows, test rows, training labels, test labels."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import minmax_scale

    rows, labels = getattr(datasets, TABLES[name])(return_X_y=True)
    # Bounded: a pixel that is almost always 0 would be far outside in units of its deviation.
    rows = minmax_scale(rows, (-1, 1)).astype(np.float32)
    parts = train_test_split(rows, labels, test_size=0.3, random_state=0, stratify=labels)
    return [torch.from_numpy(part) for part in parts]


def run(name: str, way: str, seed: int, epochs: int) -> tuple[float, float]:
    """Test loss and accuracy of a net that was trained in one way."""
    rows, test_rows, labels, test_labels = table(name)
    batch, ghost = WAYS[way]
    torch.manual_seed(seed)
    net = Net(rows.shape[1], int(labels.max()) + 1, ghost)
    steps = epochs * (len(rows) // batch)

    def loss(part):
        return cross_entropy(net(rows[part]), labels[part])

    common.train(net, loss, common.batches(len(rows), batch, steps, seed), steps, rate=1e-2)
    with torch.no_grad():
        scores = net(test_rows)
    return cross_entropy(scores, test_labels).item(), common.accuracy(scores, test_labels)


def ghosts_against_chunks(seed: int) -> float:
    """Largest difference of a layer with ghost batches from torch's BatchNorm called chunk by chunk: outputs, gradients
    and running statistics, in float64."""
    torch.manual_seed(seed)
    x = torch.randn(LARGE, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    stock = nn.BatchNorm1d(8).double()
    ours = FusedBatchNorm1d(8, ghost_batch_size=SMALL).double()
    results = []
    for layer, y in ((stock, torch.cat([stock(part) for part in x.split(SMALL)])), (ours, ours(x))):
        (grad,) = torch.autograd.grad((y * weights).sum(), x)
        results.append([y, grad, layer.running_mean, layer.running_var])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def draw(figure, found: dict) -> None:
    for axis, (name, ways) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for place, (way, colour) in enumerate(zip(WAYS, ("C3", "C1", "C0"), strict=True)):
            losses = ways[way][:, 0]
            mean, low, _ = common.interval(losses)
            axis.plot(losses, np.full(len(losses), place + 0.18), "o", ms=3, alpha=0.5, color=colour)
            axis.errorbar(mean, place, xerr=mean - low, fmt="s", ms=6, color=colour, capsize=3)
            axis.annotate(f"{ways[way][:, 1].mean():.1%} right", (mean, place - 0.14), ha="center", va="bottom")
        axis.set_yticks(range(len(WAYS)), [way.replace(", ", "\n") for way in WAYS])
        axis.set_ylim(len(WAYS) - 0.5, -0.6)
        axis.grid(axis="x")
        axis.set(title=name, xlabel="loss on the test rows (less is better)")
    figure.axes[1].tick_params(labelleft=False)
    figure.supxlabel("squares: means with their 95 % intervals; dots: one net each", fontsize="small")


def main() -> int:
    arguments = common.options(__doc__)
    seeds, epochs = (3, 2) if arguments.quick else (10, 20)
    print(f"ghost batches against BatchNorm on chunks: {ghosts_against_chunks(arguments.seed):.0e} apart at most")
    found = {}
    for name in TABLES:
        every = range(arguments.seed, arguments.seed + seeds)
        found[name] = ways = {way: np.array([run(name, way, seed, epochs) for seed in every]) for way in WAYS}
        print(f"{name}, {epochs} epochs, {seeds} seeds:")
        for way, values in ways.items():
            loss, right = values.mean(0)
            print(f"  {way}: loss {loss:.4f}, accuracy {right:.1%}")
        print(f"  ghosts less none: loss {common.difference(ways[GHOSTS][:, 0], ways[BASE][:, 0], '.4f')}")
    common.pictures("tabular", arguments.out, (9, 3.4), lambda figure: draw(figure, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
