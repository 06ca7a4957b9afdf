"""`torch.compile(model, backend="fusednorm")`: what a captured graph fuses, and what it must leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from backend_models import Block, Case, compiled, same, values
from torch import nn

import fusednorm
from fusednorm.convert import Report

pytestmark = pytest.mark.cpu


def add_to_branch(m, x):
    out = m.bn(x)
    out += m.conv(x)
    return F.relu_(out)


def silu_by_hand(m, x):
    x = m.bn(m.conv(x))
    return x * x.sigmoid()


def add_without_rebinding(m, x):
    out = m.bn(m.conv(x))
    out.add_(x)
    return out.relu()


def added_up(m, x):
    """timm's RepVGG and MobileOne: the last norm is added to a sum, in place, and so was another."""
    last, y = m.bn(x), m.conv(x)
    y += m.one(x)
    y += m.other(x)
    y += last
    return F.relu_(y)


FUSED = {
    "modules": (lambda m, x: m.act(m.bn(m.conv(x))), {"act": nn.ReLU(inplace=True)}, "norm-act"),
    "functions": (lambda m, x: F.leaky_relu(m.bn(m.conv(x)), 0.2), {}, "norm-act"),
    "method": (lambda m, x: m.bn(m.conv(x)).relu_(), {}, "norm-act"),
    "keywords": (lambda m, x: F.elu(input=m.bn(x), alpha=0.7, inplace=True), {}, "norm-act"),
    "gelu": (lambda m, x: F.gelu(m.bn(x), approximate="tanh"), {}, "norm-act"),
    "hardtanh": (lambda m, x: m.act(m.bn(x)), {"act": nn.Hardtanh(-0.5, 2)}, "norm-act"),
    "relu6": (lambda m, x: m.act(m.bn(x)), {"act": nn.ReLU6(inplace=True)}, "norm-act"),
    "softplus": (lambda m, x: F.softplus(m.bn(x), 2.0), {}, "norm-act"),
    "prelu": (lambda m, x: m.act(m.bn(x)), {"act": nn.PReLU(6)}, "norm-act"),
    "silu by hand": (silu_by_hand, {}, "norm-act"),
    "hardswish, mish": (lambda m, x: F.mish(m.bn(F.hardswish(m.conv(x)))), {}, "norm-act"),
    "in front": (lambda m, x: m.bn(F.relu_(m.conv(x))), {}, "act-norm"),
    "silu by hand in front": (lambda m, x: m.bn((y := m.conv(x)) * torch.sigmoid(y)), {}, "act-norm"),
    "addition": (add_to_branch, {}, "norm-add-act"),
    "addition, in place and not rebound": (add_without_rebinding, {}, "norm-add-act"),
    "to itself": (lambda m, x: F.relu(m.bn(x) + x), {}, "norm-add-act"),
    "residual first": (lambda m, x: torch.add(x, F.silu(m.bn(m.conv(x)))), {}, "norm-act-add"),
    "dropout that drops nothing": (lambda m, x: F.relu(m.drop(m.bn(x))), {"drop": nn.Dropout(0.0)}, "norm-act"),
    "everything dropped": (lambda m, x: m.bn(x) + F.dropout(m.bn(x), 1.0, m.training), {}, "norm"),
    "dropped and added": (lambda m, x: F.relu(F.dropout(m.bn(x), 1.0, m.training) + x), {}, "norm-drop-add-act"),
    "three norms added": (added_up, {"one": nn.BatchNorm2d(6), "other": nn.BatchNorm2d(6)}, "norm-add-act"),
    "bare": (lambda m, x: m.bn(m.conv(x)).sum(1), {}, "norm"),
    "torch.batch_norm": (
        lambda m, x: torch.batch_norm(
            x, m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, m.training, 0.1, 1e-5, False
        ).tanh(),
        {},
        "norm-act",
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_equal_and_fused(name):
    function, layers, order = FUSED[name]
    rows = same(Case(function, **layers))
    assert order in [row.order for row in rows], rows


def used_again(m, x):
    y = m.bn(x)
    return F.relu(y) + y.sum()


def residual_written(m, x):
    identity = m.conv(x)
    out = m.bn(x)
    out = out + identity
    identity.mul_(2)  # after the addition, before the activation
    return F.relu(out) * identity


def residual_written_later(m, x):
    """Stock keeps the sum; a call with all of it would keep what is written."""
    identity = m.conv(x)
    out = F.gelu(m.bn(x) + identity)
    identity.mul_(2)
    return out * identity.detach() + identity


def input_written(m, x):
    y = m.conv(x)
    out = m.bn(y)
    y.mul_(0.5)
    return F.relu(out) + y


def writes_the_residual(m, x):
    identity = m.conv(x)
    seen = identity.view(-1)
    identity += m.bn(x)
    return identity * seen.view_as(x)


def writes_a_sum(m, x):
    y = x * 2
    y += m.bn(x)
    return y


def writes_the_input(m, x):
    y = x * 2
    seen = y[:, :1]
    return m.bn(F.relu_(y)) + seen


def statistics_between(m, x):
    out = m.bn(x)
    return F.relu(out) + m.bn.running_mean.sum() * 0 if m.training else F.relu(out)


def statistics_read_between(m, x):
    out = m.bn(x)
    seen = m.bn.running_mean.clone()
    return F.relu(out) * seen.view(1, -1, 1, 1)


def one_norm_twice(m, x):
    a, b = m.bn(x), m.bn(m.conv(x))
    return F.relu(a) - F.relu(b) * 2


def broadcast(m, x):
    return m.bn(x) + x.mean(1, keepdim=True)


def alpha(m, x):
    return torch.add(m.bn(x), x, alpha=2)


def doubled(m, x):
    y = m.bn(x)
    return y + y


def gradients_off(m, x):
    with torch.no_grad():
        y = m.bn(x)
    return F.relu(y) + x


def gradients_off_behind(m, x):
    y = m.bn(x)
    with torch.no_grad():
        z = F.relu(y)
    return z + x


def gradients_off_in_a_gate(m, x):
    y = m.bn(x)
    with torch.no_grad():
        gate = torch.sigmoid(y)
    return y * gate


def gradients_off_ahead(m, x):
    x = x * 2
    with torch.no_grad():
        z = F.relu(x)
    return m.bn(z) + x.sum(1, keepdim=True)


def shared_statistics(m, x):
    y = m.bn(x)
    z = F.instance_norm(x, m.bn.running_mean, m.bn.running_var, use_input_stats=m.training)
    return F.relu(y) + z.sum(1, keepdim=True)


UNLIKE = {  # of a chain that is one stage shorter than it looks
    f.__name__: (f, order)
    for f, order in (
        (used_again, "norm"),
        (residual_written, "norm-add"),
        (residual_written_later, "norm-add"),
        (writes_the_residual, "norm"),
        (writes_the_input, "norm"),
        (statistics_between, "norm-act"),
        (statistics_read_between, "norm"),
        (one_norm_twice, "norm"),
        (broadcast, "norm"),
        (alpha, "norm"),
        (doubled, "norm"),
        (gradients_off, "norm"),
        (gradients_off_behind, "norm"),
        (gradients_off_in_a_gate, "norm"),
        (gradients_off_ahead, "norm"),
    )
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_not_a_chain(name):
    function, order = UNLIKE[name]
    assert same(Case(function))[0].order == order


@torch.library.custom_op("fusednorm_tests::twice_", mutates_args=("x",))
def twice_(x: torch.Tensor) -> None:
    x.mul_(2)


def written_by_an_operator(m, x):
    y = m.conv(x)
    out = m.bn(y)
    twice_(y)
    return F.relu(out) + y.sum(1, keepdim=True)


def written_by_aten(m, x):
    y = m.conv(x)
    out = m.bn(y)
    torch.ops.aten.add_.Tensor(y, torch.ones_like(y))
    return F.relu(out) + y.sum(1, keepdim=True)


def written_in_a_list(m, x):
    other, y = x * 1, m.conv(x)
    out = m.bn(y)
    torch._foreach_add_([other, y], 1.0)
    return F.relu(out) + other.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "function", [input_written, written_by_an_operator, written_by_aten, written_in_a_list, shared_statistics]
)
@torch.no_grad()  # autograd would not have it
def test_an_input_that_is_written_in_between(function):
    model, report = Case(function).double(), Report()
    expected = copy.deepcopy(model)(values())
    torch.testing.assert_close(compiled(model, report)(values()), expected)
    assert [row.order for row in report.rows] == ["norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_of_another_dtype_stays_outside(dtype):
    report = Report()
    model = Case(lambda m, x: F.relu(m.bn(x.bfloat16()).to(dtype) + x.float()))
    compiled(model, report)(values(dtype=torch.float32))
    assert [row.order for row in report.rows] == ["norm"]


# ---- noise -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("drop", [nn.Dropout(0.4), nn.Dropout2d(0.4)])
@pytest.mark.parametrize("order", ["norm-act-drop", "drop-norm", "norm-add-drop"])
def test_noise(drop, order):
    def function(m, x):
        if order == "drop-norm":
            return m.bn(m.drop(m.conv(x) + 9))
        v = m.bn(x)
        return m.drop(v + m.act(x)) if "add" in order else m.drop(m.act(v))

    model, report = Case(function, drop=copy.deepcopy(drop), act=nn.Softplus()).double(), Report()
    run, x = compiled(model, report), values(64, 6, 5, 5).requires_grad_()
    torch.manual_seed(3)
    output = run(x)
    assert [row.order for row in report.rows] == [order]
    torch.manual_seed(3)
    assert torch.equal(run(x), output)
    dropped = output == 0 if order != "drop-norm" else output == output.amin((0, 2, 3), keepdim=True)
    share = dropped.double().mean().item()
    assert abs(share - 0.4) < 0.1, share
    if isinstance(drop, nn.Dropout2d):
        assert torch.equal(dropped, dropped[:, :, :1, :1].expand_as(dropped))
    model.eval()
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(run(x), expected)


def test_live_dropout_in_evaluation():
    model, report = Case(lambda m, x: F.dropout(m.bn(x), 0.5)), Report()
    run, x = compiled(model.eval(), report), values(dtype=torch.float32)
    share = (run(x) == 0).float().mean().item()
    assert 0.4 < share < 0.6 and report.rows[0].order == "norm-drop"


# ---- around the graph ------------------------------------------------------------------------------------------------
def graphs_of(backend, calls):
    """How many graphs a sequence of calls needs."""
    torch._dynamo.reset()
    count = 0

    def counted(gm, inputs):
        nonlocal count
        count += 1
        return backend(gm, inputs)

    model = nn.Sequential(Block(), Block())
    run = torch.compile(model, backend=counted)
    for training, batch in calls:
        model.train(training)
        run(values(batch, 6, 5, 5, dtype=torch.float32)).sum().backward()
    return count


def test_compiled_again_as_often_as_without():
    calls = [(True, 4), (True, 5), (True, 6), (True, 7), (False, 4), (False, 9), (True, 2), (True, 2)]
    assert graphs_of(fusednorm.backend, calls) == graphs_of(lambda gm, inputs: gm.forward, calls)


@pytest.mark.parametrize("small", ["always", "measure"])
def test_a_dynamic_batch(small):
    """Numbers of layers are no constants of such a graph either."""
    model = nn.Sequential(Block(), Block(), nn.BatchNorm2d(6), nn.LeakyReLU(0.3)).double()
    stock, report = copy.deepcopy(model), Report()
    torch._dynamo.reset()
    options = {"report": report.add, "small": small}
    run = torch.compile(model, backend=fusednorm.backend, dynamic=True, options=options)
    for batch in (3, 5, 8):
        torch.testing.assert_close(run(values(batch, 6, 5, 5)), stock(values(batch, 6, 5, 5)))
    assert [row.name for row in report.rows] == ["0.bn", "1.bn", "2"]
    if small == "always":
        assert [row.order for row in report.rows] == ["norm-add-act", "norm-add-act", "norm-act"]
        assert report.rows[1].taken == ("add 1", "relu 1.act")


def test_a_dynamic_dropout():
    model, report = nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.4)), Report()
    torch._dynamo.reset()
    options = {"report": report.add, "small": "always"}
    run = torch.compile(model, backend=fusednorm.backend, dynamic=True, options=options)
    share = (run(values(9, 6, 9, 9, dtype=torch.float32)) == 0).float().mean().item()
    assert abs(share - 0.4) < 0.1 and [row.order for row in report.rows] == ["norm-drop"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.relu(x.contiguous() + m.bn(x)).view(x.size(0), -1),
        lambda m, x: torch.zeros(x.shape, dtype=x.dtype).add_(m.bn(x)).view(x.size(0), -1),
        lambda m, x: torch.as_strided(x.contiguous() + m.bn(x), (2, 3, 20), (60, 20, 1)),
    ],
)
def test_a_sum_of_another_layout(function):
    same(Case(function), values().contiguous(memory_format=torch.channels_last))


