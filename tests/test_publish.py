"""Pages and their picture: what the results files say, and what becomes of a new run."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAME = "cpu-epyc-genoa-2-cores"

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not (RESULTS / f"{NAME}.json").is_file(), reason="needs the sources")]


@pytest.fixture
def publish(benchmarks, tmp_path, monkeypatch):
    """The module, at work on copies of the pages and without results."""
    module = benchmarks("publish")
    copies = tuple(tmp_path / page.name for page in module.PAGES)
    for copy, page in zip(copies, module.PAGES, strict=True):
        copy.write_text(page.read_text())
    monkeypatch.setattr(module, "PAGES", copies)
    monkeypatch.setattr(module.figures, "RESULTS", tmp_path)
    return module


@pytest.fixture
def figures(benchmarks):
    return benchmarks("figures")


def run(publish, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["publish.py", *map(str, arguments)])
    return publish.main()


def parts(figures):
    return {kind: RESULTS / f"{NAME}{suffix}.json" for kind, suffix in figures.KINDS.items()}


def test_pages_are_up_to_date(benchmarks, figures):
    assert benchmarks("publish").stale(figures.load(NAME)) == []


def test_rows_find_their_files(publish, figures, monkeypatch, tmp_path):
    """One run with all rows, as a machine may well have made them, gives the same files and the same figures."""
    found = {kind: json.loads(path.read_text()) for kind, path in parts(figures).items()}
    machine = found["layers"]["machine"]
    pages = {page: page.read_text() for page in publish.PAGES}
    everything = tmp_path / "run.json"
    rows = [row for part in found.values() for row in part["rows"]]
    everything.write_text(json.dumps({"machine": machine, "rows": rows}))
    assert run(publish, monkeypatch, "new", everything) == 0
    for kind, part in found.items():
        written = json.loads((tmp_path / f"new{figures.KINDS[kind]}.json").read_text())
        assert written == {"machine": machine, "rows": part["rows"]}
    for page, text in pages.items():
        assert page.read_text() == text


def test_check(publish, figures, monkeypatch, capsys):
    assert run(publish, monkeypatch, "new", *parts(figures).values()) == 0
    assert run(publish, monkeypatch, "new", "--check") == 0
    readme = publish.PAGES[0]
    text = readme.read_text()
    stale = text.replace("| 0.1 | ", "| 0.1 | 9", 1)
    readme.write_text(stale)
    assert run(publish, monkeypatch, "new", "--check") == 1
    assert capsys.readouterr().out == "README.md is not what the results files say: make readme\n"
    assert readme.read_text() == stale
    assert run(publish, monkeypatch, "new") == 0
    assert readme.read_text() == text
    with pytest.raises(SystemExit):
        run(publish, monkeypatch, "new", *parts(figures).values(), "--check")


def test_an_unknown_figure_is_an_error(figures):
    with pytest.raises(KeyError, match="no-such"):
        figures.fill("<!--= no-such -->1<!--/-->", {})


def test_every_figure_is_on_a_page(benchmarks, figures):
    text = "".join(page.read_text() for page in benchmarks("publish").PAGES)
    assert {found[1] for found in figures.MARK.findall(text)} == set(figures.figures(figures.load(NAME)))


def test_figures_move_with_the_rows(figures):
    """Every ratio in prose is taken from the rows: with all times of ours doubled, all of them change."""
    results = figures.load(NAME)
    before = figures.figures(results)
    for kind in ("layers", "orders", "census", "models"):
        for row in results[kind]["rows"]:
            row["ratio"] = {peer: ratio / 2 for peer, ratio in row.get("ratio", {}).items()}
    after = figures.figures(results)
    still = {"machine", "models", "census-plain", "whose-statistics-table", "predicted-table"}
    assert {name for name in before if before[name] == after[name]} == still


@pytest.mark.parametrize("page", ["README.md", "docs/why.md"])
def test_no_figure_is_typed_by_hand(figures, page):
    """A multiple, a share or a time is in a marked place; no line of prose begins with a mark, which would be HTML."""
    text = (ROOT / page).read_text()
    assert not re.findall(r"^\s*<!--= [\w-]+ -->.+", text, re.M)
    prose = re.sub(r"```.*?```|^    .*$", "", figures.MARK.sub("", text), flags=re.S | re.M)
    assert not re.findall(r"\d(?:\.\d+)?(?:x\b(?! is)| times| ms\b|%| MB\b)", prose)
