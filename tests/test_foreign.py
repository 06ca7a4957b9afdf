"""Modules of other packages, as `fuse` knows them: by name. These are small ones of those names, as the packages may be
absent; `make models` has the real ones."""

import copy
import functools
import math
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from common import generator
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, _children, unfuse

pytestmark = pytest.mark.cpu
fuse = functools.partial(fusednorm.fuse, small="always")


_CLASSES = []


def of_package(module):
    """Makes a class the one that another package has under its name."""

    def named(cls):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        _CLASSES.append(cls)
        return cls

    return named


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """So that they can be pickled."""
    for cls in _CLASSES:
        parts = cls.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for cls in _CLASSES:
        setattr(sys.modules[cls.__module__], cls.__name__, cls)


@of_package("timm.layers.norm_act")
class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels, act=None, drop=None):
        super().__init__(channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@of_package("timm.layers.drop")
class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        noise = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * (noise.div_(1 - self.drop_prob) if self.scale_by_keep else noise)


@of_package("torchvision.ops.stochastic_depth")
class StochasticDepth(nn.Module):
    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x):
        return x


@of_package("torch_geometric.nn.norm.batch_norm")
class BatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.module = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.module(x)


@of_package("pytorch_tabnet.tab_network")
class GBN(nn.Module):
    def __init__(self, channels, virtual_batch_size):
        super().__init__()
        self.virtual_batch_size, self.bn = virtual_batch_size, nn.BatchNorm1d(channels, momentum=0.02)

    def forward(self, x):
        return torch.cat([self.bn(chunk) for chunk in x.chunk(math.ceil(len(x) / self.virtual_batch_size))])


def values(*shape):
    return torch.randn(shape, generator=generator(1), dtype=torch.float64)


def same(stock, ours, x):
    for training in (True, False):
        stock.train(training), ours.train(training)
        stock.zero_grad(), ours.zero_grad()
        for model in (stock, ours):
            model(x).square().sum().backward()
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-10, atol=1e-10)
        pairs = [*zip(stock.parameters(), ours.parameters(), strict=True)]
        pairs = [(a.grad, b.grad) for a, b in pairs] + [*zip(stock.buffers(), ours.buffers(), strict=True)]
        for a, b in pairs:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


CASES = {
    "BatchNormAct2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, nn.SiLU())),
        (4, 3, 6, 6),
        "norm-act",
    ),
    "its own class of act": (lambda: nn.Sequential(BatchNormAct2d(4, nn.RReLU(0.2, 0.2))), (4, 4, 6, 6), "norm-act"),
    "without act": (lambda: nn.Sequential(BatchNormAct2d(4)), (4, 4, 6, 6), "norm"),
    "with PReLU": (lambda: nn.Sequential(BatchNormAct2d(4, nn.PReLU(4))), (4, 4, 6, 6), "norm-act"),
    "with a dropout": (lambda: BatchNormAct2d(4, nn.ReLU(), nn.Dropout(0.0)), (4, 4, 6, 6), "norm-act"),
    "GBN": (lambda: nn.Sequential(nn.Linear(3, 4), GBN(4, 8)), (30, 3), "norm"),
    "GBN alone": (lambda: GBN(4, 7), (29, 4), "norm"),
    "PyG's BatchNorm": (lambda: nn.Sequential(nn.Linear(3, 4), BatchNorm(4), nn.ReLU()), (9, 3), "norm-act"),
    "DropPath": (lambda: nn.Sequential(nn.BatchNorm2d(3), DropPath(0.0)), (4, 3, 5, 5), "norm-drop"),
}


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_fused_and_back(name, blind):
    make, shape, order = CASES[name]
    stock, x = make().double(), values(*shape)
    ours = fuse(stock, None if blind else x)
    assert [row.order for row in ours.fusednorm_report.rows] == [order], str(ours.fusednorm_report)
    assert any(isinstance(m, (FusedBatchNorm1d, FusedBatchNorm2d)) for m in ours.modules())
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert list(ours.state_dict()) == list(stock.state_dict())
    same(stock, ours, x)
    assert fuse(ours, x).fusednorm_report.rows[0].order is not None
    ours = ours.float().double()  # other tensors, of which the modules that come back have to know
    state = ours.state_dict()
    back = unfuse(ours)
    assert [type(m) for m in back.modules()] == [type(m) for m in stock.modules()]
    assert [m.training for m in back.modules()] == [m.training for m in stock.modules()]
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), state.values(), strict=True))
    stock.load_state_dict(state)
    same(stock, back, x)


