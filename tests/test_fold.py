"""`fold`: what an evaluated model gives does not change, wherever its norms went."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import generator
from torch import nn

from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, fold, fuse

pytestmark = pytest.mark.cpu


def prepared(model):
    """With statistics and parameters as training leaves them, in evaluation."""
    g = generator(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                *((module.running_mean, -1, 1), (module.running_var, 0.3, 2)),
                *((module.weight, -2, 2), (module.bias, -1, 1)),
            ):
                if tensor is not None:
                    tensor.data = torch.empty_like(tensor).uniform_(low, high, generator=g)
    return model.eval()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def row(*modules):
    return nn.Sequential(*modules)


CONVOLUTIONS = {
    "plain": lambda i, o, **k: nn.Conv2d(i, o, 3, **k),
    "without bias": lambda i, o, **k: nn.Conv2d(i, o, 3, bias=False, **k),
    "grouped": lambda i, o, **k: nn.Conv2d(i, o, (2, 3), groups=2, **k),
    "depthwise": lambda i, o, **k: nn.Conv2d(i, i, 3, groups=i, **k),
    "strided, dilated": lambda i, o, **k: nn.Conv2d(i, o, 3, stride=(2, 3), dilation=2, **k),
    "pointwise": lambda i, o, **k: nn.Conv2d(i, o, 1),
    "reflect": lambda i, o, **k: nn.Conv2d(i, o, 3, padding=1, padding_mode="reflect"),
    "circular": lambda i, o, **k: nn.Conv2d(i, o, 3, padding=2, padding_mode="circular"),
}
PADDINGS = {"no padding": {}, "padding": {"padding": (1, 2)}}


class TestBehind:
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("kind", CONVOLUTIONS)
    @pytest.mark.parametrize("ours", [False, True])
    def test_convolution(self, kind, padding, ours):
        conv = CONVOLUTIONS[kind](4, 6, **PADDINGS[padding])
        norm = FusedBatchNorm2d(conv.out_channels, act="elu") if ours else nn.BatchNorm2d(conv.out_channels)
        self.check(row(conv, norm), torch.randn(2, 4, 9, 11), [nn.ELU] if ours else [])

    @pytest.mark.parametrize(
        ("layer", "norm", "shape"),
        [
            (nn.Conv1d(3, 5, 3, padding="same"), nn.BatchNorm1d(5), (2, 3, 20)),
            (nn.Conv3d(3, 5, 2), nn.BatchNorm3d(5), (2, 3, 4, 5, 6)),
            (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 7)),
            (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(6), (2, 4, 7, 5)),
            (nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3), (2, 2, 3, 4, 5)),
            (nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), (5, 4)),
            (nn.Linear(4, 6, bias=False), FusedBatchNorm1d(6, act="prelu"), (5, 4)),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_others(self, layer, norm, shape):
        self.check(row(layer, norm), torch.randn(shape), [nn.PReLU] if hasattr(norm, "act") else [])

    def check(self, model, x, left):
        model = prepared(model)
        folded = fold(model, x)
        assert norms(folded) == []
        assert [type(m) for m in folded.modules() if type(m) in (nn.ELU, nn.PReLU)] == left
        expected = model(x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert len(norms(model)) == 1


class TestAhead:
    @pytest.mark.parametrize("zero", [False, True], ids=["", "a weight is 0"])
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("kind", CONVOLUTIONS)
    def test_convolution(self, kind, padding, zero):
        # Pooled between, so that the norm does not go into the layer ahead.
        conv = CONVOLUTIONS[kind](4, 2, **PADDINGS[padding])
        model = prepared(row(nn.BatchNorm2d(4), conv)).double()
        if zero:
            model[0].weight.data[1] = 0
        x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
        folded = fold(model, x)
        reason = folded.fusednorm_report.rows[0].reason
        pays = conv(x).numel() < x.numel()
        if padding == "padding" and conv.padding_mode == "zeros" and any(conv.padding) and not pays:
            assert "to correct the border" in reason
            assert len(norms(folded)) == 1
        else:
            assert reason is None
            assert norms(folded) == []
        torch.testing.assert_close(folded(x), model(x))
        torch.testing.assert_close(folded(x[:1, :, 1:, 2:]), model(x[:1, :, 1:, 2:]))  # another size

    def test_linear(self):
        model = prepared(row(nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))).double()
        x = torch.randn(6, 4, dtype=torch.float64)
        assert "without an example" in fold(model).fusednorm_report.rows[0].reason
        folded = fold(model, x)
        assert norms(folded) == []
        torch.testing.assert_close(folded(x), model(x))

    def test_zero_padding_without_example(self):
        folded = fold(prepared(row(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))))
        assert "without an example" in folded.fusednorm_report.rows[0].reason


class Residual(nn.Module):
    """What the convolution gives is used past the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.conv(self.one(self.conv(x))))


