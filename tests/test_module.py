"""The modules stand in for nn.BatchNorm + activation + dropout: same arguments, state, errors and idioms."""

import copy
import inspect
import io
import itertools
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, lay_out, noise
from torch import nn
from torch.nn.utils import parametrize

import fusednorm
from fusednorm import functional

PAIRS = (
    (nn.BatchNorm1d, fusednorm.FusedBatchNorm1d),
    (nn.BatchNorm2d, fusednorm.FusedBatchNorm2d),
    (nn.BatchNorm3d, fusednorm.FusedBatchNorm3d),
)
SHAPES = {
    nn.BatchNorm1d: ((6, 4), (6, 4, 5)),
    nn.BatchNorm2d: ((3, 4, 5, 2),),
    nn.BatchNorm3d: ((2, 4, 3, 2, 2),),
}
pairs = pytest.mark.parametrize(("stock", "fused"), PAIRS, ids=["1d", "2d", "3d"])


def randomise(layer):
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


def outcome(function):
    """What a call does: (True, result), or (False, type and text of the exception)."""
    try:
        return True, function()
    except Exception as error:
        return False, (type(error), str(error))


def twins(stock, fused, **options):
    """A stock layer and ours with the same random state."""
    theirs = randomise(stock(4, **options))
    ours = fused(4, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def stable_id(value):
    """Without the address of an object: workers that share the tests out must agree on their names."""
    return type(value).__name__ if type(value) is object else str(value)


class UserReLU(nn.ReLU):
    pass


class UserDropout(nn.Dropout):
    pass


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class TestBatchNorm:
    """With act=None and drop=None the module is nn.BatchNorm."""

    @pairs
    def test_signature(self, stock, fused):
        ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (fused, stock))
        positional = [p for p in theirs.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in ours.values() if p.kind == p.POSITIONAL_OR_KEYWORD] == [p.name for p in positional]
        for p in positional:
            assert ours[p.name].default == p.default, p.name
        assert ours["act"].default is None
        assert ours["drop"].default is None
        assert ours["order"].default == "norm-act-drop"

    @pytest.mark.parametrize("momentum", [None, 0.1])
    def test_without_a_counter(self, momentum):
        ours, theirs = (cls(4, momentum=momentum) for cls in (fusednorm.FusedBatchNorm1d, nn.BatchNorm1d))
        ours.num_batches_tracked = theirs.num_batches_tracked = None
        x = torch.randn(9, 4)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_var, theirs.running_var)

    @pairs
    def test_subclass(self, stock, fused):
        assert issubclass(fused, stock)
        assert "dropout" not in fused.__name__.lower()

    @pairs
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"affine": False},
            {"track_running_stats": False},
            {"momentum": None},
            {"eps": 1e-3, "momentum": 0.01},
            {"bias": False},
        ],
        ids=str,
    )
    def test_same_results(self, stock, fused, options, training):
        if "bias" in options and "bias" not in inspect.signature(stock).parameters:
            pytest.skip("this torch has no bias=")
        theirs, ours = twins(stock, fused, **options)
        for shape, layout in itertools.product(SHAPES[stock], ("first", "last")):
            results = []
            for layer in (theirs, ours):
                layer.train(training)
                torch.manual_seed(1)
                x = lay_out(torch.randn(shape), layout).requires_grad_()
                y = layer(x)
                grads = torch.autograd.grad(y, (x, *layer.parameters()), torch.randn(shape))
                results.append((y, *grads, *layer.buffers()))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @pairs
    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
    def test_state_dict_both_ways(self, stock, fused, options):
        theirs = randomise(stock(4, **options))
        ours = fused(4, **options, act=("elu", 0.5), drop=0.3)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
        again = stock(4, **options)
        again.load_state_dict(randomise(ours).state_dict(), strict=True)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[name])

    @pairs
    def test_old_state_dict(self, stock, fused):
        """Version 1 of it had no num_batches_tracked."""
        state = stock(4).state_dict()
        del state["num_batches_tracked"], state._metadata
        ours = fused(4, act="relu")
        ours.load_state_dict(state)
        assert int(ours.num_batches_tracked) == 0

    @pairs
    @pytest.mark.parametrize(
        "call",
        [
            lambda layer: layer(4)(torch.randn(4)),
            lambda layer: layer(4)(torch.randn(3, 4)),
            lambda layer: layer(4)(torch.randn(3, 4, 2)),
            lambda layer: layer(4)(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(4)(torch.randn(3, 4, 2, 2, 2)),
            lambda layer: layer(4)(torch.randn(3, 4, 2, 2, 2, 2)),
            lambda layer: layer(4)(torch.randn(1, 4)),
            lambda layer: layer(4)(torch.randn(1, 4, 1)),
            lambda layer: layer(4)(torch.randn(1, 4, 1, 1)),
            lambda layer: layer(4)(torch.randn(1, 4, 1, 1, 1)),
            lambda layer: layer(4).eval()(torch.randn(1, 4)),
            lambda layer: layer(4, track_running_stats=False).eval()(torch.randn(1, 4)),
            lambda layer: layer(5)(torch.randn(3, 4)),
            lambda layer: layer(5)(torch.randn(3, 4, 2)),
            lambda layer: layer(5)(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(5)(torch.randn(3, 4, 2, 2, 2)),
            lambda layer: layer(5, affine=False)(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(5, affine=False, track_running_stats=False)(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(5, track_running_stats=False)(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(5).eval()(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(4, eps=0.0)(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(4, eps=0.0).eval()(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(4, eps=-1.0)(torch.randn(3, 4, 2, 2)),
            lambda layer: layer(),
            lambda layer: layer("4"),
            lambda layer: layer(-1),
            lambda layer: layer(4, bogus=1),
            lambda layer: layer(4)("x"),
            lambda layer: layer(4)(None),
            lambda layer: layer(4).load_state_dict({}),
        ],
        ids=lambda call: inspect.getsource(call).split("lambda layer: ")[1].strip().rstrip(","),
    )
    def test_same_errors(self, stock, fused, call):
        """As the running torch gives them: both are run, and where torch refuses we do, in its words."""

        def anonymous(text):
            return re.sub(r"\w+(?=\.__init__)", "", text.replace(fused.__name__, stock.__name__))

        fine, theirs = outcome(lambda: call(stock))
        our_fine, ours = outcome(lambda: call(fused))
        assert our_fine == fine, (ours, theirs)
        if not fine:
            assert ours[0] is theirs[0]
            assert anonymous(ours[1]) == anonymous(theirs[1])

    @pairs
    def test_empty_batch(self, stock, fused):
        theirs, ours = twins(stock, fused)
        for shape in SHAPES[stock]:
            x = torch.empty(0, *shape[1:])
            for layer in (theirs, ours):
                y = layer(x)
                assert y.shape == x.shape
                y.sum().backward()
                assert torch.equal(layer.weight.grad, torch.zeros(4))
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert torch.equal(a, b)


class TestChildren:
    def test_real_modules(self):
        layer = fusednorm.FusedBatchNorm2d(4, act="relu", drop=0.3)
        assert type(layer.act) is nn.ReLU
        assert type(layer.drop) is nn.Dropout
        assert layer.drop.p == 0.3
        assert {"act", "drop"} <= {name for name, _ in layer.named_children()}

    @pytest.mark.parametrize("name", functional.activations())
    def test_every_name(self, name):
        layer = fusednorm.FusedBatchNorm1d(4, act=name).eval()
        assert isinstance(layer.act, nn.Module)
        x = torch.randn(6, 4)
        expected = functional.batch_norm_act_drop(x, layer.running_mean, layer.running_var, act=name)
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize(
        ("act", "module"),
        [
            (("leaky_relu", 0.2), nn.LeakyReLU(0.2)),
            (("elu", 0.5), nn.ELU(0.5)),
            (("gelu", "tanh"), nn.GELU("tanh")),
            (("hardtanh", 0.0, 20.0), nn.Hardtanh(0.0, 20.0)),
            (("softplus", 2.0, 5.0), nn.Softplus(2.0, 5.0)),
            ("relu6", nn.ReLU6()),
            ("hardswish", nn.Hardswish()),
            ("mish", nn.Mish()),
            ("identity", nn.Identity()),
            ("silu", nn.SiLU()),
        ],
        ids=str,
    )
    def test_name_and_module_are_the_same(self, act, module):
        by_name, by_module = (fusednorm.FusedBatchNorm1d(4, act=a) for a in (act, module))
        assert type(by_name.act) is type(module)
        assert by_module.act is module
        x = torch.randn(9, 4)
        assert torch.equal(by_name(x), by_module(x))
        torch.testing.assert_close(
            by_name.eval()(x), module(F.batch_norm(x, by_name.running_mean, by_name.running_var))
        )

    def test_parameters_of_a_child_are_read_at_the_call(self):
        layer = fusednorm.FusedBatchNorm1d(4, act=nn.LeakyReLU(0.2)).eval()
        x = torch.randn(9, 4)
        layer.act.negative_slope = 0.5
        z = F.batch_norm(x, layer.running_mean, layer.running_var)
        torch.testing.assert_close(layer(x), F.leaky_relu(z, 0.5))

    def test_child_exchanged_later(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu").eval()
        layer.act = nn.Tanh()
        x = torch.randn(9, 4)
        torch.testing.assert_close(layer(x), torch.tanh(F.batch_norm(x, layer.running_mean, layer.running_var)))

    def test_zero_drop_is_a_real_dropout(self):
        """So that a schedule can raise it."""
        layer = fusednorm.FusedBatchNorm1d(4, drop=0.0)
        assert type(layer.drop) is nn.Dropout
        x = torch.randn(400, 4)
        assert int((layer(x) == 0).sum()) == 0
        layer.drop.p = 0.5
        assert 600 < int((layer(x) == 0).sum()) < 1000
        layer.drop.p = 1.0
        assert int((layer(x) == 0).sum()) == 1600

    def test_frozen_statistics_with_live_noise(self):
        layer = fusednorm.FusedBatchNorm1d(4, drop=0.5)
        layer.eval()
        layer.drop.train()
        before = [buffer.clone() for buffer in layer.buffers()]
        x = torch.randn(400, 4)
        y = layer(x, seed=3)
        z = F.batch_norm(x, layer.running_mean, layer.running_var)
        torch.testing.assert_close(y, z * noise(x.shape, 0.5, 3, dtype=torch.float32))
        assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))

    def test_live_statistics_with_dead_noise(self):
        layer = fusednorm.FusedBatchNorm1d(4, drop=0.5)
        layer.drop.eval()
        x = torch.randn(400, 4)
        torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True))
        assert int(layer.num_batches_tracked) == 1

    @pytest.mark.parametrize("idiom", ["isinstance", "class name"])
    def test_monte_carlo_dropout(self, idiom):
        """The two ways people switch dropout on for prediction; neither may touch the statistics."""
        model = nn.Sequential(nn.Linear(4, 4), fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.5))
        model.eval()
        for module in model.modules():
            by_type = isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
            if by_type if idiom == "isinstance" else "dropout" in type(module).__name__.lower():
                module.train()
        x = torch.randn(64, 4)
        assert not torch.equal(model(x), model(x))
        assert int(model[1].num_batches_tracked) == 0

    def test_inplace_children(self):
        x = torch.randn(9, 4)
        kept = x.clone()
        layer = fusednorm.FusedBatchNorm1d(4, act=nn.ReLU(inplace=True), drop=nn.Dropout(0.5, inplace=True))
        layer(x)
        layer.eval()(x)
        assert torch.equal(x, kept)

    def test_inplace_children_of_an_identity_chain(self):
        """A composition with nothing before the in-place child would write the input."""
        x = torch.randn(9, 4)
        kept = x.clone()
        layer = fusednorm.FusedBatchNorm1d(4, act=UserReLU(inplace=True), drop=UserDropout(0.5, inplace=True))
        layer(x)
        assert torch.equal(x, kept)


class TestNotFused:
    """A child that is more than its type says is called, not guessed at."""

    @pytest.mark.parametrize("child", ["act", "drop"])
    @pytest.mark.parametrize(
        "hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
    )
    def test_hooks_fire(self, hook, child):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.5)
        seen = []
        handle = getattr(getattr(layer, child), hook)(lambda *args: seen.append(args))
        x = torch.randn(9, 4, requires_grad=True)
        layer(x).sum().backward()
        assert len(seen) == 1
        handle.remove()
        layer(x).sum().backward()
        assert len(seen) == 1

    def test_hook_may_change_the_result(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu")
        layer.act.register_forward_hook(lambda module, args, output: output + 100)
        assert (layer(torch.randn(9, 4)) >= 100).all()

    def test_hook_on_the_layer_itself(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu")
        seen = []
        layer.register_forward_hook(lambda *args: seen.append(args))
        layer(torch.randn(9, 4))
        assert len(seen) == 1

    def test_same_numbers_as_the_stock_layers(self):
        """Called with the stock generator the composition is the stock composition, mask and all."""
        x = torch.randn(9, 4)
        ours = fusednorm.FusedBatchNorm1d(4, act=UserReLU(), drop=UserDropout(0.5))
        stock = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
        results = []
        for model in (ours, stock):
            torch.manual_seed(4)
            results.append(model(x))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(ours.running_var, stock[0].running_var)
        assert int(ours.num_batches_tracked) == 1

    def test_users_modules(self):
        x = torch.randn(9, 4)
        layer = fusednorm.FusedBatchNorm1d(4, act=Double(), drop=nn.Dropout(0.0))
        torch.testing.assert_close(layer(x), 2 * F.batch_norm(x, None, None, training=True))

    def test_instance_with_its_own_forward(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu")
        layer.act.forward = lambda x: x - 1
        x = torch.randn(9, 4)
        torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True) - 1)

    def test_parametrised_child(self):
        class Negative(nn.Module):
            def forward(self, x):
                return -x

        layer = fusednorm.FusedBatchNorm1d(4, act=nn.PReLU(4))
        parametrize.register_parametrization(layer.act, "weight", Negative())
        x = torch.randn(9, 4)
        torch.testing.assert_close(layer(x), F.prelu(F.batch_norm(x, None, None, training=True), layer.act.weight))

    def test_parametrised_weight_of_the_layer(self):
        class Exp(nn.Module):
            def forward(self, x):
                return x.exp()

        layer = fusednorm.FusedBatchNorm1d(4, act="relu")
        parametrize.register_parametrization(layer, "weight", Exp())
        x = torch.randn(9, 4)
        y = layer(x)
        expected = F.batch_norm(x, None, None, torch.full((4,), 1.0).exp(), torch.zeros(4), training=True).relu()
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        assert layer.parametrizations.weight.original.grad is not None


ORDERS = tuple(fusednorm.reference.ORDERS)


def staged(order, norm, x, residual, **children):
    """The stock layers one after the other."""
    children["norm"] = norm
    for stage in order.split("-"):
        x = x + residual if stage == "add" else children[stage](x)
    return x


class TestOrders:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("user", ["act", "drop", "both", "neither"])
    def test_like_the_stock_layers(self, user, order):
        """Whichever children have to be called, and whichever are fused: results, gradients, statistics."""
        act = (UserReLU if user in ("act", "both") else nn.ReLU)() if "act" in order else None
        drop = (UserDropout(0.5) if user in ("drop", "both") else nn.Dropout(0.0)) if "drop" in order else None
        ours, norm = fusednorm.FusedBatchNorm1d(4, act=act, drop=drop, order=order), nn.BatchNorm1d(4)
        x, residual, results = torch.randn(9, 4, 3), torch.randn(9, 4, 3), []
        for model in (ours, lambda *args: staged(order, norm, *args, act=act, drop=drop)):
            torch.manual_seed(4)
            leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
            adds = "add" in order
            y = model(*leaves) if adds or model is not ours else model(leaves[0])
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves[: 1 + adds])))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.running_var, norm.running_var)
        assert int(ours.num_batches_tracked) == 1

    @pytest.mark.parametrize("order", [order for order in ORDERS if "act" in order])
    def test_input_is_never_written(self, order):
        for act in (nn.ReLU(inplace=True), UserReLU(inplace=True)):
            layer = fusednorm.FusedBatchNorm1d(4, act=act, order=order)
            x, residual = torch.randn(9, 4), torch.randn(9, 4)
            copies = x.clone(), residual.clone()
            layer(x, residual) if "add" in order else layer(x)
            assert torch.equal(x, copies[0])
            assert torch.equal(residual, copies[1])

    def test_evaluation_without_noise(self):
        for order in ORDERS:
            act, drop = ("silu" if "act" in order else None), (0.5 if "drop" in order else None)
            layer = fusednorm.FusedBatchNorm1d(4, act=act, drop=drop, order=order).eval()
            x, residual = torch.randn(9, 4), torch.randn(9, 4)
            expected = staged(order, nn.BatchNorm1d(4).eval(), x, residual, act=F.silu, drop=lambda x: x)
            torch.testing.assert_close(layer(x, residual) if "add" in order else layer(x), expected)

    def test_a_child_without_a_place(self):
        with pytest.raises(ValueError, match="act: expected None"):
            fusednorm.FusedBatchNorm1d(4, act="relu", order="norm-drop")
        with pytest.raises(ValueError, match="drop: expected None"):
            fusednorm.FusedBatchNorm1d(4, drop=0.5, order="act-norm")

    def test_a_child_without_a_place_later(self):
        for name, child in (("act", nn.ReLU()), ("drop", nn.Dropout(0.5))):
            layer = fusednorm.FusedBatchNorm1d(4, order="norm")
            setattr(layer, name, child)
            with pytest.raises(ValueError, match=f"{name}: expected None"):
                layer(torch.randn(9, 4))

    def test_seed_where_a_child_is_called(self):
        x = torch.randn(9, 4)
        fusednorm.FusedBatchNorm1d(4, act=UserReLU())(x, seed=3)
        with pytest.raises(ValueError, match="seed: expected None, as UserDropout"):
            fusednorm.FusedBatchNorm1d(4, drop=UserDropout(0.5))(x, seed=3)

    @pytest.mark.parametrize(
        "residual",
        [torch.randn(2, 9, 4), torch.randn(9, 4).double(), torch.randn(4), torch.randn(9, 4).bfloat16()],
        ids=str,
    )
    @pytest.mark.parametrize("order", ["norm-act-add", "norm-add-act", "norm-drop-add-act", "act-norm-add-drop"])
    @pytest.mark.parametrize("act", [nn.ReLU, UserReLU])
    def test_residual_as_plus_takes_it(self, act, order, residual):
        """Broadcast and promoted; the noise stays that of the seed."""
        x, p = torch.randn(9, 4), 0.5 if "drop" in order else None
        layer, norm = fusednorm.FusedBatchNorm1d(4, act=act(), drop=p, order=order), nn.BatchNorm1d(4)
        shape = torch.broadcast_shapes(x.shape, residual.shape) if order.endswith("add-drop") else x.shape
        m = noise(shape, 0.5, 3, dtype=torch.float32)
        results = []
        for model in (
            lambda *args: layer(*args, seed=3),
            lambda *args: staged(order, norm, *args, act=nn.ReLU(), drop=lambda v: v * m.to(v.dtype)),
        ):
            leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
            y = model(*leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(
                got, expected, rtol=1e-2 if residual.dtype == torch.bfloat16 else 1e-4, atol=1e-3
            )
        assert int(layer.num_batches_tracked) == 1

    def test_matched_statistics_need_noise_ahead(self):
        with pytest.raises(ValueError, match="eval_matched_stats"):
            fusednorm.FusedBatchNorm1d(4, drop=0.5, eval_matched_stats=True)

    def test_prelu_is_where_the_layer_is(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="prelu", device="meta", dtype=torch.float64)
        assert (layer.act.weight.device.type, layer.act.weight.dtype) == ("meta", torch.float64)
        layer = fusednorm.FusedBatchNorm1d.from_torch(nn.BatchNorm1d(4, dtype=torch.float64), act="prelu")
        assert layer.act.weight.dtype == torch.float64

    def test_residual(self):
        layer = fusednorm.FusedBatchNorm1d(4, order="norm-add")
        with pytest.raises(ValueError, match="residual: expected a tensor"):
            layer(torch.randn(9, 4))
        with pytest.raises((ValueError, RuntimeError), match="residual: expected shape"):
            layer(torch.randn(9, 4), torch.randn(9, 3))
        assert int(layer.num_batches_tracked) == 0

    def test_prelu_weight_learns(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="prelu")
        assert isinstance(layer.act, nn.PReLU)
        layer(torch.randn(9, 4)).sum().backward()
        assert layer.act.weight.grad.shape == (1,)
        assert layer.act.weight.grad.abs() > 0

    def test_repr(self):
        layer = fusednorm.FusedBatchNorm1d(4, order="drop-norm", drop=0.5, ghost_batch_size=8, eval_matched_stats=True)
        assert all(word in repr(layer) for word in ("drop-norm", "ghost_batch_size=8", "eval_matched_stats=True"))

    @pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
    def test_bad_ghost_batch_size(self, size):
        with pytest.raises(ValueError, match="ghost_batch_size"):
            fusednorm.FusedBatchNorm1d(4, ghost_batch_size=size)

    def test_from_torch_takes_the_options(self):
        bn = nn.BatchNorm1d(4)
        layer = fusednorm.FusedBatchNorm1d.from_torch(
            bn, nn.ReLU(), nn.Dropout(0.5), order="act-drop-norm", ghost_batch_size=8, eval_matched_stats=True
        )
        assert (layer.order, layer.ghost_batch_size, layer.eval_matched_stats) == ("act-drop-norm", 8, True)
        assert layer.weight is bn.weight


CHANNEL = (
    (fusednorm.FusedBatchNorm1d, nn.Dropout1d, (40, 16, 5)),
    (fusednorm.FusedBatchNorm2d, nn.Dropout2d, (40, 16, 3, 2)),
    (fusednorm.FusedBatchNorm3d, nn.Dropout3d, (40, 16, 2, 1, 2)),
)


def varies(y):
    """Whether the zeros of y differ within each dimension: what tells one granularity from another."""
    zero = y == 0
    return [bool((zero != zero.narrow(dim, 0, 1)).any()) for dim in range(y.dim())]


class TestChannelDropout:
    @pytest.mark.parametrize(("fused", "drop", "shape"), CHANNEL, ids=["1d", "2d", "3d"])
    def test_natural_ranks(self, fused, drop, shape):
        layer = fused(16, drop=drop(0.4))
        x = torch.randn(shape)
        y = layer(x, seed=8)
        expected = F.batch_norm(x, None, None, training=True) * noise(shape, 0.4, 8, "channel", torch.float32)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)

    def test_dropout1d_on_rows(self):
        """nn.Dropout1d takes (N, C) for one sample of N channels and drops whole rows."""
        x = torch.randn(40, 4)
        ours = fusednorm.FusedBatchNorm1d(4, act="tanh", drop=nn.Dropout1d(0.5))
        stock = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout1d(0.5))
        results = []
        for model in (ours, stock):
            torch.manual_seed(4)
            results.append(model(x))
        torch.testing.assert_close(*results)
        assert 0 < int((results[0] == 0).all(1).sum()) < 40

    @pytest.mark.parametrize("drop", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
    @pytest.mark.parametrize(
        ("stock", "fused", "shape"),
        [(*PAIRS[0], (40, 4)), (*PAIRS[0], (40, 4, 9)), (*PAIRS[1], (40, 4, 3, 3)), (*PAIRS[2], (40, 4, 3, 3, 2))],
        ids=["2-D", "3-D", "4-D", "5-D"],
    )
    def test_like_the_stock_module_at_every_rank(self, stock, fused, shape, drop):
        """The zeros vary in the same dimensions, or both refuse, or ours refuses."""
        x = torch.randn(shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fine, expected = outcome(lambda: nn.Sequential(stock(4), drop(0.5))(x))
            our_fine, got = outcome(lambda: fused(4, drop=drop(0.5))(x))
        if not our_fine:
            assert got[0] in (RuntimeError, ValueError)
            assert not fine or len(got[1]) > 20
            return
        assert fine, expected
        assert varies(got) == varies(expected)


class TestFromTorch:
    @pairs
    def test_shares_what_it_converts(self, stock, fused):
        bn = randomise(stock(4, eps=1e-3, momentum=0.02))
        ours = fused.from_torch(bn, act="relu", drop=0.3)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            assert getattr(ours, name) is getattr(bn, name), name
        assert (vars(ours)["eps"], ours.momentum, ours.training) == (1e-3, 0.02, bn.training)
        x = torch.randn(SHAPES[stock][0])
        ours(x).sum().backward()
        assert bn.weight.grad is not None
        assert int(bn.num_batches_tracked) == 1

    @pairs
    def test_frozen_layer_stays_frozen(self, stock, fused):
        bn = randomise(stock(4)).eval()
        bn.requires_grad_(False)
        ours = fused.from_torch(bn, act="relu")
        assert not ours.training
        assert not any(p.requires_grad for p in ours.parameters())
        x = torch.randn(SHAPES[stock][0])
        torch.testing.assert_close(ours(x), bn(x).relu())

    def test_takes_stock_layers(self):
        bn, act, drop = nn.BatchNorm2d(4), nn.ELU(0.5), nn.Dropout2d(0.2)
        ours = fusednorm.FusedBatchNorm2d.from_torch(bn, act, drop)
        assert ours.act is act
        assert ours.drop is drop

    @pytest.mark.parametrize(
        "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
    )
    def test_every_kind(self, options):
        bn = nn.BatchNorm2d(4, **options, dtype=torch.float64)
        ours = fusednorm.FusedBatchNorm2d.from_torch(bn, act="relu")
        x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
        torch.testing.assert_close(ours(x), copy.deepcopy(bn)(x).relu())
        assert list(ours.state_dict()) == list(bn.state_dict())

    def test_refuses_another_rank(self):
        with pytest.raises((TypeError, ValueError)):
            fusednorm.FusedBatchNorm2d.from_torch(nn.BatchNorm1d(4))


class TestArguments:
    @pytest.mark.parametrize(
        "act", ["nope", ("nope", 1.0), ("relu", 1.0, 2.0), 3, object(), (), nn.ReLU], ids=stable_id
    )
    def test_bad_act(self, act):
        with pytest.raises((ValueError, TypeError)) as error:
            fusednorm.FusedBatchNorm1d(4, act=act)
        if act == "nope":
            assert error.type is ValueError
            assert all(name in str(error.value) for name in ("relu", "gelu", "softplus"))

    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
    def test_bad_p(self, p):
        with pytest.raises(ValueError, match="between 0 and 1"):
            fusednorm.FusedBatchNorm1d(4, drop=p)(torch.randn(6, 4))

    @pytest.mark.parametrize("drop", ["x", object(), nn.Dropout, [0.1]], ids=stable_id)
    def test_bad_drop(self, drop):
        with pytest.raises((ValueError, TypeError)):
            fusednorm.FusedBatchNorm1d(4, drop=drop)

    @pytest.mark.parametrize("order", ["act", "norm-norm", "norm-act-act", "", "norm,act", "drop-add-norm", 3])
    def test_senseless_order(self, order):
        with pytest.raises((ValueError, TypeError)):
            fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.1, order=order)

    def test_p_set_to_nonsense_later(self):
        layer = fusednorm.FusedBatchNorm1d(4, drop=0.5)
        layer.drop.p = 1.5
        with pytest.raises(ValueError, match="between 0 and 1"):
            layer(torch.randn(6, 4))

    def test_alpha_dropout_is_not_dropout(self):
        """It either runs as itself or is refused; it is never taken for Bernoulli noise."""
        fine, layer = outcome(lambda: fusednorm.FusedBatchNorm1d(4, drop=nn.AlphaDropout(0.5)))
        if fine:
            x = torch.randn(40, 4)
            torch.manual_seed(1)
            got = layer(x)
            torch.manual_seed(1)
            torch.testing.assert_close(got, F.alpha_dropout(F.batch_norm(x, None, None, training=True), 0.5, True))
        else:
            assert layer[0] in (ValueError, TypeError)

    @pytest.mark.parametrize(
        "seed", [torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor([1, 2]), "1", 1.5], ids=str
    )
    def test_bad_seed(self, seed):
        layer = fusednorm.FusedBatchNorm1d(4, drop=0.5)
        with pytest.raises((ValueError, RuntimeError, TypeError), match="seed"):
            layer(torch.randn(6, 4), seed=seed)

    def test_seed_on_another_device(self):
        layer = fusednorm.FusedBatchNorm1d(4, drop=0.5)
        with pytest.raises((ValueError, RuntimeError), match="seed"):
            layer(torch.randn(6, 4), seed=torch.zeros((), dtype=torch.int64, device="meta"))

    def test_residual_needs_an_order_that_adds(self):
        with pytest.raises(ValueError, match="residual"):
            fusednorm.FusedBatchNorm1d(4)(torch.randn(6, 4), torch.randn(6, 4))


class TestLife:
    @staticmethod
    def model():
        torch.manual_seed(2)
        return randomise(fusednorm.FusedBatchNorm2d(4, act=("leaky_relu", 0.2), drop=0.4))

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, way):
        layer = self.model()
        if way == "deepcopy":
            other = copy.deepcopy(layer)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        x = torch.randn(3, 4, 5, 5)
        results = []
        for each in (layer, other):
            torch.manual_seed(6)
            results.append(each(x))
        assert torch.equal(*results)
        assert other.running_mean.data_ptr() != layer.running_mean.data_ptr()
        assert torch.equal(other.running_mean, layer.running_mean)

    def test_repr(self):
        text = repr(self.model())
        assert "FusedBatchNorm2d(" in text
        assert "LeakyReLU" in text
        assert "Dropout(p=0.4" in text
        for layer in (fusednorm.FusedBatchNorm1d(4), fusednorm.FusedBatchNorm3d(4, affine=False, act="relu")):
            assert "4, eps=1e-05" in repr(layer)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_conversion(self, dtype):
        layer = self.model().to(dtype)
        x = torch.randn(3, 4, 5, 5, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert layer.weight.grad.dtype == dtype
        assert layer.running_mean.dtype == dtype
        assert layer.num_batches_tracked.dtype == torch.int64

    def test_meta_construction(self):
        layer = fusednorm.FusedBatchNorm2d(4, act="relu", drop=0.1, device="meta", dtype=torch.bfloat16)
        assert layer.weight.device.type == "meta"
        layer = layer.to_empty(device=DEVICE)
        layer.reset_parameters()
        assert torch.isfinite(layer(torch.randn(3, 4, 2, 2).bfloat16())).all()

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_two_forwards_before_one_backward(self, training):
        """What backward needs belongs to its own forward, not to the module."""
        layer = randomise(fusednorm.FusedBatchNorm2d(4, act="tanh", drop=0.4)).train(training)
        layer.drop.train()
        inputs = [torch.randn(3, 4, 5, 5).mul(scale).requires_grad_() for scale in (1.0, 10.0)]
        alone = []
        state = copy.deepcopy(layer.state_dict())
        for i, x in enumerate(inputs):
            layer.load_state_dict(state)
            alone.append(torch.autograd.grad(layer(x, seed=i).sum(), (x, *layer.parameters())))
        layer.load_state_dict(state)
        outputs = [layer(x, seed=i) for i, x in enumerate(inputs)]
        with torch.no_grad():
            layer.running_mean.fill_(77)
            layer.running_var.fill_(77)
        together = torch.autograd.grad(sum(y.sum() for y in outputs), (*inputs, *layer.parameters()))
        for i in (0, 1):
            assert torch.equal(together[i], alone[i][0])
        for i in (1, 2):
            torch.testing.assert_close(together[i + 1], alone[0][i] + alone[1][i])

    def test_shared_by_two_places(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.3)
        stock = nn.BatchNorm1d(4)
        x = torch.randn(30, 4)
        ours = layer(layer(x, seed=1), seed=2)
        m1, m2 = (noise((30, 4), 0.3, seed, dtype=torch.float32) for seed in (1, 2))
        theirs = stock(stock(x).relu() * m1).relu() * m2
        torch.testing.assert_close(ours, theirs)
        for y, parameters in ((ours, layer.parameters()), (theirs, stock.parameters())):
            y.square().sum().backward()
            assert all(p.grad is not None for p in parameters)
        torch.testing.assert_close(layer.weight.grad, stock.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.running_var, stock.running_var)

    def test_update_bn(self):
        ours = nn.Sequential(nn.Linear(4, 4), fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.5), nn.Linear(4, 2))
        stock = nn.Sequential(ours[0], nn.BatchNorm1d(4))
        batches = [torch.randn(8, 4) for _ in range(5)]
        for model in (ours, stock):
            torch.optim.swa_utils.update_bn(batches, model)
        torch.testing.assert_close(ours[1].running_mean, stock[1].running_mean)
        torch.testing.assert_close(ours[1].running_var, stock[1].running_var)
        assert ours[1].momentum == 0.1

    def test_averaged_model(self):
        model = nn.Sequential(nn.Linear(4, 4), fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.5))
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        model(torch.randn(8, 4))
        averaged.update_parameters(model)
        assert torch.equal(averaged.module[1].running_mean, model[1].running_mean)

    def test_functional_call(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu")
        state = {name: tensor.clone() for name, tensor in randomise(layer).state_dict().items()}
        x = torch.randn(9, 4)
        expected = F.batch_norm(x, None, None, 2 * state["weight"], state["bias"], training=True).relu()
        y = torch.func.functional_call(layer, state | {"weight": 2 * state["weight"]}, (x,))
        torch.testing.assert_close(y, expected)


def stock_like(layer, x, m):
    """The stock composition of a layer of ours, with the noise that ours drew."""
    bn = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    act = layer.act if layer.act is not None else nn.Identity()
    return act(bn) * m


class TestIdioms:
    """As the users of the stock layers write them."""

    @pytest.mark.parametrize(("act", "channels"), [("tanh", 512), (None, 80)])
    def test_tacotron_postnet(self, act, channels):
        conv = nn.Conv1d(32, channels, 5, padding=2)
        layer = fusednorm.FusedBatchNorm1d(channels, act=act, drop=0.5)
        x = conv(torch.randn(4, 32, 50))
        m = noise(x.shape, 0.5, 3, dtype=torch.float32)
        torch.testing.assert_close(layer(x, seed=3), stock_like(layer, x, m), rtol=1e-4, atol=1e-5)

    def test_jasper(self):
        layer = fusednorm.FusedBatchNorm1d(16, eps=1e-3, momentum=0.1, act=("hardtanh", 0.0, 20.0), drop=0.2)
        x = torch.randn(4, 16, 83)
        m = noise(x.shape, 0.2, 3, dtype=torch.float32)
        torch.testing.assert_close(layer(x, seed=3), F.hardtanh(stock_like(layer, x, 1.0), 0, 20) * m)

    def test_functional_mlp(self):
        """for lin, bn in ...: x = F.dropout(F.relu(bn(lin(x))), p, training=self.training)"""
        linear, bn = nn.Linear(6, 32), nn.BatchNorm1d(32)
        twin = copy.deepcopy(bn)
        x = linear(torch.randn(1001, 6))
        for training in (True, False):
            bn.train(training)
            twin.train(training)
            y = functional.batch_norm_act_drop(
                x,
                bn.running_mean,
                bn.running_var,
                bn.weight,
                bn.bias,
                training,
                bn.momentum,
                bn.eps,
                act="relu",
                p=0.5,
                seed=5,
            )
            m = noise(x.shape, 0.5, 5, dtype=torch.float32) if training else 1.0
            torch.testing.assert_close(y, F.relu(twin(x)) * m)
        torch.testing.assert_close(bn.running_mean, twin.running_mean)
        torch.testing.assert_close(bn.running_var, twin.running_var)

    def test_functional_takes_what_batch_norm_takes(self):
        x, mean, var = torch.randn(9, 4), torch.zeros(4), torch.ones(4)
        arguments = (torch.ones(4), torch.zeros(4), True, 0.2, 1e-3)
        ours = functional.batch_norm_act_drop(x, mean, var, *arguments)
        mean2, var2 = torch.zeros(4), torch.ones(4)
        torch.testing.assert_close(ours, F.batch_norm(x, mean2, var2, *arguments))
        torch.testing.assert_close(mean, mean2)
        torch.testing.assert_close(var, var2)

    def test_lin_bn_drop(self):
        """fastai: [BatchNorm1d, Dropout(p), Linear], the weights of the normalisation preset."""
        bn = nn.BatchNorm1d(64)
        nn.init.constant_(bn.bias, 1e-3)
        layer = fusednorm.FusedBatchNorm1d.from_torch(bn, None, nn.Dropout(0.25))
        head = nn.Sequential(layer, nn.Linear(64, 10, bias=False))
        x = torch.randn(32, 64)
        expected = F.linear(stock_like(layer, x, noise((32, 64), 0.25, 1, dtype=torch.float32)), head[1].weight)
        torch.testing.assert_close(head[1](layer(x, seed=1)), expected)
        head(x).sum().backward()
        assert bn.bias.grad is not None

    def test_wide_resnet_block(self):
        """conv1 -> bn2 -> relu -> F.dropout -> conv2, plus the shortcut: trained a step beside its stock twin."""
        torch.manual_seed(0)
        conv1, conv2 = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        pre, post = fusednorm.FusedBatchNorm2d(8, act="relu"), fusednorm.FusedBatchNorm2d(16, act="relu", drop=0.3)
        bn1, bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        x = torch.randn(4, 8, 8, 8).to(memory_format=torch.channels_last)
        m = noise((4, 16, 8, 8), 0.3, 11, dtype=torch.float32)
        ours = x + conv2(post(conv1(pre(x)), seed=11))
        theirs = x + conv2(F.relu(bn2(conv1(F.relu(bn1(x))))) * m)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        parameters = (*conv1.parameters(), *conv2.parameters())
        ours_grads = torch.autograd.grad(ours.square().mean(), (*parameters, *pre.parameters(), *post.parameters()))
        their_grads = torch.autograd.grad(theirs.square().mean(), (*parameters, *bn1.parameters(), *bn2.parameters()))
        for a, b in zip(ours_grads, their_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    def test_speech_with_channels_innermost(self):
        """SpeechBrain's wrapper feeds x.transpose(-1, 1) and turns the output back."""
        layer = fusednorm.FusedBatchNorm1d(20, act="leaky_relu", drop=0.15)
        x = torch.randn(3, 50, 20)
        turned = x.transpose(-1, 1)
        y = layer(turned, seed=2)
        assert y.transpose(1, -1).is_contiguous()
        m = noise((3, 20, 50), 0.15, 2, dtype=torch.float32)
        torch.testing.assert_close(y, stock_like(layer, turned, m))

    def test_weight_decay_filter(self):
        """Optimiser set-ups sort parameters by isinstance(module, _BatchNorm)."""
        model = nn.Sequential(nn.Linear(4, 4), fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.5))
        found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert found == [model[1]]
        assert len(list(model.parameters())) == 4

    def test_freezing(self):
        model = nn.Sequential(nn.Linear(4, 4), fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.5))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        model(torch.randn(9, 4))
        assert int(model[1].num_batches_tracked) == 0

    def test_training_descends(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), fusednorm.FusedBatchNorm1d(64, act="relu", drop=0.2), nn.Linear(64, 1))
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        x = torch.randn(256, 8)
        target = (x[:, :1] * x[:, 1:2]).sin()
        losses = []
        for _ in range(100):
            optimiser.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