@pytest.mark.parametrize("norm", [lambda: BatchNormAct2d(4, nn.ReLU()), lambda: BatchNormAct2d(4), lambda: GBN(4, 8)])
def test_folded(norm):
    norm = norm().double()
    first = nn.Linear(3, 4) if isinstance(norm, GBN) else nn.Conv2d(3, 4, 3)
    stock, x = nn.Sequential(first, norm).double(), values(30, 3) if isinstance(norm, GBN) else values(4, 3, 6, 6)
    stock(x)
    folded = fusednorm.fold(stock.eval(), x)
    assert [row.order for row in folded.fusednorm_report.rows] == ["folded"]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(x), stock(x), rtol=1e-12, atol=1e-12)
    alone = fusednorm.fold(nn.Sequential(nn.ReLU(), copy.deepcopy(norm)).eval(), None)
    assert type(alone[1]) is type(norm)


def test_hooks_of_a_norm_and_act_go_on():
    stock, seen = nn.Sequential(BatchNormAct2d(3, nn.ReLU())), []
    stock[0].register_forward_hook(lambda m, i, o: seen.append(o.min().item()))
    ours = fuse(stock, torch.randn(4, 3, 5, 5))
    seen.clear()
    ours(torch.randn(4, 3, 5, 5))
    assert seen == [0.0]
    seen.clear()
    unfuse(ours)(torch.randn(4, 3, 5, 5))
    assert seen == [0.0]


def test_a_forward_of_its_own_stays():
    stock = nn.Sequential(BatchNormAct2d(3, nn.ReLU()))
    stock[0].forward = lambda x: x * 2
    assert torch.equal(fuse(stock)(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 2.0))


def test_include_and_exclude_mean_these_too():
    stock = nn.Sequential(BatchNormAct2d(3, nn.ReLU()), BatchNormAct2d(3))
    assert [row.order for row in fuse(stock, exclude="1").fusednorm_report.rows] == ["norm-act", None]


@pytest.mark.parametrize(
    "drop, known",
    [
        (DropPath(0.4), True),
        (DropPath(0.4, scale_by_keep=False), False),
        (StochasticDepth(0.4, "row"), True),
        (StochasticDepth(0.4, "batch"), False),
    ],
)
def test_drop_paths(drop, known):
    layer = FusedBatchNorm2d(3, drop=drop, order="norm-drop")
    assert (_children.read_drop(drop, 4) == ("bernoulli", 0.4, "sample")) is known
    assert (_children.read_drop(drop.eval(), 4) == ("bernoulli", 0.0, "sample")) is known
    drop.train()
    rows = layer(torch.randn(2000, 3, 2, 2)).flatten(1)
    if known:
        gone = (rows == 0).all(1)
        assert torch.equal(gone, (rows == 0).any(1)) and abs(gone.float().mean().item() - 0.4) < 0.05


def test_a_drop_path_behind_a_norm_is_taken_along():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.drop_path = nn.BatchNorm2d(3), DropPath(0.3)

        def forward(self, x):
            return F.relu(self.drop_path(self.bn(x)) + x)

    ours = fuse(Residual(), torch.randn(4, 3, 5, 5))
    assert ours.fusednorm_report.rows[0].order == "norm-drop" and type(ours.bn.drop) is DropPath
    assert type(unfuse(ours).drop_path) is DropPath
