"""The README's picture: time and memory of a training step of some layers, before and after.

The stock layers are 100% in every pair of bars; the bars' labels are what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; there may be no display

import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

from benchmarks import figures, labels, machine  # noqa: E402

PANELS: dict[str, tuple[Callable[[dict, str], float], str]] = {
    "Time of forward and backward": (figures.milliseconds, "ms"),
    "Memory kept for backward": (figures.saved_megabytes, "MB"),
}
PAIR = (("eager", -0.2, "stock layers", "#8c8c8c"), ("fused", 0.2, "fusednorm", "#4c72b0"))


def _panel(axis, rows: list[dict], value: Callable[[dict, str], float], unit: str) -> None:
    for provider, offset, name, colour in PAIR:
        shares = [100 * value(row, provider) / value(row, "eager") for row in rows]
        bars = axis.barh([i + offset for i in range(len(rows))], shares, 0.38, color=colour, label=name)
        axis.bar_label(bars, [f"{figures.short(value(row, provider))} {unit}" for row in rows], padding=3, fontsize=8)
    axis.set_xlim(0, 122)  # room for the labels of full bars
    axis.set_xticks([0, 50, 100], ["0", "50%", "100%"])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def draw(rows: list[dict], facts: dict, path: Path) -> Path:
    shown = figures.shown(rows)
    rows = [row for _, row in shown]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (title, (value, unit)) in zip(axes, PANELS.items(), strict=True):
        _panel(axis, rows, value, unit)
        axis.set_title(title, fontsize=10)
    names = ["\n".join([*name.split(", ", 1), labels.noise(row)]) for name, row in shown]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel(f"share of the stock layers; {machine.line(facts)}", fontsize=8)
    figure.savefig(path)
    plt.close(figure)
    return path
