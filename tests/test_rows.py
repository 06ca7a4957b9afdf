"""Rows that do not count: the call against one on the rows that do, put together as a batch of their own.

The oracle never sees the others: values of (rows, C), in float64, with the noise that falls on them where they stood.
"""

import itertools

import pytest
import torch
from common import FLOATS, TOLERANCE, channels_last, close, dtype_id
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, functional, reference

SHAPES = {
    "rows": (12, 6),
    "wide rows": (9, 600),
    "sequences": (5, 6, 40),
    "long": (4, 3, 700),
    "very long": (2, 3, 9000),
    "maps": (6, 40, 5, 5),
    "one channel": (7, 1, 33),
    "volumes": (3, 4, 2, 3, 4),
}
ORDERS = [order for order in reference.ORDERS if "act" in order or "drop" in order] + ["norm"]


def masks(shape, kind):
    rows = (shape[0], *shape[2:])
    draw = torch.Generator(device="cpu").manual_seed(len(kind))
    if kind == "padding":
        lengths = torch.randint(0, rows[-1] + 1, rows[:-1], generator=draw)
        return torch.arange(rows[-1]) < lengths[..., None]
    if kind == "holes":
        return torch.rand(rows, generator=draw) < 0.6
    if kind == "stretches":
        return (torch.rand(rows, generator=draw).cumsum(-1) % 12) < 7
    if kind == "samples":
        return (torch.arange(rows[0]) % 3 > 0).reshape(-1, *[1] * (len(rows) - 1)).expand(rows)
    return torch.full(rows, kind == "all")


KINDS = ("padding", "holes", "stretches", "samples", "all")


