"""`report` of models that can be fused, of those that cannot, and of what is no model."""

import sys

import pytest
import torch
from terminal import SCRIPT, Session, environment, facts_of, run

pytestmark = pytest.mark.cpu

NETS = """
from torch import nn
print("said while it is imported")
def row():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 4, 3))
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    def forward(self, x):
        return self.act(self.norm(self.conv(x)))
class Two(nn.Module):
    def forward(self, x, y):
        return x + y
plain = nn.Linear(3, 3)
seven = 7
def gives_seven():
    return 7
def leaves():
    raise SystemExit(3)
class Has:
    @property
    def broken(self):
        raise RuntimeError("no such part")
has = Has()
def fails():
    raise ValueError("no such luck\\nand more of it")
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with models, which is the one that the process is in."""
    name = "nets_of_test_cli"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name
    sys.modules.pop(name, None)


def test_report_of_a_row_needs_no_example(called, nets):
    status, out, err = called("report", f"{nets}:row")
    assert status == 0
    assert (
        "norm-act-drop with 2, 3" in out
        and "1 of 1 BatchNorms fused, 1 with what stands beside them (1 norm-act-drop)" in out
    )
    assert "said while it is imported" in err and "said" not in out


def test_report_with_an_example(called, nets):
    status, facts = facts_of(called("report", f"{nets}:Own", "--example", "4,3,16,16", "--small", "always", "--json"))
    assert status == 0 and facts["orders"] == {"norm-act": 1}
    assert facts["rows"] == [{"name": "norm", "order": "norm-act", "taken": ["act"], "reason": None}]
    assert 0 < facts["kept_bytes"]["fused"] < facts["kept_bytes"]["stock"]
    assert "MiB for its backward" in facts["summary"]


def test_report_says_why_not(called, nets):
    _, facts = facts_of(called("report", f"{nets}:Own", "--json"))
    assert (facts["norms"], facts["fused"], facts["kept_bytes"]) == (1, 0, None)
    assert "1 left: outside nn.Sequential only an example shows who calls it" in facts["summary"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_report_of_another_type(called, nets, dtype):
    arguments = "--example", "4,3,16,16", "--dtype", dtype, "--small", "always", "--json"
    status, facts = facts_of(called("report", f"{nets}:Own", *arguments))
    single = facts_of(called("report", f"{nets}:Own", *arguments[:2], *arguments[4:]))[1]
    assert status == 0
    share = torch.finfo(getattr(torch, dtype)).bits / 32
    assert facts["kept_bytes"]["fused"] == pytest.approx(share * single["kept_bytes"]["fused"], rel=0.05)


@pytest.mark.parametrize(("model", "examples"), [("plain", ["2,3"]), ("Two", ["2,3", "2,3"])])
def test_report_of_what_has_no_norm(called, nets, model, examples):
    status, out, _ = called("report", f"{nets}:{model}", *(a for e in examples for a in ("--example", e)))
    assert (status, out) == (0, "no BatchNorm in this model\n")


def test_report_finds_modules_of_the_folder(tmp_path):
    """And keeps off stdout what programs that these start say."""
    (tmp_path / "of_here.py").write_text(NETS + 'import os\nos.system("echo said by another program")\n')
    script = tmp_path / "elsewhere" / "fusednorm"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    status, facts = facts_of(run("report of_here:row --json", start=[str(script)], cwd=tmp_path))
    assert status == 0 and facts["fused"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("NETS:fails", 2, "NETS:fails: ValueError: no such luck ("),
        ("NETS:leaves", 2, "NETS:leaves: SystemExit: 3 ("),
        ("NETS:has.broken", 2, "NETS:has.broken: RuntimeError: no such part ("),
        ("NETS:seven", 2, "NETS:seven: expected a factory or a module, but got int"),
        ("NETS:gives_seven", 2, "NETS:gives_seven: expected it to give a torch.nn.Module, but got int"),
        ("NETS:nothing", 2, "NETS:nothing: NETS has no nothing"),
        ("nowhere.at_all:row", 2, "nowhere.at_all:row: there is no module nowhere here, nor installed"),
        ("NETS", 2, "package.module:factory: expected package.module:factory, but got 'NETS'"),
        ("NETS:row --example 4,3", 1, "NETS:row: the model does not run or cannot be fused: RuntimeError: "),
        ("NETS:row --example 4,3,0,5", 2, "--example: expected sizes of 1 and more, but got '4,3,0,5'"),
        ("NETS:row --dtype int7", 2, "--dtype: invalid choice: 'int7'"),
    ],
)
def test_report_of_what_is_no_model(called, nets, arguments, status, said):
    found, out, err = called("report", *arguments.replace("NETS", nets).split())
    ours = [line for line in err.splitlines() if not line.startswith("said while")]
    assert (found, out, len(ours)) == (status, "", 1)
    assert ours[0].startswith(f"fusednorm report: {said}".replace("NETS", nets))


def test_a_module_that_breaks_is_named_with_its_line(called, tmp_path, monkeypatch):
    (tmp_path / "broken_of_test_cli.py").write_text("import math\nmath.nothing\n")
    monkeypatch.chdir(tmp_path)
    status, _, err = called("report", "broken_of_test_cli:x")
    assert status == 2
    assert err.endswith(f"has no attribute 'nothing' ({tmp_path}/broken_of_test_cli.py, line 2)\n")


@pytest.mark.parametrize("columns", [80, 100])
def test_report_at_a_terminal(columns, tmp_path):
    """A reason that is longer than the line goes on behind its beginning."""
    pytest.importorskip("pyte")
    (tmp_path / "of_here.py").write_text(NETS)
    session = Session(columns, "report of_here:Own", cwd=tmp_path, env=environment(tmp_path))
    assert session.status == 0 and session.widest <= columns
    assert "outside nn.Sequential only an example shows who calls it" in " ".join(" ".join(session.lines).split())
