"""The table: outputs and all gradients against the reference in float64, over everything that can break a kernel."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from common import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    Problem,
    act_id,
    activate,
    close,
    double,
    dtype_id,
    generator,
    lay_out,
    leaf,
    noise,
    same_bits,
    spread,
)

import fusednorm
from fusednorm import functional, reference

pytestmark = pytest.mark.kernel

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
both_layouts = pytest.mark.parametrize("layout", ["first", "last"])
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

# Around the 8 rows of one Philox call, the 16 or 32 lanes of a vector, the 32 bits of a mask word, the 512 of a tile.
COUNTS = (2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025)
CHANNELS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 257)
SHAPES = (
    (7, 13, 11),
    (3, 5, 4),
    (4, 6, 1),
    (4, 6, 1, 1),
    (5, 3, 2, 2),
    (3, 9, 7, 7),
    (2, 17, 13, 29),
    (2, 4, 56, 56),
    (3, 5, 4, 7, 3),
    (2, 2, 1, 1, 1),
    (1, 1, 6, 1, 5),
    (2, 40, 3, 1, 11),
)


@dtypes
@layouts
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=act_id)
def test_activations(act, p, layout, dtype):
    Problem((3, 17, 5, 3), dtype, layout, act, p).check()


@dtypes
@layouts
@training
@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("act", [None, "relu", "silu"], ids=act_id)
def test_noise(act, p, granularity, training, layout, dtype):
    Problem((5, 9, 3, 7), dtype, layout, act, p, granularity, training).check()


@dtypes
@layouts
@training
@pytest.mark.parametrize("act", ["relu", "tanh"])
@pytest.mark.parametrize("shape", [(37, 19), (6, 7, 13), (2, 5, 3, 4, 5)], ids=str)
def test_ranks(shape, act, training, layout, dtype):
    Problem(shape, dtype, layout, act, 0.5, training=training).check()


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("act", ["relu", "tanh"])
@pytest.mark.parametrize(
    "shape",
    [shape for count in COUNTS for shape in ((count, 33), (1, 3, count), (count, 1), (count, 2, 1), (2, 5, count))],
    ids=str,
)
def test_row_counts(shape, act, dtype, layout):
    Problem(shape, dtype, layout, act, 0.5).check()


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(
    "shape", [shape for c in CHANNELS for shape in ((5, c), (3, c, 7, 7), (2, c, 2, 2), (2, c, 25))], ids=str
)
def test_channel_counts(shape, dtype, layout):
    Problem(shape, dtype, layout, "relu", 0.25).check()


@layouts
@training
@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, dtype, granularity, training, layout):
    if layout == "expanded" and shape[0] == 1:
        pytest.skip("is dense")
    constant = layout == "expanded" and math.prod(shape[2:]) == 1
    if constant and training:
        pytest.skip("has constant channels: see the accuracy tests")
    Problem(shape, dtype, layout, "relu", 0.5, granularity, training).check()


@both_layouts
@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(3, 100_000), (2, 100_000, 2), (65_537, 3), (65_537, 1), (65_537, 2, 2)], ids=str)
def test_many(shape, dtype, granularity, layout):
    Problem(shape, dtype, layout, "relu", 0.5, granularity).check()


@dtypes
@training
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("n, c", [(2, 70), (3, 7), (130, 3), (1100, 2)])
@pytest.mark.parametrize("s", [2, 3, 7, 16, 25, 49, 100, 171, 257, 400, 511, 512])
def test_short_rows(s, n, c, act, training, dtype):
    """Channels-first without noise, where adjacent channels are worked on together: all remainders of blocks."""
    Problem((n, c, s), dtype, act=act, p=0.0, training=training).check()


@dtypes
@training
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("rows", [2, 9, 163, 4100])
@pytest.mark.parametrize("channels", [2, 3, 5, 17, 31, 33, 50, 100, 127])
def test_few_channels_side_by_side(channels, rows, act, training, dtype):
    """Channels-last without noise, where several rows are worked on as one: with a rest, and without."""
    Problem((rows, channels), dtype, act=act, p=0.0, training=training).check()


@dtypes
@pytest.mark.parametrize("order", ["norm-act", "act-norm", "norm-add-act", "norm-act-add"])
@pytest.mark.parametrize("act", [None, "relu", "silu", ("prelu", "channel")], ids=act_id)
@pytest.mark.parametrize("shape", [(3, 7, 33), (1, 70, 49), (2, 130, 100), (2, 3, 9000), (5, 1, 40)], ids=str)
def test_evaluation_without_gradients(shape, act, order, dtype):
    """Channels-first, where it goes through memory in order: rows of several channels a tile, and pieces of one."""
    problem = Problem(shape, dtype, act=act, order=order, training=False)
    with torch.no_grad():
        close(problem.forward(), problem.expected["y"], problem.scale["y"])


@dtypes
@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1), (1, 1, 1, 1), (1, 1), (1, 33, 1, 1)], ids=str)
def test_single_row_with_running_statistics(shape, dtype):
    Problem(shape, dtype, act="relu", p=0.5, training=False).check()


@both_layouts
@pytest.mark.parametrize("grad_layout", ["first", "last", "sliced", "transposed", "expanded", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(6, 7, 5, 3), (12, 33), (5, 4, 9)], ids=str)
def test_gradient_layouts(shape, p, dtype, grad_layout, layout):
    Problem(shape, dtype, layout, "tanh", p, grad_layout=grad_layout).check()


def test_sum_backward():
    """`out.sum().backward()` hands over a gradient whose strides are all zero."""
    problem = Problem((6, 7, 5, 3), act="tanh", p=0.5, grad_layout="scalar")
    problem.forward().sum().backward()
    close(problem.x.grad, problem.expected["x"], problem.scale["x"])
    close(problem.bias.grad, problem.expected["bias"], problem.scale["bias"])


@both_layouts
@training
@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_missing_parameters(p, weight, bias, training, layout):
    Problem((5, 7, 3, 3), torch.float32, layout, "relu", p, training=training, weight=weight, bias=bias).check()


@training
@pytest.mark.parametrize("stat_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("param_dtype", FLOATS, ids=dtype_id)
@dtypes
def test_mixed_dtypes(dtype, param_dtype, stat_dtype, training):
    problem = Problem(
        (9, 5, 3), dtype, act="relu", p=0.5, training=training, param_dtype=param_dtype, stat_dtype=stat_dtype
    )
    problem.check()
    assert problem.running_mean.dtype == stat_dtype


def test_every_tensor_of_another_dtype():
    problem = Problem((9, 5, 3), torch.float16, act="relu", p=0.5, param_dtype=torch.bfloat16)
    problem.bias = leaf(problem.bias.float())
    problem.running_mean = problem.running_mean.double()
    problem.running_var = problem.running_var.bfloat16()
    problem.check()


@both_layouts
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_requires_grad_subsets(wanted, p, layout):
    problem = Problem((5, 7, 3, 3), torch.float32, layout, "relu", p)
    inputs = dict(zip(("x", "weight", "bias"), wanted, strict=True))
    for name, want in inputs.items():
        getattr(problem, name).requires_grad_(want)
    y = problem.forward()
    assert y.requires_grad == any(wanted)
    close(y, problem.expected["y"], problem.scale["y"])
    if any(wanted):
        y.backward(problem.grad)
    for name, want in inputs.items():
        got = getattr(problem, name).grad
        assert (got is not None) == want
        if want:
            close(got, problem.expected[name], problem.scale[name], name)


@both_layouts
@pytest.mark.parametrize("eps", [1e-3, 1e-1])
def test_eps(eps, layout):
    Problem((5, 7, 3, 3), torch.float32, layout, "relu", 0.5, eps=eps).check()


@training
@both_layouts
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, layout, training):
    problem = Problem((5, 7, 3, 3), torch.float32, layout, "gelu", 0.5, training=training)
    with context():
        y = problem.forward()
    assert not y.requires_grad
    close(y, problem.expected["y"], problem.scale["y"])


@dtypes
@layouts
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 7), (4, 5, 3, 2), (2, 5, 3, 2, 2)], ids=str)
def test_output_strides(shape, layout, dtype):
    """The input's strides where it is dense, those of nn.BatchNorm where it is not."""
    problem = Problem(shape, dtype, layout, "relu", 0.5)
    x = problem.x.detach()
    got = problem.forward().stride()
    eager = F.batch_norm(x, None, None, training=True).stride()
    allowed = {"first": [x.stride()], "last": [x.stride()], "transposed": [x.stride(), eager]}
    assert got in allowed.get(layout, [eager])


