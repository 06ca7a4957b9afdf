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

from benchmarks import machine, models_table
from benchmarks.census_table import LOSS

RESULTS = machine.ROOT / "benchmarks" / "results"
KINDS = {"layers": "", "orders": "-orders", "census": "-census", "models": "-models"}  # what a file's name ends with
MARK = re.compile(r"(<!--= ([\w-]+) -->)(.*?)(<!--/-->)", re.DOTALL)

SHOWN = {  # of the README's table and picture: workload, whether at p = 0, and what a reader calls it
    ("cnn_f32", False): "ResNet layer, 64x56x56, batch 64",
    ("tacotron2_postnet", False): "speech layer, 512x800, batch 64",
    ("ogbn_arxiv", False): "graph layer, 169343 nodes, 256 features",
    ("pointnet_head", False): "small dense layer, 24 rows, 512 features",
    ("cnn_f32", True): "ResNet layer, 64x56x56, batch 64",
}
LAYERS = (  # of the table of layers: workload, and whether at p = 0
    *(("cnn_f32", False), ("cnn_f32_last", False), ("cnn_bf16", False), ("cnn_bf16_last", False), ("dense", False)),
    *(("tacotron2_postnet", False), ("jasper_b5", False), ("ogbn_arxiv", False), ("pointnet_head", False)),
    *(("cnn_f32", True), ("cnn_f32_last", True), ("cnn_bf16", True), ("cnn_bf16_last", True)),
)
ORDERS = {  # of the table of orders: workload and what it is called
    "norm-act-drop": "norm-act-drop",
    "act-norm-drop": "act-norm-drop",
    "drop-norm-act": "drop-norm-act",
    "norm-act-drop-add": "norm-act-drop-add",
    "norm-add-act": "norm-add-act",
    "norm-add-act-drop": "norm-add-act-drop",
    "norm-act-drop_uniform": "norm-act-drop, uniform",
    "drop-norm-act_uniform": "drop-norm-act, uniform",
    "norm-act-drop_gaussian": "norm-act-drop, Gaussian",
    "drop-norm-act_gaussian": "drop-norm-act, Gaussian",
    "norm-act-drop_channel": "norm-act-drop, per channel",
    "drop": "dropout alone",
    "drop_uniform": "uniform alone",
    "drop_sample": "drop path alone",
}
IN_CACHE = ("cnn_f32_last_16", "cnn_bf16_16", "cnn_f32_4")  # tensors that fit the caches
TINY = ("pointnet_head", "fastai_head")  # where a call is most of the time


def load(name: str) -> dict[str, dict]:
    """The results files of a machine, by kind."""
    return {kind: json.loads((RESULTS / f"{name}{suffix}.json").read_text()) for kind, suffix in KINDS.items()}


def of_layer(rows: list[dict], workload: str, bare: bool) -> list[dict]:
    """Rows of forward and backward of a workload, at p = 0 or at its own p; one for each level that was measured."""
    return [r for r in rows if (r["workload"], r["mode"], r["p"] == 0) == (workload, "both", bare)]


def shown(rows: list[dict]) -> list[tuple[str, dict]]:
    """(what a reader calls it, its row) for the README's layers, at the machine's own level."""
    return [(name, of_layer(rows, *key)[0]) for key, name in SHOWN.items()]


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


def saved(row: dict) -> str:
    fused, eager = (row["providers"][name]["saved_bytes_per_element"] for name in ("fused", "eager"))
    return f"{fused:.2f} ({eager:.0f})"


def layers_table(rows: list[dict]) -> list[str]:
    lines = ["| layer | p | vs eager | vs torch.compile | copies | saved bytes per element (eager) |"]
    lines.append("|---|---|---|---|---|---|")
    for name, bare in LAYERS:
        for row in of_layer(rows, name, bare):
            level = " (AVX2)" if row["level"] == "avx2" else ""
            lines.append(
                f"| {row['label']}{level} | {row['p']:g} | {row['ratio']['eager']:.1f}x | "
                f"{row['ratio']['compile']:.1f}x | {row['providers']['fused']['copies']:.1f} | {saved(row)} |"
            )
    return lines


def orders_table(rows: list[dict]) -> list[str]:
    found = {row["workload"]: row for row in rows}
    lines = ["| order, noise | of the default order | vs eager | vs torch.compile | saved bytes per element (eager) |"]
    lines.append("|---|---|---|---|---|")
    for name, title in ORDERS.items():
        both = found[name], found[f"{name}_last"]
        default = ", ".join(f"{1 / row['ratio']['default']:.2f}" for row in both)
        eager, compiled = (", ".join(f"{row['ratio'][peer]:.1f}x" for row in both) for peer in ("eager", "compile"))
        lines.append(f"| {title} | {default} | {eager} | {compiled} | {saved(both[0])} |")
    return lines


def of_onednn(rows: list[dict]) -> dict[str, str]:
    """oneDNN's time over ours, in the better of its layouts."""

    def onednn(*workloads: str) -> list[float]:
        ratios = [of_layer(rows, workload, True)[0]["ratio"] for workload in workloads]
        return [min(value for peer, value in ratio.items() if peer.startswith("onednn")) for ratio in ratios]

    return {
        "onednn": ", ".join(f"{ratio:.2f}" for ratio in onednn(*(name for name, bare in LAYERS if bare))),
        "onednn-in-cache": between(onednn(*IN_CACHE)),
        "onednn-tiny": between(onednn(*TINY)),
    }


def of_census(rows: list[dict]) -> dict[str, str]:
    """Eager's time over ours, of the layers of public models."""

    def ratios(mode: str, *noise: bool) -> list[float]:
        return [row["ratio"]["eager"] for row in rows if row["mode"] == mode and (row["p"] > 0) in noise]

    plain, noisy, evaluation = ratios("both", False), ratios("both", True), ratios("eval", False, True)
    losses = [ratio for ratio in evaluation if ratio < LOSS]
    return {
        "census-plain": f"{len(plain)}",
        "census-plain-median": f"{statistics.median(plain):.1f}",
        "census-plain-lowest": f"{min(plain):.2f}",
        "census-plain-eval-median": f"{statistics.median(ratios('eval', False)):.1f}",
        "census-noisy": f"{len(noisy)}",
        "census-noisy-median": f"{statistics.median(noisy):.1f}",
        "census-noisy-lowest": f"{min(noisy):.1f}",
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
    tables = {
        "readme-table": readme_table(rows["layers"]),
        "layers-table": layers_table(rows["layers"]),
        "orders-table": orders_table(rows["orders"]),
        "models-table": models_table.markdown(rows["models"]),
    }
    facts = results["layers"]["machine"]
    return {
        "machine": machine.line(facts),
        "measured": facts["date"][:10],
        **of_onednn(rows["layers"]),
        **of_census(rows["census"]),
        **of_models(rows["models"]),
        **{name: "\n".join(["", *lines, ""]) for name, lines in tables.items()},
    }


def fill(text: str, known: dict[str, str]) -> str:
    """`text` with what is known in all its marked places."""
    return MARK.sub(lambda found: found[1] + known[found[2]] + found[4], text)
