"""Results into the repository: `python benchmarks/publish.py NAME [RUN.json ...]`.

Rows of these runs become benchmarks/results/NAME.json, NAME-orders.json, NAME-census.json and NAME-models.json,
whichever they have rows for; then the README's two tables, and that of docs/models.md, are written again from those
files. `--check` writes nothing, and fails where a table is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MODELS_PAGE = ROOT / "docs" / "models.md"

LAYERS = (  # of the README's first table: workload, and whether at p = 0
    *(("cnn_f32", False), ("cnn_f32_last", False), ("cnn_bf16", False), ("cnn_bf16_last", False), ("dense", False)),
    *(("tacotron2_postnet", False), ("jasper_b5", False), ("ogbn_arxiv", False), ("pointnet_head", False)),
    *(("cnn_f32", True), ("cnn_f32_last", True), ("cnn_bf16", True), ("cnn_bf16_last", True)),
)
ORDERS = {  # of the second: workload and what it is called
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


def saved(row: dict) -> str:
    fused, eager = (row["providers"][name]["saved_bytes_per_element"] for name in ("fused", "eager"))
    return f"{fused:.2f} ({eager:.0f})"


def layers_table(rows: list[dict]) -> list[str]:
    lines = ["| layer | p | vs eager | vs torch.compile | copies | saved bytes per element (eager) |"]
    lines.append("|---|---|---|---|---|---|")
    for name, bare in LAYERS:
        for row in rows:
            if row["workload"] == name and row["mode"] == "both" and (row["p"] == 0) == bare:
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


def replace_table(text: str, table: list[str]) -> str:
    """`text` with `table` in place of the one that has the same first line."""
    lines = text.splitlines()
    first = last = lines.index(table[0])
    while last < len(lines) and lines[last].startswith("|"):
        last += 1
    return "\n".join([*lines[:first], *table, *lines[last:]]) + "\n"


def pages(name: str) -> dict[Path, str]:
    """The pages that have tables, with those of the results files of that name."""
    from benchmarks.models_table import markdown

    texts = {page: page.read_text() for page in (README, MODELS_PAGE)}
    for page, suffix, table in (
        (README, "", layers_table),
        (README, "-orders", orders_table),
        (MODELS_PAGE, "-models", markdown),
    ):
        rows = json.loads((RESULTS / f"{name}{suffix}.json").read_text())["rows"]
        texts[page] = replace_table(texts[page], table(rows))
    return texts


def kind(row: dict) -> str:
    """Which results file a row goes to."""
    from benchmarks import workloads

    if "model" in row:
        return "-models"
    if row["workload"] in {workload.name for workload in workloads.CENSUS}:
        return "-census"
    return "-orders" if row["workload"] in {workload.name for workload in workloads.FAMILY} else ""


def write_results(name: str, runs: list[str]) -> None:
    files: dict[str, dict] = {}
    for path in runs:
        run = json.loads(Path(path).read_text())
        for row in run["rows"]:
            files.setdefault(kind(row), {"machine": run["machine"], "rows": []})["rows"].append(row)
    for suffix, result in files.items():
        text = compact(result) if suffix in ("-census", "-models") else json.dumps(result, indent=1) + "\n"
        (RESULTS / f"{name}{suffix}.json").write_text(text)


def compact(result: dict) -> str:
    """A line a row."""
    rows = ",\n".join(map(json.dumps, result["rows"]))
    return f'{{"machine": {json.dumps(result["machine"])},\n"rows": [\n{rows}\n]}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description="Results into benchmarks/results, and from there into the README.")
    parser.add_argument("name", help="of the machine, as the files have it: cpu-epyc-genoa-2-cores")
    parser.add_argument("runs", nargs="*", metavar="RUN.json", help="what run.py --json wrote")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not up to date")
    args = parser.parse_args()
    if args.check and args.runs:
        parser.error("--check takes no runs")
    write_results(args.name, args.runs)
    new = pages(args.name)
    if args.check:
        return int(any(page.read_text() != text for page, text in new.items()))
    for page, text in new.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