def test_transforms_in_the_same_graph():
    rows = same(Case(lambda m, x: F.relu(m.bn(x)) + torch.vmap(lambda a: a * 2)(x)))
    assert rows[0].order == "norm-act"


def test_graph_breaks():
    def function(m, x):
        y = F.relu(m.bn(x))
        torch._dynamo.graph_break()
        return torch.tanh(m.again(m.conv(y)))

    assert [row.order for row in same(Case(function, again=nn.BatchNorm2d(6)))] == ["norm-act", "norm-act"]


def test_names_that_begin_anew_behind_a_graph_break():
    class Breaks(Block):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model, report = nn.Sequential(Breaks(), Breaks(track_running_stats=False)), Report()
    run, x = compiled(model, report), values(dtype=torch.float32)
    run(x), run(x[:3])  # one graph of each kind, again for any batch
    assert [(row.name, row.order) for row in report.rows] == [("bn", "norm-add-act")] * 2


def test_checkpointed():
    def function(m, x):
        return torch.utils.checkpoint.checkpoint(m.block, x, use_reentrant=False)

    block = Block(track_running_stats=False)  # torch's own checkpoints trip over the count of batches
    assert [row.order for row in same(Case(function, block=block))] == ["norm-add-act"]


def test_autocast():
    model, x = nn.Sequential(Block(), Block()), values(dtype=torch.float32)
    stock, report = copy.deepcopy(model), Report()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = stock(x), compiled(model, report)(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.05)
    assert len(report.fused) == 2