class Masked:
    """A call, and what it should give."""

    def __init__(
        self, shape, kind, order="norm-act-drop", act="relu", p=0.4, dtype=torch.float64, layout="first", **more
    ):
        draw = torch.Generator().manual_seed(7)

        def tensor(*size):
            return torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype)

        lay = channels_last if layout == "last" else torch.Tensor.contiguous
        self.mask = masks(shape, kind)
        self.x, self.g = lay(tensor(*shape) + 1), lay(tensor(*shape))
        self.residual = lay(tensor(*shape)) if "add" in order else None
        c = shape[1]
        opmath = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight, self.bias = tensor(c).to(opmath).abs() + 0.5, tensor(c).to(opmath)
        self.prelu = tensor(c).to(opmath).abs() if act == "prelu" and "act" in order else None
        self.order, self.act = order, act if "act" in order else None
        self.p = p if "drop" in order else 0.0
        self.more = {"noise": "bernoulli", "granularity": "element"} | more
        self.buffers = [torch.zeros(c, dtype=opmath), torch.ones(c, dtype=opmath)]

    def rows(self, t):
        """(N, C, ...) as the (rows, C) that count."""
        return t.movedim(1, -1)[self.mask]

    def leaves(self):
        kept = (self.x, self.weight, self.bias, self.residual, self.prelu)
        return [None if t is None else t.detach().clone().requires_grad_() for t in kept]

    def expected(self, ghosts=None):
        x, weight, bias, residual, prelu = (
            None if t is None else t.detach().double().requires_grad_() for t in self.leaves()
        )
        m = fusednorm.noise(
            self.x.shape, self.p, seed=3, kind=self.more["noise"], granularity=self.more["granularity"],
            dtype=torch.float64,
        )  # fmt: skip
        act = self.act if prelu is None else ("prelu", prelu)
        y = torch.zeros(self.x.movedim(1, -1).shape, dtype=torch.float64)
        running = [b.double() for b in self.buffers]
        for first in range(0, len(self.x), ghosts or len(self.x)):
            mask = torch.zeros_like(self.mask)
            part = slice(first, first + (ghosts or len(self.x)))
            mask[part] = self.mask[part]
            if not mask.any():
                continue

            def rows(t, mask=mask):
                return None if t is None else t.movedim(1, -1)[mask]

            y[mask] = reference.batch_norm_act_drop(
                *(rows(x), None, None, weight, bias, True),
                **{"act": act, "order": self.order, "residual": rows(residual), "noise": rows(m)},
            )
            before = reference.parse_order(self.order)[0]
            u = reference.run_stages(before, rows(x), act, rows(m)).detach()
            n = len(u)
            learned = (u.mean(0), u.var(0, correction=0) * (n / max(n - 1, 1)))
            running = [0.9 * r + 0.1 * s for r, s in zip(running, learned, strict=True)]
        y = y.movedim(-1, 1)
        y.backward(self.g.double())
        grads = [None if t is None else t.grad for t in (x, weight, bias, residual, prelu)]
        return y.detach(), *grads, *running

    def found(self, poison=True, **more):
        x, weight, bias, residual, prelu = self.leaves()
        running = [b.clone() for b in self.buffers]
        dead = ~self.mask.unsqueeze(1)
        with torch.no_grad():
            for t in (x, residual):
                if poison and t is not None:
                    t.masked_fill_(dead, torch.nan)  # nobody looks
        act = self.act if prelu is None else ("prelu", prelu)
        y = functional.batch_norm_act_drop(
            *(x, *running, weight, bias, True),
            **{"act": act, "p": self.p, "order": self.order, "residual": residual, "seed": 3, "mask": self.mask}
            | self.more
            | more,
        )
        assert y.dtype == x.dtype and y.stride() == x.stride()
        y.backward(self.g)
        return y.detach(), *[None if t is None else t.grad for t in (x, weight, bias, residual, prelu)], *running

    def check(self, found=None, ghosts=None, factor=1):
        names = ("output", "dx", "dweight", "dbias", "dresidual", "dprelu", "running_mean", "running_var")
        found = self.found() if found is None else found
        opmath = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        for name, a, b in zip(names, found, self.expected(ghosts), strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                scale = b.abs().max().clamp_min(1)
                close(a, b, scale, name, 4 * factor * max(TOLERANCE[a.dtype], TOLERANCE[opmath]))
                if a.dim() > 1:
                    assert (a.movedim(1, -1)[~self.mask] == 0).all(), name


@pytest.mark.parametrize("act", ["relu", "gelu", "prelu"])
@pytest.mark.parametrize("order", ORDERS)
def test_orders(order, act):
    for i, (shape, layout) in enumerate(itertools.product(("rows", "sequences", "maps"), ("first", "last"))):
        kind = KINDS[(ORDERS.index(order) + i) % len(KINDS)]
        Masked(SHAPES[shape], kind, order, act, layout=layout).check()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, kind, layout, dtype):
    for order, act, p in (
        ("norm-act-drop", "tanh", 0.5),
        ("norm-act", "relu", 0.0),
        ("act-drop-norm", "elu", 0.3),
        ("norm-add-act", "relu", 0.0),
    ):
        Masked(SHAPES[shape], kind, order, act, p, dtype, layout).check()


@pytest.mark.parametrize("granularity", ["element", "channel", "sample"])
@pytest.mark.parametrize("noise", ["bernoulli", "uniform", "gaussian"])
def test_noises(noise, granularity):
    for order, layout in itertools.product(("norm-act-drop", "drop-act-norm", "norm-drop-add-act"), ("first", "last")):
        Masked((6, 5, 30), "padding", order, "silu", 0.3, layout=layout, noise=noise, granularity=granularity).check()


@pytest.mark.parametrize("kind", KINDS)
def test_ghost_batches(kind):
    for shape, layout in itertools.product(((12, 6), (7, 5, 30), (8, 3, 600)), ("first", "last")):
        q = Masked(shape, kind, layout=layout)
        q.check(q.found(ghost_batch_size=3), ghosts=3)


@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 9), (3, 4, 600)], ids=str)
def test_nothing_counts(shape):
    q = Masked(shape, "none", "norm-act-drop-add", "tanh")
    found = q.found()
    assert not any(t.any() for t in found[:5] if t is not None)
    assert torch.equal(found[6], q.buffers[0]) and torch.equal(found[7], q.buffers[1])


