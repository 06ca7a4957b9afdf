"""torch.compile, torch.export and autocast give what eager gives, masks included."""

import copy

import pytest
import torch
from common import DEVICE, lay_out, noise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusednorm
from fusednorm import functional


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Returns the fused layer's output beside the loss, so that its zeros can be compared."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.layer = fusednorm.FusedBatchNorm2d(8, **{"act": "relu", "drop": 0.3} | options)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        y = self.layer(self.conv(x))
        return y, self.head(y.mean((2, 3))).square().sum()


def train_step(net, run, x, seed=5):
    torch.manual_seed(seed)
    y, loss = run(x)
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    return {"y": y.detach(), "loss": loss.detach()} | grads | dict(net.named_buffers())


def both(net, x, backend, steps=1):
    """The same training steps in eager and compiled, from equal states."""
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for step in range(steps):
        eager = train_step(net, net, x, step)
        other = train_step(twin, compiled, x, step)
    return eager, other


def same(eager, compiled):
    assert torch.equal(eager["y"] == 0, compiled["y"] == 0)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
        assert compiled[name].stride() == value.stride(), name


class Residual(nn.Module):
    """Net's layer as an order of its own, with something to add where the order adds."""

    def __init__(self, order, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.layer = fusednorm.FusedBatchNorm2d(8, order=order, **{"act": "relu", "drop": 0.3} | options)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        z = self.conv(x)
        y = self.layer(z, torch.sigmoid(z)) if "add" in self.layer.order else self.layer(z)
        return y, self.head(y.mean((2, 3))).square().sum()


@pytest.mark.parametrize(
    "options",
    [
        dict(order="act-norm-drop"),
        dict(order="drop-norm-act", eval_matched_stats=True),
        dict(order="norm-drop-add-act"),
        dict(order="norm-add-act-drop", act="tanh"),
        dict(order="norm-act-drop", drop=fusednorm.UniformDropout(0.5)),
        dict(order="norm-drop-act", drop=fusednorm.GaussianDropout(0.2), act="prelu"),
        dict(order="drop-act-norm", drop=fusednorm.DropPath(0.3)),
        dict(order="norm-act-drop", ghost_batch_size=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["first", "last"])
def test_training_step_in_other_orders(layout, options):
    eager, compiled = both(Residual(**options), lay_out(torch.randn(8, 3, 10, 10), layout), "aot_eager", steps=2)
    same(eager, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["first", "last"])
def test_training_step_with_inductor(layout):
    x = lay_out(torch.randn(4, 3, 10, 10), layout)
    net = Net()
    if layout == "last":
        net = net.to(memory_format=torch.channels_last)
    eager, compiled = both(net, x, "inductor", steps=2)
    same(eager, compiled)
    assert int(compiled["layer.num_batches_tracked"]) == 2
    assert (compiled["y"] == 0).float().mean() > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"drop": 0.0},
        {"drop": 1.0},
        {"drop": None, "act": None},
        {"act": "gelu", "drop": nn.Dropout2d(0.4)},
        {"affine": False},
        {"track_running_stats": False},
        {"act": ("leaky_relu", 0.2)},
    ],
    ids=str,
)
def test_training_step(options):
    same(*both(Net(**options), torch.randn(4, 3, 6, 6), "aot_eager", steps=3))


def test_evaluation():
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 6, 6)
    before = [buffer.clone() for buffer in net.buffers()]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


def test_frozen_statistics_with_live_noise():
    net = Net().eval()
    net.layer.drop.train()
    same(*both(net, torch.randn(4, 3, 6, 6), "aot_eager"))


def test_composition():
    """A child that is not fused compiles too; its noise is torch's, so only a dead one can be compared."""

    class Shift(nn.Module):
        def forward(self, x):
            return x - 0.5

    same(*both(Net(act=Shift(), drop=0.0), torch.randn(4, 3, 6, 6), "aot_eager"))


def test_fresh_noise_at_every_call():
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 6, 6)
    masks = [compiled(x)[0] == 0 for _ in range(3)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_draws_beside_one_tensor(backend):
    """R-Drop, Monte-Carlo samples in one graph, two heads: seeds of their own, and those of the eager calls."""

    def draws(x, w):
        a, b = (functional.dropout(x * w, 0.5) for _ in range(2))
        c, d = (functional.batch_norm_act_drop(x * w, None, None, training=True, p=0.5) for _ in range(2))
        return a, b, c, d

    x, w = torch.randn(64, 8), torch.ones(8, requires_grad=True)
    results = []
    for function in (draws, torch.compile(draws, fullgraph=True, backend=backend)):
        torch.manual_seed(3)
        results.append(function(x, w))
        a, b, c, d = results[-1]
        assert not torch.equal(a == 0, b == 0)
        assert not torch.equal(c == 0, d == 0)
    torch.testing.assert_close(*results)


def test_a_hooked_noise():
    """Is called, and draws the same at the same seed."""
    layer, x = fusednorm.FusedBatchNorm1d(8, act="relu", drop=0.5), torch.randn(64, 8)
    expected = layer(x, seed=3)
    layer.drop.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, seed=3), expected)


def test_batch_sizes():
    """One graph for all batch sizes after the first two (below 16, where the convolution specialises by itself)."""
    net = Net()
    counter = CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for step, batch in enumerate((4, 7, 12, 14, 5)):
        x = torch.randn(batch, 3, 6, 6)
        same(train_step(net, net, x, step), train_step(twin, compiled, x, step))
    assert counter.frame_count <= 2


