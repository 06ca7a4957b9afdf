"""What the examples share: arguments, the digits, a training loop, intervals, and pictures for light and dark pages."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

# C0 to C3 of a picture: ours, what it is compared with, a third, and what is only there to compare. Then ink and grid.
COLOURS = {
    "": (("#3465a4", "#d9742b", "#3d9150", "#8c8c8c"), "#333333"),
    "-dark": (("#7ba6e8", "#f0a06a", "#7fcb93", "#9a9a9a"), "#cfd0d0"),
}


def parser(story: str) -> argparse.ArgumentParser:
    """`story`: the script's docstring, whose first line says what it does."""
    found = argparse.ArgumentParser(description=story.splitlines()[0])
    found.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where the pictures go")
    return found


def options(story: str) -> argparse.Namespace:
    found = parser(story)
    found.add_argument("--seed", type=int, default=0, help="of data, weights and noise; the same one gives the same")
    found.add_argument("--quick", action="store_true", help="a few steps only, to see it work: seconds")
    # Two threads would wait for one another longer than these small nets work, and round sums in another order.
    torch.set_num_threads(1)
    return found.parse_args()


def digits(samples: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images, training labels, test images, test labels: scikit-learn's handwritten digits.

    Images are (N, 1, 8, 8), standardised by the training images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images, labels = found.images[:samples], found.target[:samples]
    parts = train_test_split(images, labels, test_size=0.3, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).unsqueeze(1) for part in parts[:2])
    mean, std = train.mean(), train.std()
    labels = [torch.tensor(part) for part in parts[2:]]
    return (train - mean) / std, labels[0], (test - mean) / std, labels[1]


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of `steps` batches of `size` each: epoch after epoch in random order, a last smaller batch left out."""
    order = torch.Generator().manual_seed(seed)  # whatever else is drawn meanwhile
    size, done = min(size, count), 0
    while done < steps:
        for batch in torch.randperm(count, generator=order).split(size)[: min(count // size, steps - done)]:
            yield batch
            done += 1


def train(net: torch.nn.Module, loss: Callable, batches: Iterable, steps: int, rate: float = 3e-3) -> list[float]:
    """Adam over `loss(batch)`, its rate falling to nothing; the losses."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    # So that the end does not hang on where the last step happened to lead.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    net.train()
    for batch in batches:
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    net.eval()
    return losses


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


# ---- differences -----------------------------------------------------------------------------------------------------
def interval(values: np.ndarray, comparisons: int = 1, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its interval by Student's t; all of `comparisons` intervals hold at once (Bonferroni)."""
    from scipy.stats import t

    half = t.ppf(1 - (1 - level) / 2 / comparisons, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def difference(ours: Iterable[float], theirs: Iterable[float], form: str) -> str:
    """In words: the mean of paired differences, and whether it is more than the runs' own noise."""
    mean, low, high = interval(np.asarray(ours) - np.asarray(theirs))
    said = "within noise" if low <= 0 <= high else "more than noise"
    return f"{mean:+{form}} (95 %: {low:+{form}} to {high:+{form}}): {said}"


# ---- pictures --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _style(colours: tuple[str, ...], ink: str) -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: dict = dict.fromkeys((*inked, "grid.color"), ink)
    style |= {"axes.prop_cycle": matplotlib.cycler(color=colours), "axes.facecolor": "none", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.alpha": 0.25}
    style |= {"axes.titlesize": "medium", "legend.fontsize": "small", "figure.facecolor": "none"}
    # Text stays text, and the same picture is the same file.
    style |= {"svg.fonttype": "none", "svg.hashsalt": "fusednorm"}
    with matplotlib.rc_context(style):
        yield


def pictures(name: str, folder: Path, size: tuple[float, float], draw: Callable) -> list[Path]:
    """`name`.svg and `name`-dark.svg in `folder`; `draw(figure)` fills a figure of `size`, in colours C0 to C3."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for variant, (colours, ink) in COLOURS.items():
        with _style(colours, ink):
            from matplotlib import pyplot

            figure = pyplot.figure(figsize=size, layout="constrained")
            draw(figure)
            paths.append(folder / f"{name}{variant}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            pyplot.close(figure)
    print(f"wrote {' and '.join(map(str, paths))}")
    return paths