def test_everything_counts():
    """As without a mask, to the last bit."""
    for shape in SHAPES.values():
        q = Masked(shape, "all", "norm-drop-add-act", dtype=torch.float32)
        for a, b in zip(q.found(), q.found(mask=None), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=2e-6, atol=2e-6)


def test_ways_to_say_it():
    x = torch.randn(4, 3, 8)
    lengths = torch.tensor([8, 0, 3, 5])
    mask = torch.arange(8) < lengths[:, None]
    layers = [FusedBatchNorm1d(3, act="tanh", drop=0.5) for _ in range(6)]
    told = [{"mask": mask}, {"mask": mask[:, None]}, {"lengths": lengths}, {"lengths": [8, 0, 3, 5]},
            {"lengths": lengths.int()}, {"weights": mask.float()}]  # fmt: skip
    results = [layer(x, seed=1, **rows) for layer, rows in zip(layers, told, strict=True)]
    for layer, y in zip(layers, results, strict=True):
        torch.testing.assert_close(y, results[0])
        torch.testing.assert_close(layer.running_var, layers[0].running_var)
        assert layer.num_batches_tracked == 1
    samples = torch.tensor([True, False, True, True])
    whole = [FusedBatchNorm1d(3)(x, mask=m) for m in (samples, samples[:, None].expand(4, 8))]
    assert torch.equal(*whole)


def test_against_stock_layers():
    """What users do now: pack the values, a stock BatchNorm, unpack."""
    x, lengths = torch.randn(6, 5, 20), torch.tensor([20, 3, 1, 0, 11, 7])
    mask = torch.arange(20) < lengths[:, None]
    ours, stock = FusedBatchNorm1d(5, act="relu"), nn.BatchNorm1d(5)
    for _ in range(3):
        y = ours(x, lengths=lengths)
        expected = torch.zeros_like(x.movedim(1, -1))
        expected[mask] = stock(x.movedim(1, -1)[mask]).relu()
        torch.testing.assert_close(y, expected.movedim(-1, 1))
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    ours.eval()
    stock.eval()
    y, z = ours(x, lengths=lengths), stock(x).relu()
    torch.testing.assert_close(y, torch.where(mask[:, None], z, 0))


# ---- weights ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["norm-act-drop", "act-drop-norm", "norm-add-act"])
@pytest.mark.parametrize("shape", [(9, 4), (5, 4, 11)], ids=str)
def test_whole_weights_count_rows_several_times(shape, order):
    """A row of weight 3 is a row that is there three times, in everything but what the output has of it."""
    torch.manual_seed(1)
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    residual = torch.randn(shape, dtype=torch.float64) if "add" in order else None
    weights = torch.randint(0, 4, (shape[0], *shape[2:]))
    p, act = 0.3 if "drop" in order else 0.0, "tanh"
    m = fusednorm.noise(shape, p, seed=5, dtype=x.dtype)
    leaves = [t.clone().requires_grad_() for t in (x, x)]
    found = functional.batch_norm_act_drop(
        leaves[0], None, None, None, None, True, act=act, p=p, order=order, residual=residual, weights=weights.double(),
        seed=5,
    )  # fmt: skip
    found.backward(g)

    def rows(t, times):
        return None if t is None else t.movedim(1, -1).flatten(0, -2).repeat_interleave(times, 0)

    times = weights.flatten()
    y = reference.batch_norm_act_drop(
        rows(leaves[1], times), None, None, None, None, True, act=act, order=order, residual=rows(residual, times),
        noise=rows(m, times),
    )  # fmt: skip
    first = torch.cat([torch.zeros(1, dtype=torch.long), times.cumsum(0)[:-1]])[times > 0]
    y[first].backward(rows(g, (times > 0).long()))
    expected = torch.zeros_like(x.movedim(1, -1).flatten(0, -2))
    expected[times > 0] = y[first].detach()
    torch.testing.assert_close(found.movedim(1, -1).flatten(0, -2), expected)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_running_statistics_of_weights():
    x, weights = torch.randn(50, 3), torch.rand(50)
    layer = FusedBatchNorm1d(3, momentum=1.0)
    layer(x, weights=weights)
    share = weights / weights.sum()
    mean = (share[:, None] * x).sum(0)
    var = (share[:, None] * (x - mean) ** 2).sum(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var / (1 - (share**2).sum()))  # the unbiased one
    again = FusedBatchNorm1d(3, momentum=1.0)
    again(x, weights=7 * weights)
    torch.testing.assert_close(again.running_var, layer.running_var)


