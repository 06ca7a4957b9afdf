"""The README's tables: what the results files say, and what becomes of a new run."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAME = "cpu-epyc-genoa-2-cores"

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not (RESULTS / f"{NAME}.json").is_file(), reason="needs the sources")]


@pytest.fixture
def publish(benchmarks, tmp_path, monkeypatch):
    """The module, at work on a copy of the README and without results."""
    module = benchmarks("publish")
    for attribute, page in (("README", ROOT / "README.md"), ("MODELS_PAGE", ROOT / "docs" / "models.md")):
        copy = tmp_path / page.name
        copy.write_text(page.read_text())
        monkeypatch.setattr(module, attribute, copy)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def run(publish, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["publish.py", *map(str, arguments)])
    return publish.main()


def parts(name=NAME):
    return [RESULTS / f"{name}{suffix}.json" for suffix in ("", "-orders", "-census", "-models")]


def test_pages_are_up_to_date(benchmarks):
    for page, text in benchmarks("publish").pages(NAME).items():
        assert text == page.read_text()


def test_rows_find_their_files(publish, monkeypatch, tmp_path):
    """One run with all rows, as a machine may well have made them, gives the same three files and the same tables."""
    found = [json.loads(path.read_text()) for path in parts()]
    everything = tmp_path / "run.json"
    everything.write_text(
        json.dumps({"machine": {"cpu": "x"}, "rows": [row for part in found for row in part["rows"]]})
    )
    assert run(publish, monkeypatch, "new", everything) == 0
    for suffix, part in zip(("", "-orders", "-census", "-models"), found, strict=True):
        assert json.loads((tmp_path / f"new{suffix}.json").read_text()) == {
            "machine": {"cpu": "x"},
            "rows": part["rows"],
        }
    assert publish.README.read_text() == (ROOT / "README.md").read_text()


def test_check(publish, monkeypatch):
    assert run(publish, monkeypatch, "new", *parts()) == 0
    assert run(publish, monkeypatch, "new", "--check") == 0
    text = publish.README.read_text()
    stale = text.replace("| 0.1 | ", "| 0.1 | 9", 1)
    publish.README.write_text(stale)
    assert run(publish, monkeypatch, "new", "--check") == 1
    assert publish.README.read_text() == stale
    assert run(publish, monkeypatch, "new") == 0
    assert publish.README.read_text() == text
    with pytest.raises(SystemExit):
        run(publish, monkeypatch, "new", *parts(), "--check")


def test_table_that_is_not_there(publish):
    with pytest.raises(ValueError, match="not in list"):
        publish.replace_table("no table\n", ["| a |", "|---|"])
