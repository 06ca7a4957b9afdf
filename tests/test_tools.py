"""What other people's tools do to a BatchNorm: nothing of a fused layer may get lost in silence.

The tools that are not torch's are written here from what they do, in words of our own: each is a kind of code that
users have, and none of them knows fusednorm.
"""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(features))


def freeze_by_attributes(model):
    """As timm's and detection libraries' converters: a new module, attribute by attribute."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            frozen.weight.data = child.weight.data.clone()
            frozen.running_mean.data = child.running_mean.data
            frozen.running_var.data = child.running_var.data
            frozen.eps = child.eps
            setattr(model, name, frozen)


def freeze_by_names(model):
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            new = FrozenBatchNorm2d(8)
            for key in ("weight", "bias", "running_mean", "running_var", "eps"):
                setattr(new, key, getattr(child, key))
            setattr(model, name, new)


def to_group_norm(model):
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(4, child.num_features))


def fold_by_hand(model):
    """As detectors' fuse(): the arithmetic written out."""
    conv, bn = model[0], model[1]
    scale = bn.weight.div(torch.sqrt(bn.eps + bn.running_var))
    conv.weight.data.mul_(scale.view(-1, 1, 1, 1))
    model[1] = nn.Identity()


def fold_by_torch(model):
    fuse_conv_bn_eval(model[0], model[1])


TOOLS = (
    nn.SyncBatchNorm.convert_sync_batchnorm,
    fold_by_torch,
    freeze_by_attributes,
    freeze_by_names,
    to_group_norm,
    fold_by_hand,
)


def model(**options):
    return nn.Sequential(nn.Conv2d(3, 8, 3), FusedBatchNorm2d(8, **options)).eval()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
class TestRebuilding:
    @pytest.mark.parametrize(
        "options",
        [
            {"act": "relu"},
            {"drop": 0.1},
            {"act": "prelu", "order": "act-norm"},
            {"order": "norm-add"},
            {"ghost_batch_size": 4},
            {"drop": fusednorm.UniformDropout(0.1)},
        ],
        ids=str,
    )
    def test_is_refused(self, options, tool):
        net = model(**options)
        with pytest.raises(RuntimeError, match=r"fusednorm FusedBatchNorm2d .* would lose .*to_torch\(\)"):
            tool(net)
        assert type(net[1]) is FusedBatchNorm2d

    @pytest.mark.parametrize("options", [{}, {"act": "identity"}, {"drop": 0.0}, {"order": "act-norm-drop"}], ids=str)
    def test_a_bare_layer_is_a_batch_norm(self, options, tool):
        tool(model(**options))

    def test_remedy(self, tool):
        net = model(act="relu", drop=0.1)
        net[1] = net[1].to_torch()
        tool(nn.Sequential(net[0], net[1][0]))

    def test_linear(self, tool):
        linear, layer = nn.Linear(4, 8).eval(), FusedBatchNorm1d(8, act="relu").eval()
        with pytest.raises(RuntimeError, match="fusednorm"):
            fuse_linear_bn_eval(linear, layer)


def test_what_everybody_may_read():
    """Initialisers, printers, optimisers and copies find an ordinary BatchNorm."""
    net = model(act="relu", drop=0.3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.num_features, m.eps, m.momentum) == (8, 1e-5, 0.1)
            nn.init.normal_(m.weight, 1 / m.num_features, m.eps)
            m.eps = 1e-3
    assert "eps=0.001" in repr(net)
    assert copy.deepcopy(net)[1].eps == pickle.loads(pickle.dumps(net))[1].eps == 1e-3
    assert not hasattr(FusedBatchNorm2d.__new__(FusedBatchNorm2d), "eps")


# ---- the way back, and over ------------------------------------------------------------------------------------------
ORDERS = tuple(fusednorm.reference.ORDERS)


