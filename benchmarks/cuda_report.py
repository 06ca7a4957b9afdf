"""What is said of the CUDA kernels' counts: how much of each GPU a kernel fills, what its time is predicted to be and
what bounds it. `make cuda` shows an H100's, `make cuda REPORT=1` every GPU's and writes it. Nothing of it is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich.table import Table

from benchmarks import cuda_model
from benchmarks.cuda_launches import Plan, Plans
from benchmarks.cuda_model import GPU, GPUS, Counted


def report(rows: list[dict], plans: Plans) -> list[dict]:
    """A row for each counted one: counts per element, and for each GPU that can run the kernel there, its plan, its
    occupancy and the predicted time."""
    found = []
    for row in rows:
        counted = cuda_model.Counted.of(row)
        per_element = 32 / row["elements"]
        counts = {"issued": counted.issued, "alu": counted.alu, "fma": counted.fma}
        counts["other"] = counts["issued"] - counts["alu"] - counts["fma"]
        found.append(
            {key: row[key] for key in ("row", "kernel", "elements", "threads", "registers")}
            | {"instructions": {name: round(count * per_element, 2) for name, count in counts.items()}}
            | {"sectors_over_ideal": round(counted.sectors, 3)}
            | {"gpus": {name: on(counted, GPUS[name], p) for name, p in plans[row["row"], row["kernel"]].items()}}
        )
    return found


def on(counted: Counted, gpu: GPU, plan: Plan) -> dict:
    """One kernel on one GPU, with that GPU's plan."""
    there = dataclasses.replace(counted, **{key: plan[key] for key in ("threads", "blocks", "shared")})
    occupancy = there.occupancy(gpu)
    terms = {term: round(seconds * 1e6, 2) for term, seconds in there.seconds(gpu).items()}
    return {
        **plan,
        "resident_blocks": occupancy.blocks,
        "resident_warps": occupancy.warps,
        "limit": occupancy.limit,
        "bytes_in_flight": there.flying(gpu),
        "predicted_us": max(terms.values()),
        "bound": there.bound(gpu)[0],
        "terms_us": terms,
        "of_floor": round(there.of_floor(gpu), 3),
    }


def parts() -> dict:
    """The GPUs' figures, for the file."""
    return {"gpus": {name: dataclasses.asdict(gpu) for name, gpu in GPUS.items()}}


# ---- tables ----------------------------------------------------------------------------------------------------------
CAPTION = (
    "Counted: registers; instructions of an element, by the pipes that take them; sectors: bytes moved over bytes\n"
    "asked for. From these: blocks x warps that a multiprocessor holds, what limits them, what they ask for at once.\n"
    "Predicted: the time, what bounds it, and the time of a copy that moves the bytes asked for over it.\n"
    "In parentheses: what runs on that GPU only where residency is turned off; -: what cannot run there."
)
COUNTS = ("registers", "instructions", "ALU", "FMA", "other", "sectors")
PREDICTIONS = ("occupancy", "limit", "KB in flight", "predicted us", "bound by", "of floor")


def tables(rows: list[dict], gpu: str, everything: bool) -> Iterator[Table]:
    """The counts with one GPU's predictions; then every GPU's, and the figures that these rest on."""
    yield counts(rows, gpu)
    if everything:
        yield predictions(rows)
        yield figures()


def counts(rows: list[dict], gpu: str) -> Table:
    shown = Table(title=f"CUDA kernels: counted in machine code for 9.0, times predicted for an {gpu}", caption=CAPTION)
    shown.add_column("row, kernel", no_wrap=True)
    for name in (*COUNTS, *PREDICTIONS):
        shown.add_column(name, justify="right")
    for row in _with_headings(shown, rows):
        cells = [str(row["registers"]), *(f"{count:.1f}" for count in row["instructions"].values())]
        shown.add_row(row["kernel"], *cells, f"{row['sectors_over_ideal']:.2f}", *_cells(row["gpus"].get(gpu)))
    return shown


def predictions(rows: list[dict]) -> Table:
    shown = Table(title="Predicted for every GPU, with its own blocks and clusters", caption=CAPTION)
    shown.add_column("row, kernel", no_wrap=True)
    for gpu in GPUS:
        shown.add_column(gpu, justify="right", no_wrap=True)
    for row in _with_headings(shown, rows):
        shown.add_row(row["kernel"], *(_cell(row["gpus"].get(gpu)) for gpu in GPUS))
    return shown


def _with_headings(shown: Table, rows: list[dict]) -> Iterator[dict]:
    """The rows, after a line of the table for each layer."""
    previous = None
    for row in rows:
        if row["row"] != previous:
            shown.add_section()
            shown.add_row(f"[bold]{row['row']}[/]")
        previous = row["row"]
        yield row


def _cells(there: dict | None) -> list[str]:
    """As PREDICTIONS has them."""
    if there is None:
        return ["-"] * len(PREDICTIONS)
    us = f"{there['predicted_us']:.1f}"
    return [
        f"{there['resident_blocks']}x{there['resident_warps'] // there['resident_blocks']}",
        there["limit"],
        f"{there['bytes_in_flight'] / 1024:.0f}",
        us if there["default"] else f"({us})",
        there["bound"],
        f"{there['of_floor']:.0%}",
    ]


def _cell(there: dict | None) -> str:
    """All of them in one."""
    if there is None:
        return "-"
    held, limit, flying, us, bound, share = _cells(there)
    return f"{held} {limit}\n{us} us, {share}\n{bound}, {flying} KB"


def figures() -> Table:
    shown = Table(title="What the predictions rest on")
    shown.add_column("GPU")
    for name in ("multiprocessors", "GHz", "TB/s", "of it in a copy", "shared KB", "of a block", "warps", "cluster"):
        shown.add_column(name, justify="right")
    shown.add_column("source")
    for gpu in GPUS.values():
        rates = f"{gpu.clock / 1e9:.3f}", f"{gpu.bandwidth / 1e12:.2f}", f"{gpu.copies:.0%}"
        held = f"{gpu.shared / 1024:.0f}", f"{gpu.per_block / 1024:.0f}", str(gpu.warps), str(gpu.cluster)
        shown.add_row(gpu.name, str(gpu.multiprocessors), *rates, *held, gpu.source)
    return shown
