"""The variance shift: closed forms against published figures, enumeration and Monte Carlo; then measured on models.

Monte Carlo tolerances come from the standard error of what is compared, taken from the sample itself: five of them, so
that a right formula fails once in a million seeds; the seeds are fixed besides.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE
from torch import nn

import fusednorm
from fusednorm.analysis import VarianceShift, alpha_of, measure_variance_shift, variance_shift

DOUBLE = torch.float64
SIGMAS = 5


def prediction(*args, **kwargs):
    return variance_shift(*args, **kwargs).tolist()


def multiplier(kind, strength, shape):
    """The noise in plain torch, for Monte Carlo."""
    if kind == "bernoulli":
        return (torch.rand(shape, dtype=DOUBLE) >= strength).to(DOUBLE) / (1 - strength)
    if kind == "uniform":
        return 1 + strength * (2 * torch.rand(shape, dtype=DOUBLE) - 1)
    return 1 + math.sqrt(strength) * torch.randn(shape, dtype=DOUBLE)


def variance_error(values):
    """(variance, its standard error) of independent values: var * sqrt((kurtosis - 1) / n)."""
    deviation = (values - values.mean()).square()
    return deviation.mean().item(), (deviation.std() / math.sqrt(values.numel())).item()


class Multiplied(nn.Module):
    """A noise of somebody else: all that is known of it is the property."""

    def __init__(self, alpha, granularity=None):
        super().__init__()
        self._alpha = alpha
        if granularity:
            self.granularity = granularity

    @property
    def alpha(self):
        return self._alpha


# ---- published figures -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.5, 0.7])
def test_mean_zero_gives_the_keep_probability(p):
    assert prediction(nn.Dropout(p)) == pytest.approx(1 - p, rel=1e-12)


@pytest.mark.parametrize(
    ("noise", "moments", "published"),
    [
        (nn.Dropout(0.2), {"mean": 5.0, "var": 4.0}, 0.35556),
        (("uniform", 0.1), {}, 300 / 301),
        (("uniform", 0.1), {}, 0.996678),
        (("uniform", 0.5), {}, 0.923077),
        (("uniform", 1.0), {}, 0.75),
    ],
)
def test_published_figures(noise, moments, published):
    assert prediction(noise, **moments) == pytest.approx(published, abs=5e-6)


@pytest.mark.parametrize(("p", "published"), [(0.5, 0.4054), (0.2, 0.7317), (0.05, 0.9283)])
def test_relu_of_a_normal_is_worse_than_the_keep_probability(p, published):
    moments = {"mean": 1 / math.sqrt(2 * math.pi), "var": 0.5 - 1 / (2 * math.pi)}
    assert prediction(nn.Dropout(p), **moments) == pytest.approx(published, abs=5e-5)


def li_equation_12(p, rho, mean, var, w):
    """With p the probability of dropping; theirs is that of keeping."""
    width = w.sum() ** 2 / w.square().sum()  # d cos^2 (their eq. 13)
    spread = var * rho * (width - 1)
    return (var + spread) / ((mean**2 + var) / (1 - p) - mean**2 + spread)


@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.parametrize("rho", [0.0, 0.05, 0.3])
def test_equation_12(rho, mean):
    w = torch.randn(7, 33, dtype=DOUBLE) + 0.3
    linear = nn.Linear(33, 7, dtype=DOUBLE)
    linear.weight.data = w
    cov = 2.5 * ((1 - rho) * torch.eye(33, dtype=DOUBLE) + rho)
    expected = torch.stack([li_equation_12(0.4, rho, mean, 2.5, row) for row in w])
    got = variance_shift(nn.Dropout(0.4), layer=linear, mean=mean, cov=cov)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


# d cos^2 measured on trained nets (Li et al., Table 1, CIFAR-10) and what follows for p = 0.5 and correlations 0.05,
# 0.1 and 0.2.
TABLE_1 = {
    "PreResNet": (2.91827, (0.523, 0.544, 0.580)),
    "ResNeXt": (14.78266, (0.628, 0.704, 0.790)),
    "WRN": (52.73550, (0.782, 0.861, 0.919)),
    "DenseNet": (3.83390, (0.533, 0.562, 0.610)),
}


@pytest.mark.parametrize("net", TABLE_1)
def test_table_1(net):
    width, published = TABLE_1[net]
    # (sum w)^2 / sum w^2 = 64 / (1 + a^2) for weights 1 + a, 1 - a, 1 + a, ...
    a = math.sqrt(64 / width - 1)
    linear = nn.Linear(64, 1, dtype=DOUBLE)
    linear.weight.data = 1 + a * torch.tensor([[1.0, -1.0]], dtype=DOUBLE).repeat(1, 32)
    for rho, expected in zip((0.05, 0.1, 0.2), published, strict=True):
        cov = (1 - rho) * torch.eye(64, dtype=DOUBLE) + rho
        assert prediction(nn.Dropout(0.5), layer=linear, cov=cov) == [pytest.approx(expected, abs=5.1e-4)]


# ---- strength --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("p", "alpha", "beta"), [(0.05, 0.0526, 0.397), (0.1, 0.111, 0.577), (0.2, 0.25, 0.866), (0.3, 0.4286, None)]
)
def test_matched_strength(p, alpha, beta):
    """The same alpha is the same shift, whatever the noise; beyond p = 0.25 no uniform noise matches."""
    assert alpha_of(nn.Dropout(p)) == pytest.approx(alpha, rel=5e-3)
    if beta is not None:
        assert alpha_of(("uniform", beta)) == pytest.approx(alpha, rel=5e-3)
    exact = alpha_of(("bernoulli", p))
    for noise in (("gaussian", exact), ("alpha", exact), Multiplied(exact), nn.Dropout2d(p), nn.Dropout1d(p)):
        assert prediction(noise, mean=0.7, var=1.3) == pytest.approx(
            prediction(nn.Dropout(p), mean=0.7, var=1.3), rel=1e-12
        )


def test_the_largest_uniform_noise_is_a_quarter_dropped():
    assert alpha_of(("uniform", 1)) == pytest.approx(alpha_of(("bernoulli", 0.25)), rel=1e-12)


# ---- exact: the variance that a mask adds to a linear map, by its Jacobian -------------------------------------------
def added_by_enumeration(layer, x, granularity):
    """Mean over outputs of sum over draws of (what the draw multiplies)^2, from the Jacobian; (C_out,)."""
    features = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
    linear = copy.deepcopy(layer)
    linear.bias = None
    jacobian = torch.func.jacrev(linear)(x)  # (output..., input...)
    rank = jacobian.dim() - x.dim()
    parts = jacobian * x
    if granularity == "channel" and x.dim() > 2:
        parts = parts.sum([rank + d for d in range(2, x.dim())], keepdim=True)
    elif granularity == "sample":
        parts = parts.sum([rank + d for d in range(1, x.dim())], keepdim=True)
    added = parts.square().flatten(rank).sum(-1)
    return added.mean([d for d in range(rank) if d != features])


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear on sequences": (lambda: nn.Linear(5, 4), (3, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, padding=2, bias=False), (3, 3, 8)),
    "conv1d circular": (lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), (3, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 6)),
    "conv2d padded": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 4)),
    "conv2d strided": (lambda: nn.Conv2d(3, 2, (3, 2), padding=(2, 1), stride=(2, 3)), (2, 3, 5, 6)),
    "conv2d same": (lambda: nn.Conv2d(3, 2, (3, 5), padding="same"), (2, 3, 4, 6)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 4, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 4, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, 2, padding=1, dilation=2), (2, 2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, stride=2), (2, 2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), (2, 4, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 2, 4, 2), (2, 3, 5)),
}
NOISES = {"element": nn.Dropout(0.4), "channel": nn.Dropout2d(0.4), "sample": Multiplied(0.4 / 0.6, "sample")}


@pytest.mark.parametrize("granularity", NOISES)
@pytest.mark.parametrize("name", LAYERS)
def test_any_layer_exactly(name, granularity):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=DOUBLE) + 0.5
    if name == "linear on sequences" and granularity == "channel":
        with pytest.raises(ValueError, match="granularity"):
            variance_shift(NOISES[granularity], x, layer)
        return
    y = layer(x).detach().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    clean = y.var(1, correction=0)
    added = added_by_enumeration(layer, x, granularity)
    expected = clean / (clean + 0.4 / 0.6 * added)
    torch.testing.assert_close(variance_shift(NOISES[granularity], x, layer), expected, rtol=1e-10, atol=0)
    # A float32 model gives float64 answers too.
    again = variance_shift(NOISES[granularity], x.float(), layer.float())
    assert again.dtype == DOUBLE
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("granularity", ["channel", "sample"])
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_repeating_padding(mode, granularity):
    layer, x = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode).double(), torch.randn(2, 2, 4, 5, dtype=DOUBLE)
    clean = layer(x).detach().transpose(0, 1).flatten(1).var(1, correction=0)
    expected = clean / (clean + 0.4 / 0.6 * added_by_enumeration(layer, x, granularity))
    torch.testing.assert_close(variance_shift(NOISES[granularity], x, layer), expected, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=mode):
        variance_shift(nn.Dropout(0.4), x, layer)


def test_circular_padding_that_wraps_around():
    with pytest.raises(ValueError, match="circular"):
        variance_shift(nn.Dropout(0.4), torch.randn(2, 2, 3), nn.Conv1d(2, 3, 5, padding=2, padding_mode="circular"))


@pytest.mark.parametrize("granularity", NOISES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_moments_agree_with_the_sample(kind, granularity):
    """One window of the kernel per sample: its moments say all."""
    layer = nn.Linear(12, 4).double() if kind == "linear" else nn.Conv2d(3, 4, 2).double()
    x = (torch.randn(40, 12, dtype=DOUBLE) @ torch.randn(12, 12, dtype=DOUBLE) + 0.5).clone()
    moments = {"mean": x.mean(0), "cov": torch.cov(x.T, correction=0)}
    sample = x if kind == "linear" else x.view(40, 3, 2, 2)
    expected = variance_shift(NOISES[granularity], sample, layer)
    got = variance_shift(NOISES[granularity], layer=layer, **moments)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_variances_alone_are_uncorrelated_inputs():
    layer = nn.Conv2d(3, 4, 2, dtype=DOUBLE)
    mean, var = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE) + 0.5
    wide = {"mean": mean.repeat_interleave(4), "cov": torch.diag(var.repeat_interleave(4))}
    expected = variance_shift(nn.Dropout(0.3), layer=layer, **wide)
    torch.testing.assert_close(
        variance_shift(nn.Dropout(0.3), layer=layer, mean=mean, var=var), expected, rtol=1e-12, atol=0
    )
    # Uncorrelated inputs of mean zero: no width helps, the shift is that of no layer at all.
    torch.testing.assert_close(
        variance_shift(nn.Dropout(0.3), layer=layer, var=2.0), torch.full((4,), 0.7, dtype=DOUBLE), rtol=1e-12, atol=0
    )


def test_sample_without_a_layer():
    x = torch.randn(7, 3, 4, 5, dtype=DOUBLE) * 2 + 1
    columns = x.transpose(0, 1).flatten(1)
    expected = variance_shift(nn.Dropout(0.3), mean=columns.mean(1), var=columns.var(1, correction=0))
    for noise in (nn.Dropout(0.3), nn.Dropout2d(0.3)):
        torch.testing.assert_close(variance_shift(noise, x), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        variance_shift(nn.Dropout(0.3), mean=columns.mean(1), cov=torch.cov(columns, correction=0)), expected
    )


def test_torch_drops_rows_without_a_batch_dimension():
    """nn.Dropout1d takes (N, C) for one sample of N channels: whole rows go, which no BatchNorm behind averages out."""
    x, layer = torch.randn(9, 5, dtype=DOUBLE), nn.Linear(5, 4, dtype=DOUBLE)
    expected = variance_shift(nn.Dropout(0.3), x, layer, granularity="sample")
    torch.testing.assert_close(variance_shift(nn.Dropout1d(0.3), x, layer), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(variance_shift(nn.Dropout(0.3), x, layer), expected)
    x, layer = torch.randn(3, 2, 3, 4, dtype=DOUBLE), nn.Conv2d(2, 4, 2, dtype=DOUBLE)
    expected = variance_shift(nn.Dropout(0.3), x, layer, granularity="sample")
    torch.testing.assert_close(variance_shift(nn.Dropout3d(0.3), x, layer), expected, rtol=1e-12, atol=0)


# ---- Monte Carlo -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (1.0, 1.0), (5.0, 4.0)])
@pytest.mark.parametrize(
    "noise",
    [("bernoulli", 0.5), ("bernoulli", 0.2), ("uniform", 0.5), ("uniform", 1.0), ("gaussian", 0.25)],
    ids=lambda n: f"{n[0]}-{n[1]}",
)
def test_monte_carlo_of_noise_before_a_norm(noise, mean, var):
    n = 1_000_000
    x = mean + math.sqrt(var) * torch.randn(n, dtype=DOUBLE)
    train, error = variance_error(x * multiplier(*noise, (n,)))
    expected = var / prediction(noise, mean=mean, var=var)
    assert error < 0.004 * expected  # and so the test is sharp
    assert abs(train - expected) < SIGMAS * error
    # The strength of what is measured: without the mean in the formula it would not pass.
    if mean:
        assert abs(train - var * (1 + alpha_of(noise))) > SIGMAS * error


def test_decorrelation_is_the_same_number():
    """Correlations shrink by the shift (Li et al., eq. 11): what the IC layer claims as its benefit."""
    n, rho, p = 400_000, 0.6, 0.3
    x = torch.randn(2, n, dtype=DOUBLE)
    x[1] = rho * x[0] + math.sqrt(1 - rho**2) * x[1]
    for mean in (0.0, 1.0):
        a, b = (x + mean) * multiplier("bernoulli", p, (2, n))
        products = (a - a.mean()) * (b - b.mean()) / (a.std() * b.std())
        expected = rho * prediction(nn.Dropout(p), mean=mean)
        # The error of the mean product; that of the deviations correlates with it and only lowers it.
        assert abs(products.mean().item() - expected) < SIGMAS * products.std().item() / math.sqrt(n)


MONTE_CARLO = {
    "linear": (nn.Linear(24, 6), nn.Dropout(0.5), (500, 24)),
    "conv": (nn.Conv2d(3, 4, 3), nn.Dropout(0.5), (16, 3, 8, 8)),
    "conv padded": (nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5), (16, 3, 8, 8)),
    "conv strided": (nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Dropout(0.5), (16, 3, 8, 8)),
    "conv, channels": (nn.Conv2d(3, 4, 3, padding=1), nn.Dropout2d(0.5), (64, 3, 8, 8)),
}


@pytest.mark.parametrize("name", MONTE_CARLO)
def test_monte_carlo_of_noise_before_a_layer(name):
    """torch's own dropout over fixed, strongly correlated inputs with a mean: the spread between masks is the error."""
    layer, noise, shape = MONTE_CARLO[name]
    layer = copy.deepcopy(layer).to(DEVICE, DOUBLE)
    base = torch.randn(shape[0], 1, *shape[2:], dtype=DOUBLE)
    x = 0.6 * base + 0.5 * torch.randn(shape, dtype=DOUBLE) + 0.4
    expected = variance_shift(noise, x, layer)
    with torch.no_grad():
        clean = layer(x).transpose(0, 1).flatten(1)
        # Around the noise-free mean, so that the mean over masks is exact for any number of samples.
        runs = [layer(noise(x)).transpose(0, 1).flatten(1) - clean.mean(1, keepdim=True) for _ in range(60)]
    train = torch.stack([run.square().mean(1) for run in runs])
    error = train.std(0) / math.sqrt(len(runs))
    target = clean.var(1, correction=0) / expected
    assert (error < 0.03 * target).all()
    assert ((train.mean(0) - target).abs() < SIGMAS * error).all()


