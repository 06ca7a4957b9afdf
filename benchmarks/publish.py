"""Results into the repository: `python benchmarks/publish.py NAME [RUN.json ...]`.

Rows of these runs become benchmarks/results/NAME.json, NAME-orders.json, NAME-census.json and NAME-models.json,
whichever they have rows for. Then the figures and tables of the pages below are written again from those files, and
the README's picture is drawn. `--check` writes nothing, and fails where a page or the picture says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import figures  # noqa: E402  (found through the line above)

PAGES = tuple(ROOT / page for page in ("README.md", "docs/performance-tables.md", "docs/models.md"))
PICTURES = ROOT / "docs" / "pictures"


def pages(results: dict[str, dict]) -> dict[Path, str]:
    """The pages, as these results would have them."""
    known = figures.figures(results)
    return {page: figures.fill(page.read_text(), known) for page in PAGES}


def draw(results: dict[str, dict], folder: Path) -> list[Path]:
    from benchmarks import before_after  # and with it matplotlib, which those who come for `compact` may lack

    return before_after.draw(results["layers"], folder)


def spelled(picture: Path) -> list[str]:
    """The words and figures in a picture: outlines, which differ between versions, follow comments that spell them."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text()) if picture.is_file() else []


def stale(results: dict[str, dict]) -> list[Path]:
    """Pages and pictures that say something else than these results."""
    found = [page for page, text in pages(results).items() if page.read_text() != text]
    with tempfile.TemporaryDirectory() as folder:
        for drawn in draw(results, Path(folder)):
            there = PICTURES / drawn.name
            if spelled(there) != spelled(drawn):
                found.append(there)
    return found


def kind(row: dict) -> str:
    """Which results file a row goes to."""
    from benchmarks import workloads

    if "model" in row:
        return "models"
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
        text = compact(result) if of in ("census", "models") else json.dumps(result, indent=1) + "\n"
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
    draw(results, PICTURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
