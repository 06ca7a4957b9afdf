"""`fuse` and `unfuse`: small models, each with something that a careless converter would break."""

import copy
import functools
import io
import json
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from common import generator
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, unfuse
from fusednorm.convert import measure

pytestmark = pytest.mark.cpu
fuse = functools.partial(fusednorm.fuse, small="always")  # these models are small, and what is faster is not the point


def picture(*shape):
    return torch.randn(shape or (4, 3, 8, 8), generator=generator(1), dtype=torch.float64)


class ConvNormAct(nn.Module):
    def __init__(self, act=None, inside=3, outside=6):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3)
        self.bn = nn.BatchNorm2d(outside)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class SharedAct(nn.Module):
    """One activation object, a slot of it in each block."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.one, self.two = ConvNormAct(act), ConvNormAct(act, 6)

    def forward(self, x):
        return self.two(self.one(x))


class ActTwice(nn.Module):
    """torchvision's BasicBlock: the second call of the ReLU does not follow a norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class UsedTwice(nn.Module):
    """What the norm gives goes to the activation and past it."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.act(y) + y


class UsedAfterIdleDropout(nn.Module):
    """In evaluation the dropout gives the tensor that it took, and the addition takes both."""

    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x):
        y = self.bn(x)
        return self.drop(y) + y


class InPlaceIgnored(nn.Module):
    """The activation writes, and nobody takes what it returns."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(x)
        self.act(y)
        return y * 2


class Features(nn.Module):
    """Gives what the norm gives, too."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return {"normed": y, "out": self.act(y)}


class Keeps(nn.Module):
    """Leaves what the norm gives where a loss will look for it."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        self.normed = {"last": self.bn(x)}
        return self.act(self.normed["last"])


class Output:
    def __init__(self, normed, out):
        self.normed, self.out = normed, out

    def values(self):
        return [self.normed, self.out]


class OwnOutput(nn.Module):
    """Gives an object of a class that torch does not know."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return Output(y, self.act(y))


class InAList(nn.Module):
    """The model calls its norm by a list of its own, which no converter can see."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.layers = [self.bn, self.act]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TwoPlaces(nn.Module):
    """A block registered under two names."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.stages = nn.ModuleList([self.block])
        self.norm = self.block[1]

    def forward(self, x):
        return self.stages[0](x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x))


class Looks(nn.Module):
    """Code that asks the activation something that an nn.Identity cannot answer."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(x)
        return self.act(y) if self.act.inplace else self.act(y.clone())


class Apart(nn.Module):
    """The norm in one module, activation and dropout in its parent, by keyword."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity())
        self.act, self.drop = nn.ELU(0.5), nn.Dropout2d(0.3)

    def forward(self, x):
        return self.drop(input=self.act(self.inner(x)))


class ActFirst(nn.Module):
    """ECAPA's block: the activation ahead of the norm, and a dropout behind."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.bn, self.drop = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(self.bn(self.act(self.conv(x))))


class TwoNorms(nn.Module):
    """An activation between two norms belongs to one of them."""

    def __init__(self):
        super().__init__()
        self.one, self.act, self.two = nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.act(self.one(x)))


class Recurrent(nn.Module):
    """A block called several times in one forward."""

    def __init__(self):
        super().__init__()
        self.block = ConvNormAct(nn.Tanh(), 3, 3)

    def forward(self, x):
        return self.block(self.block(x))