# ---- hostile input ---------------------------------------------------------------------------------------------------
LINEAR, CONV = nn.Linear(3, 2), nn.Conv2d(3, 2, 2)


@pytest.mark.parametrize(
    ("noise", "error", "words"),
    [
        (0.5, TypeError, "kind, strength"),
        (None, TypeError, "kind, strength"),
        ("bernoulli", TypeError, "kind, strength"),
        (nn.ELU(), TypeError, "dropout module"),
        (nn.AlphaDropout(0.1), TypeError, "AlphaDropout"),
        (nn.FeatureAlphaDropout(0.1), TypeError, "AlphaDropout"),
        (("binomial", 0.5), ValueError, "bernoulli, uniform, gaussian"),
        (("bernoulli", 1.0), ValueError, "outside"),
        (nn.Dropout(1.0), ValueError, "outside"),
        (("bernoulli", -0.1), ValueError, "outside"),
        (("uniform", 1.01), ValueError, "outside"),
        (("gaussian", -1.0), ValueError, "outside"),
        (("gaussian", math.inf), ValueError, "outside"),
        (("alpha", math.nan), ValueError, "outside"),
        (Multiplied(-0.1), ValueError, "outside"),
    ],
    ids=str,
)
def test_what_is_no_noise(noise, error, words):
    with pytest.raises(error, match=words):
        alpha_of(noise)
    with pytest.raises(error, match=words):
        variance_shift(noise)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"input": torch.randn(4, 3), "mean": 0.0}, ValueError, "beside a sample"),
        ({"input": torch.randn(4, 3), "cov": torch.eye(3)}, ValueError, "beside a sample"),
        ({"input": torch.randn(4)}, ValueError, "input"),
        ({"input": torch.randn(0, 3)}, ValueError, "input"),
        ({"input": torch.randn(4, 5), "layer": LINEAR}, ValueError, "input"),
        ({"input": torch.randn(4, 5, 3, 3), "layer": CONV}, ValueError, "input"),
        ({"input": torch.randn(3, 5, 5), "layer": CONV}, ValueError, "batch dimension"),
        ({"layer": nn.ReLU()}, TypeError, "ReLU"),
        ({"layer": nn.BatchNorm1d(3)}, TypeError, "BatchNorm1d"),
        ({"granularity": "pixel"}, ValueError, "granularity"),
        ({"var": -1.0}, ValueError, "negative"),
        ({"var": math.nan}, ValueError, "finite"),
        ({"mean": math.inf}, ValueError, "finite"),
        ({"var": 1.0, "cov": torch.eye(3)}, ValueError, "cov"),
        ({"cov": torch.ones(3, 2)}, ValueError, "cov"),
        ({"cov": torch.tensor([[1.0, 0.5], [0.1, 1.0]])}, ValueError, "symmetric"),
        ({"cov": torch.diag(torch.tensor([1.0, -1.0]))}, ValueError, "negative"),
        ({"cov": torch.eye(3), "mean": torch.zeros(2)}, ValueError, "mean"),
        ({"cov": torch.eye(4), "layer": LINEAR}, ValueError, "cov"),
        ({"cov": torch.eye(3), "layer": CONV}, ValueError, "cov"),
        ({"mean": torch.zeros(5), "layer": LINEAR}, ValueError, "mean"),
        ({"layer": nn.Conv2d(3, 2, 3, padding=1)}, ValueError, "sample"),
        ({"layer": nn.Conv2d(4, 2, 3, groups=2)}, ValueError, "sample"),
        ({"layer": nn.ConvTranspose2d(3, 2, 3)}, ValueError, "sample"),
    ],
    ids=str,
)
def test_what_does_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        variance_shift(nn.Dropout(0.5), **arguments)


