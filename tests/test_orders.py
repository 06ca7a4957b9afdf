"""Every order and every noise: outputs and all gradients against the reference in float64, as in test_forward_backward.

Also the identities between orders, ghost batches, and the statistics that evaluation will want.
"""

import itertools

import pytest
import torch
from common import (
    FLOATS,
    Problem,
    act_id,
    channels_last,
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

from fusednorm import functional, reference

pytestmark = pytest.mark.kernel

ORDERS = tuple(reference.ORDERS)
# Each group's orders, and one order for each place of the noise and of the activation.
WITH_DROP = tuple(order for order in ORDERS if "drop" in order)
FEW = ("norm-act-drop", "act-drop-norm", "drop-act-norm", "drop-norm-add-act", "norm-drop-add-act", "act-norm-add-drop")
# One for each way through a kernel: a bit says all, a kink, a transcendental function, a parameter with a gradient.
ACTS = ("relu", "elu", ("prelu", "channel"))
NOISES = (
    ("bernoulli", 0.4, "element"),
    ("bernoulli", 0.4, "channel"),
    ("bernoulli", 0.4, "sample"),
    ("bernoulli", 1.0, "element"),
    ("uniform", 0.8, "element"),
    ("uniform", 0.8, "channel"),
    ("uniform", 0.8, "sample"),
    ("gaussian", 0.3, "element"),
    ("gaussian", 0.3, "channel"),
    ("gaussian", 0.3, "sample"),
)

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
layouts = pytest.mark.parametrize("layout", ["first", "last"])
orders = pytest.mark.parametrize("order", ORDERS)
noises = pytest.mark.parametrize("drop", NOISES, ids=str)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def problem(shape, drop=NOISES[0], **options):
    kind, p, granularity = drop
    return Problem(shape, p=p, granularity=granularity, kind=kind, **options)


@orders
@layouts
@dtypes
@pytest.mark.parametrize("act", ACTS, ids=act_id)
def test_orders(act, dtype, layout, order):
    problem((5, 9, 3, 7), act=act, dtype=dtype, layout=layout, order=order).check()


@orders
@layouts
@training
@pytest.mark.parametrize("act", ["gelu", "hardtanh", None, ("prelu", "shared")], ids=act_id)
def test_activations(act, training, layout, order):
    problem((4, 33, 5, 3), act=act, layout=layout, order=order, training=training).check()


@orders
@layouts
@noises
def test_noises(drop, layout, order):
    problem((7, 10, 5), drop, act="elu", layout=layout, order=order).check()


@layouts
@dtypes
@noises
@pytest.mark.parametrize("order", FEW)
def test_noises_in_every_dtype(order, drop, dtype, layout):
    problem((5, 17, 3, 3), drop, act="relu", dtype=dtype, layout=layout, order=order).check()


# With bits saved for backward: long rows, a multiple of 32 channels, and where both make many tiles.
@layouts
@orders
@pytest.mark.parametrize("act", ACTS, ids=act_id)
@pytest.mark.parametrize("shape", [(9, 32, 8, 8), (2, 3, 700), (3, 64, 37, 45), (600, 64), (5, 513, 3, 3)], ids=str)
def test_large(shape, act, order, layout):
    problem(shape, act=act, layout=layout, order=order).check()


SHAPES = (
    (2, 1),
    (2, 33),
    (7, 1, 3),
    (513, 3),
    (3, 5, 1025),
    (64, 3, 1, 1),
    (33, 40, 7, 7),
    (2, 100, 2, 2),
    (1, 3, 31),
    (2, 5, 2, 3, 2),
    (600, 32),
    (70, 513),
    (3, 2000),
)


@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drop", [NOISES[0], NOISES[4], NOISES[7], NOISES[1], NOISES[8], NOISES[5]], ids=str)
@pytest.mark.parametrize("order", FEW)
def test_shapes(order, drop, shape, layout):
    problem(shape, drop, act="silu", layout=layout, order=order).check()


@pytest.mark.parametrize("order", FEW)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "last"])
@pytest.mark.parametrize("residual_layout", ["first", "sliced", "expanded"])
@pytest.mark.parametrize("grad_layout", ["first", "last", "expanded", "scalar"])
def test_layouts(grad_layout, residual_layout, layout, order):
    problem(
        (6, 7, 5, 3),
        act="tanh",
        layout=layout,
        order=order,
        residual_layout=residual_layout,
        grad_layout=grad_layout,
    ).check()


