"""What `fuse` leaves alone as stock is faster, lone dropouts, and stages that several norms have in common."""

import copy
import functools
import json
import pickle

import pytest
import torch
from fuse_models import ConvNormAct, picture, step
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm2d, unfuse
from fusednorm.convert import measure

pytestmark = pytest.mark.cpu
fuse = functools.partial(fusednorm.fuse, small="always")


# ---- small maps ------------------------------------------------------------------------------------------------------
@pytest.fixture
def timed(monkeypatch):
    """What is measured, and what comes out of that: (0.2, 0.1) ms unless a test sets another `result`."""

    class Timed(list):
        result = (0.2, 0.1)

        def by_shape(self, shape):
            return self.result

    calls = Timed()

    def measured(stock, ours, tensors, training):
        generated = torch.get_rng_state()
        expected = stock(*tensors)
        torch.set_rng_state(generated)
        if not any(isinstance(m, nn.Dropout) for m in _modules_of(stock)):
            torch.testing.assert_close(ours(*tensors), expected)
        calls.append((tuple(tensors[0].shape), training))
        return calls.by_shape(tensors[0].shape)

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


# ---- one stage of several norms --------------------------------------------------------------------------------------
class Levels(nn.Module):
    """PyG's models: one activation and one dropout behind each norm in turn."""

    def __init__(self, act, levels=3, last=False):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(levels))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(levels))
        self.act, self.drop, self.last = act, nn.Dropout(0.0), last

    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self.drop(self.act(norm(linear(x))))
        return self.act(x) if self.last else x


def same(stock, ours, x):
    for a, b in zip(step(stock, x), step(ours, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_an_act_behind_every_norm_goes_with_each():
    stock, x = Levels(nn.ELU()).double(), picture(9, 4)
    fused = fuse(stock, x)
    assert [row.order for row in fused.fusednorm_report.rows] == ["norm-act-drop"] * 3
    assert fused.norms[0].act is fused.norms[2].act and type(fused.act) is nn.Identity
    same(stock, fused, x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    back = unfuse(again)
    assert type(back.act) is nn.ELU and type(back.drop) is nn.Dropout and type(back.norms[1]) is nn.BatchNorm1d
    same(stock, back, x)


@pytest.mark.parametrize(
    "make, options, orders",
    [
        (lambda: Levels(nn.ReLU(), last=True), {}, ["norm"] * 3),
        (lambda: Levels(nn.ReLU()), {"exclude": "norms.1"}, ["norm", None, "norm"]),
        (lambda: Levels(nn.PReLU()), {}, [None, "norm", "norm"]),  # whose weight would be in three places
    ],
)
def test_an_act_with_another_call_stays(make, options, orders):
    stock, x = make().double(), picture(9, 4)
    fused = fuse(stock, x, **options)
    assert [row.order for row in fused.fusednorm_report.rows] == orders
    same(stock, fused, x)


def test_a_small_one_leaves_the_act_of_all(timed):
    stock = Levels(nn.ReLU())
    stock.linears[1], stock.linears[2], stock.norms[1] = nn.Linear(4, 3), nn.Linear(3, 4), nn.BatchNorm1d(3)

    def result(shape):
        return (0.1, 0.2) if shape[1] == 3 else (0.2, 0.1)

    timed.by_shape = result
    fused = fusednorm.fuse(stock.double(), picture(9, 4))
    assert [row.order for row in fused.fusednorm_report.rows] == ["norm", None, "norm"]
    same(stock, fused, picture(9, 4))