def test_nothing_varies():
    """A dead channel has not shifted; a constant one, which the noise alone makes vary, has shifted to nothing."""
    x = torch.stack([torch.zeros(6), torch.full((6,), 2.0), torch.arange(6.0)], 1)
    assert variance_shift(nn.Dropout(0.5), x)[:2].tolist() == [1.0, 0.0]
    assert variance_shift(nn.Dropout(0.0), x)[2].item() == 1.0
    x[0, 2] = math.nan
    assert variance_shift(nn.Dropout(0.5), x).isnan().tolist() == [False, False, True]


def test_the_noise_may_be_off_and_the_layer_need_gradients():
    x, layer, drop = torch.randn(5, 3, requires_grad=True), nn.Linear(3, 2), nn.Dropout(0.5)
    expected = variance_shift(drop, x, layer)
    assert not expected.requires_grad
    assert torch.equal(variance_shift(drop.eval(), x, layer.eval()), expected)


# ---- on a model ------------------------------------------------------------------------------------------------------
def batches(count, shape):
    return [torch.randn(shape) + 0.5 for _ in range(count)]


def settle(model, data):
    """Running statistics of the noisy pass, as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in data:
            model(batch)
    return model


def check_ratio(got, expected, values, p, draws=1):
    """`values`: how many independent ones a variance was taken of; `draws`: how many sides have noise."""
    # Relative error of a variance of values times a mask: kurtosis of a normal is 3, a mask divides by its keep rate.
    # The ratio's clean part has the same data and only less spread.
    error = math.sqrt(draws * (3 / (1 - p) - 1) / values)
    torch.testing.assert_close(got, expected, rtol=SIGMAS * error, atol=0)


def test_measured_ratio_before_a_norm():
    data = batches(40, (512, 6))
    model = settle(nn.Sequential(nn.Dropout(0.4), nn.BatchNorm1d(6)), data)
    (name, got), *rest = measure_variance_shift(model, data).items()
    assert name == "1" and not rest
    everything = torch.cat(data)
    check_ratio(got.ratio, variance_shift(model[0], everything), len(everything), 0.4)
    check_ratio(got.ratio_to_running, variance_shift(model[0], everything), len(everything), 0.4)
    torch.testing.assert_close(got.evaluation, everything.double().var(0), rtol=1e-6, atol=0)
    assert torch.equal(got.running, model[1].running_var.double())
    assert got.shift == pytest.approx(1 / got.ratio_to_running.mean().item(), rel=0.02)


@pytest.mark.parametrize("drop", [nn.Dropout(0.4), nn.Dropout2d(0.4)], ids=["element", "channel"])
def test_measured_ratio_behind_a_convolution(drop):
    data = batches(30, (64, 3, 6, 6))
    conv = nn.Conv2d(3, 5, 3, padding=1, stride=2)
    model = settle(nn.Sequential(drop, conv, nn.BatchNorm2d(5)), data)
    got = measure_variance_shift(model, data)["2"]
    # A map of 9 outputs that share a mask counts as one value at worst.
    check_ratio(got.ratio, variance_shift(drop, torch.cat(data), conv), 30 * 64, 0.4)


def test_without_noise_nothing_shifts():
    data = batches(8, (64, 6))
    model = settle(
        nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4)), [torch.cat(data)]
    )
    got = measure_variance_shift(model, [torch.cat(data)])
    for layer in got.values():
        # Training divides by the biased variance of 512 values and the running one is unbiased: 512/511 and no more.
        torch.testing.assert_close(layer.ratio, torch.ones_like(layer.ratio), rtol=1 / 511 + 1e-5, atol=0)
        assert layer.shift == pytest.approx(1, rel=1 / 511 + 1e-5)


def fused_net():
    return nn.Sequential(
        nn.Linear(6, 16),
        fusednorm.FusedBatchNorm1d(16, act="relu", drop=0.3),
        nn.Linear(16, 8),
        fusednorm.FusedBatchNorm1d(8, act="relu", drop=0.3),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
    )


def stock_net(fused):
    """The same net of stock layers, with the same parameters and buffers."""
    parts = []
    for layer in copy.deepcopy(fused):
        if isinstance(layer, fusednorm.FusedBatchNorm1d):
            bn = nn.BatchNorm1d(layer.num_features)
            bn.load_state_dict(layer.state_dict())
            parts.append(nn.Sequential(bn, nn.ReLU(), nn.Dropout(0.3)))
        else:
            parts.append(layer)
    return nn.Sequential(*parts)


def test_fused_layers_measure_as_stock_ones():
    data = batches(40, (256, 6))
    fused = settle(fused_net(), data)
    stock = stock_net(fused)
    ours, theirs = measure_variance_shift(fused, data), measure_variance_shift(stock, data)
    assert list(ours) == ["1", "3", "5"] and list(theirs) == ["1.0", "3.0", "5"]
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(a.evaluation, b.evaluation, rtol=1e-4, atol=1e-6)
        # Heavier tails than a normal's behind the ReLU: twice its kurtosis.
        assert (a.ratio / b.ratio - 1).abs().max() < SIGMAS * math.sqrt(2 * (6 / 0.7 - 1) / (40 * 256))
    assert (ours["1"].ratio - 1).abs().max() < 1e-6  # before any noise
    assert ours["3"].ratio.mean() < 0.9 and ours["5"].ratio.mean() < 0.9


class Composed(nn.BatchNorm1d):
    """An order with a prologue, in stock torch."""

    def __init__(self, order):
        super().__init__(6)
        self.order, self.act, self.drop = order, nn.ELU(inplace=True), nn.Dropout(0.4)

    def forward(self, input):
        for stage in self.order.split("-"):
            input = super().forward(input) if stage == "norm" else getattr(self, stage)(input.clone())
        return input


@pytest.mark.parametrize("order", ["norm-act-drop", "act-norm-drop", "drop-norm-act", "act-drop-norm", "drop-act-norm"])
def test_what_an_order_normalises(order):
    data = batches(40, (512, 6))
    model = settle(nn.Sequential(Composed(order)), data)
    kept = [x.clone() for x in data]
    got = measure_variance_shift(model, data)["0"]
    assert all(map(torch.equal, data, kept))
    prologue = order.split("norm")[0]
    x = torch.cat(data)
    clean = F.elu(x) if "act" in prologue else x
    torch.testing.assert_close(got.evaluation, clean.double().var(0), rtol=1e-6, atol=0)
    # ELU bends what the noise before it adds; the layer itself says how much arrives.
    check_ratio(got.training, got.running, len(x), 0.4 if "drop" in prologue else 0.0, draws=2)
    if prologue in ("drop-", "act-drop-"):
        check_ratio(got.ratio, variance_shift(model[0].drop, clean), len(x), 0.4)
    elif "drop" not in prologue:
        torch.testing.assert_close(got.ratio, torch.ones(6, dtype=DOUBLE), rtol=1e-9, atol=0)


def test_a_child_that_works_in_place_unseen():
    """What it does to the layer's input is not done again by the layer."""
    x = torch.randn(64, 3)
    found = []
    for inplace in (False, True):
        act = nn.Sequential(nn.ELU(inplace=inplace))
        model = nn.Sequential(fusednorm.FusedBatchNorm1d(3, act=act, order="act-norm"), nn.BatchNorm1d(3)).eval()
        found.append(measure_variance_shift(model, [x.clone()])["1"].evaluation)
    assert torch.equal(*found)


