"""The table for people: one line per row, peers beside the fused layer, wins and losses alike.

Where a terminal is too narrow for it, the parts of a cell stand one below another, and nothing is cut off.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import census_table
from benchmarks.rivals import RIVALS

COLUMNS = (
    "fused ms = median of the fused layer \\[p20..p80];  peak MB = tensors of one step;\n"
    "vs eager, vs compile = theirs / ours (below 1 we lose);  of default = ours / that of the default order;\n"
    "copies = ours / one copy of the tensor;  saved B/el = bytes kept for backward per element."
)
STACKED = "\nOf three values below one another the first is fused, the second eager, the third compile."
BUSY = "\nbusy = a ratio of times that were taken on a busy machine, which changes them by as much as two."

RIVAL_COLUMN = (
    "\nvs onednn = oneDNN's best layout / ours, (b) where that is the blocked one, with tensors made in it; "
    "p = 0 and relu or none only."
)


class Form(NamedTuple):
    """How cells are written: narrow, with their parts one below another, or not; whether ratios say "busy"."""

    narrow: bool = False
    busy: bool = False

    @property
    def line(self) -> str:
        return "\n" if self.narrow else " "

    def ratio(self, value: float, unit: str = "") -> str:
        return f"{value:.2f}{unit}" + f"{self.line}busy" * self.busy


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(row: dict, peer: str, form: Form) -> str:
    if peer not in row["ratio"]:
        return "n/a"
    value = row["ratio"][peer]
    colour = "bold green" if value >= 1.05 else "bold red" if value < 0.95 else "yellow"
    return f"[{colour}]{form.ratio(value, 'x')}[/]"


def _rival(row: dict, form: Form) -> str:
    """The best of the rival's layouts over ours; (b) where that is the blocked one, which is not the row's."""
    ratios = {name: row["ratio"][name] for name in RIVALS if name in row["ratio"]}
    if not ratios:
        return "n/a" if any(name in row.get("missing", {}) for name in RIVALS) else "-"
    best = min(ratios, key=ratios.get)
    return _ratio(row, best, form) + f"{form.line}(b)" * (best == "onednn_blocked")


def _each(row: dict, key: str, digits: str, form: Form) -> str:
    values = [row["providers"].get(name, {}).get(key) for name in ("fused", "eager", "compile")]
    between = "\n" if form.narrow else " / "
    return between.join("-" if value is None else format(value, digits) for value in values)


def _met(rows: list[dict]) -> bool:
    """Whether this run wanted the rivals, so that they have a column."""
    return any(name in row.get(key, {}) for row in rows for key in ("ratio", "missing") for name in RIVALS)


def _cells(row: dict, rivals: bool, form: Form) -> list[str]:
    if "failed" in row:
        return ["[bold red]FAILED[/], not timed", *[""] * (7 + rivals)]
    fused = row["providers"]["fused"]
    median, p20, p80 = (_ms(fused[f"{name}_ms"]) for name in ("median", "p20", "p80"))
    return [
        f"{median}{form.line}\\[{p20}..{form.line.strip(' ')}{p80}]",
        _ratio(row, "eager", form),
        _ratio(row, "compile", form),
        *([_rival(row, form)] if rivals else []),
        form.ratio(1 / row["ratio"]["default"]) if "default" in row["ratio"] else "-",
        form.ratio(fused["copies"]),
        _each(row, "saved_bytes_per_element", ".2f", form) if row["mode"] != "eval" else "-",
        _each(row, "peak_mb", ".0f", form),
        str(fused["rounds"]),
    ]


def render(rows: list[dict], form: Form) -> Table:
    rivals = _met(rows)
    caption = COLUMNS + STACKED * form.narrow + RIVAL_COLUMN * rivals + BUSY * form.busy
    table = Table(title="fusednorm against the unfused layers", caption=caption, caption_justify="left")
    if form.narrow:
        table.box, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, True
    table.add_column("workload", overflow="fold")
    for name in ("p", "mode"):
        table.add_column(name, no_wrap=True)
    table.add_column(f"fused{form.line}ms", no_wrap=True)
    names = ["vs eager", "vs compile", *["vs onednn"] * rivals, "of default", "copies", "saved B/el", "peak MB"]
    for name in names:
        triple = "" if form.narrow or name not in names[-2:] else "\nfused/eager/compile"
        table.add_column(name.replace(" ", form.line) + triple, justify="right", no_wrap=True)
    table.add_column("rounds", justify="right")
    previous = None
    for row in rows:
        key = row["workload"], row["level"]
        if key != previous:
            table.add_section()
        head = f"[bold]{row['workload']}[/] ({row['level']})\n{row['label']}" if key != previous else ""
        table.add_row(head, f"{row['p']:g}", row["mode"], *_cells(row, rivals, form))
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


def console(piped: int = 190) -> Console:
    """On the stdout of now (pytest replaces it while it runs); `piped` columns wide where there is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else piped)


def show(rows: list[dict], facts: dict, console: Console, busy: bool = False) -> None:
    counted = [row for row in rows if row["workload"].startswith("census_")]
    if len(counted) > census_table.MOST_ROWS:
        census_table.show(counted, console)
        rows = [row for row in rows if row not in counted]
    if rows:
        wide = render(rows, Form(busy=busy))
        needed = console.measure(wide, options=console.options.update(max_width=sys.maxsize)).minimum
        console.print(wide if needed <= console.width else render(rows, Form(narrow=True, busy=busy)))
    for line in remarks(rows):
        console.print(f"  {line}", markup=False)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, level {facts['level']}, {facts['threads']} threads, "
        f"torch {facts['torch']}, commit {facts['commit']}, load average {facts['load_average'][0]}",
        markup=False,
        highlight=False,
    )
