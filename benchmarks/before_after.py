"""The README's picture: time and memory of a training step of some layers, before and after, for light and dark pages.

The stock layers are 100% in every pair of bars; the bars' labels are what was measured. A drawing depends on the
results and on matplotlib's version alone: no date, and ids from a fixed salt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; there may be no display

import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

from benchmarks import figures, machine  # noqa: E402

STYLES = {  # what a file's name ends with: ink, stock's bars, ours
    "": ("#1f2328", "#b8bec6", "#2f6fb3"),
    "-dark": ("#e6edf3", "#6b7480", "#6ea8e6"),
}
PANELS: dict[str, tuple[Callable[[dict, str], float], str]] = {
    "Time of forward and backward": (figures.milliseconds, "ms"),
    "Memory kept for backward": (figures.saved_megabytes, "MB"),
}
PAIR = (("eager", -0.2, "stock layers"), ("fused", 0.2, "fusednorm"))


def _panel(axis, rows: list[dict], value: Callable[[dict, str], float], unit: str, colours: tuple[str, str]) -> None:
    for (provider, offset, name), colour in zip(PAIR, colours, strict=True):
        shares = [100 * value(row, provider) / value(row, "eager") for row in rows]
        bars = axis.barh([i + offset for i in range(len(rows))], shares, 0.38, color=colour, label=name)
        axis.bar_label(bars, [f"{figures.short(value(row, provider))} {unit}" for row in rows], padding=3, fontsize=8)
    axis.set_xlim(0, 122)  # room for the labels of full bars
    axis.set_xticks([0, 50, 100], ["0", "50%", "100%"])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _figure(result: dict, colours: tuple[str, str]):
    shown = figures.shown(result["rows"])
    rows = [row for _, row in shown]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (title, (value, unit)) in zip(axes, PANELS.items(), strict=True):
        _panel(axis, rows, value, unit, colours)
        axis.set_title(title, fontsize=10)
    noises = [f"dropout {row['p']:g}" if row["p"] else "no dropout" for row in rows]
    names = ["\n".join([*name.split(", ", 1), noise]) for (name, _), noise in zip(shown, noises, strict=True)]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel(f"share of the stock layers; {machine.line(result['machine'])}", fontsize=8)
    return figure


def draw(result: dict, folder: Path) -> list[Path]:
    """Writes the pictures of a results file into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for suffix, (ink, *colours) in STYLES.items():
        inked = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with plt.rc_context({**inked, "svg.hashsalt": "before-after"}):
            figure = _figure(result, tuple(colours))
            drawn.append(folder / f"before-after{suffix}.svg")
            figure.savefig(drawn[-1], transparent=True, metadata={"Date": None})
            plt.close(figure)
    return drawn
