"""What torch's tests check of its own BatchNorm, lazy BatchNorm and Dropout, asked of ours.

In words of our own, from what is checked there; what the other files here test already is not repeated. Much of it is
tables of situations that both libraries are put into: where the stock layer gives a result ours gives the same, and
where it raises so does ours.
"""

import copy
import inspect
import itertools
import pickle
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from common import FLOATS, close, dtype_id, generator, leaf, spread
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fusednorm
from fusednorm import functional

SHAPES = ((6, 4), (6, 4, 5), (3, 4, 2, 5), (3, 4, 2, 2, 2))
VECTORS = ("running_mean", "running_var", "weight", "bias")
STATISTICS = VECTORS[:2]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
pytestmark = [
    pytest.mark.cpu,  # messages, formats and refusals of other backends of torch are others
    pytest.mark.filterwarnings("ignore:Lazy", "ignore:`torch.jit.script`", "ignore:for .* copying from a non-meta"),
]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Nearly all of it is a handful of numbers, for which threads would only wait."""
    threads(1)


def pair(rank=2, lazy=""):
    """The stock layer for inputs of that rank, and ours."""
    name = f"BatchNorm{max(rank - 2, 1)}d"
    return getattr(nn, f"{lazy}{name}"), getattr(fusednorm, f"{lazy}Fused{name}")


def attempt(function):
    """(result, None) or (None, exception)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def alike(got, expected):
    """Nested lists of tensors and of what can be compared; a tensor on meta has no values."""
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            alike(a, b)
    elif isinstance(expected, torch.Tensor) and expected.device.type != "meta":
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    elif isinstance(expected, torch.Tensor):
        assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    else:
        assert got == expected


def same(situation, stock, ours):
    """`situation(cls)` ends alike for both classes: the same tensors and values, or an exception of each."""
    (expected, refused), (got, raised) = attempt(lambda: situation(stock)), attempt(lambda: situation(ours))
    assert (raised is None) == (refused is None), (raised, refused)
    if raised is None:
        alike(got, expected)
    else:
        assert isinstance(raised, (RuntimeError, ValueError, TypeError)), repr(raised)
        assert len(str(raised)) > 20
    return raised


def situations(table):
    return pytest.mark.parametrize("situation", table.values(), ids=table)


def batch(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype).copy_(spread(shape, generator(5)))