def test_channels_last_stays():
    x = values(dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(Block(), Block()).to(memory_format=torch.channels_last)
    assert compiled(model)(x).stride() == model(x).stride()


def test_nothing_of_the_model_changes():
    model = nn.Sequential(Block(), nn.Flatten(), nn.Linear(150, 2))
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    before = list(model.state_dict()), [type(m) for m in model.modules()]
    compiled(model)(values(dtype=torch.float32))
    assert before == (list(model.state_dict()), [type(m) for m in model.modules()]) and len(seen) == 1


def test_a_graph_without_norms_is_run_as_it_is():
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    code = graph.code
    assert fusednorm.backend(graph, []) == graph.forward and graph.code == code


def test_fused_layers_are_left_alone():
    model, report = nn.Sequential(nn.Conv2d(6, 6, 3), fusednorm.FusedBatchNorm2d(6, act="relu", drop=0.2)), Report()
    compiled(model, report)(values(dtype=torch.float32)).sum().backward()
    assert report.rows == [] and str(report) == "no BatchNorm in this model"


@pytest.mark.parametrize("x", [torch.ones(4, 6, dtype=torch.complex64), torch.ones(2, 6, 1, 1, 1, 1), torch.ones(1, 6)])
def test_what_the_operator_does_not_take(x):
    def function(x):
        return F.relu(F.batch_norm(x, torch.zeros(6), torch.ones(6), training=True).real)

    try:
        expected = function(x)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(Exception, match=str(error)[:20]):
            compiled(function)(x)
    else:
        torch.testing.assert_close(compiled(function)(x), expected)
