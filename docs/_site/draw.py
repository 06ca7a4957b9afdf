"""Draws the pictures of the site: `python docs/_site/draw.py`, or `make pictures`.

Measured ones come from benchmarks/results and examples/results, by the functions that draw them for a run; two are
drawings. Each is drawn once and coloured twice, NAME.svg for light pages and NAME-dark.svg for dark ones, and depends
on nothing but the results and matplotlib's version.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "docs")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")  # writes files; there may be no display

import orderings  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from _site import drawings  # noqa: E402
from benchmarks import before_after, figures, plot, publish  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
INK = "#1f2328"
# What a light page's colours become on a dark one; those that are not here are seen on both.
DARK = {INK: "#e6edf3", "#000000": "#e6edf3", "#ffffff": "#131416", "#555555": "#b0b8c0", "#2b4a80": "#8fb0dc"}
DARK |= {"#4c72b0": "#6f9bdc", "#c44e52": "#e8777b", "#8c8c8c": "#9aa2aa"}
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"svg.hashsalt": "fusednorm", "svg.fonttype": "none", "savefig.transparent": True, "font.size": 10}
STYLE |= {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"]}


def _of(kind: str) -> tuple[list[dict], dict]:
    found = figures.load(publish.NAME)[kind]
    return found["rows"], found["machine"]


def _orderings(path: Path) -> None:
    orderings.plot(orderings.Runs(ROOT / "examples" / "results" / "orderings.jsonl"), path)


DRAWN: dict[str, Callable[[Path], object]] = {
    "before-after": lambda path: before_after.draw(*_of("layers"), path),
    "passes": drawings.passes,
    "orders": drawings.orders,
    "speed": lambda path: plot.speed(*_of("layers"), path),
    "saved": lambda path: plot.saved(*_of("layers"), path),
    "census": lambda path: plot.census(*_of("census"), path),
    "models": lambda path: plot.models(*_of("models"), path),
    "orderings": _orderings,
}


def dark(svg: str) -> str:
    """The same drawing for a dark page."""
    return re.sub("|".join(DARK), lambda colour: DARK[colour[0]], svg)


def draw(folder: Path, names: tuple[str, ...] = tuple(DRAWN)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / f"{name}.svg"
        with plt.rc_context(STYLE):
            DRAWN[name](path)
        svg = re.sub(r"\s*<dc:date>.*?</dc:date>", "", path.read_text())  # the day on which it was drawn
        path.write_text(svg)
        path.with_name(f"{name}-dark.svg").write_text(dark(svg))


def words(picture: Path) -> list[str]:
    """What is written in a picture, labels and figures alike."""
    return re.findall(r"<text [^>]*>(.*?)</text>", picture.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the pictures of the site.")
    parser.add_argument("--out", type=Path, default=PICTURES, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DRAWN)}; all, where none is named")
    arguments = parser.parse_args()
    draw(arguments.out, tuple(arguments.names) or tuple(DRAWN))


if __name__ == "__main__":
    main()
