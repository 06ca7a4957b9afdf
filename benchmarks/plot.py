"""Pictures of a run: how many times faster, and how much is kept for backward."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; there may be no display

import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)
from matplotlib.ticker import FixedLocator, NullLocator  # noqa: E402

from benchmarks import labels, machine  # noqa: E402
from benchmarks.census_classes import PATTERNS, pattern_class, pixels  # noqa: E402
from benchmarks.workloads import BY_NAME, FAMILY  # noqa: E402

COLOURS = {"eager": "#8c8c8c", "compile": "#dd8452", "fused": "#4c72b0", "streaming": "#8fb0dc", "resident": "#2b4a80"}
MODEL_COLOURS = {"fuse": "#4c72b0", "backend": "#8fb0dc", "compile": COLOURS["compile"]}
COLOURS |= MODEL_COLOURS
PATTERN_COLOURS = ("#8c8c8c", "#4c72b0", "#dd8452", "#55a868")
CENSUS_TITLES = {"both": "Forward + backward", "eval": "Evaluation", "both_cold": "Forward + backward, caches cold"}
NAMES = {"eager": "eager", "compile": "torch.compile", "fused": "fusednorm"}
NAMES |= {"fuse": "fusednorm.fuse(model, example)", "backend": 'torch.compile(model, backend="fusednorm")'}


def _pick(rows: list[dict]) -> list[dict]:
    """Forward + backward at the workload's own p, and one row that shows p = 0; a failed row has nothing to draw."""
    both = [row for row in rows if row["mode"] == "both" and "failed" not in row]
    picked = [row for row in both if row["p"] == BY_NAME[row["workload"]].p or row["workload"] == "cnn_f32"]
    return [row for row in picked if BY_NAME[row["workload"]] not in FAMILY] or picked


def _title(row: dict) -> str:
    return f"{labels.layer(row)}\n{labels.noise(row)}"


def _groups(axis, rows, names, value, form, title=_title) -> None:
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        positions = [j + (i - (len(names) - 1) / 2) * height for j in range(len(rows))]
        values = [value(row, name) for row in rows]
        bars = axis.barh(positions, [v or 0 for v in values], height, label=NAMES.get(name, name), color=COLOURS[name])
        texts = ["n/a" if v is None else form.format(v) for v in values]
        behind = {"facecolor": "white", "linewidth": 0, "pad": 0}  # where a line crosses them
        axis.bar_label(bars, texts, padding=2, fontsize=7, bbox=behind)
    axis.set_yticks(range(len(rows)), [title(row) for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def _figure(rows):
    return plt.subplots(figsize=(8.5, 1.4 + 0.42 * len(rows)), layout="constrained")


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def speed(rows: list[dict], facts: dict, path: Path) -> Path:
    rows = _pick(rows)
    figure, axis = _figure(rows)
    _groups(axis, rows, ("eager", "compile"), lambda row, name: row["ratio"].get(name), "{:.1f}x")
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("unfused time / fusednorm time (right of 1: fusednorm is faster)")
    axis.set_title(f"Forward + backward\n{machine.line(facts)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return _save(figure, path)


def saved(rows: list[dict], facts: dict, path: Path) -> Path:
    rows = _pick(rows)
    figure, axis = _figure(rows)

    def value(row, name):
        return row["providers"].get(name, {}).get("saved_bytes_per_element")

    _groups(axis, rows, ("fused", "eager", "compile"), value, "{:.2f}")
    axis.set_xlabel("bytes kept for backward, per element of the activation")
    axis.set_title(f"Memory saved for backward\n{machine.line(facts)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _save(figure, path)


def census(rows: list[dict], facts: dict, path: Path) -> Path:
    """Every row of the census as a point: eager's time over ours against the pixels per channel."""
    modes = [mode for mode in CENSUS_TITLES if any(row["mode"] == mode for row in rows)]
    figure, axes = plt.subplots(1, len(modes), figsize=(5.5 * len(modes), 4.2), sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axis, mode in zip(axes[0], modes, strict=True):
        for pattern, colour in zip(PATTERNS, PATTERN_COLOURS, strict=True):
            of = [row for row in rows if row["mode"] == mode and pattern_class(row["order"]) == pattern]
            at = [pixels(row["shape"]) for row in of]
            ratios = [row["ratio"]["eager"] for row in of]
            axis.scatter(at, ratios, s=14, alpha=0.75, linewidths=0, color=colour, label=f"{pattern} ({len(of)})")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="pixels per channel", title=CENSUS_TITLES[mode])
        axis.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20]))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    axes[0][0].set_ylabel("eager time / fusednorm time")
    figure.suptitle(f"Layers of public models\n{machine.line(facts)}", fontsize=10)
    return _save(figure, path)


def models(rows: list[dict], facts: dict, path: Path) -> Path:
    """Whole models: stock's training step over that of each way."""
    figure, axis = plt.subplots(figsize=(8.5, 1.6 + 0.5 * len(rows)), layout="constrained")
    _groups(
        axis, rows, tuple(MODEL_COLOURS), lambda row, way: row["ratio"].get(way), "{:.2f}x", lambda row: row["model"]
    )
    axis.margins(y=0.01)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("stock's training step / this one's (right of 1: faster; n/a: did not run)")
    axis.set_title(f"Training steps of whole models\n{machine.line(facts)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _save(figure, path)


def draw(rows: list[dict], facts: dict, folder: str | Path) -> list[Path]:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counted = [row for row in rows if row["workload"].startswith("census_")]
    measured = [row for row in counted if "failed" not in row]
    drawn = [census(measured, facts, folder / "census.png")] if measured else []
    return drawn + _bars([row for row in rows if row not in counted], facts, folder)


def _bars(rows: list[dict], facts: dict, folder: Path) -> list[Path]:
    if not _pick(rows):
        return []
    return [speed(rows, facts, folder / "speed.png"), saved(rows, facts, folder / "saved.png")]
