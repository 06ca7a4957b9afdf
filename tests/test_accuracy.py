"""Errors against float64 are at most twice those of torch's own unfused layers, plus four units in the last place."""

import pytest
import torch
import torch.nn.functional as F
from common import ACTIVATIONS, FLOATS, act_id, activate, double, dtype_id, generator, lay_out, leaf, noise, slope

from fusednorm import functional, reference

pytestmark = pytest.mark.kernel

SHAPES = ((16, 8, 14, 14), (2048, 16))


def normal(x):
    return x


def far_mean(x):
    """Statistics by E[x^2] - E[x]^2 lose everything here."""
    return x + 1e4


def negative_mean(x):
    return x * 3 - 1e3


def outlier_first(x):
    """Statistics shifted by the first element of a channel lose everything here."""
    x = x.clone()
    x[0, :, ...] = x[0, :, ...] + (1e4 if x.dim() == 2 else 0)
    x.select(0, 0).view(x.shape[1], -1)[:, 0] = 1e4
    return x


def outlier_last(x):
    x = x.clone()
    x.select(0, -1).view(x.shape[1], -1)[:, -1] = -1e4
    return x


def constant_channel(x):
    x = x.clone()
    x[:, 1] = 3.3
    x[:, 2] = -1e3
    return x


def drifting(x):
    """Every chunk of rows has a mean of its own: what is merged matters, not only what is summed."""
    ramp = torch.linspace(-50, 50, x.shape[0], dtype=x.dtype)
    return x + ramp.view(-1, *[1] * (x.dim() - 1))


def tiny(x):
    return x * 1e-4


DATA = (normal, far_mean, negative_mean, outlier_first, outlier_last, constant_channel, drifting, tiny)


def unfused(x, mean, var, weight, bias, training, act, m):
    return activate(act, F.batch_norm(x, mean, var, weight, bias, training)) * m.to(x.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("act", ["relu", "tanh", "gelu", "silu", None])
@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_torch(shape, data, act, layout, dtype, training):
    p, channels = 0.3, shape[1]
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    draw = generator(3)
    x = lay_out(data(torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype), layout)
    weight = leaf(0.5 + torch.rand(channels, generator=draw, dtype=opmath))
    bias = leaf(torch.randn(channels, generator=draw, dtype=opmath) / 4 + 0.1)
    rows = [0, *range(2, x.dim())]
    mean = x.double().mean(rows).to(opmath)
    var = x.double().var(rows).to(opmath)
    g = torch.randn(shape, generator=draw).to(dtype)
    m = noise(shape, p, 5)

    x64, w64, b64 = leaf(double(x)), leaf(double(weight)), leaf(double(bias))
    with torch.no_grad():
        z = reference.batch_norm_act_drop(x64, double(mean), double(var), w64, b64, training)
    kink = (slope(act, z - 0.02) - slope(act, z + 0.02)).abs() > 0.1
    g = g.masked_fill(kink, 0)
    exact = reference.batch_norm_act_drop(x64, double(mean), double(var), w64, b64, training, act=act, noise=m)
    exact = (exact, *torch.autograd.grad(exact, (x64, w64, b64), g.double()))

    x = leaf(x)
    # Each side gets buffers of its own: training moves them.
    ours = functional.batch_norm_act_drop(
        x, mean.clone(), var.clone(), weight, bias, training, act=act, p=p, drop_training=True, seed=5
    )
    theirs = unfused(x, mean.clone(), var.clone(), weight, bias, training, act, m)
    for name, answer, *results in zip(
        ("y", "x", "weight", "bias"),
        exact,
        (ours, *torch.autograd.grad(ours, (x, weight, bias), g)),
        (theirs, *torch.autograd.grad(theirs, (x, weight, bias), g)),
        strict=True,
    ):
        error, torch_error = ((result.double() - answer).abs().max().item() for result in results)
        ulp = answer.abs().max().item() * torch.finfo(results[0].dtype).eps
        # In float64 the reference itself has rounding errors of this size.
        times, ulps = (4, 64) if dtype == torch.float64 else (2, 4)
        assert error <= times * torch_error + ulps * ulp, (
            f"{name}: error {error:.3g}, torch's {torch_error:.3g}, ulp {ulp:.3g}"
        )


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e3, 1e4, 1e30])
def test_constant_channel_gives_the_bias(value, layout):
    x = lay_out(torch.full((16, 3, 7, 7), value), layout)
    y = functional.batch_norm_act_drop(x, None, None, None, torch.full((3,), 0.25), training=True)
    torch.testing.assert_close(y, torch.full_like(y, 0.25), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_sixteen_bit_sums_do_not_overflow(dtype, layout):
    """Squares of 3e4 do not fit a half, and 65,536 ones do not add up in a bfloat16."""
    x = lay_out((torch.randn(8, 4, 96, 96) * 1e4).clamp(-6e4, 6e4).to(dtype), layout)
    mean, var = torch.zeros(4), torch.ones(4)
    y = functional.batch_norm_act_drop(x, mean, var, training=True, momentum=1.0)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(var, x.double().var((0, 2, 3)).float(), rtol=1e-4, atol=0)


# Where the formulas of csrc/math/functions.h change over or clamp, and past that.
CORNERS = (0.0, 1e-30, 1e-4, 8.5, 8.500001, 9.1, 13.2, 18.0, 87.0, 88.722, 88.73, 89.0, 90.0, 1e3, 1e20, 5e37)


def along_the_axis():
    corners = torch.tensor(CORNERS)
    return torch.cat([torch.linspace(-20, 20, 100_001), corners, -corners])


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act not in (None, "prelu")], ids=act_id)
def test_activations_along_the_axis(act):
    """Of z itself, in units in the last place of the larger of the result and 1. A derivative may have a factor z."""
    z = leaf(along_the_axis().view(-1, 1))
    y = functional.batch_norm_act_drop(z, torch.zeros(1), torch.ones(1), eps=1e-30, act=act)
    (dz,) = torch.autograd.grad(y.sum(), z)
    exact = z.detach().double()
    for got, answer, units in ((y.detach(), activate(act, exact), 4), (dz, slope(act, exact), 24)):
        error = (got.double() - answer).abs() / answer.abs().clamp(min=1)
        worst = error.argmax()
        assert error[worst] <= units * 2**-23, f"{error[worst].item():.3g} at {exact[worst].item()}"


def test_gelu_keeps_its_left_tail():
    """As far as the rounding of an exponent of that size lets it; what torch computes from erf is 0 from -6 on."""
    z = torch.linspace(-6, -1, 20_001).view(-1, 1)
    y = functional.batch_norm_act_drop(z, torch.zeros(1), torch.ones(1), eps=1e-30, act="gelu").double()
    answer = 0.5 * z.double() * torch.special.erfc(-z.double() / 2**0.5)
    allowed = 2**-24 * (8 + 6 * z.double().square())
    worst = ((y / answer - 1).abs() / allowed).max()
    assert worst <= 1, worst
