"""What a net does not know: digits that are turned, moved and covered with noise, and how unsure the net says it is.

    python examples/uncertainty.py [--out DIR] [--seed 0] [--quick]

Nets are trained on upright digits and asked about test images that are shifted more and more from these, in three ways:
one pass without noise; many passes with the dropout on, by `fusednorm.predict` (Gal & Ghahramani 2016); and many passes
that each normalise by the statistics of one batch of training (Teye et al. 2018). All three give probabilities of ten
classes. The entropy of their mean says how unsure; the mutual information is the part of it that the passes disagree
about. Whether that tells right answers from wrong ones is the area under the ROC curve: 0.5 is chance, 1 is perfect.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found through the line above, or by it)
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, nll_loss  # noqa: E402

import fusednorm  # noqa: E402
from examples import common  # noqa: E402

BATCH = 64
METHODS = ("one pass, no noise", "Monte-Carlo dropout", "Monte-Carlo batch statistics")
# A shift's name on the axis, and its levels from none to much.
SHIFTS = {"turned by degrees": (0, 15, 30, 45, 60), "moved by pixels": (0, 1, 2, 3), "noise": (0, 0.5, 1, 1.5, 2)}
QUANTITIES = ("accuracy", "loss", "entropy", "mutual information")


def shifted(images: torch.Tensor, kind: str, level: float, seed: int) -> torch.Tensor:
    """What is moved or turned in from outside the image is black; noise is in units of the images' deviation."""
    if kind == "noise":
        return images + level * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    angle = math.radians(level) if kind.startswith("turned") else 0.0
    right = 2 * level / images.shape[-1] if kind.startswith("moved") else 0.0
    rows = [[math.cos(angle), -math.sin(angle), -right], [math.sin(angle), math.cos(angle), 0.0]]
    grid = affine_grid(torch.tensor(rows).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    black = images.min()
    return grid_sample(images - black, grid, align_corners=False) + black


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        fusednorm.FusedBatchNorm2d(16, act="relu", drop=0.1),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        fusednorm.FusedBatchNorm2d(32, act="relu", drop=nn.Dropout2d(0.1)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64, bias=False),
        fusednorm.FusedBatchNorm1d(64, act="relu", drop=0.5),
        nn.Linear(64, 10),
    )


def trained(seed: int, images, labels, steps: int) -> nn.Sequential:
    model = net(seed)

    def loss(batch):
        return cross_entropy(model(images[batch]), labels[batch])

    common.train(model, loss, common.batches(len(images), BATCH, steps, seed), steps)
    return model


def predictions(model, bank, images, passes: int, seed: int) -> dict[str, fusednorm.uncertainty.Prediction]:
    """By each method. A single pass has an entropy, and nothing that it could disagree with."""
    with torch.no_grad():
        p = model(images).softmax(1)
    entropy = -torch.special.xlogy(p, p).sum(1)
    once = fusednorm.uncertainty.Prediction(p, torch.zeros_like(p), entropy, torch.zeros_like(entropy))
    dropout = fusednorm.predict(model, images, passes, seed)
    statistics = fusednorm.predict(model, images, passes, seed, statistics=bank, noises=())
    return dict(zip(METHODS, (once, dropout, statistics), strict=True))


def seen(found, labels) -> list[float]:
    """QUANTITIES, means over the images."""
    loss = nll_loss(found.mean.clamp_min(1e-12).log(), labels).item()
    return [
        common.accuracy(found.mean, labels),
        loss,
        found.entropy.mean().item(),
        found.mutual_information.mean().item(),
    ]


def study(seed: int, quick: bool) -> tuple[dict, dict]:
    """{method: (nets, levels, quantities)} and {(method, score): areas under the ROC curve, a net each}."""
    from sklearn.metrics import roc_auc_score

    nets, steps, passes = (2, 60, 4) if quick else (5, 300, 12)
    images, labels, test_images, test_labels = common.digits()
    curves, areas = {method: [] for method in METHODS}, {}
    for number in range(seed, seed + nets):
        model = trained(number, images, labels, steps)
        order = list(common.batches(len(images), BATCH, 32, number))
        bank = fusednorm.uncertainty.batch_statistics(model, [images[batch] for batch in order], progress=False)
        rows, scores, wrong = {method: [] for method in METHODS}, {}, {}
        for kind, levels in SHIFTS.items():
            for level in levels:
                asked = shifted(test_images, kind, level, number)
                for method, found in predictions(model, bank, asked, passes, number).items():
                    rows[method].append(seen(found, test_labels))
                    wrong.setdefault(method, []).append(found.mean.argmax(1) != test_labels)
                    scores.setdefault((method, "entropy"), []).append(found.entropy)
                    scores.setdefault((method, "mutual information"), []).append(found.mutual_information)
        for method in METHODS:
            curves[method].append(rows[method])
        for (method, score), values in scores.items():
            area = roc_auc_score(torch.cat(wrong[method]), torch.cat(values))
            areas.setdefault((method, score), []).append(area)
    del areas[METHODS[0], "mutual information"]  # all zeros
    return {method: np.array(values) for method, values in curves.items()}, areas


def report(curves: dict, areas: dict) -> None:
    plain, dropout, statistics = (curves[method] for method in METHODS)
    worst = len(SHIFTS["turned by degrees"]) - 1
    for at, words in ((0, "upright"), (worst, f"turned by {SHIFTS['turned by degrees'][worst]} degrees")):
        right, _, entropy, information = dropout[:, at].mean(0)
        print(f"{words}: accuracy {right:.1%}, entropy {entropy:.2f}, mutual information {information:.3f} nats")
    print("over all shifts, against one pass without noise:")
    for values, name in ((dropout, METHODS[1]), (statistics, METHODS[2])):
        for at, quantity, form in ((0, "accuracy", ".2%"), (1, "loss", ".3f")):
            means = values[:, :, at].mean(1), plain[:, :, at].mean(1)
            print(f"  {name}: {quantity} {common.difference(*means, form)}")
    print("area under the ROC curve of telling wrong answers from right ones, against the entropy of one pass:")
    base = areas[METHODS[0], "entropy"]
    print(f"  {METHODS[0]}, entropy: {np.mean(base):.3f}")
    for (method, score), values in areas.items():
        if method != METHODS[0]:
            print(f"  {method}, {score}: {np.mean(values):.3f}, {common.difference(values, base, '.3f')}")


def draw(figure, curves: dict) -> None:
    axes = figure.subplots(2, len(SHIFTS), sharey="row", sharex="col")
    start = 0
    for column, (kind, levels) in zip(axes.T, SHIFTS.items(), strict=True):
        part = slice(start, start + len(levels))
        start += len(levels)
        for axis, at in zip(column, (0, 2), strict=True):
            for method, colour in zip(METHODS, ("C3", "C0", "C1"), strict=True):
                values = curves[method][:, part, at]
                axis.plot(levels, values.mean(0), marker="o", ms=3, color=colour, label=method)
                axis.fill_between(levels, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
            axis.grid(axis="y")
        column[1].set_xlabel("noise, deviations of the images" if kind == "noise" else kind)
    axes[0, 0].set_ylabel("right answers")
    axes[0, 0].yaxis.set_major_formatter("{x:.0%}")
    axes[1, 0].set_ylabel("how unsure: entropy, nats")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def main() -> int:
    arguments = common.options(__doc__)
    curves, areas = study(arguments.seed, arguments.quick)
    report(curves, areas)
    common.pictures("uncertainty", arguments.out, (9, 5), lambda figure: draw(figure, curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
