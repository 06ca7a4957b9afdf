"""Tables of the pages in docs/, in Markdown, losses included: from the results files, as `figures.load` has them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks import labels, models_table
from benchmarks.census_classes import PATTERNS, PIXELS, pattern_class, pixel_class
from benchmarks.census_table import LOSS

PREDICTED_ON = "H100"
WORDS = {"bare": "norm alone", "act": "with an activation", "add": "with an addition", "dropout": "with dropout"}
MODES = {"both": "training", "eval": "evaluation"}


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


def layers(results: dict[str, dict]) -> list[str]:
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
    return table(heads, map(cells, results["layers"]["rows"]))


def orders(results: dict[str, dict]) -> list[str]:
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
    return table(heads, map(cells, results["orders"]["rows"]))


def _class(rows: list[dict]) -> str:
    ratios = [row["ratio"]["eager"] for row in rows]
    if not ratios:
        return "-"
    lost = sum(value < LOSS for value in ratios)
    text = f"{len(ratios)}: {ratio(statistics.median(ratios))}, {ratio(min(ratios))}"
    return f"{text}, {lost} lost" if lost else text


def census(results: dict[str, dict]) -> list[str]:
    lines = []
    for mode, words in MODES.items():
        rows = [row for row in results["census"]["rows"] if row["mode"] == mode and "failed" not in row]
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


def losses(results: dict[str, dict]) -> list[str]:
    measured = [row for kind in ("census", "layers", "orders") for row in results[kind]["rows"]]
    rows = [row for row in measured if row.get("ratio", {}).get("eager", LOSS) < LOSS]
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


def models(results: dict[str, dict]) -> list[str]:
    return models_table.markdown(results["models"]["rows"])


def whose_statistics(results: dict[str, dict]) -> list[str]:
    """Two processes, padding, renormalisation, a p that is a tensor, stochastic passes: ours first in each."""
    rows = []
    for row in results["whose-statistics"]["rows"]:
        times = [(name, seconds) for name, seconds in row.items() if name != "row"]
        for i, (contestant, seconds) in enumerate(times):
            rows.append(("" if i else row["row"], contestant, milliseconds(1e3 * seconds)))
    return table(("what", "who", "ms"), rows)


def predicted(results: dict[str, dict]) -> list[str]:
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
            for row in results["predicted"]["rows"]
            for gpu in [row["gpus"].get(PREDICTED_ON)]
            if gpu
        ),
    )


def summary(results: dict[str, dict]) -> list[str]:
    """How many of the census's layers gain, in sentences."""
    lines = []
    for mode, words in MODES.items():
        for noise, having in ((False, "without dropout"), (True, "with dropout")):
            ratios = [
                r["ratio"]["eager"] for r in results["census"]["rows"] if r["mode"] == mode and (r["p"] > 0) == noise
            ]
            lost = sum(value < LOSS for value in ratios)
            middle, lowest = statistics.median(ratios), min(ratios)
            lines.append(
                f"- {words}, {len(ratios)} layers {having}: {middle:.1f} times as fast in the median, "
                f"{lowest:.2f} times at worst, {lost} below {LOSS:g}."
            )
    return lines


TABLES = (layers, orders, census, losses, models, whose_statistics, predicted, summary)
