"""Every Python block of every page runs, and every picture that a page names is there and up to date.

Blocks of a page share their names, in the order in which they stand. What a reader need not see, stands in a comment:
`<!-- setup`, code, `-->`.
"""

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^(?:```(?:python|\{worked\})|<!-- setup)\n(.*?)^(?:```|-->)$", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+)\)")
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
TITLES = {  # of the pages that the site has to have
    "Why",
    "Quick start",
    "Convert a model",
    "Orders and noises",
    "Variance shift",
    "Reproducible noise",
    "Small batches, padding, several processes",
    "Uncertainty",
    "Deploy",
    "Performance",
    "API reference",
    "Limits",
    "Whole models",
    "With the rest of PyTorch",
}

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not (DOCS / "conf.py").is_file(), reason="needs the sources")]


def run(page: Path) -> dict:
    """Runs a page's blocks. An error is where it stands in the page, as lines are counted there."""
    text, names = page.read_text(), {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_a_wrong_block_is_told_where_it_stands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n<!-- setup\na = 1\n-->\n```python\nassert a == 1\nassert a == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run(page)
    assert error.traceback[-1].lineno + 1 == 7


def test_pages_are_there():
    titles = {re.match(r"# (.*)", page.read_text())[1] for page in PAGES if page.read_text().startswith("# ")}
    assert titles >= TITLES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_are_there(page):
    missing = [name for name in PICTURE.findall(page.read_text()) if not (page.parent / name).is_file()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_elsewhere_have_a_form(page):
    """No network is at hand to follow them."""
    for link in re.findall(r"https?://[^\s)>\"\x60]+", page.read_text()):
        address = urlsplit(link)
        assert address.scheme == "https" and "." in address.netloc, link
        assert address.netloc != "arxiv.org" or re.fullmatch(r"/abs/\d{4}\.\d{4,5}", address.path), link


def test_pictures_say_what_the_results_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    from _site import draw

    draw.draw(tmp_path)
    for drawn in sorted(tmp_path.iterdir()):
        words = draw.words(drawn)
        assert len(words) > 5, drawn.name
        assert words == draw.words(draw.PICTURES / drawn.name), f"{drawn.name}: make pictures"
        assert not re.search(r"\bcnn_|_f32|_bf16", " ".join(words)), drawn.name


def test_rows_that_lose_are_in_the_tables(benchmarks):
    """In bold, and once more by themselves."""
    tables, results = benchmarks("page_tables"), benchmarks("figures").load("cpu-epyc-genoa-2-cores")
    layers = tables.layers(results)
    assert len(layers) == 2 + len(results["layers"]["rows"])
    assert any("**" in line for line in layers)
    measured = [row for kind in ("layers", "orders", "census") for row in results[kind]["rows"]]
    assert len(tables.losses(results)) == 2 + sum(row["ratio"]["eager"] < tables.LOSS for row in measured)
