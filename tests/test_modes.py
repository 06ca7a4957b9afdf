"""Modes of a layer in a model and by itself, set by the idioms that people have for stock layers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, LazyFusedBatchNorm2d


def stock():
    return nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5))


def fused():
    return nn.Sequential(nn.Linear(4, 64), FusedBatchNorm1d(64, act="relu", drop=0.5))


def state(net):
    """(whether the statistics move, whether there is noise)"""
    x, before = torch.randn(64, 4), int(net[1].num_batches_tracked)
    noisy = not torch.equal(net(x), net(x))
    return int(net[1].num_batches_tracked) != before, noisy


def walk_of_norms(net, mode=False):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.train(mode)


def walk_by_class_name(net):
    for m in net.modules():
        if m.__class__.__name__.find("BatchNorm") != -1:
            m.eval()


def walk_of_children(net):
    for child in net.children():
        child.eval()


def walk_of_children_by_hand(net):
    for i in range(len(net)):
        net[i].eval()


def freeze(m):
    if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
        m.eval()


NORM_TYPES = nn.BatchNorm1d, nn.BatchNorm2d


def walk_by_types(net):
    for m in net.modules():
        if isinstance(m, NORM_TYPES):
            m.eval()


def walk_by_statistics(net):
    for m in net.modules():
        if hasattr(m, "running_mean"):
            m.eval()


def walk_of_a_filter(net):
    for m in filter(lambda m: isinstance(m, nn.BatchNorm1d), net.modules()):
        m.eval()


class OwnTrain(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class OwnRecursion(nn.Sequential):
    def train(self, mode=True):
        self.training = mode
        for child in self.children():
            child.train(mode)
        return self


def within(cls):
    """A model of that class, of the layers of another."""
    return lambda net: cls(*net).train()


IDIOMS = {
    "nothing": lambda net: None,
    "train": lambda net: net.train(),
    "eval": lambda net: net.eval(),
    "walk of norms": walk_of_norms,
    "walk of norms behind train": lambda net: walk_of_norms(net.train()),
    "walk of norms behind eval": lambda net: walk_of_norms(net.eval(), True),
    "walk by class name": walk_by_class_name,
    "in a comprehension": lambda net: [m.eval() for m in net.modules() if isinstance(m, nn.BatchNorm1d)],
    "walk by types": walk_by_types,
    "walk by statistics": walk_by_statistics,
    "walk of a filter": walk_of_a_filter,
    "applied": lambda net: net.apply(freeze),
    "train applied": lambda net: net.eval().apply(lambda m: m.train()),
    "picked": lambda net: net[1].eval() and None,
    "picked behind eval": lambda net: net.eval()[1].train() and None,
    "walk of modules": lambda net: [m.eval() for m in net.modules()],
    "walk of modules, train": lambda net: [m.train() for m in net.eval().modules()],
    "walk of children": walk_of_children,
    "walk of children by hand": walk_of_children_by_hand,
    "flags": lambda net: [setattr(m, "training", False) for m in net.modules()],
    "a train of its own": within(OwnTrain),
    "a recursion of its own": within(OwnRecursion),
    "a recursion of its own, eval": lambda net: OwnRecursion(*net).eval(),
}


@pytest.mark.parametrize("idiom", IDIOMS.values(), ids=IDIOMS)
def test_idiom(idiom):
    """Statistics and noise are then in the modes in which the stock layers have them; a copy's too."""
    models = []
    for net in (stock(), fused()):
        result = idiom(net)
        models.append(result if isinstance(result, nn.Module) else net)
    expected, net = models
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert state(other) == state(expected)
    for end in ("train", "eval"):
        assert state(getattr(net, end)()) == state(getattr(expected, end)())


def test_a_layer_by_itself():
    """There all of it is meant, however the code around it is named."""
    norm, x = FusedBatchNorm1d(4, act="relu", drop=0.5), torch.randn(512, 4)
    for mode in (norm.eval, lambda: norm.train(False)):
        norm.train()
        assert not torch.equal(norm(x), norm(x))
        mode()
        assert torch.equal(norm(x), norm(x))


def test_in_a_compiled_region():
    def both(net, x):
        net.train()
        y = net(x)
        net.eval()
        return y, net(x)

    net, x = fused(), torch.randn(64, 4)
    y, z = torch.compile(both, backend="aot_eager", fullgraph=True)(net, x)
    assert state(net) == (False, False)
    torch.testing.assert_close(z, net(x))
    assert (y == 0).float().mean() > 0.6


def test_freeze():
    """It survives train(), copies and what resets statistics; noise is as the mode of the model has it."""
    net, x = fused(), torch.randn(256, 4) * 3 + 5
    for _ in range(50):
        net(x)
    assert net[1].freeze() is net[1]
    assert "frozen=True" in repr(net)
    mean = net[1].running_mean.clone()
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert state(other.train()) == (False, True)
        torch.optim.swa_utils.update_bn([x], other)
        fusednorm.recalibrate(other, [x + 1], progress=False)
        assert torch.equal(other[1].running_mean, mean)
    assert state(net.eval()) == (False, False)
    net[1].unfreeze()
    assert state(net.train()) == (True, True)
    net[1].reset_running_stats()
    assert not net[1].running_mean.any()


