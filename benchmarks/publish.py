"""Results into the repository: `python benchmarks/publish.py NAME [RUN.json ...]`.

Rows of these runs become benchmarks/results/NAME.json, NAME-orders.json and the like, whichever they have rows for.
Then the figures and tables of the pages below are written again from those files. `--check` writes nothing, and fails
where a page says something else. Pictures: `make pictures`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import figures  # noqa: E402  (found through the line above)

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{page}.md" for page in ("index", "why", "performance", "models", "batches")),
)
NAME = "cpu-epyc-genoa-2-cores"  # of the machine that they speak of


def pages(results: dict[str, dict]) -> dict[Path, str]:
    """The pages, as these results would have them."""
    known = figures.figures(results)
    return {page: figures.fill(page.read_text(), known) for page in PAGES}


def stale(results: dict[str, dict]) -> list[Path]:
    """Pages that say something else than these results."""
    return [page for page, text in pages(results).items() if page.read_text() != text]


def kind(row: dict) -> str:
    """Which results file a row goes to."""
    from benchmarks import workloads

    if "model" in row:
        return "models"
    if "workload" not in row:
        return "whose-statistics"
    if row["workload"] in {workload.name for workload in workloads.CENSUS}:
        return "census"
    return "orders" if row["workload"] in {workload.name for workload in workloads.FAMILY} else "layers"


def write_results(name: str, runs: list[str]) -> None:
    files: dict[str, dict] = {}
    for path in runs:
        run = json.loads(Path(path).read_text())
        for row in run["rows"]:
            files.setdefault(kind(row), {"machine": run["machine"], "rows": []})["rows"].append(row)
    for of, result in files.items():
        text = (
            compact(result) if of in ("census", "models", "whose-statistics") else json.dumps(result, indent=1) + "\n"
        )
        (figures.RESULTS / f"{name}{figures.KINDS[of]}.json").write_text(text)


def compact(result: dict) -> str:
    """A line a row."""
    rows = ",\n".join(map(json.dumps, result["rows"]))
    return f'{{"machine": {json.dumps(result["machine"])},\n"rows": [\n{rows}\n]}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description="Results into benchmarks/results, and from there into the pages.")
    parser.add_argument("name", help="of the machine, as the files have it: cpu-epyc-genoa-2-cores")
    parser.add_argument("runs", nargs="*", metavar="RUN.json", help="what run.py --json wrote")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not up to date")
    args = parser.parse_args()
    if args.check and args.runs:
        parser.error("--check takes no runs")
    write_results(args.name, args.runs)
    results = figures.load(args.name)
    if args.check:
        found = stale(results)
        for path in found:
            print(f"{path.name} is not what the results files say: make readme")
        return int(bool(found))
    for page, text in pages(results).items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
