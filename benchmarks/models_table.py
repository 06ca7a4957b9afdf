"""What `make models` found: for the terminal, for the docs, and as a picture."""

from __future__ import annotations

from rich.table import Table

EXACT = 1e-6  # of the largest value, in float64, through dozens of layers
WAYS = ("fuse", "backend")
TIMED = ("fuse", "backend", "compile")


def _chains(row: dict, way: str) -> str:
    return "-" if "failed" in row[way] else f"{row[way]['fused']}"


def _times(row: dict, name: str) -> str:
    return f"{row['ratio'][name]:.2f}x" if name in row.get("ratio", {}) else "-"


def _saved(row: dict) -> str:
    return " -> ".join(
        f"{row['saved_bytes'][name] / 2**20:.0f}" for name in ("stock", *WAYS) if name in row["saved_bytes"]
    )


def line(row: dict) -> str:
    """One model's, while it runs."""
    if "reason" in row:
        return f"  {row['model']}: {row['reason']}"
    ways = ", ".join(f"{way} {row[way].get('failed') or _counted(row, way)}" for way in WAYS)
    times = "".join(f", {name} {_times(row, name)}" for name in TIMED) if "ratio" in row else ""
    return f"  {row['model']} ({row['seconds']:.0f} s): {row['chains']} chains, {ways}{times}"


def _counted(row: dict, way: str) -> str:
    return f"{row[way]['fused']} (error {row[way]['error']:.0e})"


def wrong(rows: list[dict]) -> list[str]:
    """Models that a way has changed."""
    return [row["model"] for row in rows for way in WAYS if row.get(way, {}).get("error", 0) > EXACT]


def render(rows: list[dict]) -> Table:
    caption = "chains: as counted on the stock model; those that each way fuses; error: the larger one, in float64.\n"
    caption += "stock / ours: of a training step; saved: MiB for backward of stock, fuse and backend."
    result = Table(title="Whole models", caption=caption, caption_justify="left")
    result.add_column("model")
    columns = ["chains", *WAYS, "error"]
    if any("ratio" in row for row in rows):
        columns += ["stock ms", *(f"stock / {name}" for name in TIMED), "saved MiB"]
    for name in columns:
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "reason" in row:
            result.add_row(row["model"], f"[red]{row['reason'][:60]}[/]")
            continue
        errors = [row[way]["error"] for way in WAYS if "error" in row[way]]
        cells = [str(row["chains"]), *(_chains(row, way) for way in WAYS), f"{max(errors, default=0):.0e}"]
        if "ratio" in row:
            cells += [f"{row['ms']['stock']:.1f}", *(_times(row, name) for name in TIMED), _saved(row)]
        result.add_row(row["model"], *cells)
    return result


def markdown(rows: list[dict]) -> list[str]:
    """The table of the docs."""
    lines = ["| model | chains: fuse, backend | stock ms | fuse | backend | torch.compile | saved MiB: all three |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        if "reason" in row:
            lines.append(f"| {row['model']} | {row['reason']} | | | | | |")
            continue
        chains = f"{row['chains']}: {_chains(row, 'fuse')}, {_chains(row, 'backend')}"
        times = " | ".join(_times(row, name) for name in TIMED)
        saved = _saved(row).replace(" -> ", ", ")
        lines.append(f"| {row['model']} | {chains} | {row['ms']['stock']:.0f} | {times} | {saved} |")
    return lines