class TiedWeight(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.bn(self.a(x))))


class ReadsWeight(nn.Module):
    """The model's own code takes the weight, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)


@pytest.mark.parametrize(
    ("model", "shape", "says"),
    [
        (ReadsWeight, (2, 3, 4, 4), "weight that is not its alone"),
        (lambda: row(nn.Linear(5, 5), nn.BatchNorm1d(5)), (4, 5, 5), "another dimension"),
        (lambda: row(nn.BatchNorm1d(5), nn.Linear(6, 7)), (4, 5, 6), "another dimension"),
        (Residual, (2, 3, 4, 4), "other uses"),
        (Tied, (2, 3, 4, 4), "several times"),
        (TiedWeight, (4, 3), "weight that is not its alone"),
        (lambda: row(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), (2, 3, 4, 4), "no convolution or linear"),
        (lambda: row(nn.Conv2d(3, 3, 1), FusedBatchNorm2d(3, act="relu", order="act-norm")), (2, 3, 4, 4), "no convol"),
        (lambda: row(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), (2, 3, 4, 4), "statistics"),
    ],
)
def test_left_as_it_is(model, shape, says):
    model, x = prepared(model()), torch.randn(shape)
    folded = fold(model, x)
    assert says in folded.fusednorm_report.rows[0].reason
    torch.testing.assert_close(folded(x), model(x))
    assert len(norms(folded)) == len(norms(model))


def test_training_norm_and_live_noise_stay():
    model = prepared(row(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[1].train()
    assert "eval()" in fold(model).fusednorm_report.rows[0].reason
    model = prepared(row(nn.Conv2d(3, 3, 1), FusedBatchNorm2d(3, act="relu", drop=0.5)))
    model[1].drop.train()
    assert "live" in fold(model).fusednorm_report.rows[0].reason


def test_half():
    """Folded in double, rounded once."""
    model = prepared(row(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).bfloat16()
    folded = fold(model)
    assert folded[0].weight.dtype == torch.bfloat16
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model).float()(x)
    error = (folded(x.bfloat16()).float() - expected).abs().max() / expected.abs().max()
    assert error < 0.02


def test_of_a_fused_model():
    """A model that was fused folds like the stock one, and the copy that was given is untouched."""
    stock = prepared(
        row(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Dropout(),
        )
    )
    fused = fuse(stock)
    folded = fold(fused)
    assert norms(folded) == []
    assert len(norms(fused)) == 2
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(folded(x), stock(x), rtol=1e-5, atol=1e-5)
    assert [row.reason for row in folded.fusednorm_report.rows] == [None, None]


def test_inplace():
    model = prepared(row(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert fold(model, inplace=True) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


# ---- layers that are not what they look like -------------------------------------------------------------------------
class ReadsBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.bias.sum()


class Asks(nn.Module):
    """A norm whose own code, or the model's, wants something of it that no layer beside it has."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.bn, self.function = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), function
        self.kept = [self.bn]

    def forward(self, x):
        return self.function(self, self.conv(x))


def by_reference(m, x):
    return m.kept[0](x)


