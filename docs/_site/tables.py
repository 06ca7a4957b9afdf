"""Tables and sentences of benchmarks/results, in Markdown, losses included."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks import labels, models_table
from benchmarks.census_classes import PATTERNS, PIXELS, pattern_class, pixel_class
from benchmarks.census_table import LOSS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MACHINE = "cpu-epyc-genoa-2-cores"
PREDICTED_ON = "H100"
WORDS = {"bare": "norm alone", "act": "with an activation", "add": "with an addition", "dropout": "with dropout"}
MODES = {"both": "training", "eval": "evaluation"}


def load(kind: str) -> dict:
    return json.loads((RESULTS / f"{kind}.json").read_text())


def of(kind: str) -> list[dict]:
    return load(MACHINE + kind)["rows"]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(heads)
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def ratio(value: float | None) -> str:
    """Theirs over ours; in bold where we lose."""
    if value is None:
        return "-"
    text = f"{value:.2f}x" if value < 2 else f"{value:.1f}x"
    return f"**{text}**" if value < LOSS else text


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _onednn(row: dict) -> float | None:
    """The better of its layouts, where it took part."""
    return min((value for name, value in row["ratio"].items() if name.startswith("onednn")), default=None)


def layers() -> list[str]:
    def cells(row: dict) -> list[str]:
        eager, fused = (row["providers"][name] for name in ("eager", "fused"))
        return [
            labels.layer(row),
            f"{row['p']:g}" if row["p"] else "none",
            f"{milliseconds(eager['median_ms'])} → {milliseconds(fused['median_ms'])}",
            *(ratio(value) for value in (row["ratio"]["eager"], row["ratio"].get("compile"), _onednn(row))),
            f"{fused['copies']:.1f}",
            f"{eager['saved_bytes_per_element']:.0f} → {fused['saved_bytes_per_element']:.2f}",
        ]

    heads = ["layer", "dropout", "ms: stock → ours", "stock / ours", "torch.compile / ours", "oneDNN / ours", "copies"]
    heads += ["bytes kept: stock → ours"]
    return table(heads, map(cells, of("")))


def orders() -> list[str]:
    def cells(row: dict) -> list[str]:
        fused, eager = (row["providers"][name]["saved_bytes_per_element"] for name in ("fused", "eager"))
        noise = {"element": row["noise"], "channel": f"{row['noise']}, per channel", "sample": "drop path"}
        return [
            row["order"],
            noise[row["granularity"]] if row["p"] else "none",
            row["layout"],
            f"{1 / row['ratio']['default']:.2f}",
            ratio(row["ratio"]["eager"]),
            ratio(row["ratio"].get("compile")),
            f"{eager:.0f} → {fused:.2f}",
        ]

    heads = ("order", "noise", "layout", "of the default order", "stock / ours", "torch.compile / ours")
    heads += ("bytes kept: stock → ours",)
    return table(heads, map(cells, of("-orders")))


def _class(rows: list[dict]) -> str:
    ratios = [row["ratio"]["eager"] for row in rows]
    if not ratios:
        return "-"
    lost = sum(value < LOSS for value in ratios)
    text = f"{len(ratios)}: {ratio(statistics.median(ratios))}, {ratio(min(ratios))}"
    return f"{text}, {lost} lost" if lost else text


def census() -> list[str]:
    lines = []
    for mode, words in MODES.items():
        rows = [row for row in of("-census") if row["mode"] == mode and "failed" not in row]
        heads = [words, *(f"{end} or less" for end in PIXELS), f"more than {PIXELS[-1]}", "all"]
        lines += table(
            heads,
            [
                [WORDS[pattern]]
                + [_class([row for row in found if pixel_class(row["shape"]) == i]) for i in range(len(PIXELS) + 1)]
                + [_class(found)]
                for pattern in PATTERNS
                for found in [[row for row in rows if pattern_class(row["order"]) == pattern]]
            ],
        ) + [""]
    return lines


def losses() -> list[str]:
    rows = [row for row in of("-census") + of("") + of("-orders") if row.get("ratio", {}).get("eager", LOSS) < LOSS]
    return table(
        ("layer", "of", "in", "stock / ours", "our ms"),
        (
            [
                labels.layer(row),
                row["source"].replace("|", "/") or row["order"],
                MODES[row["mode"]],
                ratio(row["ratio"]["eager"]),
                milliseconds(row["providers"]["fused"]["median_ms"]),
            ]
            for row in sorted(rows, key=lambda row: row["ratio"]["eager"])
        ),
    )


def models() -> list[str]:
    return models_table.markdown(of("-models"))


def whose_statistics() -> list[str]:
    """Two processes, padding, renormalisation, a p that is a tensor, stochastic passes: ours first in each."""
    rows = []
    for row in of("-whose-statistics"):
        what = row.pop("row")
        for contestant, seconds in row.items():
            rows.append((what, contestant, milliseconds(1e3 * seconds)))
            what = ""
    return table(("what", "who", "ms"), rows)


def predicted() -> list[str]:
    """Nothing of it was measured."""
    heads = ("layer", "kernel", "instructions an element", "registers", "predicted µs", "bound by", "of the floor")
    return table(
        heads,
        (
            [
                row["row"],
                f"`{row['kernel']}`",
                f"{row['instructions']['issued']:.1f}",
                f"{row['registers']}",
                f"{gpu['predicted_us']:.1f}",
                gpu["bound"],
                f"{gpu['of_floor']:.2f}",
            ]
            for row in load("cuda-report-sm_90")["rows"]
            for gpu in [row["gpus"].get(PREDICTED_ON)]
            if gpu
        ),
    )


def machine() -> list[str]:
    facts = load(MACHINE)["machine"]
    return [f"Measured on {facts['cpu']}, {facts['threads']} threads, {facts['level']}, torch {facts['torch']}."]


def summary() -> list[str]:
    """How many of the census's layers gain, in sentences."""
    lines = []
    for mode, words in MODES.items():
        for noise, having in ((False, "without dropout"), (True, "with dropout")):
            ratios = [r["ratio"]["eager"] for r in of("-census") if r["mode"] == mode and (r["p"] > 0) == noise]
            lost = sum(value < LOSS for value in ratios)
            middle, lowest = statistics.median(ratios), min(ratios)
            lines.append(
                f"- {words}, {len(ratios)} layers {having}: {middle:.1f} times as fast in the median, "
                f"{lowest:.2f} times at worst, {lost} below {LOSS:g}."
            )
    return lines


KINDS = {f.__name__.replace("_", "-"): f for f in (layers, orders, census, losses, models, machine, summary)}
KINDS |= {f.__name__.replace("_", "-"): f for f in (whose_statistics, predicted)}
