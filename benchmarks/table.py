"""The table for people: one line per row, peers beside the fused layer, wins and losses alike."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from benchmarks import census_table
from benchmarks.rivals import RIVALS

COLUMNS = (
    "fused ms = median of the fused layer \\[p20..p80];  vs eager, vs compile = theirs / ours (below 1 we lose);\n"
    "of default = ours / that of the default order;  copies = ours / one copy of the tensor;\n"
    "saved B/el = bytes kept for backward per element;  "
    "peak MB = tensors of one step."
)

RIVAL_COLUMN = (
    "\nvs onednn = oneDNN's best layout / ours, (b) where that is the blocked one, with tensors made in it; "
    "p = 0 and relu or none only."
)


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(row: dict, peer: str) -> str:
    if peer not in row["ratio"]:
        return "n/a"
    value = row["ratio"][peer]
    colour = "bold green" if value >= 1.05 else "bold red" if value < 0.95 else "yellow"
    return f"[{colour}]{value:.2f}x[/]"


def _rival(row: dict) -> str:
    """The best of the rival's layouts over ours; (b) where that is the blocked one, which is not the row's."""
    ratios = {name: row["ratio"][name] for name in RIVALS if name in row["ratio"]}
    if not ratios:
        return "n/a" if any(name in row.get("missing", {}) for name in RIVALS) else "-"
    best = min(ratios, key=ratios.get)
    return _ratio(row, best) + (" (b)" if best == "onednn_blocked" else "")


def _each(row: dict, key: str, form: str) -> str:
    values = [row["providers"].get(name, {}).get(key) for name in ("fused", "eager", "compile")]
    return " / ".join("-" if value is None else format(value, form) for value in values)


def _met(rows: list[dict]) -> bool:
    """Whether this run wanted the rivals, so that they have a column."""
    return any(name in row.get(key, {}) for row in rows for key in ("ratio", "missing") for name in RIVALS)


def _cells(row: dict, rivals: bool) -> list[str]:
    if "failed" in row:
        return ["[bold red]FAILED[/], not timed", *[""] * (7 + rivals)]
    fused = row["providers"]["fused"]
    return [
        f"{_ms(fused['median_ms'])} [{_ms(fused['p20_ms'])}..{_ms(fused['p80_ms'])}]".replace("[", "\\["),
        _ratio(row, "eager"),
        _ratio(row, "compile"),
        *([_rival(row)] if rivals else []),
        f"{1 / row['ratio']['default']:.2f}" if "default" in row["ratio"] else "-",
        f"{fused['copies']:.2f}",
        _each(row, "saved_bytes_per_element", ".2f") if row["mode"] != "eval" else "-",
        _each(row, "peak_mb", ".0f"),
        str(fused["rounds"]),
    ]


def render(rows: list[dict]) -> Table:
    rivals = _met(rows)
    caption = COLUMNS + RIVAL_COLUMN * rivals
    table = Table(title="fusednorm against the unfused layers", caption=caption, caption_justify="left")
    table.add_column("workload", overflow="fold")
    for name in ("p", "mode"):
        table.add_column(name, no_wrap=True)
    table.add_column("fused ms", no_wrap=True)
    names = ["vs eager", "vs compile", *["vs onednn"] * rivals, "of default", "copies"]
    for name in (*names, *(f"{name}\nfused/eager/compile" for name in ("saved B/el", "peak MB"))):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rounds", justify="right")
    previous = None
    for row in rows:
        key = row["workload"], row["level"]
        if key != previous:
            table.add_section()
        head = f"[bold]{row['workload']}[/] ({row['level']})\n{row['label']}" if key != previous else ""
        table.add_row(head, f"{row['p']:g}", row["mode"], *_cells(row, rivals))
        previous = key
    return table


def remarks(rows: list[dict]) -> list[str]:
    """What the table has no column for: cut sizes, peers that could not run, failures."""
    lines, missing = {}, {}
    for row in rows:
        if row["note"]:
            lines[f"{row['workload']}: {row['note']}"] = None
        for peer, reason in row.get("missing", {}).items():
            missing.setdefault(f"{peer} could not run ({reason})", {})[row["workload"]] = None
        if "failed" in row:
            lines[f"{row['workload']} p={row['p']:g} {row['mode']}: {row['failed']}"] = None
    return [*lines, *(f"{', '.join(workloads)}: {line}" for line, workloads in missing.items())]


def console() -> Console:
    """On the stdout of now (pytest replaces it while it runs); wide enough for the table where there is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 190)


def show(rows: list[dict], facts: dict, console: Console) -> None:
    counted = [row for row in rows if row["workload"].startswith("census_")]
    if len(counted) > census_table.MOST_ROWS:
        census_table.show(counted, console)
        rows = [row for row in rows if row not in counted]
    if rows:
        console.print(render(rows))
    for line in remarks(rows):
        console.print(f"  {line}", markup=False)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, level {facts['level']}, {facts['threads']} threads, "
        f"torch {facts['torch']}, commit {facts['commit']}, load average {facts['load_average'][0]}",
        markup=False,
        highlight=False,
    )