class Counting(nn.Module):
    """Changes with every call: a buffer, torch's and Python's generators."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.act(self.bn(x + torch.rand(()) + random.random()))


def sequence(act=None):
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), act or nn.GELU(), nn.Dropout(0.1)),
        *(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5), nn.ReLU()),
    )


# model, with its orders as fused with an example: name of the norm -> the stages that it gets
CASES = {
    "sequence": (sequence, {"1": "norm-act-drop", "7": "norm-act"}),
    "prelu": (lambda: sequence(nn.PReLU()), {"1": "norm-act-drop", "7": "norm-act"}),
    "attributes": (ConvNormAct, {"bn": "norm-act"}),
    "shared act": (SharedAct, {"one.bn": "norm-act", "two.bn": "norm-act"}),
    "act twice": (ActTwice, {"bn1": "norm", "bn2": "norm"}),
    "used twice": (UsedTwice, {"bn": "norm"}),
    "used after an idle dropout": (UsedAfterIdleDropout, {"bn": "norm"}),
    "in place, ignored": (InPlaceIgnored, {"bn": "norm"}),
    "features": (Features, {"bn": "norm"}),
    "keeps": (Keeps, {"bn": "norm"}),
    "own output": (OwnOutput, {"bn": "norm"}),
    "in a list": (InAList, {"bn": None}),
    "two places": (TwoPlaces, {"block.1": "norm-act"}),
    "functional": (Functional, {"bn": "norm"}),
    "looks": (Looks, {"bn": None}),
    "apart": (Apart, {"inner.1": "norm-act-drop"}),
    "act first": (ActFirst, {"bn": "act-norm-drop"}),
    "two norms": (TwoNorms, {"one": "norm-act", "two": "norm"}),
    "recurrent": (Recurrent, {"block.bn": "norm-act"}),
    "counting": (Counting, {"bn": "norm-act"}),
}
cases = pytest.mark.parametrize("name", CASES)


def build(name):
    torch.manual_seed(0)
    return CASES[name][0]().double()


def without_noise(model):
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def step(model, x):
    """Outputs, gradients and buffers of a training step and of an evaluation."""
    torch.manual_seed(5)
    random.seed(5)
    found = []
    for training in (True, False):
        model.train(training).zero_grad()
        x = x.detach().requires_grad_()
        out = model(x)
        out = [out] if isinstance(out, torch.Tensor) else list(out.values())
        sum(o.square().sum() for o in out).backward()
        found += [*out, x.grad, *(p.grad for p in model.parameters())]
    return [*found, *(b.double() for b in model.buffers())]


@cases
def test_same_model(name):
    """Values, gradients and buffers, and the report says what was fused."""
    stock = without_noise(build(name))
    ours = fuse(stock, picture())
    orders = {row.name: row.order for row in ours.fusednorm_report.rows}
    assert orders == CASES[name][1]
    for a, b in zip(step(stock, picture()), step(ours, picture()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@cases
def test_same_keys(name):
    stock = build(name)
    ours = fuse(stock, picture())
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in stock.parameters()]
    for a, b in ((stock, ours), (ours, stock)):
        b.load_state_dict(a.state_dict(), strict=True)
    for path, module in stock.named_modules():
        if isinstance(module, nn.Sequential):
            assert len(module) == len(ours.get_submodule(path))


@cases
def test_optimizer_state_moves(name):
    stock = without_noise(build(name)).train()
    optimizer = torch.optim.Adam(stock.parameters())
    out = stock(picture())
    sum(o.sum() for o in ([out] if isinstance(out, torch.Tensor) else out.values())).backward()
    optimizer.step()
    ours = fuse(stock, picture(), inplace=True)
    assert [id(p) for p in ours.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]


@cases
def test_way_back(name):
    """`unfuse` gives the stock model: types in their places, objects, values; and takes what the fused one saved."""
    stock = build(name)
    types = [(n, type(m)) for n, m in stock.named_modules()]
    parameters = list(map(id, stock.parameters()))
    fused = fuse(stock, picture(), inplace=True)
    saved = fused.state_dict()
    back = unfuse(fused)
    assert [(n, type(m)) for n, m in back.named_modules()] == types
    assert list(map(id, back.parameters())) == parameters
    back.load_state_dict(saved, strict=True)
    for a, b in zip(step(without_noise(build(name)), picture()), step(without_noise(back), picture()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@cases
def test_copies(name):
    """The model given stays as it was, and what comes out copies and pickles, and can be taken back from a copy."""
    stock = build(name)
    before = [(n, type(m)) for n, m in stock.named_modules()]
    ours = fuse(stock, picture())
    assert [(n, type(m)) for n, m in stock.named_modules()] == before
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch_saved(ours)):
        assert str(copied.fusednorm_report) == str(ours.fusednorm_report)
        assert [(n, type(m)) for n, m in unfuse(copied).named_modules()] == before


def torch_saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@cases
def test_twice_is_once(name):
    once = fuse(build(name), picture())
    twice = fuse(once, picture())
    assert [(n, type(m)) for n, m in twice.named_modules()] == [(n, type(m)) for n, m in once.named_modules()]
    assert {r.name: r.order for r in twice.fusednorm_report.rows} == CASES[name][1]


@cases
@pytest.mark.parametrize("training", [True, False])
def test_observing_changes_nothing(name, training):
    stock = build(name).train(training)
    (stock.block if hasattr(stock, "block") else stock).train(not training)
    modes = {name: m.training for name, m in stock.named_modules()}
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    fuse(stock, picture(), inplace=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert {name: m.training for name, m in stock.named_modules() if name in modes} == modes
    for key, value in stock.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in stock.parameters())


class TestWithoutExample:
    def test_rows(self):
        ours = fuse(without_noise(sequence().double()))
        assert {r.name: r.order for r in ours.fusednorm_report.rows} == {"1": "norm-act-drop", "7": "norm-act"}

    def test_across_rows(self):
        model = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU(), nn.Dropout())
        )
        assert fuse(model).fusednorm_report.rows[0].order == "norm-act-drop"

    def test_somebody_looks_at_a_row(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())
        model[0].register_forward_hook(lambda module, args, output: None)
        assert fuse(model).fusednorm_report.rows[0].order == "norm"

    def test_own_code_is_left_alone(self):
        row = fuse(ConvNormAct()).fusednorm_report.rows[0]
        assert row.order is None
        assert "example" in row.reason


class TestHooks:
    @pytest.mark.parametrize("which", ["bn", "act"])
    def test_of_a_stage(self, which):
        model = ConvNormAct().double()
        seen = []
        getattr(model, which).register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        ours = fuse(model, picture(), inplace=True)
        assert ours.fusednorm_report.rows[0].order in (None, "norm")
        seen.clear()
        stock = without_noise(build("attributes")).train()
        stock.load_state_dict(model.state_dict())
        ours.train()(picture())
        expected = stock.bn(stock.conv(picture()))
        torch.testing.assert_close(seen[0], expected if which == "bn" else stock.act(expected))

    def test_of_a_block(self):
        """A hook sees what the block gives: an activation behind it cannot move in."""
        model = Apart().double()
        model.inner.register_forward_hook(lambda module, args, output: None)
        assert fuse(model, picture()).fusednorm_report.rows[0].order == "norm"


class TestPick:
    def orders(self, **pick):
        return {r.name: r.order for r in fuse(sequence(), **pick).fusednorm_report.rows}

    def test_names(self):
        assert self.orders(include="7") == {"1": None, "7": "norm-act"}
        assert self.orders(include=["1", "[0-3]"]) == {"1": "norm-act-drop", "7": None}
        assert self.orders(exclude="*") == {"1": None, "7": None}

    def test_function(self):
        assert self.orders(include=lambda name, bn: bn.num_features == 4) == {"1": "norm-act-drop", "7": None}

    @pytest.mark.parametrize("bad", [3, [3], {"1": 2}.values()])
    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_bad(self, argument, bad):
        with pytest.raises(TypeError, match=f"{argument}: expected names"):
            fuse(sequence(), **{argument: bad})


class TestRefused:
    def test_no_module(self):
        with pytest.raises(TypeError, match="model: expected an nn.Module, but got int"):
            fuse(3)

    def test_scripted(self):
        with pytest.raises(TypeError, match="not scripted"):
            fuse(torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))))

    def test_compiled(self):
        with pytest.raises(TypeError, match="not compiled"):
            fuse(torch.compile(sequence()))
        model = sequence()
        model[1].compile()
        with pytest.raises(TypeError, match="not compiled"):
            fuse(model)

    def test_failing_example(self):
        model = sequence()
        with pytest.raises(RuntimeError, match="shapes cannot"):
            fuse(model, torch.randn(2, 3, 4, 4), inplace=True)
        assert type(model[1]) is nn.BatchNorm2d
        assert not hasattr(model, "fusednorm_report")

    def test_without_a_norm(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        assert fuse(model, inplace=True) is model
        assert str(model.fusednorm_report) == "no BatchNorm in this model"


def test_norm_as_model():
    ours = fuse(nn.BatchNorm1d(3), torch.randn(4, 3))
    assert type(ours) is FusedBatchNorm1d
    assert type(unfuse(ours)) is nn.BatchNorm1d


@pytest.mark.parametrize("example", [("x",), {"x": None}])
def test_kinds_of_example(example):
    given = {"x": picture()} if isinstance(example, dict) else (picture(),)
    assert fuse(ConvNormAct().double(), given).fusednorm_report.rows[0].order == "norm-act"


def test_meta_device():
    with torch.device("meta"):
        model, x = ConvNormAct(), torch.empty(2, 3, 8, 8)
    ours = fuse(model, x)
    assert ours.fusednorm_report.rows[0].order == "norm-act"
    assert ours.bn.weight.is_meta


def test_lazy():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    for function in (fuse, fusednorm.fold):
        with pytest.raises(ValueError, match="knows its sizes"):
            function(model, torch.randn(2, 3, 5, 5))
    model(torch.randn(2, 3, 5, 5))
    assert [row.order for row in fuse(model).fusednorm_report.rows] == ["norm-act"]


def test_shared_weights():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    model[2].weight = model[0].weight
    ours = fuse(model)
    assert ours[2].weight is ours[0].weight


def test_report():
    report = fuse(build("act twice"), picture()).fusednorm_report
    data = json.loads(report.to_json())
    assert [row["name"] for row in data["rows"]] == ["bn1", "bn2"]
    assert "called elsewhere" in data["rows"][0]["reason"]
    assert "add in the model's own code" in data["rows"][1]["reason"]
    assert str(report).splitlines()[0] == "2 of 2 BatchNorms fused"
    assert "bn1" in str(report)


class TestUnfuseByHand:
    """Layers that nobody converted."""

    def step_alike(self, ours):
        x = picture(6, 4, 5, 5)
        ours = without_noise(ours.double())
        back = unfuse(copy.deepcopy(ours))
        assert not any(type(m).__module__.startswith("fusednorm.modules") for m in back.modules())
        for a, b in zip(step(ours, x), step(back, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        back.load_state_dict(ours.state_dict(), strict=True)
        back.load_state_dict(back.state_dict(), strict=True)
        return back

    def test_attribute(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = FusedBatchNorm2d(4, act="prelu", drop=0.2)

            def forward(self, x):
                return self.bn(x)

        assert [type(m) for m in self.step_alike(Block()).bn] == [nn.BatchNorm2d, nn.PReLU, nn.Dropout]

    @pytest.mark.parametrize("order", ["act-norm-drop", "drop-act-norm", "norm-drop-act"])
    def test_orders(self, order):
        self.step_alike(nn.Sequential(FusedBatchNorm2d(4, act="silu", drop=0.2, order=order)))

    def test_row(self):
        """Converted as the README says."""
        stock = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
        ours = copy.deepcopy(stock)
        ours[1] = FusedBatchNorm2d.from_torch(ours[1], act=ours[2], drop=ours[3])
        ours[2], ours[3] = nn.Identity(), nn.Identity()
        back = self.step_alike(ours)
        assert [type(m) for m in back] == [type(m) for m in stock]
        assert list(back.state_dict()) == list(stock.state_dict())

    def test_addition(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = FusedBatchNorm2d(4, act="relu", order="norm-add-act")

            def forward(self, x):
                return self.bn(x, x)

        self.step_alike(Block())

    def test_lazy(self):
        model = nn.Sequential(fusednorm.LazyFusedBatchNorm2d(act="relu"), FusedBatchNorm2d(3))
        with pytest.raises(ValueError, match="knows its size"):
            unfuse(model)
        assert type(model[1]) is FusedBatchNorm2d


# ---- small maps ------------------------------------------------------------------------------------------------------
@pytest.fixture
def timed(monkeypatch):
    """What is measured, and what comes out of that: (0.2, 0.1) ms unless a test sets another `result`."""

    class Timed(list):
        result = (0.2, 0.1)

    calls = Timed()

    def measured(stock, ours, tensors, training):
        generated = torch.get_rng_state()
        expected = stock(*tensors)
        torch.set_rng_state(generated)
        if not any(isinstance(m, nn.Dropout) for m in _modules_of(stock)):
            torch.testing.assert_close(ours(*tensors), expected)
        calls.append((tuple(tensors[0].shape), training))
        return calls.result

    monkeypatch.setattr(measure, "_measured", measured)
    monkeypatch.setattr(measure, "_known", {})
    return calls


def _modules_of(called):
    (row,) = (cell.cell_contents for cell in called.__closure__ if isinstance(cell.cell_contents, nn.Module))
    return row.modules()


def test_a_chain_is_timed_once_for_each_shape(timed):
    model = nn.Sequential(ConvNormAct(), nn.Conv2d(6, 3, 3), ConvNormAct(), nn.Conv2d(6, 3, 1), ConvNormAct()).double()
    before, generated = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fused = fusednorm.fuse(model, picture(4, 3, 12, 12))
    assert timed == [((4, 6, 10, 10), True), ((4, 6, 6, 6), True), ((4, 6, 4, 4), True)]
    assert len(fused.fusednorm_report.fused) == 3 and torch.equal(torch.get_rng_state(), generated)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    fusednorm.fuse(model, picture(4, 3, 12, 12))
    assert len(timed) == 3
    fusednorm.fuse(model.eval(), picture(4, 3, 12, 12))
    assert timed[3:] == [(shape, False) for shape, _ in timed[:3]]


@pytest.mark.parametrize(
    "row",
    [
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3)),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.PReLU(), nn.Dropout(0.2)),
        lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU6()),
    ],
)
def test_where_stock_is_faster_it_stays(row, timed):
    timed.result = (0.1, 0.25)
    fused = fusednorm.fuse(row().double(), picture() * 2)
    (report,) = fused.fusednorm_report.rows
    assert report.order is None and report.reason == "stock is faster for (4, 3, 8, 8): 0.100 ms against 0.250"
    assert not any(isinstance(m, FusedBatchNorm2d) for m in fused.modules())


def test_large_ones_are_not_timed(timed):
    fusednorm.fuse(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), torch.ones(2**18 + 1, 4))
    fusednorm.fuse(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))  # of no shape at all
    assert timed == []


def test_never_and_a_bad_choice():
    fused = fusednorm.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), picture().float(), small="never")
    assert fused.fusednorm_report.rows[0].reason == "it is small: 768 values, and up to 1048576 are left as they are"
    with pytest.raises(ValueError, match="small: expected one of 'measure', 'always', 'never', but got True"):
        fusednorm.fuse(nn.Sequential(nn.BatchNorm2d(3)), small=True)


def test_times_are_measured():
    """Milliseconds that can be."""
    norm, x = nn.BatchNorm2d(8), torch.randn(8, 8, 16, 16, requires_grad=True)
    stock, ours = measure._measured(lambda x: norm(x), lambda x: norm(x) + 0 * x.exp().sum(), [x], True)
    assert 0 < stock < ours < 1000


# ---- dropouts --------------------------------------------------------------------------------------------------------
class Lone(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu, self.drop = nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.5)
        self.linear, self.lone, self.inplace = nn.Linear(3, 3), nn.Dropout(0.25), nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        return self.inplace(self.lone(self.linear(self.drop(self.relu(self.bn(x))))))


def test_dropouts_outside_chains():
    stock = Lone()
    seen = []
    stock.lone.register_forward_hook(lambda m, i, o: seen.append(float((o == 0).float().mean())))
    stock.inplace.p = 0.0
    fused = fuse(stock, torch.ones(2, 3), dropouts=True)
    assert fused.fusednorm_report.dropouts == ["lone"] and "lone" in str(fused.fusednorm_report).splitlines()[-1]
    assert type(fused.lone) is fusednorm.Dropout and type(fused.inplace) is nn.Dropout
    fused(torch.randn(20_000, 3))
    assert abs(seen[-1] - 0.25) < 0.01
    again = pickle.loads(pickle.dumps(copy.deepcopy(fuse(Lone(), torch.ones(2, 3), dropouts=True))))
    assert type(unfuse(again).lone) is nn.Dropout and type(stock.lone) is nn.Dropout
    assert json.loads(fused.fusednorm_report.to_json())["dropouts"] == ["lone"]