# ---- vectors and statistics ------------------------------------------------------------------------------------------
class TestVectors:
    @training
    @pytest.mark.parametrize("size", [0, 1, 3, 5])
    @pytest.mark.parametrize("name", VECTORS)
    def test_of_another_size(self, name, size, training):
        def situation(cls):
            layer, vector = cls(4).train(training), torch.ones(size)
            setattr(layer, name, vector if name in STATISTICS else nn.Parameter(vector))
            return layer(batch(6, 4))

        raised = same(situation, *pair())
        assert f"{name} should contain 4 elements not {size}" in str(raised)

    @training
    @pytest.mark.parametrize("name", VECTORS)
    def test_missing(self, name, training):
        """Of the running statistics either both may be missing or none."""

        def situation(cls):
            layer = cls(4).train(training)
            setattr(layer, name, None)
            return layer(batch(6, 4))

        raised = same(situation, *pair())
        assert (raised is not None) == (name in STATISTICS)

    @training
    @pytest.mark.parametrize("alone", [True, False])
    @pytest.mark.parametrize("name", STATISTICS)
    def test_no_gradient_reaches_a_statistic(self, name, alone, training):
        """Both refuse, and say which argument it is; under no_grad it does not matter. In evaluation ours gives one."""
        x = batch(6, 4).requires_grad_(not alone)
        vectors = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
        vectors[name].requires_grad_()
        for function in (F.batch_norm, functional.batch_norm_act_drop):
            with torch.no_grad():
                function(x, **vectors, training=training)
            if function is not F.batch_norm and not training:
                function(x, **vectors, training=False).square().sum().backward()
                assert vectors[name].grad.abs().sum() > 0
                continue
            with pytest.raises(RuntimeError, match=name):
                function(x, **vectors, training=training)

    @training
    @pytest.mark.parametrize("duals", [(True, False), (False, True), (True, True)], ids=str)
    def test_no_tangent_comes_from_a_statistic(self, duals, training):
        """Where the input has one and they count, stock layers refuse running statistics with a tangent."""

        def situation(function):
            x, vectors = batch(6, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
            with forward_ad.dual_level():
                given = [forward_ad.make_dual(v, v) if dual else v for v, dual in zip(vectors, duals, strict=True)]
                y = function(forward_ad.make_dual(x, x.cos()), *given, training=training)
                return forward_ad.unpack_dual(y).tangent

        same(situation, F.batch_norm, functional.batch_norm_act_drop)

    def test_statistics_take_no_tangent(self):
        """A batch with a tangent leaves none behind in the running statistics, where evaluation would find it."""

        def situation(cls):
            layer, x = cls(4, dtype=torch.float64), batch(6, 4, dtype=torch.float64)
            with forward_ad.dual_level():
                layer(forward_ad.make_dual(x, x.cos()))
                y = layer.eval()(x)
                return [forward_ad.unpack_dual(t).tangent is None for t in (y, layer.running_mean, layer.running_var)]

        same(situation, *pair())


# ---- numbers and layouts ---------------------------------------------------------------------------------------------
class TestNumbers:
    @pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
    @shapes
    def test_normalised(self, shape, dtype):
        """Channels of any mean and scale leave with mean 0 and variance 1, or what weight and bias make of that."""
        rows, tolerance = [0, *range(2, len(shape))], {"rtol": 0.02, "atol": 0.02}
        scale = torch.tensor([0.1, 1.0, 10.0, 100.0]).view(-1, *[1] * (len(shape) - 2))
        x = (batch(*shape) * scale + 2 * scale).to(dtype)
        for affine in (False, True):
            layer = pair(len(shape))[1](4, affine=affine, dtype=dtype)
            if affine:
                nn.init.constant_(layer.weight, -2.0)
                nn.init.constant_(layer.bias, 4.0)
            var, mean = torch.var_mean(layer(x).double(), rows, correction=0)
            torch.testing.assert_close(mean, torch.full((4,), 4.0 * affine, dtype=torch.float64), **tolerance)
            torch.testing.assert_close(var, torch.full((4,), 4.0 if affine else 1.0, dtype=torch.float64), **tolerance)

    def test_empty_batch_differentiated_twice(self):
        def situation(cls):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                x = torch.empty(0, 4, requires_grad=True)
                (grad,) = torch.autograd.grad(cls(4)(x).sum(), x, create_graph=True)
                torch.autograd.grad(grad.sum(), x, allow_unused=True)
                return grad

        assert same(situation, *pair()) is None

    @training
    @pytest.mark.parametrize("shape", [(880_801, 1, 1, 1), (65_536, 1, 1, 1), (1, 65_537, 1, 2)], ids=str)
    def test_long(self, shape, training, threads):
        threads(2)
        x, grad = torch.rand(shape, generator=generator(3)), torch.randn(shape, generator=generator(4))
        results = []
        for cls, dtype in zip(pair(4)[::-1], (torch.float32, torch.float64), strict=True):
            layer, inputs = cls(shape[1], dtype=dtype).train(training), leaf(x.to(dtype))
            y = layer(inputs)
            grads = torch.autograd.grad(y, (inputs, *layer.parameters()), grad.to(dtype))
            results.append([y, *grads, layer.running_mean, layer.running_var])
        for got, exact in zip(*results, strict=True):
            close(got, exact.detach(), 10 + exact.abs().max())


# Most of them with strides that fit either memory format.
IMAGES = ((4, 8, 3, 5), (4, 1, 9, 9), (4, 9, 1, 1), (1, 9, 3, 3), (1, 1, 4, 4), (2, 3, 1, 5), (2, 3, 5, 1))
VOLUMES = ((4, 1, 2, 3, 4), (4, 5, 1, 1, 1), (1, 5, 2, 2, 1))
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))


class TestLayouts:
    @training
    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", IMAGES + VOLUMES, ids=str)
    def test_either_format(self, shape, dtypes, training):
        """Output and gradient are in the formats that stock layers give them, and the same numbers."""
        formats = torch.contiguous_format, torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x, grad = batch(*shape, dtype=dtypes[0]), torch.randn(shape).to(dtypes[0])
        for of_input, of_grad in itertools.product(formats, repeat=2):
            results = []
            for cls in pair(len(shape)):
                layer, inputs = cls(shape[1], dtype=dtypes[1]).train(training), leaf(x.to(memory_format=of_input))
                y = layer(inputs)
                results.append((y, *torch.autograd.grad(y, inputs, grad.to(memory_format=of_grad))))
            for a, b in zip(*results, strict=True):
                assert all(a.is_contiguous(memory_format=f) == b.is_contiguous(memory_format=f) for f in formats)
                torch.testing.assert_close(a, b, rtol=1.6e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-2)

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
    def test_any_permutation_in_memory(self, order):
        """The same numbers and the same noise, and of noise alone the strides that torch gives."""
        x = batch(2, 3, 4, 5)
        turned = x.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
        layer = fusednorm.FusedBatchNorm2d(3, act="gelu", drop=0.3)
        torch.testing.assert_close(layer(turned, seed=3), layer(x, seed=3))
        assert torch.equal(functional.dropout(turned, 0.3, seed=3), functional.dropout(x, 0.3, seed=3))
        assert functional.dropout(turned, 0.3).stride() == F.dropout(turned, 0.3).stride()