def test_weights_of_noisy_values_and_the_statistics_that_match_evaluation():
    x, weights = torch.randn(40, 3), torch.rand(40)
    layer = FusedBatchNorm1d(3, drop=0.5, order="drop-norm", eval_matched_stats=True, momentum=1.0)
    layer(x, weights=weights)
    torch.testing.assert_close(layer.running_mean, (weights[:, None] * x).sum(0) / weights.sum())


# ---- everywhere ------------------------------------------------------------------------------------------------------
def test_gradients():
    mask = masks((4, 3, 5), "padding")
    weights = torch.rand(4, 5, dtype=torch.float64)

    def call(x, w, b, r, **rows):
        return functional.batch_norm_act_drop(
            x, None, None, w, b, True, act="tanh", p=0.3, order="act-norm-add-drop", residual=r, seed=2, **rows
        )

    x, r = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    w, b = torch.randn(2, 3, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, w, b, r)]
    for rows in ({"mask": mask}, {"weights": weights}, {"mask": mask, "weights": weights}):
        assert torch.autograd.gradcheck(lambda *a, rows=rows: call(*a, **rows), inputs)
        assert torch.autograd.gradgradcheck(lambda *a, rows=rows: call(*a, **rows), inputs)


def test_transforms():
    x, mask = torch.randn(3, 6, 4, 5, dtype=torch.float64), masks((6, 4, 5), "padding")
    g = torch.randn(6, 4, 5, dtype=torch.float64)

    def loss(x):
        y = functional.batch_norm_act_drop(x, None, None, training=True, act="gelu", p=0.4, mask=mask, seed=1)
        return (y * g).sum()

    leaf = x[0].clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), leaf.grad)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x)[0], leaf.grad)
    _, slope = torch.func.jvp(loss, (x[0],), (x[1],))
    torch.testing.assert_close(slope, (leaf.grad * x[1]).sum())


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    layer = FusedBatchNorm1d(4, act="relu", drop=0.5, momentum=None)
    eager = FusedBatchNorm1d(4, act="relu", drop=0.5, momentum=None)
    compiled = torch.compile(lambda x, lengths, seed: layer(x, lengths=lengths, seed=seed), fullgraph=True)
    for step, (n, length) in enumerate([(6, 9), (4, 12), (5, 7)]):
        x, lengths = torch.randn(n, 4, length), torch.randint(1, length + 1, (n,))
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        seed = torch.tensor(step)
        y, z = compiled(a, lengths, seed), eager(b, lengths=lengths, seed=seed)
        torch.testing.assert_close(y, z)
        (y * x).sum().backward()
        (z * x).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


def test_exported():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = FusedBatchNorm1d(4, act="relu", drop=0.5)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    net, x = Net().eval(), torch.randn(3, 4, 6)
    mask = masks((3, 4, 6), "padding")
    program = torch.export.export(net, (x, mask))
    assert "fusednorm" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, mask), net(x, mask))
    net.train()
    program = torch.export.export(net, (x, mask))
    assert "fusednorm" not in str(program.graph)
    y = program.module()(x, mask)
    assert (y.movedim(1, -1)[~mask] == 0).all()


def test_fx_keeps_the_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = FusedBatchNorm1d(4, act="relu")

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    net, x, mask = Net(), torch.randn(3, 4, 6), masks((3, 4, 6), "padding")
    assert torch.equal(torch.fx.symbolic_trace(net)(x, mask), net(x, mask))


