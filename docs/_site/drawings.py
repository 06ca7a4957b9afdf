"""Two drawings: the passes over memory before and after, and the orders of the stages."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

COLOURS = {"norm": "#4c72b0", "act": "#dd8452", "drop": "#55a868", "add": "#9467bd"}
PASSES = (  # what runs; of each step its stage, what it is called, and its passes: r a tensor read, w one written
    (
        "stock layers,\nforward",
        (("norm", "statistics", "r"), ("norm", "normalise", "rw"), ("act", "activation", "rw"), ("drop", "drop", "rw")),
    ),
    ("fusednorm,\nforward", (("norm", "all of it", "rw"),)),
    (
        "stock layers,\nbackward",
        (("drop", "drop", "rw"), ("act", "activation", "rrw"), ("norm", "sums", "rr"), ("norm", "gradient", "rrw")),
    ),
    ("fusednorm,\nbackward", (("norm", "all of it", "rrw"),)),
)
ORDERS = (
    ("norm-act-drop", "the default: Conv, BN, ReLU, Dropout"),
    ("norm-act-drop-add", "a residual block's last layer"),
    ("norm-add-act", "ResNet's last norm of a block"),
    ("norm-add-act-drop", "the same with dropout"),
    ("act-norm-drop", "the IC layer behind a ReLU"),
    ("drop-norm-act", "dropout of the layer before"),
    ("act-drop-norm", "what stands ahead is computed with the statistics"),
)


def _square(axis, x: float, y: float, width: float, height: float, face: str, edge: str) -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, linewidth=1.6))


def passes(path: Path) -> None:
    """A square a pass over the activation, where a channel stays in cache."""
    figure, axis = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
    for y, (_, steps) in enumerate(PASSES):
        x = 0.0
        for stage, words, tensors in steps:
            for i, way in enumerate(tensors):
                filled = COLOURS[stage] if way == "w" else "none"
                _square(axis, x + i, y - 0.22, 0.86, 0.44, filled, COLOURS[stage])
            axis.text(x, y - 0.34, words, fontsize=8, va="bottom")
            x += len(tensors) + 0.5
        count = sum(len(tensors) for _, _, tensors in steps)
        axis.text(x, y, f"{count} passes", va="center", fontweight="bold")
    axis.set_yticks(range(len(PASSES)), [name for name, _ in PASSES])
    axis.set(xlim=(-0.3, 14), ylim=(3.6, -0.8), xticks=[])
    axis.tick_params(axis="y", length=0)
    axis.spines[:].set_visible(False)
    for x, (facecolor, words) in enumerate((("none", "a tensor read"), ("#8c8c8c", "a tensor written"))):
        _square(axis, 7.2 + 3.2 * x, 1.0, 0.3, 0.2, facecolor, "#8c8c8c")
        axis.text(7.65 + 3.2 * x, 1.1, words, fontsize=8, va="center")
    figure.savefig(path)
    plt.close(figure)


def orders(path: Path) -> None:
    """Orders that models have, stage by stage."""
    figure, axis = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    for y, (order, words) in enumerate(ORDERS):
        for x, stage in enumerate(order.split("-")):
            box = FancyBboxPatch((x * 1.35, y - 0.27), 1, 0.54, boxstyle="round,pad=0,rounding_size=0.12", linewidth=0)
            box.set_facecolor(COLOURS[stage])
            axis.add_patch(box)
            axis.text(x * 1.35 + 0.5, y, stage, color="#fffffe", ha="center", va="center", fontsize=9)
            if x:
                arrow = {"arrowstyle": "->", "color": "#8c8c8c"}
                axis.annotate("", (x * 1.35, y), (x * 1.35 - 0.35, y), arrowprops=arrow)
        axis.text(5.6, y, words, va="center", fontsize=9)
    axis.set(xlim=(-0.1, 11), ylim=(len(ORDERS) - 0.5, -0.5), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
