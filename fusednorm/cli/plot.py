"""The times of `bench` as a picture. matplotlib is imported only if one is asked for."""

from pathlib import Path
from typing import Any

from .output import Refused

KINDS = (".png", ".svg", ".pdf")


def check(path: Path | None) -> None:
    """Raises Refused, before anything is measured, unless a picture can be written there."""
    if path is None:
        return
    if path.suffix.lower() not in KINDS:
        raise Refused(f"--plot: expected a name that ends with {', '.join(KINDS)}, but got '{path}'")
    if not path.resolve().parent.is_dir():
        raise Refused(f"--plot: the folder {path.parent} does not exist")
    try:
        path.open("ab").close()
    except OSError as error:
        raise Refused(f"--plot: {error}") from error
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Refused(
            f"--plot: needs matplotlib, which does not import here ({error}): pip install matplotlib"
        ) from error


def draw(facts: dict[str, Any], names: dict[str, str], title: str, path: Path) -> None:
    """Medians as bars, the 20th to the 80th percentile as whiskers; `names` are what the contestants are called."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for place, (name, row) in enumerate(facts["contestants"].items()):
        median = row["median_ms"]
        around = [[median - row["p20_ms"]], [row["p80_ms"] - median]]
        axes.barh(place, median, xerr=around, capsize=4, color="tab:blue" if name == "fused" else "tab:gray")
        ratio = f", {facts['ratio'][name]['median']:.2f}x" if name in facts["ratio"] else ""
        beside: dict[str, Any] = {"va": "center", "xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(f"{median:.3g} ms{ratio}", (row["p80_ms"], place), **beside)
    axes.set_yticks(range(len(facts["contestants"])), [names[name] for name in facts["contestants"]])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel(f"milliseconds: median, 20th to 80th percentile of {facts['rounds']} rounds")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
