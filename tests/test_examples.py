"""The examples gallery: each runs as the page says and draws its pictures, and what it claims is so."""

import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "examples" / "gallery"
NEW = ("uncertainty", "tabular", "graph", "padded", "two_processes")

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not GALLERY.is_dir(), reason="needs the source tree")]


@pytest.fixture
def example(monkeypatch, threads):
    """The examples' modules by name; on one thread, as they run."""
    threads(1)
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"examples.{name}")


def marks(path):
    """How many things a picture draws, and its words."""
    root = ElementTree.parse(path).getroot()
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names[0] == "svg"
    drawn = sum(name in ("path", "use", "image") for name in names)
    return drawn, " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text"))


def run(folder, name, *arguments):
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--out", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_runs_and_draws(tmp_path, name):
    said = run(tmp_path, name, "--quick")
    (drawn, words), dark = (marks(tmp_path / f"{name}{variant}.svg") for variant in ("", "-dark"))
    assert drawn > 50 and (drawn, words) == dark
    assert "nan" not in said + words
    # The same command gives the same files.
    first = (tmp_path / f"{name}.svg").read_bytes()
    assert run(tmp_path, name, "--quick") == said
    assert (tmp_path / f"{name}.svg").read_bytes() == first


def test_the_page_shows_what_is_there():
    page = (ROOT / "docs" / "gallery.md").read_text()
    shown = re.findall(r"!\[.+\]\((\S+)\.svg\)", page)
    assert len(shown) == len(set(shown)) > len(NEW)
    for path in shown:
        for variant in ("", "-dark"):
            drawn, _ = marks(ROOT / "docs" / f"{path}{variant}.svg")
            assert drawn > 30
    scripts = set(re.findall(r"examples/(\w+)\.py", page))
    assert scripts >= {*NEW, "demo", "finetune"} and all((ROOT / "examples" / f"{s}.py").is_file() for s in scripts)


def test_unsure_where_shifted(example):
    uncertainty = example("uncertainty")
    images, labels, test_images, test_labels = example("common").digits()
    model = uncertainty.trained(0, images, labels, 150)
    bank = uncertainty.fusednorm.uncertainty.batch_statistics(model, images.split(64), progress=False)
    found = []
    for degrees in (0, 45):
        asked = uncertainty.shifted(test_images, "turned by degrees", degrees, 0)
        found.append(uncertainty.predictions(model, bank, asked, 8, 0))
    for method in uncertainty.METHODS:
        upright, turned = (uncertainty.seen(f[method], test_labels) for f in found)
        assert upright[0] > 0.95 > 0.7 > turned[0]
        assert turned[2] > 1.5 * upright[2]
    # More unsure with the noise than without, and only passes can disagree.
    plain, dropout, statistics = found[1].values()
    assert dropout.entropy.mean() > plain.entropy.mean() and plain.mutual_information.max() == 0
    assert dropout.mutual_information.mean() > 0.01 and statistics.mutual_information.mean() > 0


def test_shifts(example):
    shifted = example("uncertainty").shifted
    images = torch.rand(2, 1, 8, 8)
    black = images.min()
    torch.testing.assert_close(shifted(images, "turned by degrees", 0, 0), images)
    torch.testing.assert_close(shifted(images, "turned by degrees", 90, 0), images.rot90(1, (2, 3)))
    moved = shifted(images, "moved by pixels", 2, 0)
    torch.testing.assert_close(moved[..., 2:], images[..., :-2])
    torch.testing.assert_close(moved[..., :2], black.expand(2, 1, 8, 2))


def test_ghosts_are_chunks(example):
    assert example("tabular").ghosts_against_chunks(0) < 1e-13


def test_fused_graph_net_is_the_stock_one(example):
    graph = example("graph")
    assert graph.fused_against_stock(graph.generate(0, 300), 0) < 1e-13


def test_the_graph_is_as_told(example):
    graph = example("graph")
    found = graph.generate(0, 1000)
    assert torch.equal(found.adjacency, found.adjacency.T) and found.adjacency.trace() == 0
    same = found.community[:, None] == found.community
    for where, chance in ((same, graph.INSIDE), (~same, graph.BETWEEN)):
        pairs = where.sum() - 1000 * where[0, 0]
        assert found.adjacency[where].sum() / pairs == pytest.approx(chance, rel=0.1)
    # Scaled on both sides: the largest eigenvalue is 1, of the degrees' roots.
    roots = (found.adjacency.sum(1) + 1).sqrt()
    torch.testing.assert_close(found.weights @ roots, roots)


@pytest.mark.slow
def test_the_graph_helps(example):
    graph = example("graph")
    known = graph.generate(0, 1000)
    net, alone = (graph.run(kind, known, 0, 60)[-1] for kind in ("fused", "alone"))
    assert net > alone + 0.2 > 0.4


def test_padded_with_lengths_is_packed(example):
    assert example("padded").told_against_packed(0) < 1e-12