class TestToTorch:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("order", ORDERS)
    def test_same_numbers(self, order, training):
        act, drop = ("silu" if "act" in order else None), (0.0 if "drop" in order else None)
        ours = FusedBatchNorm2d(4, act=act, drop=drop, order=order)
        twin = copy.deepcopy(ours)
        theirs = twin.to_torch()
        x, r, results = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3), []
        for layer in (ours, theirs):
            layer.train(training)
            leaf = x.clone().requires_grad_()
            y = layer(leaf, r) if "add" in order else layer(leaf)
            results.append((y, *torch.autograd.grad(y.pow(3).sum(), leaf)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.running_var, twin.running_var)
        assert not any("fusednorm" in type(m).__module__ for m in theirs.modules()) or "add" in order

    def test_shares_everything(self):
        layer = FusedBatchNorm2d(4, act="prelu", drop=nn.Dropout2d(0.2))
        layer.note = "kept"
        stock = layer.to_torch()
        assert [type(m) for m in stock] == [nn.BatchNorm2d, nn.PReLU, nn.Dropout2d]
        assert stock[0].weight is layer.weight
        assert stock[0].running_var is layer.running_var
        assert stock[0].note == "kept"
        assert stock[1] is layer.act
        again = FusedBatchNorm2d.from_torch(*stock)
        assert again.bias is layer.bias
        assert not hasattr(stock[0], "act")
        pickle.loads(pickle.dumps(copy.deepcopy(stock)))

    @pytest.mark.parametrize("matched", [True, False])
    @pytest.mark.parametrize("groups", [None, 3])
    def test_ghosts_and_matched_statistics(self, groups, matched):
        drop = nn.Dropout(0.0) if matched is False else nn.Dropout(1.0)  # all or nothing: the same noise on both sides
        ours = FusedBatchNorm1d(
            4, act="relu", drop=drop, order="act-drop-norm", ghost_batch_size=groups, eval_matched_stats=matched
        )
        twin = copy.deepcopy(ours)
        x = torch.randn(8, 4)
        torch.testing.assert_close(twin.to_torch()(x), ours(x))
        for a, b in zip(ours.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(
        "drop", [fusednorm.UniformDropout(0.5), fusednorm.GaussianDropout(0.5), fusednorm.DropPath(0.5)], ids=str
    )
    def test_noises(self, drop):
        stock = FusedBatchNorm1d(64, affine=False, drop=drop).to_torch()
        x = torch.randn(4096, 64)
        m = stock(x) / nn.functional.batch_norm(x, None, None, training=True)
        assert (m.var() / drop.alpha - 1).abs() < 0.1
        torch.testing.assert_close(stock.eval()(x), stock[0](x))

    def test_any_rank(self):
        layer = fusednorm.ICLayer(4, 0.0)
        for shape in ((6, 4), (6, 4, 2, 2)):
            x = torch.randn(shape)
            torch.testing.assert_close(layer.to_torch()(x), copy.deepcopy(layer)(x))

    @pytest.mark.filterwarnings("ignore:Lazy")
    def test_refuses_what_it_would_lose(self):
        layer = FusedBatchNorm2d(4, act="relu")
        layer.register_forward_hook(lambda *args: None)
        with pytest.raises(ValueError, match="hooks"):
            layer.to_torch()
        lazy = fusednorm.LazyFusedBatchNorm2d(act="relu")
        with pytest.raises(ValueError, match="knows its size"):
            lazy.to_torch()


class TestFromTorch:
    def test_takes_attributes_and_hooks(self):
        bn = nn.BatchNorm2d(4)
        bn.note, seen = "kept", []
        bn.register_forward_pre_hook(lambda *args: seen.append(args))
        bn.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({f"{prefix}extra": 1}))
        layer = FusedBatchNorm2d.from_torch(bn, "relu", 0.1)
        layer(torch.randn(3, 4, 2, 2))
        assert layer.note == "kept"
        assert len(seen) == 1
        assert layer.state_dict()["extra"] == 1
        assert not hasattr(bn, "act")

    def test_refuses_hooks_that_would_see_something_else(self):
        for register in ("register_forward_hook", "register_full_backward_hook"):
            bn = nn.BatchNorm2d(4)
            getattr(bn, register)(lambda *args: None)
            with pytest.raises(ValueError, match="BatchNorm2d: expected no .*hooks"):
                FusedBatchNorm2d.from_torch(bn, "relu")
            FusedBatchNorm2d.from_torch(bn)
        bn = nn.BatchNorm2d(4)
        bn.register_forward_pre_hook(lambda *args: None)
        with pytest.raises(ValueError, match="pre-hooks"):
            FusedBatchNorm2d.from_torch(bn, "relu", order="act-norm")

    @pytest.mark.parametrize("name", ["order", "ghost_batch_size", "frozen", "act", "drop"])
    def test_refuses_attributes_that_it_has_itself(self, name):
        for value in (2, nn.Linear(2, 2)):
            bn = nn.BatchNorm2d(4)
            setattr(bn, name, value)
            with pytest.raises(ValueError, match=f"no attribute of its own that is named {name}"):
                FusedBatchNorm2d.from_torch(bn, "relu")

    def test_a_forward_of_its_own(self):
        bn, layer = nn.BatchNorm2d(4), FusedBatchNorm2d(4, act="relu")
        bn.forward = layer.forward = lambda x: x
        with pytest.raises(ValueError, match="named forward"):
            FusedBatchNorm2d.from_torch(bn, "relu")
        with pytest.raises(ValueError, match="forward of its own"):
            layer.to_torch()

    def test_takes_children(self):
        bn = nn.BatchNorm2d(4)
        bn.film = nn.Linear(2, 2)
        layer = FusedBatchNorm2d.from_torch(bn, "relu")
        assert layer.film is bn.film
        assert [*layer.to_torch()[0].state_dict()] == [*bn.state_dict()]

    def test_compiled_by_itself(self):
        """What was compiled is the old layer."""
        bn, layer, x = nn.BatchNorm2d(4), FusedBatchNorm2d(4, act="relu", drop=1.0), torch.randn(3, 4, 2, 2)
        for module in (bn, layer):
            module.compile(backend="eager")
            module(x)
        assert FusedBatchNorm2d.from_torch(bn, "relu")(x).min() >= 0
        assert not layer.to_torch()[0](x).eq(0).any()

    def test_children_may_go(self):
        layer, x = FusedBatchNorm2d(4, act="relu", drop=0.5), torch.randn(3, 4, 2, 2)
        del layer.drop
        layer.act = nn.Sequential(nn.ReLU())
        torch.testing.assert_close(layer(x), nn.BatchNorm2d(4)(x).relu())
        assert len(layer.to_torch()) == 2

    def test_changed_bounds(self):
        act, x = nn.ReLU6(), torch.randn(3, 4, 2, 2) * 4
        act.max_val = 1.0
        torch.testing.assert_close(FusedBatchNorm2d(4, act=act)(x), act(nn.BatchNorm2d(4)(x)))

    def test_pruned(self):
        from torch.nn.utils import prune

        bn = nn.BatchNorm2d(4)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        prune.random_unstructured(bn, "weight", 0.5)
        layer = FusedBatchNorm2d.from_torch(bn, "relu")
        x = torch.randn(3, 4, 2, 2)
        y = layer(x)
        torch.testing.assert_close(y, bn(x).relu())
        y.sum().backward()
        assert layer.weight_orig is bn.weight_orig
        assert bn.weight_orig.grad is not None


class TestLazy:
    @pytest.mark.parametrize(
        ("lazy", "fused", "stock", "shape"),
        [
            (fusednorm.LazyFusedBatchNorm1d, FusedBatchNorm1d, nn.LazyBatchNorm1d, (6, 4)),
            (fusednorm.LazyFusedBatchNorm2d, FusedBatchNorm2d, nn.LazyBatchNorm2d, (6, 4, 2, 2)),
            (fusednorm.LazyFusedBatchNorm3d, fusednorm.FusedBatchNorm3d, nn.LazyBatchNorm3d, (6, 4, 2, 2, 2)),
        ],
        ids=["1d", "2d", "3d"],
    )
    @pytest.mark.filterwarnings("ignore:Lazy")
    def test_becomes_a_fused_layer(self, lazy, fused, stock, shape):
        x = torch.randn(shape)
        for layer in (lazy(eps=1e-3, act="relu", drop=0.0), lazy.from_torch(stock(eps=1e-3), "relu")):
            y = layer(x)
            assert type(layer) is fused
            torch.testing.assert_close(y, stock(eps=1e-3)(x).relu())
            assert list(layer.state_dict()) == list(fused(4).state_dict())
            layer.to_torch()

    @pytest.mark.filterwarnings("ignore:Lazy")
    def test_options_and_refusals(self):
        layer = fusednorm.LazyFusedBatchNorm1d(act="prelu", drop=0.2, order="act-drop-norm", ghost_batch_size=4)
        layer(torch.randn(8, 3))
        assert (layer.order, layer.ghost_batch_size, layer.drop.p) == ("act-drop-norm", 4, 0.2)
        with pytest.raises(TypeError, match="LazyFusedBatchNorm2d takes it"):
            FusedBatchNorm2d.from_torch(nn.LazyBatchNorm2d())
        state = FusedBatchNorm1d(3).state_dict()
        other = fusednorm.LazyFusedBatchNorm1d(act="relu")
        other.load_state_dict(state)
        assert other(torch.randn(8, 3)).shape == (8, 3)


class TestStateDict:
    @pytest.mark.parametrize("order", ["norm-act-drop", "act-norm-drop"])
    def test_a_converted_sequential(self, order):
        """Stock checkpoints load strictly, and ours into the stock model; optimizers go by the order of parameters."""
        torch.manual_seed(0)
        stages = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8, 0.3), nn.Dropout2d(0.1)]
        norm, act = (1, 2) if order.startswith("norm") else (2, 1)
        stages[1], stages[2] = stages[norm], stages[act]
        stock = nn.Sequential(nn.Sequential(*stages), nn.Conv2d(8, 2, 3))
        ours = copy.deepcopy(stock)
        block = ours[0]
        block[norm] = FusedBatchNorm2d.from_torch(block[norm], block[act], block[3], order=order)
        block[act], block[3] = nn.Identity(), nn.Identity()
        fusednorm.keep_act_keys(block, str(norm), str(act))
        assert sorted(ours.state_dict()) == sorted(stock.state_dict())
        names = [n.replace(f"0.{norm}.act.", f"0.{act}.") for n, _ in ours.named_parameters()]
        assert (names == [n for n, _ in stock.named_parameters()]) == order.startswith("norm")
        for source, target in ((stock, ours), (ours, stock)):
            for p in source.parameters():
                nn.init.uniform_(p)
            target.load_state_dict(source.state_dict(), strict=True)
            torch.testing.assert_close(target.eval()(torch.ones(2, 3, 9, 9)), source.eval()(torch.ones(2, 3, 9, 9)))
        again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        again.load_state_dict(stock.state_dict(), strict=True)
        own = {k.replace(f"0.{act}.", f"0.{norm}.act."): v for k, v in stock.state_dict().items()}
        ours.load_state_dict(own, strict=True)
        with pytest.raises(RuntimeError, match="Unexpected"):
            ours.load_state_dict(stock.state_dict() | {"0.9.weight": torch.ones(1)}, strict=True)

    def test_bad_names(self):
        net = nn.Sequential(FusedBatchNorm2d(3, act="prelu"), nn.Identity())
        for arguments, words in (
            (("3", "1"), "layer: expected"),
            (("0", "x"), "slot: expected"),
            (("1", "0"), "layer"),
        ):
            with pytest.raises(ValueError, match=words):
                fusednorm.keep_act_keys(net, *arguments)