def test_children_that_are_called():
    class Scaled(nn.Tanh):
        def forward(self, x):
            return super().forward(x) + 1

    mask, x = masks((5, 4, 9), "padding"), torch.randn(5, 4, 9)
    layer = FusedBatchNorm1d(4, act=Scaled())
    y = layer(x, mask=mask)
    expected = FusedBatchNorm1d(4)(x, mask=mask).tanh() + 1
    torch.testing.assert_close(y, torch.where(mask[:, None], expected, 0))


def test_residual_that_is_not_fused():
    mask, x, residual = masks((5, 4, 9), "padding"), torch.randn(5, 4, 9), torch.randn(4, 1)
    layer = FusedBatchNorm1d(4, act="relu", order="norm-add-act")
    y = layer(x, residual, mask=mask)
    expected = FusedBatchNorm1d(4, act="relu", order="norm-add-act")(x, residual.expand(5, 4, 9), mask=mask)
    torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match="residual: expected a shape that leaves that of the input"):
        layer(x[:, :, :1], torch.randn(5, 4, 9), mask=mask[:, :1])


X = torch.randn(4, 3, 8)


@pytest.mark.parametrize(
    "rows, error, says",
    [
        ({"mask": torch.ones(4, 8)}, TypeError, "mask: expected a tensor of bool.* got torch.float32"),
        ({"mask": [True] * 4}, TypeError, "mask: expected a tensor of bool.* got list"),
        (
            {"mask": torch.ones(8, 4, dtype=torch.bool)},
            ValueError,
            r"mask: expected shape \[4, 8\], \[4\] or \[4, 1, 8\]",
        ),
        ({"mask": torch.ones(4, 3, 8, dtype=torch.bool)}, ValueError, "mask: expected shape"),
        ({"mask": torch.ones(8, dtype=torch.bool)}, ValueError, "mask: expected shape"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool, device="meta")}, ValueError, "mask: expected a tensor on cpu"),
        ({"lengths": torch.tensor([1.0] * 4)}, TypeError, "lengths: expected integers, but got torch.float32"),
        (
            {"lengths": torch.tensor([1, 2, 9, 3])},
            ValueError,
            r"lengths: expected numbers from 0 to 8, but got \[1, 2, 9",
        ),
        ({"lengths": torch.tensor([1, -2, 3, 3])}, ValueError, "lengths: expected numbers from 0 to 8"),
        ({"lengths": [1, 2, 3]}, ValueError, r"lengths: expected shape \[4\]"),
        ({"lengths": 3}, TypeError, "lengths: expected integers"),
        ({"lengths": "abcd"}, TypeError, "lengths: expected integers"),
        ({"weights": torch.ones(4, dtype=torch.int)}, TypeError, "weights: expected a floating-point tensor"),
        ({"weights": torch.tensor([1.0, -1, 0, 0])}, ValueError, "weights: expected finite values of 0 or more"),
        ({"weights": torch.tensor([1.0, torch.nan, 0, 0])}, ValueError, "weights: expected finite values"),
        ({"weights": torch.ones(4, 7)}, ValueError, "weights: expected shape"),
        (
            {"lengths": [1] * 4, "mask": torch.ones(4, dtype=torch.bool)},
            ValueError,
            "mask: expected None beside lengths",
        ),
        ({"lengths": [1] * 4, "weights": torch.ones(4)}, ValueError, "lengths: expected None beside weights"),
        ({"weights": torch.ones(4), "ghost_batch_size": 2}, ValueError, "weights: expected None with ghost_batch_size"),
    ],
)
def test_bad_rows(rows, error, says):
    with pytest.raises(error, match=says):
        functional.batch_norm_act_drop(X, None, None, training=True, **rows)


def test_lengths_need_a_length():
    with pytest.raises(ValueError, match="lengths: expected None for an input of shape .* no length"):
        FusedBatchNorm1d(3)(torch.randn(4, 3), lengths=[1] * 4)


@pytest.mark.parametrize(
    "valid, says",
    [
        (torch.ones(4, 7, dtype=torch.bool), r"valid: expected shape \[4, 8\] of bool"),
        (torch.ones(4, 8), "valid: expected shape .* of bool"),
    ],
)
def test_the_operator_looks_itself(valid, says):
    with pytest.raises(ValueError, match=says):
        torch.ops.fusednorm.statistics(X, None, None, "norm", "identity", [], "bernoulli", 0.0, "element", False, valid)


