"""The census for people: hundreds of rows by class, then one by one those where we lose."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from benchmarks.census_classes import PATTERNS, PIXELS, pattern_class, pixel_class

MOST_ROWS = 40  # as many fit the usual table
LOSS = 0.95  # of eager's time, below which a row is a loss


def _headings() -> list[str]:
    return [*(f"<= {end}" for end in PIXELS), f"> {PIXELS[-1]}", "all"]


def _cell(ratios: list[float]) -> str:
    """Count, median, lowest, and how many are losses."""
    if not ratios:
        return "-"
    losses = sum(ratio < LOSS for ratio in ratios)
    text = f"{len(ratios)}: {statistics.median(ratios):.2f}x, {min(ratios):.2f}x"
    return f"{text}, [bold red]{losses}[/]" if losses else f"{text}, 0"


def summary(rows: list[dict], mode: str) -> Table:
    title = f"census, {mode}: rows: median and lowest of eager's time over ours, rows below {LOSS:g}"
    table = Table(title=title, caption="across: pixels per channel", caption_justify="left")
    table.add_column("")
    for heading in _headings():
        table.add_column(heading, justify="right", no_wrap=True)
    measured = [row for row in rows if row["mode"] == mode and "failed" not in row]
    for pattern in (*PATTERNS, "all"):
        of = [row for row in measured if pattern in ("all", pattern_class(row["order"]))]
        if pattern == "all":
            table.add_section()
        classes = [
            [row["ratio"]["eager"] for row in of if pixel_class(row["shape"]) == i] for i in range(len(PIXELS) + 1)
        ]
        table.add_row(pattern, *map(_cell, (*classes, [row["ratio"]["eager"] for row in of])))
    return table


def losses(rows: list[dict]) -> list[str]:
    """A line for each row below the limit, the lowest first, and for each that failed."""
    measured = sorted((row for row in rows if "failed" not in row), key=lambda row: row["ratio"]["eager"])
    lines = []
    for row in measured:
        ratio, ms = row["ratio"]["eager"], row["providers"]["fused"]["median_ms"]
        if ratio < LOSS:
            lines.append(f"{ratio:.2f}x {row['mode']} {row['workload']}: {ms:.4f} ms, {row['source']}")
    return lines + [f"FAILED {row['mode']} {row['workload']}: {row['failed']}" for row in rows if "failed" in row]


def show(rows: list[dict], console: Console) -> None:
    for mode in dict.fromkeys(row["mode"] for row in rows):
        console.print(summary(rows, mode))
    for line in losses(rows):
        console.print(f"  {line}", markup=False, highlight=False)