def reads_weight(m, x):
    return m.bn(x) * m.bn.weight.sum()


def reads_statistics(m, x):
    return m.bn(x) + m.bn.running_mean.view(-1, 1, 1)


def reads_eps(m, x):
    return m.bn(x) + m.bn.eps


def asks_its_type(m, x):
    return m.bn(x) * (2 if isinstance(m.bn, nn.BatchNorm2d) else 3)


def doubled(self, x):
    return 2 * nn.functional.conv2d(x, self.weight, self.bias)


def with_forward_of_its_own():
    row = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    row[0].forward = doubled.__get__(row[0])
    return row


@pytest.mark.parametrize(
    "build, shape, reason",
    [
        (lambda: nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)), (3, 6), "in another dimension"),
        (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(3, 6, 1)), (3, 6), "in another dimension"),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm1d(6)), (3, 6, 6), "in another dimension"),
        (ReadsBias, (2, 3, 4, 4), "a weight that is not its alone"),
        (with_forward_of_its_own, (2, 3, 4, 4), "a forward of its own"),
        (lambda: Asks(reads_weight), (2, 3, 4, 4), "reads its tensors elsewhere"),
        (lambda: Asks(reads_statistics), (2, 3, 4, 4), "reads its tensors elsewhere"),
        (lambda: Asks(reads_eps), (2, 3, 4, 4), "code fails without it"),
        (lambda: Asks(asks_its_type), (2, 3, 4, 4), "gives something else without it"),
        (lambda: Asks(by_reference), (2, 3, 4, 4), "by a reference of its own"),
    ],
)
def test_layers_that_are_not_what_they_look_like(build, shape, reason):
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    folded = fold(model, x)
    assert torch.equal(folded(x), model(x))
    assert reason in folded.fusednorm_report.rows[0].reason
    assert [(name, type(module)) for name, module in folded.named_modules()] == modules


def norm_with_a_forward_of_its_own(model):
    model[1].forward = lambda x: 2 * x


def row_with_a_forward_of_its_own(model):
    model.forward = lambda x: model[1](model[0](x) + 1)


def conv_that_stands_elsewhere(model):
    return nn.ModuleDict({"row": model, "conv": model[0]})


@pytest.mark.parametrize(
    "change", [norm_with_a_forward_of_its_own, row_with_a_forward_of_its_own, conv_that_stands_elsewhere]
)
def test_without_an_example(change):
    model = prepared(row(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)))
    model = change(model) or model
    folded = fold(model)
    assert len(norms(folded)) == 1 and "with this example" not in folded.fusednorm_report.rows[0].reason


@pytest.mark.parametrize("given", [None, torch.empty(2, 3, 8, 8, device="meta")])
def test_meta_device(given):
    with torch.device("meta"):
        model = row(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 3, padding=1)).eval()
    folded = fold(model, given)
    assert len(norms(folded)) == (given is None)


def test_what_is_left_can_be_scripted_and_traced():
    model, x = prepared(row(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))), torch.randn(2, 4, 8, 8)
    folded = fold(model, x)
    assert norms(folded) == []
    for run in (torch.jit.script(folded), torch.fx.symbolic_trace(folded)):
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "modules, shape",
    [
        ((nn.Conv2d(3, 6, 1), nn.BatchNorm1d(4)), (3, 4, 4)),
        ((nn.Conv2d(3, 6, 1), nn.BatchNorm1d(6)), (3, 6, 4)),
        ((nn.Conv1d(3, 6, 1), nn.BatchNorm1d(4)), (3, 4)),
        ((nn.BatchNorm1d(5), nn.Conv1d(3, 6, 1)), (3, 5)),
    ],
)
def test_one_sample_without_an_example(modules, shape):
    """What a convolution without a batch gives has its channels where the norm has the batch."""
    model, x = prepared(row(*modules)), torch.randn(shape)
    folded = fold(model)
    assert torch.equal(folded(x), model(x))
    assert "in another dimension" in folded.fusednorm_report.rows[0].reason