class TestGhostBatches:
    @pytest.mark.parametrize("batch", [7, 9, 12, 13, 25, 4, 5])
    def test_cut_as_chunk_cuts(self, batch):
        layer, norm = FusedBatchNorm1d(3, ghost_batch_size=4, even_ghost_batches=True), nn.BatchNorm1d(3)
        x = torch.randn(batch, 3)
        if batch in (13, 25):  # chunk leaves one sample there, and stock layers raise
            assert torch.isfinite(layer(x)).all()
            return
        expected = torch.cat([norm(c) for c in x.chunk(-(-batch // 4))])
        torch.testing.assert_close(layer.to_torch()(x), expected)
        torch.testing.assert_close(
            FusedBatchNorm1d.from_torch(nn.BatchNorm1d(3), ghost_batch_size=4, even_ghost_batches=True)(x), expected
        )
        torch.testing.assert_close(layer.running_var, norm.running_var)
        assert "even_ghost_batches" in repr(layer)

    def test_a_rest_of_one(self):
        """Which would end an epoch: the batch is cut evenly instead."""
        x = torch.randn(9, 3)
        expected = torch.cat([nn.functional.batch_norm(c, None, None, training=True) for c in x.chunk(3)])
        torch.testing.assert_close(FusedBatchNorm1d(3, ghost_batch_size=4)(x), expected)
        with pytest.raises(ValueError, match="more than 1 value"):
            FusedBatchNorm1d(3, ghost_batch_size=1)(x)
        volume = torch.randn(9, 3, 5)
        expected = torch.cat([nn.functional.batch_norm(c, None, None, training=True) for c in volume.split(4)])
        torch.testing.assert_close(FusedBatchNorm1d(3, ghost_batch_size=4)(volume), expected)


# ---- watched layers --------------------------------------------------------------------------------------------------
class TestWatched:
    @pytest.mark.parametrize("order", [order for order in ORDERS if "drop" in order])
    @pytest.mark.parametrize("child", ["act", "drop"])
    @pytest.mark.parametrize("seed", [None, 3])
    def test_a_hook_changes_nothing(self, seed, child, order):
        if child not in order:
            pytest.skip("no such child")
        options = {"act": "relu" if "act" in order else None, "drop": 0.4, "order": order}
        layer, x, r, results, seen = (
            FusedBatchNorm2d(4, **options),
            torch.randn(6, 4, 3, 3),
            torch.randn(6, 4, 3, 3),
            [],
            [],
        )
        for watched in (False, True):
            if watched:
                getattr(layer, child).register_forward_hook(lambda *args: seen.append(args))
            torch.manual_seed(8)
            results.append(layer(x, r, seed=seed) if "add" in order else layer(x, seed=seed))
        assert len(seen) == 1
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_global_hooks_see_the_children(self):
        layer, seen = FusedBatchNorm1d(4, act="relu", drop=0.4), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module)))
        try:
            y = layer(torch.randn(8, 4), seed=3)
        finally:
            handle.remove()
        assert seen == [nn.ReLU, nn.Dropout, FusedBatchNorm1d]
        assert y.shape == (8, 4)

    def test_everything_that_watches_a_model(self):
        layer = FusedBatchNorm1d(4, drop=0.5, order="drop-norm", eval_matched_stats=True)
        net, batches = nn.Sequential(nn.Linear(4, 4), layer), [torch.randn(32, 4) for _ in range(3)]
        layer.drop.register_forward_hook(lambda *args: None)
        torch.optim.swa_utils.update_bn(batches, net)
        fusednorm.recalibrate(net, batches, progress=False)
        assert fusednorm.analysis.measure_variance_shift(net, batches, progress=False)

    def test_error_inside_a_watched_child(self):
        layer = FusedBatchNorm1d(4, drop=0.5)
        layer.drop.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer(torch.randn(8, 4))
        y = nn.functional.dropout(torch.ones(1000), 1 / 3)
        assert set(y.unique().tolist()) == {0.0, 1.5}  # torch's own again, not ours of 65536 / T
        torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 1.5), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["p", "training"])
    def test_a_hook_that_sets_the_noise(self, name):
        """Has its way in the call that it comes before, as with stock layers."""
        value = 0.9 if name == "p" else False
        for net in (nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.4)), FusedBatchNorm2d(4, drop=0.4)):
            drop = net.drop if isinstance(net, FusedBatchNorm2d) else net[1]
            drop.register_forward_pre_hook(lambda m, args: setattr(m, name, value))
            dropped = (net(torch.randn(64, 4, 3, 3)) == 0).float().mean()
            assert abs(dropped - (0.9 if name == "p" else 0)) < 0.05

    def test_a_copy_made_by_a_hook(self):
        """Evaluates, and has the noise of its own p."""
        layer, x, copies = FusedBatchNorm2d(4, drop=0.5), torch.randn(64, 4, 3, 3), []
        layer.drop.register_forward_hook(lambda *args: copies.append(copy.deepcopy(layer)))
        layer(x)
        copies[0].drop._forward_hooks.clear()
        assert not copies[0].eval()(x).eq(0).any()

    def test_another_thread_meanwhile(self):
        layer, x, results = FusedBatchNorm2d(4, drop=0.5), torch.randn(64, 4, 3, 3), []
        expected = layer(x, seed=2)

        def in_between(*args):
            if not results:
                results.append(None)
                thread = threading.Thread(target=lambda: results.append(layer(x, seed=2)))
                thread.start()
                thread.join()

        layer.drop.register_forward_pre_hook(in_between)
        assert not torch.equal(layer(x, seed=3), expected)
        torch.testing.assert_close(results[1], expected)


