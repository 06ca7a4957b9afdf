"""`torch.compile(model, backend="fusednorm")`: its options, what follows it, and how its graphs run."""

import copy
import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from backend_models import Block, Case, compiled, step, values
from torch import nn

import fusednorm
from fusednorm.convert import Report
from fusednorm.convert.backend import _with_room

pytestmark = pytest.mark.cpu


# ---- options ---------------------------------------------------------------------------------------------------------
def test_the_name():
    """A checkout has its entry points as an installed package does: `make build` writes them."""
    torch._dynamo.reset()
    model = nn.Sequential(Block())
    report = Report()
    torch.compile(model, backend="fusednorm", options={"report": report.add})(values(dtype=torch.float32))
    assert [row.name for row in report.rows] == ["0.bn"]


def test_on_to_inductor():
    model, x = nn.Sequential(Block(), Block(), nn.Dropout(0.0)).double(), values()
    stock, report = copy.deepcopy(model), Report()
    run = compiled(model, report, inner="inductor")
    for a, b in zip(step(stock, stock, x), step(run, model, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    assert [row.order for row in report.rows] == ["norm-add-act"] * 2
    model.eval(), stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), stock(x))
    assert report.rows[0].reason == "in evaluation it is left to the inner compiler"


def test_noise_through_inductor():
    model = Case(lambda m, x: F.dropout(F.relu(m.bn(x)), 0.5, m.training))
    run, x = compiled(model, inner="inductor"), values(64, 6, 5, 5, dtype=torch.float32).requires_grad_()
    first, second = run(x), run(x)
    assert not torch.equal(first, second)
    share = (first == 0).float().mean().item()
    assert abs(share - 0.75) < 0.05
    first.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"iner": "eager"}, "expected 'inner', 'report', 'small' and 'dropouts', but got 'iner'"),
        ({"inner": 3}, r"options\['inner'\]: expected a backend's name or function, but got 3"),
        ({"report": []}, r"options\['report'\]: expected a function, but got list"),
        ({"small": "no"}, r"options\['small'\]: expected one of 'measure', 'always', 'never', but got 'no'"),
        ({"inner": "nonesuch"}, "nonesuch"),
    ],
)
def test_bad_options(options, words):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words):
        torch.compile(Block(), backend=fusednorm.backend, options=options)(values(dtype=torch.float32))


def test_a_mode_is_the_inner_compilers():
    with pytest.raises(ValueError, match="mode: expected None"):
        fusednorm.backend(torch.fx.symbolic_trace(nn.Identity()), [], mode="max-autotune")


@pytest.mark.parametrize("faster", ["stock", "ours"])
def test_slower_chains_are_left(faster, monkeypatch):
    from fusednorm.convert import measure

    def writes_a_sum(m, x):
        y = x * 2
        y += m.bn(x)
        return y

    timed = []

    def measured(stock, ours, tensors, training):
        with torch.no_grad():
            torch.testing.assert_close(ours(*tensors), stock(*tensors), rtol=1e-4, atol=1e-4)
        timed.append(training)
        return (0.1, 0.2) if faster == "stock" else (0.2, 0.1)

    monkeypatch.setattr(measure, "_measured", measured)
    monkeypatch.setattr(measure, "_known", {})
    parts = Block(), Block(), nn.SiLU(inplace=True), nn.BatchNorm2d(6)
    report, model = Report(), nn.Sequential(*parts, Case(writes_a_sum))
    state = torch.get_rng_state()
    compiled(model, report, small="measure")(values(dtype=torch.float32))
    assert torch.equal(state, torch.get_rng_state())
    assert timed == [True, True, True]  # the two blocks are alike
    if faster == "stock":
        assert {row.reason for row in report.rows} == {"stock is faster for (4, 6, 5, 5): 0.100 ms against 0.200"}
    assert len(report.fused) == (0 if faster == "stock" else 4)


def test_small_ones_without_measuring():
    report = Report()
    compiled(Block(), report, small="never")(values(dtype=torch.float32))
    assert report.rows[0].reason == "it is small: 600 values, and up to 1048576 are left as they are"


# ---- dropouts --------------------------------------------------------------------------------------------------------
def test_dropouts_outside_chains():
    def function(m, x):
        x = F.dropout(m.conv(x), p=0.25, training=m.training)
        return m.lone(x.flatten(1)), F.dropout(x, 0.5, m.training, True)

    model, report, x = Case(function, lone=nn.Dropout(0.5)), Report(), values(64, 6, 5, 5, dtype=torch.float32)
    run = compiled(model, report, dropouts=True)
    torch.manual_seed(1)
    one, other = run(x)
    assert len(report.dropouts) == 2 and report.dropouts[1] == "lone"  # the last one writes what it takes
    assert abs((one == 0).float().mean().item() - 0.625) < 0.02
    torch.manual_seed(1)
    assert torch.equal(run(x)[0], one)
    model.eval()
    torch.testing.assert_close(run(x)[0], model(x)[0])


def test_dropouts_stay_torchs_where_not_asked_for():
    model, report = nn.Sequential(nn.Dropout(0.5)), Report()
    x = torch.ones(1000)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(model, report)(x), expected) and report.dropouts == []


# ---- room on Python's stack ------------------------------------------------------------------------------------------
def faults_at(depth, function):
    """Pages that are mapped while `function` runs, so many calls down."""
    if depth:
        return faults_at(depth - 1, function)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def calls():
    def nothing():
        pass

    for _ in range(300):
        nothing()


def test_no_call_from_a_graph_maps_memory():
    """A piece of the stack ends somewhere in so many calls; that it does matter is asked where nobody mends Python."""
    assert max(faults_at(depth, _with_room(calls, 100)) for depth in range(300)) < 100
    if sys.version_info[:2] in ((3, 11), (3, 12)) and sys.platform == "linux":
        assert max(faults_at(depth, calls) for depth in range(300)) >= 300


def test_a_graph_has_room_for_its_variables_too():
    model = Case(lambda m, x: F.relu(m.bn(x))).eval()
    x = values(dtype=torch.float32)
    roomy = _with_room(model, 5000)
    assert torch.equal(roomy(x), model(x)) and roomy.__code__.co_stacksize >= 6024


@pytest.mark.parametrize("model, roomy", [(Block(), True), (nn.Conv2d(6, 6, 3), False)])
def test_what_is_not_fused_runs_as_eagerly(model, roomy, monkeypatch):
    asked = []

    def with_room(function, variables):
        asked.append(variables)
        return function

    # By the module's name: the package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules[fusednorm.backend.__module__], "_with_room", with_room)
    compiled(model)(values(dtype=torch.float32))
    assert bool(asked) == roomy and all(n > 3 for n in asked)


def test_what_is_compiled_ahead_of_time():
    """There torch wants an object that it could store."""
    model, x = nn.Sequential(Block(), Block()).eval(), values(dtype=torch.float32)
    report = Report()
    with torch._dynamo.config.patch(enable_aot_compile=True):
        run = compiled(model, report, fullgraph=True).forward.aot_compile(((x,), {}))
    assert [row.order for row in report.rows] == ["norm-add-act"] * 2
    torch.testing.assert_close(run(x), model(x))