@pytest.mark.parametrize("param_dtype", FLOATS, ids=dtype_id)
@dtypes
@pytest.mark.parametrize("order", ["act-norm-drop", "norm-add-act"])
def test_mixed_dtypes(order, dtype, param_dtype):
    problem((9, 5, 3), act=("prelu", "channel"), dtype=dtype, order=order, param_dtype=param_dtype).check()


@orders
@layouts
def test_gradients_of_some(order, layout):
    """Whatever the gradients asked for, each is what it is among all."""
    q = problem((9, 32, 8, 8), act=("prelu", "channel"), layout=layout, order=order)
    everything = q.fused()
    for count in (1, 2):
        for names in itertools.combinations(q.inputs, count):
            for name, value in q.inputs.items():
                value.requires_grad_(name in names)
            for name, value in q.fused().items():
                assert same_bits(value, everything[name]), (names, name)


@pytest.mark.parametrize("order", FEW)
@layouts
def test_eval_without_noise(order, layout):
    problem((6, 5, 4), ("bernoulli", 0.0, "element"), act="relu", layout=layout, order=order, training=False).check()


# ---- identities between orders -------------------------------------------------------------------------------------
def output(x, order, act="relu", **options):
    return functional.batch_norm_act_drop(x, None, None, training=True, act=act, p=0.4, seed=3, order=order, **options)


@layouts
@dtypes
@pytest.mark.parametrize("act", ["relu", "elu", ("leaky_relu", 0.3)], ids=act_id)
def test_positively_homogeneous_activations_commute_with_dropout(act, dtype, layout):
    """f(m z) = m f(z) for m >= 0 holds for ReLU and its leaky sisters, and not for ELU."""
    x = lay_out(torch.randn(8, 5, 6, generator=generator(1)).to(dtype), layout)
    pairs = (("norm-act-drop", "norm-drop-act"), ("act-drop-norm", "drop-act-norm"))
    for one, other in pairs:
        a, b = output(x, one, act), output(x, other, act)
        if act == "elu":
            assert (a - b).abs().max() > 0.01
        else:
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


def test_noise_is_that_of_fusednorm_noise():
    """With an affine map that gives ones, the layer writes m itself: in the default order and in the staged ones."""
    x, zeros, ones = torch.randn(6, 4, 5), torch.zeros(4), torch.ones(4)
    for kind, p, granularity in NOISES:
        for order in ("norm-drop", "norm-act-drop", "norm-drop-act"):
            y = functional.batch_norm_act_drop(
                x, None, None, zeros, ones, True, p=p, noise=kind, granularity=granularity, seed=5, order=order
            )
            m = noise(x.shape, p, 5, granularity, torch.float32, kind)
            assert torch.equal(y, m), (kind, order)


@pytest.mark.parametrize("drop", NOISES, ids=str)
@pytest.mark.parametrize("order", ["drop-norm-act", "norm-act-drop-add", "norm-drop-add-act"])
def test_layouts_agree(order, drop):
    """The same logical noise in either memory format."""
    x, r = torch.randn(6, 33, 5, 5), torch.randn(6, 33, 5, 5)
    kind, p, granularity = drop

    def run(lay):
        return functional.batch_norm_act_drop(
            lay(x),
            None,
            None,
            training=True,
            act="relu",
            p=p,
            noise=kind,
            granularity=granularity,
            seed=5,
            order=order,
            residual=lay(r) if "add" in order else None,
        )

    torch.testing.assert_close(run(torch.clone), run(channels_last), rtol=1e-5, atol=1e-5)


# ---- ghost batches --------------------------------------------------------------------------------------------------
@layouts
@dtypes
@pytest.mark.parametrize("order", FEW)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((10, 5, 3), 4), ((9, 4, 3, 3), 3), ((300, 33), 128), ((11, 2), 2), ((64, 6), 16), ((5, 3, 40, 30), 2)],
    ids=str,
)
def test_ghost_batches(shape, size, order, dtype, layout):
    if shape[0] % size == 1 and len(shape) == 2:
        shape = (shape[0] + 1, *shape[1:])
    problem(shape, act="relu", dtype=dtype, layout=layout, order=order, ghost_batch_size=size).check()