def test_padding_taken_for_data(example):
    """The first norm's variance is that of all values; told of the lengths, answers do not depend on the batch."""
    padded = example("padded")
    data, test = padded.sequences(256, 0), padded.sequences(64, 1)
    ignored, told = (padded.run(way, 0, data, test, 80) for way in (False, True))
    assert max(ignored["variance"]) < 0.6 and min(told["variance"]) > 0.9 and max(told["variance"]) < 1.1
    assert told["apart"] < 1e-5 < 1e-2 < ignored["apart"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.slow
def test_two_processes_are_one(example):
    two = example("two_processes")
    found = two.study(0, 30)
    assert two.apart(found, "shared").max() < 1e-10 < 1e-3 < two.apart(found, "apart").max()
    assert found["shared"][1] == pytest.approx(found["one"][1], rel=1e-10)


def test_an_interval_says_whether_it_is_noise(example):
    difference = example("common").difference
    assert difference([1.1, 2.0, 2.9], [1.0, 2.1, 2.9], ".1f").endswith("within noise")
    assert difference([2.0, 3.1, 4.0], [1.0, 2.0, 3.1], ".1f").endswith("more than noise")


def test_batches(example):
    batches = example("common").batches
    found = list(batches(10, 4, 5, seed=3))
    assert [len(batch) for batch in found] == [4] * 5
    assert len(set(torch.cat(found[:2]).tolist())) == 8  # an epoch meets no row twice
    assert all(torch.equal(a, b) for a, b in zip(found, batches(10, 4, 5, seed=3), strict=True))


class TestDemo:
    @pytest.fixture
    def rows(self, benchmarks):
        """The demo's rows with the widest figures that there may be."""
        figures = {"median_ms": 1234.5, "p20_ms": 1111.1, "p80_ms": 2222.2, "rounds": 100, "copies": 123.45}
        figures |= {"saved_bytes_per_element": 12.12, "peak_mb": 12345.0}
        names, workloads = importlib.import_module("examples.demo").BENCH, benchmarks("workloads").BY_NAME
        return [
            benchmarks("measure").describe(workloads[name], workloads[name].p, "both_cold")
            | {"providers": dict.fromkeys(("fused", "eager", "compile"), figures)}
            | {"ratio": {"eager": 13.81, "compile": 121.11}}
            for name in names
        ]

    @pytest.fixture
    def shown(self, example, benchmarks, rows):
        table = benchmarks("table")
        facts = {"cpu": "", "cores": 2, "level": "", "threads": 2, "torch": "", "commit": "", "load_average": [0]}

        def show(width, busy=False):
            console = table.Console(width=width, record=True, file=io.StringIO())
            table.show(rows, facts, console, busy=busy)
            return console.export_text()

        return show

    @pytest.mark.parametrize("busy", (False, True))
    def test_table_fits_100_columns(self, shown, busy):
        said = shown(100, busy)
        assert max(map(len, said.splitlines())) <= 100 and "…" not in said
        for whole in ("1234.5", "[1111.1..", "2222.2]", "13.81x", "121.11x", "123.45", "12345", "both_cold", "rounds"):
            assert said.count(whole) >= 3 or whole == "rounds"

    def test_wide_table_is_one_line_a_cell(self, shown):
        said = shown(190)
        assert "1234.5 [1111.1..2222.2]" in said and "12.12 / 12.12 / 12.12" in said

    @pytest.mark.parametrize("width", (100, 190))
    def test_each_ratio_of_times_says_busy(self, shown, width):
        assert "busy" not in shown(width)
        table, _, caption = shown(width, True).partition("fused ms =")
        assert table.count("busy") == 3 * 3 and "busy machine" in caption  # eager, compile, copies

    @pytest.mark.parametrize("load", (0.1, 3.0))
    def test_a_busy_machine_is_told(self, example, benchmarks, monkeypatch, capsys, tmp_path, load, rows):
        demo, machine = example("demo"), benchmarks("machine")
        monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, load, load))
        monkeypatch.setattr(machine, "tuned", lambda: True)
        monkeypatch.setattr(demo, "benchmark", lambda compiled, console: rows)
        monkeypatch.setattr(sys, "argv", ["demo.py", "--seeds", "3", "--epochs", "2", "--out", str(tmp_path)])
        assert demo.main() == 0
        said = capsys.readouterr().out
        (line,) = (line for line in said.splitlines() if "time per epoch" in line)
        _, words = marks(tmp_path / "demo.svg")
        assert ("busy" in line) == ("not a quiet machine" in said) == (load > 1)
        assert ("time of an epoch" in words) == (load < 1) and "kept for the backward pass" in words


def test_without_arguments_there_is_help(tmp_path):
    for name in (*NEW, "demo"):
        said = run(tmp_path, name, "--help")
        assert "--out DIR" in said and "where the pictures go" in said