@dtypes
@training
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 7), (3, 5, 0), (0, 5, 3, 3), (2, 5, 0, 3)], ids=str)
@pytest.mark.parametrize("order", ["norm-act-drop", "norm-add-act-drop"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_empty(p, order, shape, training, dtype):
    x = leaf(torch.empty(shape, dtype=dtype))
    weight, bias = leaf(torch.ones(5)), leaf(torch.zeros(5))
    mean, var = torch.zeros(5), torch.ones(5)
    residual = x.detach() if "add" in order else None
    options = dict(act="relu", p=p, drop_training=True, seed=1, order=order, residual=residual)
    y = functional.batch_norm_act_drop(x, mean, var, weight, bias, training, **options)
    assert y.shape == shape
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(5))
    assert torch.equal(bias.grad, torch.zeros(5))
    assert torch.equal(mean, torch.zeros(5))
    assert torch.equal(var, torch.ones(5))


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_input_is_not_written(dtype, layout):
    problem = Problem((5, 7, 3, 3), dtype, layout, "relu", 0.5)
    x, g = problem.x.detach().clone(), problem.grad.clone()
    problem.fused()
    assert torch.equal(problem.x, x)
    assert torch.equal(problem.grad, g)


class TestNonFinite:
    """Forward like the unfused composition; backward, 0 where the slope is 0."""

    VALUES = (math.nan, math.inf, -math.inf)

    @dtypes
    @both_layouts
    @pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("act", ACTIVATIONS, ids=act_id)
    def test_forward_with_running_statistics(self, act, p, layout, dtype):
        x = torch.linspace(-3, 3, 5 * 40 * 3).reshape(5, 40, 3).contiguous()
        for i, value in enumerate(self.VALUES):
            x[:, i::4, 1] = value
        x, mean, var = lay_out(x.to(dtype), layout), torch.zeros(40), torch.ones(40)
        y = functional.batch_norm_act_drop(x, mean, var, act=act, p=p, drop_training=True, seed=2)
        # Composed in float64: torch's float32 gelu makes a NaN of +inf where its other dtypes keep it.
        expected = activate(act, F.batch_norm(x.double(), mean.double(), var.double())) * noise(x.shape, p, 2)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            for at in (kind(y) != kind(expected)).nonzero()[:1].tolist():
                at = tuple(at)
                raise AssertionError(f"x = {x[at].item()} gives {y[at].item()}, expected {expected[at].item()}")

    @both_layouts
    @pytest.mark.parametrize("value", VALUES)
    def test_forward_spoils_its_own_channel_only(self, value, layout):
        x = spread((6, 5, 7), generator(1)).float()
        clean = functional.batch_norm_act_drop(x, None, None, training=True, act="relu", p=0.5, seed=2)
        x[3, 2, 4] = value
        y = functional.batch_norm_act_drop(lay_out(x, layout), None, None, training=True, act="relu", p=0.5, seed=2)
        others = [0, 1, 3, 4]
        assert torch.isnan(y[:, 2]).all()
        torch.testing.assert_close(y[:, others], clean[:, others])

    @both_layouts
    @pytest.mark.parametrize("value", VALUES)
    @pytest.mark.parametrize("act", [None, "relu", "silu"])
    @pytest.mark.parametrize("p", [0.0, 0.5])
    @pytest.mark.parametrize("order", [order for order in reference.ORDERS if "drop" in order])
    def test_backward_where_the_slope_is_zero(self, order, p, act, value, layout):
        """A non-finite gradient at an element whose local derivative is zero (dropped, or relu at rest) gives 0 there,
        and the non-finite value where the derivative is not zero; with running statistics nothing else feels it."""
        if act is not None and "act" not in order:
            pytest.skip("no place for an activation")
        x = lay_out(torch.randn(6, 9, 7), layout)
        residual = lay_out(torch.randn(6, 9, 7), layout) if "add" in order else None
        g = torch.randn(6, 9, 7)
        mean, var = torch.zeros(9), torch.ones(9)

        def gradients(g):
            leaves = [leaf(t) for t in (x, residual) if t is not None]
            y = functional.batch_norm_act_drop(
                *(leaves[0], mean, var),
                act=act,
                p=p,
                drop_training=True,
                seed=3,
                order=order,
                residual=leaves[1] if residual is not None else None,
            )
            return torch.autograd.grad(y, leaves, g)

        hit = torch.zeros(6, 9, 7, dtype=torch.bool)
        hit[::2, 4] = True
        for clean, got in zip(gradients(g), gradients(g.masked_fill(hit, value)), strict=True):
            assert torch.equal(got[~hit], clean[~hit])
            live, dead = hit & (clean != 0), hit & (clean == 0)
            assert live.any()
            assert not torch.isfinite(got[live]).any()
            assert bool((got[dead] == 0).all())

    @both_layouts
    @pytest.mark.parametrize("value", VALUES)
    def test_backward_spoils_its_own_channel_only(self, value, layout):
        problem = Problem((6, 5, 7), layout=layout, act="tanh", p=0.5)
        problem.grad[3, 2, 4] = value
        if noise((6, 5, 7), 0.5, problem.seed)[3, 2, 4] == 0:
            pytest.skip("the element is dropped")
        got = problem.fused()
        others = [0, 1, 3, 4]
        close(got["x"][:, others], problem.expected["x"][:, others], problem.scale["x"])
        close(got["weight"][others], problem.expected["weight"][others], problem.scale["weight"])
        assert not torch.isfinite(got["x"][:, 2]).any()


@pytest.mark.parametrize("act", ACTIVATIONS, ids=act_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_activations_far_out(act, dtype):
    """Values and slopes from the underflow to the overflow of exp, where a formula that is right near 0 may not be."""
    far = torch.cat([torch.logspace(-12, 4, 200, dtype=torch.float64), torch.tensor([0.0, 88.0, 89.0, 104.0, 710.0])])
    x = torch.cat([far, -far]).to(dtype).unsqueeze(1)
    x = leaf(x)
    y = functional.batch_norm_act_drop(x, torch.zeros(1), torch.ones(1, dtype=dtype) - 1e-5, act=act)
    (grad,) = torch.autograd.grad(y.sum(), x)
    x64 = leaf(double(x))
    z = reference.batch_norm_act_drop(x64, torch.zeros(1).double(), (torch.ones(1, dtype=dtype) - 1e-5).double())
    exact = activate(act, z)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x64)
    close(y, exact.detach(), 1e-3)
    smooth = x64.detach().abs() > 1e-2
    close(grad[smooth], exact_grad[smooth], 1.0)


def test_drop_training_follows_training():
    x, mean, var = torch.randn(50, 4), torch.zeros(4), torch.ones(4)
    off = functional.batch_norm_act_drop(x, mean, var, p=0.5, seed=1)
    assert int((off == 0).sum()) == 0
    on = functional.batch_norm_act_drop(x, mean, var, training=True, p=0.5, seed=1)
    assert int((on == 0).sum()) > 0
    off = functional.batch_norm_act_drop(x, mean, var, training=True, p=0.5, drop_training=False, seed=1)
    assert int((off == 0).sum()) == 0


def test_p_zero_is_the_exact_identity():
    x = torch.randn(50, 4)
    without = functional.batch_norm_act_drop(x, None, None, training=True, act="gelu")
    assert same_bits(functional.batch_norm_act_drop(x, None, None, training=True, act="gelu", p=0.0, seed=3), without)


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    size = st.integers(1, 40)

    @hypothesis.settings(deadline=None, derandomize=True, max_examples=150, database=None)
    @hypothesis.given(
        st.one_of(
            st.tuples(size, size),
            st.tuples(st.integers(1, 9), size, size),
            st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
        ),
        st.sampled_from(FLOATS),
        st.sampled_from(["first", "last", "sliced", "transposed"]),
        st.sampled_from(["first", "last", "sliced"]),
        st.sampled_from(ACTIVATIONS),
        st.sampled_from([0.0, 0.1, 0.5]),
        st.sampled_from(["element", "channel"]),
        st.booleans(),
    )
    def run(shape, dtype, layout, grad_layout, act, p, granularity, training):
        training = training and shape[0] * math.prod(shape[2:]) > 1
        Problem(shape, dtype, layout, act, p, granularity, training, grad_layout=grad_layout).check()

    run()


@pytest.mark.kernel
@pytest.mark.cpu
@pytest.mark.parametrize("act", [None, *functional.activations()])
@pytest.mark.parametrize("shape", [(3, 2), (3, 64), (3, 5, 7, 5), (2, 4, 40, 40)], ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_input_in_evaluation(value, layout, shape, act):
    """With running statistics no element has a say in another's gradient; where stock's own is finite, so is ours."""
    norm = {2: fusednorm.FusedBatchNorm1d, 4: fusednorm.FusedBatchNorm2d}[len(shape)]
    ours = norm(shape[1], act=act).eval()
    x = torch.randn(shape)
    x.view(-1)[1] = value
    grads = []
    for layer in (ours, ours.to_torch()):
        leaf = lay_out(x, layout).requires_grad_()
        grads.append(torch.autograd.grad(layer(leaf).sum(), leaf)[0])
    finite = torch.isfinite(grads[1])
    assert finite.sum() >= x.numel() - 1
    torch.testing.assert_close(grads[0][finite], grads[1][finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", functional.activations())
def test_large_pre_activations(act):
    """Value and gradient at any finite size: what is beyond an activation's bend is a line or a constant."""
    x = torch.tensor([[-1.0], [1.0]]) * 10.0 ** torch.arange(0, 38, 2)
    inputs, mean, var = leaf(x), torch.zeros(19), torch.ones(19)
    y = functional.batch_norm_act_drop(inputs, mean, var, act=act, order="act-norm", eps=1e-20)
    (gx,) = torch.autograd.grad(y, inputs, torch.ones_like(y))
    exact = leaf(x.double())
    expected = reference.activation(act, exact)
    (expected_gx,) = torch.autograd.grad(expected, exact, torch.ones_like(exact))
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gx, expected_gx.float(), rtol=1e-5, atol=1e-6)