def test_marked_dynamic():
    """Nothing in the operators pins a size that is marked as free, neither the batch nor the picture."""
    net = Net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for batch, side in ((4, 6), (9, 8), (5, 11)):
        x = torch.randn(batch, 3, side, side)
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, dim)
        y, loss = compiled(x)
        loss.backward()
        assert y.shape == (batch, 8, side - 2, side - 2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_functional_with_a_seed(granularity):
    def step(x, mean, var, weight, bias, seed):
        return functional.batch_norm_act_drop(
            x, mean, var, weight, bias, True, 0.1, 1e-3, act="silu", p=0.4, granularity=granularity, seed=seed
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        torch.manual_seed(1)
        x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((6, 5, 4), (5,), (5,)))
        mean, var = torch.zeros(5), torch.ones(5)
        y = run(x, mean, var, weight, bias, torch.tensor(77))
        results.append((y, *torch.autograd.grad(y.sum(), (x, weight, bias)), mean, var))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_noise_compiles():
    compiled = torch.compile(
        lambda: fusednorm.noise((8, 4), 0.5, seed=3, device=DEVICE), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(), noise((8, 4), 0.5, 3, dtype=torch.float32))


def test_export():
    net = Net().eval()
    x = torch.randn(4, 3, 6, 6)
    other = torch.randn(7, 3, 6, 6)
    with torch.no_grad():  # for inference; the operators in an exported graph refuse to be differentiated
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(other), net(other))


class TestAutocast:
    """nn.BatchNorm follows its input's dtype under autocast; so do we."""

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_net(self, training, compiled):
        net = nn.Sequential(nn.Linear(6, 8), fusednorm.FusedBatchNorm1d(8, act="relu", drop=0.3), nn.Linear(8, 2))
        net.train(training)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        seen = []
        if not compiled:
            net[1].register_forward_hook(lambda module, args, y: seen.append((args[0].dtype, y.dtype)))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = run(torch.randn(10, 6))
        y.float().sum().backward()
        assert all(dtypes == (torch.bfloat16, torch.bfloat16) for dtypes in seen)
        assert net[1].weight.grad.dtype == torch.float32
        assert net[1].running_var.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_follows_the_input(self, dtype):
        ours, theirs = fusednorm.FusedBatchNorm1d(8, act="relu", drop=0.3), nn.BatchNorm1d(8)
        x = torch.randn(10, 8, dtype=dtype)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert ours(x).dtype == theirs(x).dtype == dtype


class TestGraphs:
    """What is compiled, and how often."""

    def test_batches_around_512_rows(self):
        """Two graphs for any batch, as the stock layers; whether bits are saved is no reason for a third."""
        counts = []
        for layer in (
            fusednorm.FusedBatchNorm2d(8, act="relu", drop=0.3),
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)),
        ):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(layer, fullgraph=True, backend=counter)
            for batch in (3, 5, 9, 40, 130, 7):
                x = torch.randn(batch, 8, 5, 5, requires_grad=True)
                compiled(x).sum().backward()
                assert torch.isfinite(x.grad).all()
            counts.append(counter.frame_count)
        assert counts[0] <= counts[1] == 2

    def test_residual_of_a_dynamic_batch(self):
        layer, twin = (fusednorm.FusedBatchNorm2d(4, act="relu", order="norm-add-act") for _ in range(2))
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for batch in (3, 5, 40, 130, 7):
            x, r = torch.randn(batch, 4, 5, 5, requires_grad=True), torch.randn(batch, 4, 5, 5, requires_grad=True)
            got = torch.autograd.grad(compiled(x, r).pow(3).sum(), (x, r))
            for a, b in zip(got, torch.autograd.grad(twin(x, r).pow(3).sum(), (x, r)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 2

    def test_evaluation_is_plain_torch(self):
        """So that the compiler fuses it with its neighbours; with live noise it stays our operator, and our noise."""
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph.code)
            return graph

        net = Net().eval()
        compiled = torch.compile(net, backend=backend)
        x = torch.randn(4, 3, 6, 6)
        torch.testing.assert_close(compiled(x)[0], net(x)[0])
        assert "fusednorm" not in graphs[-1]
        net.layer.drop.train()
        torch.manual_seed(2)
        y = compiled(x)[0]
        torch.manual_seed(2)
        assert torch.equal(y == 0, net(x)[0] == 0)
        assert "fusednorm" in graphs[-1]

    def test_cache_of_training_graphs(self):
        """AOTAutograd's cache takes no custom autograd Function unless told to; stock and ours differ in that alone."""
        from torch._dynamo.utils import counters

        config = torch._functorch.config
        found = []
        for allowed in (False, True):
            with config.patch(
                {"enable_autograd_cache": True, "autograd_cache_allow_custom_autograd_functions": allowed}
            ):
                for _ in range(2):
                    torch._dynamo.reset()
                    counters.clear()
                    layer = fusednorm.FusedBatchNorm1d(6, act="relu", drop=0.3)
                    torch.compile(layer, backend="inductor")(torch.randn(9, 6, requires_grad=True)).sum().backward()
                    found.append(dict(counters["aot_autograd"]))
        assert found[1].get("autograd_cache_bypass", 0) == 1
        assert found[3].get("autograd_cache_hit", 0) + found[3].get("autograd_cache_miss", 0) == 1