def test_maps_of_any_memory():
    """A transposed batch, whose samples lie one behind the other in each channel."""
    x = torch.randn(5, 4, 6, 7).transpose(0, 1).contiguous().transpose(0, 1)
    mask = masks(x.shape, "holes")
    a, b = (FusedBatchNorm2d(4, act="relu", drop=0.3)(t, mask=mask, seed=1) for t in (x, x.contiguous()))
    torch.testing.assert_close(a, b)


# ---- tools -----------------------------------------------------------------------------------------------------------
class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3, padding=1), FusedBatchNorm1d(4, act="tanh", drop=0.5)

    def forward(self, batch):
        x, rows = batch
        return self.norm(self.conv(x), **rows)


def test_statistics_gathered_again_are_of_the_rows_that_count():
    net, x, lengths = Speech(), torch.randn(6, 3, 20), torch.tensor([20, 3, 1, 0, 11, 7])
    batches = [(part, {"lengths": some}) for part, some in zip(x.split(2), lengths.split(2), strict=True)]
    fusednorm.recalibrate(net, batches, forward=net, progress=False)
    mask = torch.arange(20) < lengths[:, None]
    values = net.conv(x).detach().movedim(1, -1)[mask].double()
    torch.testing.assert_close(net.norm.running_mean.double(), values.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.norm.running_var.double(), values.var(0), rtol=1e-5, atol=1e-6)
    batches = [(x, {"weights": torch.rand(6)})]
    with pytest.raises(ValueError, match="model: FusedBatchNorm1d is called with weights"):
        fusednorm.recalibrate(net, batches, forward=net, progress=False)


# ---- found by looking for trouble ------------------------------------------------------------------------------------
def test_what_is_called_sees_no_value_of_a_row_that_does_not_count():
    """A NaN there would come back through a derivative: of a child with a hook, and behind a residual."""
    x, mask = torch.randn(8, 3), torch.arange(8) < 5
    x[5:] = torch.nan
    hooked = FusedBatchNorm1d(3, act="prelu", order="act-norm")
    hooked.act.register_forward_hook(lambda *_: None)
    noisy = FusedBatchNorm1d(3, drop=fusednorm.ConcreteDropout(0.3), order="drop-norm")
    adding = FusedBatchNorm1d(3, act="prelu", order="norm-add-act")
    residual = x.double().requires_grad_()
    for layer, more in ((hooked, ()), (noisy, ()), (adding, (residual,))):
        layer(x, *more, mask=mask).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert residual.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e38, 1e-40, 1e300, 1e-300])
def test_weights_have_no_scale(scale):
    x, weights = torch.randn(8, 3), torch.rand(8, dtype=torch.float64)
    found = [
        functional.batch_norm_act_drop(x, None, None, training=True, weights=w) for w in (weights, weights * scale)
    ]
    torch.testing.assert_close(*found)


def test_weights_leave_statistics_alone_where_a_call_fails():
    layer = FusedBatchNorm1d(3)
    layer.weight = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="weight should contain 3 elements not 4"):
        layer(torch.randn(8, 3), weights=torch.rand(8))
    assert not layer.running_mean.any() and layer.num_batches_tracked == 0
    layer = FusedBatchNorm1d(3)
    layer.num_batches_tracked = torch.tensor(2.0)
    layer(torch.randn(8, 3), weights=torch.rand(8))
    assert layer.num_batches_tracked == 3
    with pytest.raises(ValueError, match="weights: expected a tensor that requires no gradient"):
        layer(torch.randn(8, 3), weights=torch.rand(8, requires_grad=True))


def test_no_samples_have_no_lengths():
    assert FusedBatchNorm1d(3).eval()(torch.randn(0, 3, 5), lengths=[]).shape == (0, 3, 5)
    with pytest.raises(TypeError, match="lengths: expected integers, but got"):
        FusedBatchNorm1d(3)(torch.randn(2, 3, 5), lengths=[1, None])