@layouts
@noises
@pytest.mark.parametrize("act", [("prelu", "channel"), "tanh"], ids=act_id)
def test_ghost_batches_with_every_noise(act, drop, layout):
    """Groups that begin inside a Philox call's 8 rows."""
    for order in ("norm-act-drop", "drop-act-norm", "norm-drop-add-act"):
        problem((11, 9, 3), drop, act=act, layout=layout, order=order, ghost_batch_size=5).check()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("size", [4, 5, 128])
def test_ghost_batches_equal_chunks(size, momentum):
    """A stock BatchNorm called chunk by chunk: outputs, running statistics, number of batches."""
    from fusednorm import FusedBatchNorm1d

    x = torch.randn(14, 6, 3)
    ours, theirs = (
        FusedBatchNorm1d(6, momentum=momentum, ghost_batch_size=size),
        torch.nn.BatchNorm1d(6, momentum=momentum),
    )
    torch.testing.assert_close(ours(x), torch.cat([theirs(chunk) for chunk in x.split(size)]))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=str)
def test_ghost_batches_with_a_counter_of_another_dtype(dtype, momentum):
    """As it is behind an average of all buffers."""
    from fusednorm import FusedBatchNorm1d

    layers = [FusedBatchNorm1d(3, ghost_batch_size=2, momentum=momentum) for _ in range(2)]
    layers[1].num_batches_tracked = layers[1].num_batches_tracked.to(dtype)
    x = torch.randn(7, 3, 2)
    for layer in layers * 2:
        layer(x)
    assert layers[1].num_batches_tracked.dtype == dtype
    for a, b in zip(*(layer.buffers() for layer in layers), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, rtol=0, atol=0)


def test_a_ghost_batch_of_one_value_raises():
    with pytest.raises(ValueError, match="ghost_batch_size: expected more than 1 value per channel"):
        functional.batch_norm_act_drop(torch.randn(9, 3), None, None, training=True, ghost_batch_size=1)


# ---- statistics for evaluation ---------------------------------------------------------------------------------------
@layouts
@dtypes
@pytest.mark.parametrize("drop", NOISES, ids=str)
@pytest.mark.parametrize("ghost", [None, 3])
@pytest.mark.parametrize("order", [o for o in ORDERS if "drop" in reference.ORDERS[o][0] and "add" not in o])
def test_eval_matched_statistics(order, ghost, drop, dtype, layout):
    """The running statistics learn the values without the noise; outputs and gradients are those of ever."""
    options = {
        "act": "relu",
        "dtype": dtype,
        "layout": layout,
        "order": order,
        "momentum": 1.0,
        "ghost_batch_size": ghost,
    }
    matched = problem((8, 5, 12), drop, eval_matched_stats=True, **options)
    plain = problem((8, 5, 12), drop, **options)
    for name, value in plain.check().items():
        assert same_bits(matched.fused()[name] if name == "y" else matched.check()[name], value), name
    before = reference.ORDERS[order][0]
    clean = reference.run_stages(before, double(matched.x), "relu")[-(ghost and 8 % ghost or 8) :]
    rows = [0, 2]
    tolerance = 1e-5 if dtype != torch.float64 else 1e-12
    close(matched.running_mean, clean.mean(rows), 1.0, tolerance=tolerance)
    close(matched.running_var, clean.var(rows), 1.0, tolerance=tolerance)


@pytest.mark.parametrize("order", ["norm-act-drop", "act-norm-drop"])
def test_eval_matched_statistics_without_noise_before_the_norm(order):
    """There is nothing to match."""
    results = []
    for matched in (False, True):
        mean, var = torch.zeros(5), torch.ones(5)
        x = spread((8, 5, 12), generator(3)).float()
        functional.batch_norm_act_drop(
            x, mean, var, training=True, act="relu", p=0.5, seed=1, order=order, eval_matched_stats=matched
        )
        results.append((mean, var))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


# ---- differentiated twice -------------------------------------------------------------------------------------------
def call(order, act, drop, ghost=None, training=True):
    """The function of (x, weight, bias, residual, act_weight), the latter two where the order has them."""
    kind, p, granularity = drop

    def fused(x, weight, bias, *rest):
        rest = list(rest)
        residual = rest.pop(0) if "add" in order else None
        return functional.batch_norm_act_drop(
            x,
            torch.zeros(2, dtype=x.dtype),
            torch.ones(2, dtype=x.dtype),
            weight,
            bias,
            training,
            act=None if "act" not in order else ("prelu", rest[0]) if act == "prelu" else act,
            p=p if "drop" in order else 0.0,
            noise=kind,
            granularity=granularity,
            drop_training=True,
            order=order,
            residual=residual,
            ghost_batch_size=ghost,
            seed=5,
        )

    return fused


