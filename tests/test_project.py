"""The files around the code: what they say agrees with the code, and their forms are what their readers expect."""

import re
import tomllib
from pathlib import Path

import pytest

import fusednorm

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/how-it-works.md")

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="not a source tree")]


def text(path):
    return (ROOT / path).read_text()


def parsed(path):
    return pytest.importorskip("yaml", reason="PyYAML is not installed").safe_load(text(path))


def project():
    return tomllib.loads(text("pyproject.toml"))["project"]


def makefile_targets():
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", text("Makefile"), re.M))


# ---- one version, one name -------------------------------------------------------------------------------------------
def releases():
    """(version, date) as CHANGELOG.md has them, the newest first."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", text("CHANGELOG.md"), re.M)


def test_versions_agree():
    version, date = releases()[0]
    citation = parsed("CITATION.cff")
    assert version == str(citation["version"])
    assert f"version = {{{version}}}" in text("docs/index.md") and f"year    = {{{date[:4]}}}" in text("docs/index.md")
    own, _, development = fusednorm.__version__.partition(".dev")  # of the release that it is on the way to
    assert tuple(map(int, own.split("."))) > tuple(map(int, version.split("."))) if development else own == version
    assert date == str(citation["date-released"])


def test_changelog():
    headings = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.M)
    assert headings == ["[Unreleased]", *(f"[{version}] - {date}" for version, date in releases())]
    numbers = [tuple(map(int, version.split("."))) for version, _ in releases()]
    assert numbers == sorted(numbers, reverse=True)
    parts = set(re.findall(r"^### (.*)$", text("CHANGELOG.md"), re.M))
    assert parts <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_citation():
    citation = parsed("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what cff 1.2.0 asks for
    assert str(citation["cff-version"]) == "1.2.0"
    assert citation["title"] == project()["name"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project()["authors"]]
    assert text("LICENSE").startswith(f"{citation['license']} License")


def test_the_readme_asks_for_what_the_package_asks_for():
    python = project()["requires-python"].removeprefix(">=")
    torch = ".".join(re.search(r"^OLDEST_TORCH = \((\d+), (\d+)\)$", text("setup.py"), re.M).groups())
    readme = text("README.md")
    assert set(re.findall(r"Python (\d+\.\d+)", readme)) == {python}
    assert set(re.findall(r"torch \((\d+\.\d+) or newer\)", readme)) == {torch}


# ---- pages -----------------------------------------------------------------------------------------------------------
def test_the_readme_is_short_and_a_command_is_on_its_first_screen():
    lines = text("README.md").splitlines()
    assert len(lines) <= 110
    assert next(i for i, line in enumerate(lines) if line.startswith("    make ")) <= 25


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:srcset|src)=\"([^\"]+)\"", text(page))
    links = {link or picture for link, picture in found}
    missing = {link for link in links if not (ROOT / page).parent.joinpath(link).exists()}
    # In code, paths are those from the root: `csrc/math/`, `csrc/cpu/level_*.cpp`.
    paths = set(re.findall(r"`((?:csrc|fusednorm|tests|docs|benchmarks|examples)/[\w./*-]*)`", text(page)))
    missing |= {path for path in paths if not any(ROOT.glob(path.rstrip("/")))}
    assert not missing


def test_every_file_of_the_package_has_a_room():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "fusednorm").rglob("*.py")}
    files = {path for path in files if not path.endswith(("__init__.py", "_built_for.py", "__main__.py"))}
    rooms = set(re.findall(r"`(fusednorm/[\w./]*)`", text("docs/how-it-works.md").partition("## The rooms")[2]))
    folders = tuple(room for room in rooms if room.endswith("/") and room.count("/") > 1)
    assert {path for path in files if not path.startswith(folders)} <= rooms


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    commands = re.findall(r"(?:^    |`)make ((?:[a-z][a-z-]* ?)+)", text(page), re.M)
    assert {word for command in commands for word in command.split()} <= makefile_targets()


# ---- how others join -------------------------------------------------------------------------------------------------
def test_hooks_run_what_lint_runs():
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in repository["hooks"])
    parts = re.search(r"^lint: (.+)$", text("Makefile"), re.M)[1].split()
    assert [hook["entry"] for hook in repository["hooks"]] == [f"make -s {part}" for part in parts]
    assert set(parts) <= makefile_targets()


@pytest.mark.parametrize("form", ["bug", "speed", "torch"])
def test_issue_forms_ask_for_the_installation(form):
    found = parsed(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert found["name"] and found["description"]
    fields = {field["id"]: field for field in found["body"]}
    assert len(fields) == len(found["body"])
    for field in fields.values():
        assert field["type"] in {"input", "textarea"} and field["attributes"]["label"]
    assert "`python -m fusednorm info`" in fields["info"]["attributes"]["label"]
    assert fields["info"]["validations"] == {"required": True}
    assert form != "speed" or "fusednorm bench" in fields["bench"]["attributes"]["description"]
