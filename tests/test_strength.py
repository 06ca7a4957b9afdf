"""A strength of noise that is a tensor: as the number that it holds, and another one without compiling again."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, functional

STRENGTHS = {"bernoulli": (0.0, 1e-7, 0.1, 0.5, 1.0), "uniform": (0.0, 0.3, 1.0), "gaussian": (0.0, 0.3, 2.0)}


@pytest.mark.parametrize("granularity", ["element", "channel", "sample"])
@pytest.mark.parametrize("noise", STRENGTHS)
def test_as_the_number(noise, granularity):
    """To the last bit, forward and backward, in every kind of tile."""
    for strength, (shape, last), order in itertools.product(
        STRENGTHS[noise],
        [((9, 40), False), ((6, 5, 7, 7), False), ((6, 5, 7, 7), True), ((3, 4, 40, 40), False)],
        ("norm-act-drop", "drop-act-norm", "norm-add-act-drop"),
    ):
        x = torch.randn(shape)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        found = []
        for p in (strength, torch.tensor(strength, dtype=torch.float64)):
            leaf = x.clone().requires_grad_()
            residual = x.flip(0).requires_grad_() if "add" in order else None
            y = functional.batch_norm_act_drop(
                leaf, None, None, training=True, act="relu", p=p, noise=noise, granularity=granularity, order=order,
                residual=residual, seed=6,
            )  # fmt: skip
            y.backward(x)
            found.append((y.detach(), leaf.grad, *([residual.grad] if "add" in order else [])))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-6, atol=1e-6), (strength, shape, order)


@pytest.mark.parametrize("noise", STRENGTHS)
def test_dropout_alone(noise):
    for strength in STRENGTHS[noise]:
        x = torch.randn(5, 70, 3)
        outputs = []
        for p in (strength, torch.tensor(strength, dtype=torch.float64)):
            leaf = x.clone().requires_grad_()
            y = functional.dropout(leaf, p, noise=noise, seed=2)
            y.backward(x)
            outputs.append((y.detach(), leaf.grad))
        for a, b in zip(*outputs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("noise", STRENGTHS)
def test_in_plain_torch(noise):
    """Under transforms, and differentiated twice, the same noise in torch's operations."""
    for strength in STRENGTHS[noise]:
        p, x = torch.tensor(strength, dtype=torch.float64), torch.randn(6, 4, 5, dtype=torch.float64)

        def loss(x, p=p):
            y = functional.batch_norm_act_drop(x, None, None, training=True, act="tanh", p=p, noise=noise, seed=3)
            return y.square().sum()

        leaf = x.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad, rtol=1e-6, atol=1e-6)
        assert torch.autograd.gradgradcheck(loss, x.clone().requires_grad_(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["norm-act-drop", "drop-norm"])
def test_another_strength_compiles_nothing(order):
    torch._dynamo.reset()
    p = torch.tensor(0.25)
    act = "relu" if "act" in order else None
    layer = FusedBatchNorm2d(4, act=act, drop=fusednorm.Dropout(p), order=order)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    eager = FusedBatchNorm2d(4, act=act, drop=0.25, order=order)
    for strength in (0.25, 0.5, 0.0, 1.0, 0.125):
        layer.drop.p = strength
        eager.drop.p = strength
        x, seed = torch.randn(8, 4, 6, 6), torch.tensor(5)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = compiled(a, seed=seed), eager(b, seed=seed)
        y.backward(x)
        z.backward(x)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count == 1


def test_the_module():
    drop = fusednorm.Dropout(torch.tensor(0.5))
    assert not drop.state_dict() and drop.p.dtype == torch.float32
    layer = FusedBatchNorm1d(4, act="relu", drop=drop)
    x = torch.randn(64, 4)
    assert (layer(x) == 0).float().mean() > 0.6
    drop.p.fill_(0.0)
    torch.testing.assert_close(layer(x), FusedBatchNorm1d(4, act="relu")(x))
    layer.drop.p = torch.tensor(1.0)
    assert not layer(x).any()
    layer.drop.p = 0.125
    assert layer.drop is drop and isinstance(drop.p, torch.Tensor) and float(drop.p) == 0.125
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        drop.p = 2.0
    assert copy.deepcopy(layer).drop.p == 0.125
    assert type(drop.to_torch()) is nn.Dropout and drop.to_torch().p == 0.125
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert "0.125" in repr(drop)
    assert fusednorm.Dropout(0.5).p == 0.5


def test_a_change_between_forward_and_backward_changes_nothing():
    p, x = torch.tensor(0.5), torch.randn(64, 4)
    grads = []
    for change in (False, True):
        leaf = x.clone().requires_grad_()
        y = functional.batch_norm_act_drop(leaf, None, None, training=True, p=p, act="gelu", seed=1)
        if change:
            p.fill_(0.9)
        y.backward(x)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "p, error, says",
    [
        (torch.tensor(1.5), ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
        (torch.tensor(float("nan")), ValueError, "dropout probability has to be between 0 and 1"),
        (torch.tensor([0.5, 0.5]), ValueError, "dropout probability has to be between 0 and 1"),
        (torch.tensor(0.5, requires_grad=True), ValueError, "p: expected a tensor that requires no gradient"),
        (torch.tensor(0.5, device="meta"), ValueError, "p: expected a tensor on cpu, but got one on meta"),
    ],
)
def test_bad_strengths(p, error, says):
    with pytest.raises(error, match=says):
        functional.batch_norm_act_drop(torch.randn(4, 3), None, None, training=True, p=p)
    with pytest.raises(error, match=says):
        functional.dropout(torch.randn(4, 3), p)


def test_exported():
    net = nn.Sequential(FusedBatchNorm1d(4, act="relu", drop=fusednorm.Dropout(torch.tensor(0.5))))
    for mode in (False, True):
        program = torch.export.export(net.train(mode), (torch.randn(8, 4),))
        assert "fusednorm" not in str(program.graph)
        assert program.module()(torch.randn(8, 4)).shape == (8, 4)


# ---- a probability that is learned -----------------------------------------------------------------------------------
def test_concrete_dropout():
    """Its formula at the draws of torch's generator, its gradient, and that what is kept has the mean 1."""
    drop = fusednorm.ConcreteDropout(0.2)
    x = torch.randn(1000, 40)
    torch.manual_seed(3)
    y = drop(x)
    torch.manual_seed(3)
    u, p = torch.rand(1000, 40), torch.tensor(0.2)
    z = torch.sigmoid((p.logit() + u.logit()) / 0.1)
    torch.testing.assert_close(y, x * (1 - z) / (1 - p), rtol=1e-4, atol=1e-4)
    assert (drop(torch.ones(400, 400)).mean() - 1).abs() < 0.01
    assert ((drop(torch.ones(400, 400)) < 0.1).float().mean() - 0.2).abs() < 0.05
    assert drop.eval()(x) is x
    torch.testing.assert_close(drop.entropy(), -(p * p.log() + (1 - p) * (1 - p).log()))

    def loss(logit):
        torch.manual_seed(5)
        again = fusednorm.ConcreteDropout(0.3, 0.5).double()
        return torch.func.functional_call(again, {"logit_p": logit}, (x[:3, :4].double(),)).square().sum()

    assert torch.autograd.gradcheck(loss, torch.tensor(-0.4, dtype=torch.float64, requires_grad=True))


def test_concrete_dropout_learns():
    """Of a value that is multiplied by itself alone, noise is only harm: p falls. Its entropy alone draws it to 1/2."""
    for rewarded, expected in ((False, lambda p: p < 0.05), (True, lambda p: 0.4 < p < 0.6)):
        layer = FusedBatchNorm1d(8, act="relu", drop=fusednorm.ConcreteDropout(0.2))
        x, optimizer = torch.randn(256, 8), torch.optim.Adam(layer.drop.parameters(), lr=0.05)
        for _ in range(150):
            y = layer(x)
            loss = -layer.drop.entropy() if rewarded else (y - FusedBatchNorm1d(8, act="relu")(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert expected(layer.drop.p.item()), layer.drop
    assert "temperature=0.1" in repr(layer.drop)


@pytest.mark.parametrize("arguments", [(0.0,), (1.0,), (2.0,), (0.5, 0.0), (0.5, -1), (0.5, "low")])
def test_bad_concrete_dropout(arguments):
    with pytest.raises(ValueError, match="expected|has to be"):
        fusednorm.ConcreteDropout(*arguments)


def test_what_else_holds_a_strength():
    """torch's own modules with a tensor as p; what has no values yet; a probability that cannot be learned."""
    layer = FusedBatchNorm1d(4, drop=nn.Dropout(0.5))
    layer.drop.p = torch.tensor(0.25)
    assert torch.equal(layer(torch.ones(8, 4), seed=1), FusedBatchNorm1d(4, drop=0.25)(torch.ones(8, 4), seed=1))
    with torch.device("meta"):
        assert fusednorm.Dropout(torch.tensor(0.3)).p.is_meta and "temperature" in repr(fusednorm.ConcreteDropout())
    drop = fusednorm.ConcreteDropout(0.3)
    for p in (0.0, 1.0):
        with pytest.raises(ValueError, match="p: expected a probability between 0 and 1"):
            drop.p = p
    drop.p = 0.125
    assert drop.p.item() == pytest.approx(0.125)