def everything_of(model):
    return [
        *((m.training, getattr(m, "track_running_stats", None)) for m in model.modules()),
        *(len(m._forward_pre_hooks) for m in model.modules()),
    ], copy.deepcopy(model.state_dict())


def check_untouched(model, before):
    flags, state = everything_of(model)
    assert flags == before[0]
    for name, value in state.items():
        assert torch.equal(value, before[1][name]), name


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(training):
    model = fused_net().train(training)
    model[0] = nn.utils.parametrizations.spectral_norm(model[0])  # changes buffers whenever it runs in training mode
    model[1].drop.train(not training)
    before = everything_of(model)
    data = batches(3, (16, 6))
    measure_variance_shift(model, data)
    check_untouched(model, before)
    with pytest.raises(RuntimeError):
        measure_variance_shift(model, [*data, torch.randn(16, 7)])
    check_untouched(model, before)


def test_flags_of_a_model_in_training_are_its_training():
    """A frozen noise stays off in a model in training mode, and is on in one that is in evaluation mode."""
    data = batches(4, (64, 6))
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6))
    model[0].eval()
    ratio = measure_variance_shift(model, data)["1"].ratio
    assert (ratio - 1).abs().max() < 1e-9
    ratio = measure_variance_shift(model.eval(), data)["1"].ratio
    assert ratio.max() < 0.8