@pytest.mark.parametrize(
    "drop",
    [nn.Dropout(0.5), fusednorm.UniformDropout(0.9), fusednorm.GaussianDropout(0.5), fusednorm.DropPath(0.5)],
    ids=lambda drop: type(drop).__name__,
)
@pytest.mark.parametrize(
    "idiom",
    [
        lambda m: "drop" in type(m).__name__.lower(),
        lambda m: isinstance(m, nn.Dropout),
        lambda m: isinstance(m, nn.modules.dropout._DropoutNd),
    ],
    ids=["by name", "nn.Dropout", "_DropoutNd"],
)
def test_monte_carlo(idiom, drop):
    net, x = nn.Sequential(nn.Linear(4, 64), FusedBatchNorm1d(64, act="relu", drop=drop)).eval(), torch.randn(64, 4)
    for m in net.modules():
        if idiom(m):
            m.train()
    assert not torch.equal(net(x), net(x))
    assert int(net[1].num_batches_tracked) == 0


def test_probability_of_every_noise():
    """Schedules set `p` of whatever is a Dropout: the noise of equal variance."""
    for drop in (fusednorm.UniformDropout(0.1), fusednorm.GaussianDropout(0.1), fusednorm.DropPath(0.1)):
        drop.p = 0.2
        assert drop.p == pytest.approx(0.2)
        assert drop.alpha == pytest.approx(0.25)
    with pytest.raises(ValueError, match="1/3"):
        fusednorm.UniformDropout(0.1).p = 0.5


# ---- a batch of one --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order, act", [("norm-act-drop", "relu"), ("drop-norm", None), ("act-norm", "tanh")])
@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1, 1)], ids=str)
def test_allow_single_value(shape, order, act):
    """A batch with one value per channel goes through the running statistics, which stay; others as ever."""
    torch.manual_seed(0)
    kind = FusedBatchNorm1d if len(shape) == 2 else FusedBatchNorm2d
    drop = 0.5 if "drop" in order else None
    layer = kind(6, act=act, drop=drop, order=order, allow_single_value=True)
    many = torch.randn(8, *shape[1:]) * 2 + 1
    strict = kind(6, act=act, drop=drop, order=order)
    strict.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(layer(many, seed=1), strict(many, seed=1))
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    x = torch.randn(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        strict(x)
    expected = copy.deepcopy(layer).eval()
    if drop:
        expected.drop.train()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(t, seed=2) for m, t in zip((layer, expected), inputs, strict=True)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad) and torch.equal(layer.weight.grad, expected.weight.grad)
    assert layer.training and all(torch.equal(v, before[n]) for n, v in layer.state_dict().items())


def test_allow_single_value_needs_running_statistics():
    layer = FusedBatchNorm1d(3, track_running_stats=False, allow_single_value=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3))


# ---- activation checkpointing ----------------------------------------------------------------------------------------
OPTIONS = {
    "default": {"act": "relu", "drop": 0.3},
    "groups": {"act": "relu", "ghost_batch_size": 4},
    "matched": {"drop": 0.3, "order": "drop-norm", "eval_matched_stats": True},
    "called": {"act": nn.Sequential(nn.ReLU()), "order": "act-norm"},
    "counted": {"momentum": None},
}


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_recomputed_forward(options, reentrant):
    """Under checkpointing the statistics move once, as without it; by default, and in torch, twice."""
    x = torch.randn(8, 6, requires_grad=True)

    def trained(update, use):
        torch.manual_seed(3)
        layer = FusedBatchNorm1d(6, **OPTIONS[options], update_when_recomputed=update)
        block = nn.Sequential(layer, nn.Tanh())  # what is repeated ends where nothing is needed any more
        for _ in range(2):  # steps
            x.grad = None
            y = checkpoint(block, x, use_reentrant=reentrant) if use else block(x)
            y.square().sum().backward()
        return x.grad, [b.clone() for b in layer.buffers()]

    expected, once = trained(True, use=False)
    found, buffers = trained(False, use=True)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(buffers, once, strict=True))
    _, twice = trained(True, use=True)
    assert int(twice[2]) == 2 * int(once[2]) and not torch.equal(twice[0], once[0]) or options == "counted"
    _, plain = trained(False, use=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, once, strict=True))


def test_flags_are_shown_and_kept():
    flags = {"allow_single_value": True, "update_when_recomputed": False}
    norm = nn.BatchNorm2d(3)
    lazy = LazyFusedBatchNorm2d(**flags)
    lazy(torch.randn(2, 3, 2, 2))
    for layer in (FusedBatchNorm2d(3, **flags), FusedBatchNorm2d.from_torch(norm, **flags), lazy):
        for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert (copied.allow_single_value, copied.update_when_recomputed) == (True, False)
            assert "allow_single_value=True, update_when_recomputed=False" in repr(copied)
        (stock,) = layer.to_torch()
        assert type(stock) is nn.BatchNorm2d and not flags.keys() & vars(stock).keys()
    assert "allow_single_value" not in repr(FusedBatchNorm2d(3))