# ---- arguments -------------------------------------------------------------------------------------------------------
class TestKindArguments:
    def test_activation_where_eps_stands(self):
        with pytest.raises(TypeError, match="act='relu'"):
            FusedBatchNorm2d(8, "relu")

    def test_children_set_later(self):
        layer = FusedBatchNorm2d(8)
        layer.drop, layer.act = 0.5, "relu"
        assert (type(layer.drop), layer.drop.p, type(layer.act)) == (nn.Dropout, 0.5, nn.ReLU)
        assert [name for name, _ in layer.named_children()] == ["drop", "act"]
        layer.drop = None
        assert (layer(torch.randn(4, 8, 2, 2)) >= 0).all()
        with pytest.raises(ValueError, match="drop: expected a probability"):
            layer.drop = "0.5"

    @pytest.mark.parametrize("kind", ["float32", "float64", "torch", "int"])
    def test_numbers_of_any_library(self, kind):
        numpy = pytest.importorskip("numpy")
        p = {"float32": numpy.float32(0.5), "float64": numpy.float64(0.5), "torch": torch.tensor(0.5), "int": 1}[kind]
        assert FusedBatchNorm1d(4, drop=p).drop.p == float(p)
        assert fusednorm.UniformDropout(p).beta == float(p)
        assert fusednorm.GaussianDropout(p).alpha == float(p)
        assert fusednorm.DropPath(p).p == float(p)
        assert fusednorm.at_alpha(nn.Dropout, p).p == float(p) / (1 + float(p))
        assert FusedBatchNorm1d(4, act=("leaky_relu", p)).act.negative_slope == float(p)
        FusedBatchNorm1d(4, drop=0.5, ghost_batch_size=numpy.int64(4))(torch.randn(8, 4), seed=numpy.int64(7))
        torch.testing.assert_close(
            fusednorm.noise((8, 4), p, seed=numpy.uint8(7)), fusednorm.noise((8, 4), float(p), seed=7)
        )

    @pytest.mark.parametrize("p", ["0.5", None, True, [0.5], torch.ones(2), 1j], ids=str)
    def test_what_is_no_number(self, p):
        for make in (fusednorm.UniformDropout, fusednorm.GaussianDropout, fusednorm.DropPath):
            with pytest.raises(ValueError, match="has to be"):
                make(p)
        if p is not None:
            with pytest.raises(ValueError, match="drop: expected"):
                FusedBatchNorm1d(4, drop=p)

    def test_counter_of_another_kind(self):
        """Averaged as a float with all buffers, or left on another device: torch does not care."""
        x = torch.randn(9, 4)
        for momentum in (0.1, None):
            ours, stock = (cls(4, momentum=momentum) for cls in (FusedBatchNorm1d, nn.BatchNorm1d))
            for layer in (ours, stock):
                layer.num_batches_tracked = torch.tensor(3.0)
                layer(x)
            for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
                torch.testing.assert_close(a, b)

    def test_default_device_of_noise(self):
        with torch.device("meta"):
            assert fusednorm.noise((8, 4), 0.5, seed=3).device.type == "meta"