# ---- modules in the situations that torch's tests put them into ------------------------------------------------------
def inference_layer(cls):
    with torch.inference_mode():
        layer = cls(4)
    return layer(batch(6, 4))


def inference_input(layer):
    with torch.inference_mode():
        x = batch(6, 4)
    return layer(x)


def on_meta(cls):
    layer, x = cls(4, device="meta"), torch.empty(6, 4, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return [(t.shape, t.device) for t in (y, x.grad, layer.weight.grad, layer.running_mean)]


def loads(cls, version=2, device=None, assign=False, own=None, **options):
    """What a state dict of a stock layer leaves in the buffers, with or without the counter of version 2."""
    source = nn.BatchNorm1d(4)
    source(batch(6, 4))
    state, layer = source.state_dict(), cls(4, device=device, **options)
    if version == 1:
        del state["num_batches_tracked"]
        state._metadata[""]["version"] = 1
    if own is not None:
        layer.num_batches_tracked.fill_(own)
    report = layer.load_state_dict(state, strict=False, assign=assign)
    return [str(report), *((n, t) if t.device.type == "cpu" else (n, t.shape) for n, t in layer.state_dict().items())]


def keeps_the_tensors(cls, assign):
    state, layer = nn.BatchNorm1d(4).state_dict(), cls(4)
    layer.load_state_dict(state, assign=assign)
    return [t.data_ptr() == state[n].data_ptr() for n, t in layer.state_dict().items()]


def with_number(name, value, training=True):
    def situation(cls):
        layer = cls(4, **{name: value}).train(training)
        return layer(batch(6, 4)), layer.running_mean, layer.running_var

    return situation


BIAS = "bias" in inspect.signature(nn.BatchNorm1d).parameters  # an argument since torch 2.13
MODULES = {
    "on meta": on_meta,
    "state of version 1": lambda cls: loads(cls, version=1),
    "state of version 1 beside a count": lambda cls: loads(cls, version=1, own=5),
    "state of version 1, assigned": lambda cls: loads(cls, version=1, own=5, assign=True),
    "state of version 1 into meta": lambda cls: loads(cls, version=1, device="meta"),
    "state of version 1 assigned to meta": lambda cls: loads(cls, version=1, device="meta", assign=True),
    "state assigned to meta": lambda cls: loads(cls, device="meta", assign=True),
    "state where nothing is tracked": lambda cls: loads(cls, track_running_stats=False),
    "state without parameters": lambda cls: loads(cls, affine=False),
    "assigned tensors are kept": lambda cls: keeps_the_tensors(cls, True),
    "loaded tensors are copied": lambda cls: keeps_the_tensors(cls, False),
    "version of a state": lambda cls: list(cls(4).state_dict()._metadata.items()),
    "tracking None": lambda cls: cls(4, track_running_stats=None).eval()(batch(6, 4)),
    **{f"momentum {value}": with_number("momentum", value) for value in (2.0, -0.5, 0, 1, True, float("nan"))},
    **{f"eps {value}": with_number("eps", value) for value in (1, True, float("inf"), float("nan"))},
    **{f"eps {value} evaluated": with_number("eps", value, False) for value in (1, float("inf"), 0)},
} | ({"state without bias": lambda cls: loads(cls, bias=False)} if BIAS else {})
REFUSED_MODULES = {
    "input made in inference mode": lambda cls: inference_input(cls(4)),
    "input made in inference mode, evaluated": lambda cls: inference_input(cls(4).eval()),
    "layer made in inference mode": inference_layer,
    "input on meta": lambda cls: cls(4)(batch(6, 4).to("meta")),
    "layer on meta": lambda cls: cls(4, device="meta")(batch(6, 4)),
    "momentum of text": with_number("momentum", "0.1"),
    **{f"eps {value}": with_number("eps", value) for value in (0, -1, None, "1")},
    "eps -0.5 evaluated": with_number("eps", -0.5, False),
}


@situations(MODULES)
def test_module(situation):
    assert same(situation, *pair()) is None


@situations(REFUSED_MODULES)
def test_module_refused(situation):
    same(situation, *pair())


# ---- lazy layers -----------------------------------------------------------------------------------------------------
def described(layer):
    """Class, and kind and shape of all that a state dict holds; what is not made yet has no shape."""
    return [type(layer).__name__.replace("Fused", "")] + [
        (n, type(t).__name__, None if is_lazy(t) else t.shape) for n, t in layer.state_dict().items()
    ]


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def called(layer, *inputs):
    """Outputs, and what the layer is then."""
    return [layer(x) for x in inputs], described(layer), list(layer.state_dict().values())


def eager(x, **options):
    return random_state(pair(x.dim())[0](x.size(1), **options))


def random_state(layer):
    with torch.no_grad():
        for i, tensor in enumerate(t for t in layer.state_dict().values() if t.is_floating_point()):
            tensor.copy_(torch.linspace(0.5, 1.5 + i, tensor.numel()))
    return layer


def behind(layer, method, *inputs):
    """The layer after `method(layer)`, called."""
    method(layer)
    return called(layer, *inputs)


def made(layer, x):
    """What has become of the layer by a call."""
    layer(x)
    return layer


def loaded(layer, source):
    layer.load_state_dict(source.state_dict())
    return layer


LAZY = {
    "first": lambda lazy, x: called(lazy(), x, x + 1),
    "before": lambda lazy, x: described(lazy()),
    "before, no parameters": lambda lazy, x: described(lazy(affine=False)),
    "before, nothing tracked": lambda lazy, x: described(lazy(track_running_stats=False)),
    "no parameters": lambda lazy, x: called(lazy(affine=False), x),
    "nothing tracked": lambda lazy, x: called(lazy(track_running_stats=False), x),
    "cumulative": lambda lazy, x: called(lazy(momentum=None), x, x + 1, x + 3),
    "float64": lambda lazy, x: called(lazy(dtype=torch.float64), x.double()),
    "evaluated first": lambda lazy, x: called(lazy().eval(), x),
    "by keyword": lambda lazy, x: lazy()(input=x),
    "empty batch first": lambda lazy, x: called(lazy(), x[:0], x),
    "converted before": lambda lazy, x: called(lazy().double(), x.double()),
    "moved before": lambda lazy, x: described(lazy().to("meta")),
    "pickled before": lambda lazy, x: (described(pickled(lazy())), called(pickled(lazy(eps=0.1)), x)),
    "pickled later": lambda lazy, x: called(pickled(made(lazy(), x)), x),
    "copied later": lambda lazy, x: called(copy.deepcopy(made(lazy(), x)), x),
    "a wrong rank, then a right one": lambda lazy, x: behind(lazy(), lambda m: attempt(lambda: m(x.flatten())), x),
    "its state in another": lambda lazy, x: behind(lazy(), lambda m: m.load_state_dict(lazy().state_dict()), x),
    "its later state in an eager one": lambda lazy, x: called(loaded(eager(x), made(lazy(), x)), x),
    "the state of an eager one": lambda lazy, x: behind(lazy(), lambda m: m.load_state_dict(eager(x).state_dict()), x),
    "that state, not called": lambda lazy, x: described(loaded(lazy(), eager(x))),
    "that state, pickled": lambda lazy, x: called(pickled(loaded(lazy(), eager(x))), x),
    "reset before": lambda lazy, x: behind(lazy(), lambda m: m.reset_parameters(), x),
    "zero_grad before": lambda lazy, x: behind(lazy(), lambda m: m.zero_grad(), x),
    "an optimizer before": lambda lazy, x: behind(lazy(), lambda m: torch.optim.SGD(m.parameters(), 0.1), x),
    "has uninitialised parameters": lambda lazy, x: lazy().has_uninitialized_params(),
} | ({"no bias": lambda lazy, x: called(lazy(bias=False), x)} if BIAS else {})
REFUSED_LAZY = {
    "copied before": lambda lazy, x: copy.deepcopy(lazy()),
    "another size later": lambda lazy, x: called(lazy(), x, torch.cat([x, x], 1)),
    "a wrong rank first": lambda lazy, x: lazy()(x.unsqueeze(-1).unsqueeze(-1)),
    "one value per channel first": lambda lazy, x: lazy()(torch.ones(1, 4, *[1] * (x.dim() - 2))),
    "its state in an eager one": lambda lazy, x: eager(x).load_state_dict(lazy().state_dict()),
    "a state of another size, then": lambda lazy, x: called(loaded(lazy(), eager(torch.cat([x, x], 1))), x),
    "share_memory before": lambda lazy, x: lazy().share_memory(),
    "requires_grad_ before": lambda lazy, x: lazy().requires_grad_(False),
    "to_empty before": lambda lazy, x: lazy().to_empty(device="meta"),
    "scripted before": lambda lazy, x: torch.jit.script(lazy()),
    "counted before": lambda lazy, x: sum(p.numel() for p in lazy().parameters()),
}


@shapes
@situations(LAZY)
def test_lazy(situation, shape):
    assert same(lambda lazy: situation(lazy, batch(*shape)), *pair(len(shape), "Lazy")) is None


@shapes
@situations(REFUSED_LAZY)
def test_lazy_refused(situation, shape):
    assert same(lambda lazy: situation(lazy, batch(*shape)), *pair(len(shape), "Lazy")) is not None


# ---- dropout ---------------------------------------------------------------------------------------------------------
GRANULARITIES = {"element": 0, "sample": 1, "channel": 2}


class TestDropout:
    @pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
    @pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2), (5,), (6, 4, 3)], ids=str)
    @pytest.mark.parametrize(("p", "training"), [(0.0, True), (1.0, True), (0.0, False), (0.5, False), (1.0, False)])
    def test_without_chance(self, p, training, shape, dtype):
        """All or nothing, where numbers and gradients are those of torch; not finite ones too."""
        x = torch.randn(shape).to(dtype)
        if x.numel() > 10:
            x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        for granularity, dims in GRANULARITIES.items():
            if x.dim() < dims and training and p:
                continue
            results = []
            for function in (F.dropout, lambda *args, of=granularity: functional.dropout(*args, granularity=of)):
                ours = leaf(x)
                y = function(ours, p, training)
                results.append((y, *torch.autograd.grad(y, ours, torch.ones_like(y))))
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("turned", [False, True], ids=["dense", "turned"])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.8])
    def test_means_are_kept(self, p, granularity, turned):
        """Of the output and of the gradient, to within four and a half standard deviations of their noise."""
        shape = (1000, 300, 2, 3)
        x = torch.full(shape[::-1] if turned else shape, 0.7)
        x = leaf(x.permute(3, 2, 1, 0) if turned else x)
        y = functional.dropout(x, p, granularity=granularity)
        y.backward(torch.full(shape, 0.7))
        draws = {"element": 1_800_000, "channel": 300_000, "sample": 1000}[granularity]
        assert abs(y.mean().item() - 0.7) < 4.5 * 0.7 * (p / (1 - p) / draws) ** 0.5
        assert torch.equal(x.grad, y)

    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf"), None, "0.5", [0.5]], ids=str)
    def test_bad_probability(self, p):
        raised = same(lambda dropout: dropout(torch.ones(4), p), F.dropout, functional.dropout)
        assert "dropout probability has to be between 0 and 1" in str(raised)

    @training
    @pytest.mark.parametrize("p", [0.0, 0.5])
    @pytest.mark.parametrize("x", [None, "x", [1.0]], ids=str)
    def test_not_a_tensor(self, x, p, training):
        raised = same(lambda dropout: dropout(x, p, training), F.dropout, functional.dropout)
        assert "input" in str(raised)


# ---- what torch makes of a bare layer --------------------------------------------------------------------------------
class TestConversions:
    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None, "eps": 0.1}], ids=str)
    @shapes
    def test_sync_batch_norm(self, shape, options):
        """Shares everything, and evaluates as before."""

        def situation(cls):
            layer = random_state(cls(4, **options)).eval()
            net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
            before, after = (m.state_dict(keep_vars=True) for m in (layer, net[0]))
            assert all(after[name] is tensor for name, tensor in before.items())
            torch.testing.assert_close(net(batch(*shape)), layer(batch(*shape)))
            return repr(net), net(batch(*shape))

        assert same(situation, *pair(len(shape))) is None

    def test_folded_into_a_convolution(self):
        conv, x = nn.Conv2d(3, 4, 3).eval(), batch(2, 3, 6, 6)
        folded = [fuse_conv_bn_eval(conv, random_state(cls(4)).eval())(x) for cls in pair(4)]
        assert torch.equal(*folded)
        torch.testing.assert_close(folded[1], random_state(pair(4)[1](4)).eval()(conv(x)), rtol=1e-4, atol=1e-5)
