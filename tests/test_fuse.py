"""`fuse` and `unfuse`: the models of `fuse_models.py`, what is refused, and the way back."""

import copy
import functools
import io
import json
import pickle
import random

import pytest
import torch
from fuse_models import (
    FUNCTIONS,
    ActFirst,
    ActTwice,
    Apart,
    BeginsAsNothing,
    Case,
    ConvNormAct,
    Counting,
    Features,
    Functional,
    InAList,
    InPlaceIgnored,
    Keeps,
    Logs,
    Looks,
    OwnOutput,
    Recurrent,
    Remembers,
    SharedAct,
    TwoNorms,
    TwoPlaces,
    UsedAfterIdleDropout,
    UsedTwice,
    picture,
    sequence,
    step,
)
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, unfuse

pytestmark = pytest.mark.cpu
fuse = functools.partial(fusednorm.fuse, small="always")  # these models are small, and what is faster is not the point


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
    "remembers": (Remembers, {"bn": "norm-act"}),
    "begins as nothing": (BeginsAsNothing, {"bn": None}),
} | {f.__name__: (lambda f=f, act=act: Case(f, act()), {"bn": order}) for f, (act, order) in FUNCTIONS.items()}
cases = pytest.mark.parametrize("name", CASES)


def build(name):
    torch.manual_seed(0)
    return CASES[name][0]().double()


def without_noise(model):
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


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


def test_what_modules_keep_is_as_before():
    stock = Logs().double()
    state = stock.generator.get_state()
    ours = fuse(stock, picture(), inplace=True)
    assert ours.fusednorm_report.rows[0].order == "norm-act"
    assert (ours.seen, ours.counts) == ([], {"calls": 0})
    assert torch.equal(ours.generator.get_state(), state)


def test_an_example_of_a_class_of_its_own():
    """As PyTorch Geometric's batches, which models write."""

    class Batch:
        def __init__(self, x):
            self.x = x

    class Writes(ConvNormAct):
        def forward(self, batch):
            batch.x = super().forward(batch.x)
            return batch.x

    batch = Batch(picture())
    given = batch.x
    assert fuse(Writes().double(), batch).fusednorm_report.rows[0].order == "norm-act"
    assert batch.x is given


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

    def test_a_row_with_code_of_its_own(self):
        model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
        model[0].forward = lambda x: model[0][1](model[0][0](x) + x)
        assert fuse(model).fusednorm_report.rows[0].order is None

    @pytest.mark.parametrize("function", [lambda m, x: m.row(x) + m.part(x), lambda m, x: m.row(x) + m.part[0](x)])
    def test_what_stands_elsewhere_too(self, function):
        class Elsewhere(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
                self.row = nn.Sequential(self.part[0], nn.ReLU(), nn.Sequential(nn.ReLU(), self.part), nn.ReLU())

            def forward(self, x):
                return function(self, x)

        stock = Elsewhere().double().eval()
        torch.testing.assert_close(fuse(stock)(picture()), stock(picture()))

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

    def test_of_an_identity(self):
        """It sees what the norm gives: an activation behind it cannot move ahead of it."""
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()).double()
        model[1].register_forward_hook(lambda module, args, output: 2 * output - 1)
        expected = model(picture())
        for example in (None, picture()):
            ours = fuse(model, example)
            assert ours.fusednorm_report.rows[0].order == "norm"
            torch.testing.assert_close(ours(picture()), expected)

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
    assert str(report).splitlines()[0] == "2 of 2 BatchNorms fused, 0 with what stands beside them"
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


@pytest.mark.parametrize(
    "ahead", [[nn.ReLU()], [nn.Tanh()], [nn.Identity(), nn.ReLU()], [nn.Flatten(2), nn.Unflatten(2, (5, 5)), nn.ReLU()]]
)
@pytest.mark.parametrize("way", ["fuse", "without example", "backend"])
def test_a_stage_whose_input_is_written_later(way, ahead):
    """Stock keeps what the activation gives, and trains; a layer with it ahead would keep what is written."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(8, 8, 1)
            self.body = nn.Sequential(*ahead, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))

        def forward(self, x):
            x = self.stem(x)
            x += self.body(x)
            return x

    model, x = Adds().double(), torch.randn(4, 8, 5, 5, dtype=torch.float64)
    if way != "backend":
        run = fusednorm.fuse(model, x if way == "fuse" else None, small="always")
        assert [row.order for row in run.fusednorm_report.rows] == ["norm"]
    else:
        torch._dynamo.reset()
        run = torch.compile(model, backend=fusednorm.backend, options={"small": "always"})
    run(x).square().sum().backward()