def test_layers_that_cannot_be_compared_are_left_out():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.head = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
            self.free = nn.BatchNorm1d(6, track_running_stats=False)

        def forward(self, x):
            return self.head(x) if self.training else self.free(self.main(x))

    assert measure_variance_shift(Auxiliary(), batches(2, (8, 6))) == {}
    assert measure_variance_shift(nn.Linear(6, 2), batches(2, (8, 6))) == {}


def test_measured_on_bad_input():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="at least one"):
        measure_variance_shift(model, [])
    with pytest.raises(TypeError, match=r"\[x\]"):
        measure_variance_shift(model, torch.randn(4, 6))
    with pytest.raises(TypeError, match="Module"):
        measure_variance_shift(lambda x: x, batches(2, (8, 6)))
    with pytest.raises(ValueError, match="lazy"):
        measure_variance_shift(nn.LazyBatchNorm1d(), batches(2, (8, 6)))


def test_a_layer_without_variance():
    zero, one = torch.zeros(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
    assert VarianceShift(zero, zero, zero).ratio.tolist() == [1, 1]
    assert VarianceShift(zero, zero, zero).shift == 1
    assert VarianceShift(one, zero, one).shift == math.inf
    assert VarianceShift(one, one / 2, one).shift == VarianceShift(one, one * 2, one).shift == 2