def arguments(order, act, shape=(4, 2, 3)):
    draw = generator(8)
    x = leaf(spread(shape, draw))
    parameters = [leaf(torch.tensor(v, dtype=torch.float64)) for v in ([0.8, 1.3], [-0.2, 0.3])]
    residual = [leaf(torch.randn(shape, generator=draw, dtype=torch.float64))] if "add" in order else []
    slope = [leaf(torch.tensor([0.3, -0.2], dtype=torch.float64))] if act == "prelu" and "act" in order else []
    return (x, *parameters, *residual, *slope)


@orders
@pytest.mark.parametrize("act", ["tanh", "relu", "prelu"])
@pytest.mark.parametrize("drop", [NOISES[0], NOISES[8]], ids=str)
def test_gradcheck(drop, act, order):
    fused, inputs = call(order, act, drop), arguments(order, act)
    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradgradcheck(fused, inputs, fast_mode=True)


@pytest.mark.parametrize("order", FEW)
def test_gradcheck_of_ghost_batches(order):
    fused, inputs = call(order, "tanh", NOISES[4], ghost=3), arguments(order, "tanh", (7, 2, 2))
    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradgradcheck(fused, inputs, fast_mode=True)


@pytest.mark.parametrize("order", [o for o in ORDERS if "add" in o])
@pytest.mark.parametrize("act", ["tanh", "relu"])
def test_twice_with_respect_to_the_residual_alone(act, order):
    fused, (x, weight, bias, residual) = call(order, act, NOISES[0]), arguments(order, act)
    constants = [t.detach() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda r: fused(*constants, r), residual)
    assert torch.autograd.gradgradcheck(lambda r: fused(*constants, r), residual)
    (grad,) = torch.autograd.grad(fused(*constants, residual).square().sum(), residual)
    again = torch.func.grad(lambda r: fused(*constants, r).square().sum())(residual.detach())
    torch.testing.assert_close(again, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("act", [*functional.activations(), ("hardtanh", 0.0, 1.5), ("softplus", 2.0, 1.0)], ids=act_id)
def test_derivatives_at_kinks(act, dtype):
    """Ahead of the norm an activation meets its very kinks: the derivative there is torch's."""
    points = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0, 6.0, 20.0, 10.0], dtype=dtype).repeat(2, 1).T
    x = leaf(points)
    y = functional.batch_norm_act_drop(x, torch.zeros(2), torch.ones(2), act=act, order="act-norm", eps=1e-12)
    (grad,) = torch.autograd.grad(y.sum(), x)
    twin = leaf(points.float())
    (expected,) = torch.autograd.grad(reference.run_stages(("act",), twin, act).sum(), twin)
    torch.testing.assert_close(grad.float(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("order", [o for o in ORDERS if "add" in o])
@layouts
def test_twice_with_saved_bits(order, layout):
    """Where a bit stands for the residual, the second derivative has to do without the residual, too."""
    q = problem((9, 32, 8, 8), act="relu", layout=layout, order=order, dtype=torch.float64)
    results = []
    m, act = noise(q.x.shape, q.options["p"], q.seed), q.act
    for y in (
        q.forward(),
        reference.batch_norm_act_drop(
            q.x, None, None, q.weight, q.bias, True, act=act, order=order, residual=q.residual, noise=m
        ),
    ):
        grads = torch.autograd.grad(y, [q.x, q.residual], q.grad, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append([*grads, *torch.autograd.grad(penalty, [q.x, q.weight])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ["norm-add-act", "norm-add-act-drop", "norm-act-drop-add"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
@layouts
def test_residual_changed_afterwards(order, act, layout):
    """Backward reads it ahead of an activation that no bit tells all about; then torch says that it has changed."""
    q = problem((3, 32, 4, 4), act=act, layout=layout, order=order)
    output = q.forward()
    leaves = [q.x, q.weight]
    expected = torch.autograd.grad(output, leaves, q.grad, retain_graph=True)
    with torch.no_grad():
        q.residual.add_(1)
    if act == "gelu" and order != "norm-act-drop-add":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output, leaves, q.grad)
    else:
        for got, grad in zip(torch.autograd.grad(output, leaves, q.grad), expected, strict=True):
            assert torch.equal(got, grad)
