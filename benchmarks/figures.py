"""What the pages say in figures: a name for each of them, and what the results files have for it.

A page marks the place of a figure or of a table, `<!--= models -->26<!--/-->`, and `fill` writes there what the
results say. So no figure is typed by hand, and `publish.py --check` finds those that are out of date.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from math import prod

from benchmarks import labels, machine, models_table, page_tables
from benchmarks.census_table import LOSS

RESULTS = machine.ROOT / "benchmarks" / "results"
PREDICTED = RESULTS / "cuda-report-sm_90.json"  # of no machine that was measured
# What a file's name ends with.
KINDS = {"layers": ""} | {kind: f"-{kind}" for kind in ("orders", "census", "models", "whose-statistics")}
MARK = re.compile(r"(<!--= ([\w-]+) -->)(.*?)(<!--/-->)", re.DOTALL)

SHOWN = (  # of the README's table and picture: workload, and whether at p = 0
    *(("cnn_f32", False), ("tacotron2_postnet", False), ("ogbn_arxiv", False), ("pointnet_head", False)),
    ("cnn_f32", True),
)


def load(name: str) -> dict[str, dict]:
    """The results files of a machine, by kind, and what is predicted for GPUs."""
    files = {kind: RESULTS / f"{name}{suffix}.json" for kind, suffix in KINDS.items()}
    return {kind: json.loads(file.read_text()) for kind, file in (files | {"predicted": PREDICTED}).items()}


def of_layer(rows: list[dict], workload: str, bare: bool) -> list[dict]:
    """Rows of forward and backward of a workload, at p = 0 or at its own p; one for each level that was measured."""
    return [r for r in rows if (r["workload"], r["mode"], r["p"] == 0) == (workload, "both", bare)]


def shown(rows: list[dict]) -> list[tuple[str, dict]]:
    """(what a reader calls it, its row) for the README's layers, at the machine's own level."""
    found = [of_layer(rows, *key)[0] for key in SHOWN]
    return [(labels.layer(row), row) for row in found]


def milliseconds(row: dict, provider: str) -> float:
    return row["providers"][provider]["median_ms"]


def saved_megabytes(row: dict, provider: str) -> float:
    """Kept for backward."""
    return row["providers"][provider]["saved_bytes_per_element"] * prod(row["shape"]) / 1e6


def short(value: float) -> str:
    """Two digits, and all of them in front of the point."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:#.2g}"


def between(values: Iterable[float], form: str = ".1f") -> str:
    """The lowest and the highest, once where they read the same."""
    ends = sorted(values)
    low, high = format(ends[0], form), format(ends[-1], form)
    return low if low == high else f"{low} to {high}"


def readme_table(rows: list[dict]) -> list[str]:
    lines = ["| layer | dropout | time, ms | vs stock | vs torch.compile | kept for backward, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in shown(rows):
        times, kept = (
            " → ".join(short(value(row, provider)) for provider in ("eager", "fused"))
            for value in (milliseconds, saved_megabytes)
        )
        peers = " | ".join(f"{row['ratio'][peer]:.1f}x" for peer in ("eager", "compile"))
        lines.append(f"| {name} | {row['p'] or 'none'} | {times} | {peers} | {kept} |")
    return lines


def of_census(rows: list[dict]) -> dict[str, str]:
    """Eager's time over ours, of the layers of public models."""

    def ratios(mode: str, *noise: bool) -> list[float]:
        return [row["ratio"]["eager"] for row in rows if row["mode"] == mode and (row["p"] > 0) in noise]

    plain, evaluation = ratios("both", False), ratios("eval", False, True)
    losses = [ratio for ratio in evaluation if ratio < LOSS]
    return {
        "census-plain": f"{len(plain)}",
        "census-plain-median": f"{statistics.median(plain):.1f}",
        "census-plain-lowest": f"{min(plain):.2f}",
        "census-eval-losses": f"{len(losses)}",
        "census-eval-lost": between(losses, ".2f"),
    }


def of_models(rows: list[dict]) -> dict[str, str]:
    """Stock's training step over that of a converted model."""
    ratios = {way: [row["ratio"][way] for row in rows if way in row.get("ratio", {})] for way in models_table.WAYS}
    return {
        "models": f"{len(rows)}",
        **{f"models-{way}-median": f"{statistics.median(found):.2f}" for way, found in ratios.items()},
        "models-fuse-all": between(ratios["fuse"], ".2f"),
    }


def figures(results: dict[str, dict]) -> dict[str, str]:
    """All that a page may name."""
    rows = {kind: result["rows"] for kind, result in results.items()}
    tables = {table.__name__.replace("_", "-"): table(results) for table in page_tables.TABLES}
    tables["readme"] = readme_table(rows["layers"])
    return {
        "machine": machine.line(results["layers"]["machine"]),
        **of_census(rows["census"]),
        **of_models(rows["models"]),
        **{f"{name}-table": "\n".join(["", *lines, ""]) for name, lines in tables.items()},
    }


def fill(text: str, known: dict[str, str]) -> str:
    """`text` with what is known in all its marked places."""
    return MARK.sub(lambda found: found[1] + known[found[2]] + found[4], text)
