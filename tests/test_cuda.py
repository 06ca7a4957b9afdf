"""What only a GPU can show: the same noise and values as the CPU, graphs, streams, launches, memory, sizes.

The rest of the suite runs on a GPU too, with FUSEDNORM_TEST_DEVICE=cuda; these tests hold two devices side by side and
name the device of every tensor themselves, as users do.
"""

import contextlib
import copy
import json
import math

import definition
import numpy as np
import pytest
import torch
from common import (
    DEVICE,
    FLOATS,
    LAYOUTS,
    TOLERANCE,
    Problem,
    close,
    dtype_id,
    lay_out,
    leaf,
    same_bits,
    slope,
)

import fusednorm
from fusednorm import _autograd, functional, reference
from fusednorm._hooks import RESIDENCIES, set_residency

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if DEVICE.type != "cpu":
    pytest.skip("compares devices: run without FUSEDNORM_TEST_DEVICE", allow_module_level=True)

GPU = torch.device("cuda:0")
BOTH = pytest.mark.parametrize("layout", ["first", "last"])
MAIN = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
GRANULARITIES = pytest.mark.parametrize("granularity", ["element", "channel"])


@pytest.fixture
def residency():
    if not set_residency("automatic"):
        pytest.skip("the library has no switch for residency")
    yield set_residency
    set_residency("automatic")


@pytest.fixture
def save_mask():
    """Sets whether forward saves bits for backward on a GPU."""
    policy = _autograd.SAVE_MASK
    before = policy["cuda"]

    def choose(save):
        policy["cuda"] = save

    yield choose
    policy["cuda"] = before


def on_gpu(problem, layout, grad_layout="first"):
    """The same call with the same values in the same layouts on the GPU."""
    twin = copy.copy(problem)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(problem, name)
        if value is not None:
            setattr(twin, name, value.detach().to(GPU).requires_grad_(value.requires_grad))
    twin.x = leaf(lay_out(problem.x.detach().contiguous().to(GPU), layout))
    twin.grad = lay_out(problem.grad.contiguous().to(GPU), grad_layout)
    twin.expected = {name: value.to(GPU) for name, value in problem.expected.items()}
    return twin


def same_as_cpu(problem, layout, grad_layout="first"):
    """GPU and CPU agree with the reference, and with each other on what is zero; returns the GPU's results."""
    gpu, cpu = on_gpu(problem, layout, grad_layout).check(), problem.fused()
    if problem.act is None:
        assert torch.equal(gpu["y"].cpu() == 0, cpu["y"] == 0)
    return gpu


def check_on_gpu(shape, dtype, layout="first", act="relu", p=0.5, granularity="element", seed=7):
    """Forward and backward against the reference in float64, all on the GPU, for tensors too large for `Problem`."""
    draw = torch.Generator(GPU).manual_seed(3)
    c, rows = shape[1], [0, *range(2, len(shape))]
    x = leaf(lay_out(torch.randn(shape, device=GPU, generator=draw, dtype=torch.float32).to(dtype), layout))
    weight = leaf(torch.rand(c, device=GPU, generator=draw) + 0.5)
    bias = leaf(torch.rand(c, device=GPU, generator=draw) - 0.5)
    mean, var = torch.zeros(c, device=GPU), torch.ones(c, device=GPU)
    m = fusednorm.noise(shape, p, seed=seed, granularity=granularity, device=GPU)

    inputs = [leaf(t.double()) for t in (x, weight, bias)]
    with torch.no_grad():
        z = reference.batch_norm_act_drop(inputs[0], None, None, *inputs[1:], True)
        # Where the slope hangs on the last bit of z there is nothing to compare.
        kink = (slope(act, z - 1e-3) - slope(act, z + 1e-3)).abs() > 0.01
    g = torch.randn(shape, device=GPU, generator=draw).masked_fill_(kink, 0).to(dtype)
    dz = g.double() * m * slope(act, z)
    exact = reference.batch_norm_act_drop(inputs[0], None, None, *inputs[1:], True, act=act, noise=m)
    exact_grads = torch.autograd.grad(exact, inputs, g.double())

    y = functional.batch_norm_act_drop(
        x, mean, var, weight, bias, True, 1.0, act=act, p=p, granularity=granularity, seed=seed
    )
    grads = torch.autograd.grad(y, (x, weight, bias), lay_out(g, layout))
    x64 = inputs[0].detach()
    var64, mean64 = torch.var_mean(x64, rows, correction=1)
    scales = (
        exact.abs().max(),
        (dz.abs().max() / var64.min().sqrt() * 1.5),
        (dz.square().sum(rows).sqrt().max() * 4),
        dz.square().sum(rows).sqrt().max(),
    )
    for name, got, expected, scale in zip(
        ("y", "x", "weight", "bias"), (y, *grads), (exact.detach(), *exact_grads), scales, strict=True
    ):
        close(got, expected, scale, name)
    torch.testing.assert_close(mean.double(), mean64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), var64, rtol=1e-5, atol=1e-6)


# ---- beside the CPU --------------------------------------------------------------------------------------------------
SHAPES = (
    (64, 5),
    (513, 2),
    (37, 129),
    (7, 33, 9),
    (4, 3, 7, 7),
    (2, 65, 2, 2),
    (3, 8, 14, 14),
    (2, 3, 3, 2, 5),
    (3, 2, 1025),
    (1, 1, 70_001),
    (2, 5, 48, 48),
)


class TestNoise:
    @GRANULARITIES
    @DTYPES
    @pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3, -(2**63)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_operator(self, shape, seed, dtype, granularity):
        a, b = (
            fusednorm.noise(shape, 0.3, seed=seed, granularity=granularity, device=device, dtype=dtype)
            for device in ("cpu", GPU)
        )
        assert b.device == GPU
        assert same_bits(a, b.cpu())

    @pytest.mark.parametrize("p", [0.0, 1e-9, 1 / 65536, 0.1, 1 / 3, 0.5, 0.9, 1 - 1e-12, 1.0])
    @GRANULARITIES
    def test_strengths(self, granularity, p):
        a, b = (
            fusednorm.noise((300, 30, 5), p, seed=11, granularity=granularity, device=device) for device in ("cpu", GPU)
        )
        assert same_bits(a, b.cpu())

    def test_large(self):
        a, b = (fusednorm.noise((3, 70_001, 64), 0.5, seed=-9, device=device) for device in ("cpu", GPU))
        assert same_bits(a, b.cpu())

    @pytest.mark.parametrize("device", ["cuda", "cuda:0", 0], ids=str)
    def test_names_of_the_device(self, device):
        """With and without its index, for both kinds of seed."""
        expected = fusednorm.noise((50, 3), 0.5, seed=4)
        tensor = torch.tensor(4, device=GPU)
        assert torch.equal(fusednorm.noise((50, 3), 0.5, seed=4, device=device).cpu(), expected)
        assert torch.equal(fusednorm.noise((50, 3), 0.5, seed=tensor, device=device).cpu(), expected)
        assert torch.equal(fusednorm.noise((50, 3), 0.5, seed=tensor).cpu(), expected)

    @GRANULARITIES
    @DTYPES
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_layer(self, shape, layout, dtype, granularity):
        """What the layer applies, forward and backward, is what the CPU draws."""
        if layout == "expanded" and (shape[0] == 1 or len(shape) == 2):
            pytest.skip("is dense, or repeats one channel")
        c = shape[1]
        m = fusednorm.noise(shape, 0.4, seed=-3, granularity=granularity, dtype=dtype)
        x = leaf(lay_out(torch.randn(shape).to(dtype).to(GPU), layout))
        zero, one = torch.zeros(c, device=GPU), torch.ones(c, device=GPU)
        options = {"p": 0.4, "granularity": granularity, "drop_training": True, "seed": -3}
        y = functional.batch_norm_act_drop(x, zero, one, zero, one, False, **options)
        assert torch.equal(y.cpu(), m)
        y = functional.batch_norm_act_drop(x, zero, one, one, zero, False, **options)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(grad.cpu() != 0, m != 0)


class TestFewCalls:
    """What few calls have, on both devices: rows that do not count, a strength that is a tensor, numbered samples."""

    @GRANULARITIES
    @DTYPES
    @BOTH
    @pytest.mark.parametrize("shape", [(7, 33, 9), (4, 8, 130), (37, 16, 1)], ids=str)
    @pytest.mark.parametrize("kind", ["bernoulli", "uniform", "gaussian"])
    def test_results(self, kind, shape, layout, dtype, granularity):
        draw = torch.Generator().manual_seed(len(kind))
        x, g = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
        counts = torch.rand(shape[0], shape[2], generator=draw) < 0.6
        results = []
        for device in ("cpu", GPU):
            entering = leaf(lay_out(x.to(device), layout))
            y = functional.batch_norm_act_drop(
                *(entering, None, None, None, None, True), act="gelu", p=torch.tensor(0.4, device=device), noise=kind,
                granularity=granularity, order="drop-norm-act", mask=counts.to(device), seed=5,
            )  # fmt: skip
            (grad,) = torch.autograd.grad(y, entering, g.to(device))
            results.append([y.detach().cpu(), grad.cpu()])
        for on_cpu, on_device in zip(*results, strict=True):
            rows = counts.unsqueeze(1).expand(shape)
            assert not on_device[~rows].any()
            torch.testing.assert_close(on_device, on_cpu, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])

    @GRANULARITIES
    @BOTH
    @pytest.mark.parametrize("sample", [1, 8, 10_003])
    @pytest.mark.parametrize("kind", ["bernoulli", "uniform", "gaussian"])
    def test_part_of_a_larger_batch(self, kind, sample, layout, granularity):
        """The draws of samples that stand behind others."""
        x = lay_out(torch.ones(5, 9, 7), layout)
        drawn = [
            torch.ops.fusednorm.dropout(x.to(device), torch.tensor([3, sample], device=device), 0.3, kind, granularity)
            for device in ("cpu", GPU)
        ]
        assert same_bits(drawn[0], drawn[1].cpu())


class TestValues:
    @DTYPES
    @pytest.mark.parametrize("layout", LAYOUTS)
    @GRANULARITIES
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("act", [None, "relu", "gelu"])
    def test_layouts(self, act, training, granularity, layout, dtype):
        problem = Problem((5, 33, 3, 7), dtype, layout, act, 0.5, granularity, training)
        same_as_cpu(problem, layout)

    @MAIN
    @BOTH
    @pytest.mark.parametrize("grad_layout", ["first", "last", "sliced", "transposed"])
    def test_gradient_layouts(self, grad_layout, layout, dtype):
        same_as_cpu(Problem((6, 8, 5, 4), dtype, layout, "tanh", 0.5), layout, grad_layout)

    @MAIN
    @BOTH
    @pytest.mark.parametrize(
        "shape",
        [(8, 64, 56, 56), (32, 256, 14, 14), (64, 512, 7, 7), (16, 3, 112, 112), (4096, 1000), (512, 1), (9, 2048)],
        ids=str,
    )
    def test_sizes_of_models(self, shape, layout, dtype):
        check_on_gpu(shape, dtype, layout)

    @DTYPES
    @BOTH
    @pytest.mark.parametrize("shape", [(6, 16, 8, 8), (5, 7, 3, 3), (33, 40), (3, 17, 129)], ids=str)
    @pytest.mark.parametrize("shift", [1, 2, 3, 5])
    def test_misaligned(self, shift, shape, layout, dtype):
        """Dense tensors that start anywhere: the input, the gradient, or both off the 16 bytes of a vector access."""
        problem = Problem(shape, dtype, layout, "relu", 0.5)

        def shifted(t, by):
            room = torch.full((t.numel() + 16,), math.nan, dtype=t.dtype, device=GPU)
            view = room[by : by + t.numel()].as_strided(t.shape, t.stride(), by)
            return view.copy_(t)

        for x_shift, g_shift in ((shift, 0), (0, shift), (shift, shift)):
            gpu = on_gpu(problem, layout, layout)
            gpu.x = leaf(shifted(gpu.x.detach(), x_shift))
            gpu.grad = shifted(gpu.grad, g_shift)
            gpu.check()

    @MAIN
    def test_tensors_of_two_devices(self, dtype):
        x, c = torch.randn(6, 4, device=GPU, dtype=dtype), 4
        for bad in ({"weight": torch.ones(c)}, {"bias": torch.ones(c)}, {"running_mean": torch.zeros(c)}):
            vectors = {"running_mean": torch.zeros(c, device=GPU), "running_var": torch.ones(c, device=GPU)} | bad
            with pytest.raises((RuntimeError, ValueError)):
                functional.batch_norm_act_drop(x, **vectors, training=True)
        with pytest.raises((RuntimeError, ValueError), match="seed"):
            functional.batch_norm_act_drop(x, None, None, training=True, p=0.5, seed=torch.tensor(3))


# ---- grids and offsets -----------------------------------------------------------------------------------------------
class TestSizes:
    @MAIN
    @pytest.mark.parametrize("shape", [(2**26, 1), (2**13, 1, 2**13), (1, 1, 2**26)], ids=str)
    def test_one_channel(self, shape, dtype):
        check_on_gpu(shape, dtype, act="tanh")

    @MAIN
    @GRANULARITIES
    @BOTH
    @pytest.mark.parametrize(
        "shape",
        [(2, 4096), (1, 4096, 2), (2, 4096, 1, 1), (2, 100_000), (70_000, 3), (70_000, 2, 1, 1), (70_000, 5, 7)],
        ids=str,
    )
    def test_wide_and_long(self, shape, layout, granularity, dtype):
        if shape[0] * math.prod(shape[2:]) > 2:
            check_on_gpu(shape, dtype, layout, granularity=granularity)
        else:  # two values per channel: normalising amplifies, `Problem` knows how to choose them
            same_as_cpu(Problem(shape, dtype, layout, "relu", 0.5, granularity), layout)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("shape", "layout"),
        [((5, 3, 143_165_577), "first"), ((71_582_789, 30), "last"), ((2, 30, 35_791_395), "last")],
        ids=str,
    )
    def test_beyond_32_bits(self, shape, layout):
        """Just more than 2^31 elements in bfloat16. The gradient is zero but for the last rows, so that all sums are
        known; outputs are compared at the start, around 2^31, and at the end."""
        n, c, s = shape[0], shape[1], math.prod(shape[2:])
        assert n * c * s > 2**31
        if torch.cuda.mem_get_info()[0] < 32e9:
            pytest.skip("needs 32 GB of free memory on the GPU")
        seed, p, eps, rows = -77, 0.5, 1e-5, n * s
        with contextlib.ExitStack() as stack:
            stack.callback(torch.cuda.empty_cache)
            memory_shape = (n, c, s) if layout == "first" else (n, s, c)
            x = torch.empty(memory_shape, device=GPU, dtype=torch.bfloat16).normal_()
            x = x if layout == "first" else x.movedim(-1, 1)
            x = x.reshape(shape) if layout == "first" else x.view(shape) if len(shape) == 3 else x[:, :, 0]
            weight, bias = (leaf(torch.linspace(low, low + 1, c, device=GPU)) for low in (0.5, -0.5))
            mean, var = torch.zeros(c, device=GPU), torch.ones(c, device=GPU)
            x.requires_grad_()
            y = functional.batch_norm_act_drop(x, mean, var, weight, bias, True, 1.0, eps, act="relu", p=p, seed=seed)
            by_row = x.detach().view(n, c, s)
            total = sum(part.double().sum((0, 2)) for part in by_row.split(max(1, n // 64)))
            exact_mean = total / rows
            square = sum(
                (part.double() - exact_mean.view(1, -1, 1)).square().sum((0, 2))
                for part in by_row.split(max(1, n // 64))
            )
            torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(var.double(), square / (rows - 1), rtol=1e-5, atol=1e-6)

            tail = 4096
            g = torch.zeros_like(x)
            g.view(n, c, s)[-1:, :, -min(tail, s) :] = 1
            if s < tail:
                g[-tail:] = 1
            got_x, got_weight, got_bias = torch.autograd.grad(y, (x, weight, bias), g)

            def at(t, r):  # (rows, channels) of a tensor at those rows
                r = r.to(GPU)
                return t.detach().view(n, c, s)[r // s, :, r % s].double().cpu()

            invstd = (square / rows + eps).rsqrt().cpu()
            exact_mean, w, b = exact_mean.cpu(), weight.detach().double().cpu(), bias.detach().double().cpu()

            def exact(r):
                kept = definition.draw16(seed, r.numpy()[:, None], np.arange(c)[None, :]) < definition.threshold(p)
                m = torch.from_numpy(np.where(kept, 65536 / definition.threshold(p), 0.0))
                xhat = (at(x, r) - exact_mean) * invstd
                z = xhat * w + b
                return z, xhat, m

            last = torch.arange(rows - tail, rows)
            z, xhat, m = exact(last)
            dz = m * (z > 0)
            sum_dz, sum_dz_xhat, scale = dz.sum(0), (dz * xhat).sum(0), dz.square().sum(0).sqrt().max()
            close(got_bias.cpu(), sum_dz, scale, "bias", 1e-3)
            close(got_weight.cpu(), sum_dz_xhat, scale * 4, "weight", 1e-3)
            middle = 2**31 // c
            for r in (torch.arange(512), torch.arange(middle - 256, min(middle + 256, rows)), last):
                z, xhat, m = exact(r)
                close(at(y, r), z.clamp_min(0) * m, 2.0, "y", TOLERANCE[torch.bfloat16])
                dz = at(g, r) * m * (z > 0)
                expected = w * invstd * (dz - sum_dz / rows - xhat * sum_dz_xhat / rows)
                sure = z.abs() > 1e-3  # elsewhere the slope hangs on the last bit of z
                close(at(got_x, r)[sure], expected[sure], 1e-6, "x", 2 * TOLERANCE[torch.bfloat16])


# ---- graphs and streams ----------------------------------------------------------------------------------------------
def capture(step):
    """Capture `step` after warming up on a side stream, as torch's documentation asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def training_step(layers, x, g):
    def step():
        x.grad = None
        for parameter in layers.parameters():
            parameter.grad = None
        y = layers(x)
        y.backward(g)
        return {"y": y, "x": x.grad} | {name: p.grad for name, p in layers.named_parameters()}

    return step


def snapshot(results, layers):
    return {name: t.detach().clone() for name, t in (results | dict(layers.named_buffers())).items()}


class TestGraphs:
    @MAIN
    @BOTH
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("shape", [(16, 8, 12, 12), (8, 64, 7, 7), (4, 3, 200, 200)], ids=str)
    def test_replay(self, shape, momentum, layout, dtype):
        """Replays equal eager steps from the same generator state, bit for bit: fresh noise each time, two draws in one
        graph, and statistics that advance."""
        layers = torch.nn.Sequential(
            fusednorm.FusedBatchNorm2d(shape[1], momentum=momentum, act="relu", drop=0.5, device=GPU),
            fusednorm.FusedBatchNorm2d(shape[1], momentum=momentum, act="tanh", drop=0.2, device=GPU),
        )
        x = leaf(lay_out(torch.randn(shape, device=GPU).to(dtype), layout))
        g = lay_out(torch.randn(shape, device=GPU).to(dtype), layout)
        step, state = training_step(layers, x, g), copy.deepcopy(layers.state_dict())

        torch.cuda.manual_seed(5)
        eager = [snapshot(step(), layers) for _ in range(3)]
        layers.load_state_dict(state)
        graph, results = capture(step)
        layers.load_state_dict(state)
        torch.cuda.manual_seed(5)
        replayed = []
        for _ in range(3):
            graph.replay()
            replayed.append(snapshot(results, layers))
        for a, b in zip(eager, replayed, strict=True):
            for name, value in a.items():
                assert same_bits(value, b[name]), name
        assert not torch.equal(replayed[0]["y"] == 0, replayed[1]["y"] == 0)
        assert not torch.equal(replayed[1]["y"] == 0, replayed[2]["y"] == 0)
        assert int(layers[0].num_batches_tracked) == 3
        # The generator has moved on with the replays: what is drawn next is new.
        expected = torch.ops.fusednorm.draw_seed(x)
        torch.cuda.manual_seed(5)
        for _ in range(3):
            step()
        assert torch.equal(torch.ops.fusednorm.draw_seed(x), expected)

    def test_given_seed(self):
        """The seed tensor is read at replay, not at capture."""
        x = torch.randn(64, 33, device=GPU)
        seed = torch.zeros((), dtype=torch.int64, device=GPU)
        graph, y = capture(
            lambda: functional.batch_norm_act_drop(x, None, None, training=True, act="relu", p=0.5, seed=seed)
        )
        for value in (3, -4):
            seed.fill_(value)
            graph.replay()
            expected = functional.batch_norm_act_drop(x, None, None, training=True, act="relu", p=0.5, seed=value)
            assert same_bits(y, expected)

    def test_evaluation(self):
        layer = fusednorm.FusedBatchNorm2d(8, act="relu", drop=0.5, device=GPU).eval()
        x = torch.randn(4, 8, 5, 5, device=GPU)
        with torch.no_grad():
            graph, y = capture(lambda: layer(x))
            x.normal_()
            graph.replay()
            assert same_bits(y, layer(x))

    @pytest.mark.slow
    def test_compiled_graphs(self):
        """torch.compile's own graphs, on the third call and after."""
        torch._dynamo.reset()
        layer = fusednorm.FusedBatchNorm2d(8, act="relu", drop=0.5, device=GPU)
        compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        x = torch.randn(4, 8, 12, 12, device=GPU)
        masks = []
        for _ in range(6):
            y = compiled(x)
            masks.append((y == 0).clone())
            y.sum().backward()
        assert all(not torch.equal(a, b) for a, b in zip(masks, masks[1:], strict=False))
        assert int(layer.num_batches_tracked) == 6


class TestStreams:
    @BOTH
    def test_current_stream(self, layout):
        """The input arrives late on a side stream: work on any other stream would read what was there before."""
        data = lay_out(torch.randn(16, 8, 32, 32, device=GPU), layout)
        g = torch.randn(16, 8, 32, 32, device=GPU)
        layer = fusednorm.FusedBatchNorm2d(8, act="tanh", drop=0.3, device=GPU)
        layer(leaf(data), seed=1).backward(g)
        expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
        layer.zero_grad(set_to_none=True)
        late, late_g = torch.zeros_like(data), torch.zeros_like(g)
        x = leaf(late)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            late.copy_(data)
            late_g.copy_(g)
            layer(x, seed=1).backward(late_g)
            assert not side.query(), "the host waited for the device"
        side.synchronize()
        for name, parameter in layer.named_parameters():
            assert same_bits(parameter.grad, expected[name]), name

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    @BOTH
    def test_other_device(self, layout):
        second = torch.device("cuda:1")
        x = lay_out(torch.randn(6, 5, 9, 9), layout)
        results = []
        for device in (GPU, second):
            torch.cuda.set_device(0)
            layer = fusednorm.FusedBatchNorm2d(5, act="tanh", drop=0.3, device=device)
            xd = leaf(x.to(device))
            y = layer(xd, seed=4)
            y.square().sum().backward()
            assert y.device == device
            assert torch.cuda.current_device() == 0
            torch.cuda.manual_seed_all(3)
            seed = torch.ops.fusednorm.draw_seed(xd)
            results.append([t.cpu() for t in (y, xd.grad, layer.weight.grad, layer.running_var, seed)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("seed", [None, 5])
    @BOTH
    def test_no_synchronisation(self, layout, seed, momentum):
        layer = fusednorm.FusedBatchNorm2d(8, act="gelu", drop=0.3, momentum=momentum, device=GPU)
        x = leaf(lay_out(torch.randn(4, 8, 9, 9, device=GPU), layout))
        g = torch.randn(4, 8, 9, 9, device=GPU)
        layer(x, seed=seed).backward(g)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer.train()(x, seed=seed).backward(g)
            layer.eval()(x).backward(g)
            with torch.no_grad():
                layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- costs -----------------------------------------------------------------------------------------------------------
def launches(function, folder):
    """Names of the kernels, memsets and copies on the device while `function` runs."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize()
    path = folder / "trace.json"
    record.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")]


class TestCosts:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("traces")
        x = torch.ones(4, device=GPU)
        for _ in range(2):  # the first record of a process may miss what ran while the tracer came up
            seen = launches(lambda: x.add_(1), folder)
        if len(seen) != 1:
            pytest.skip(f"the profiler does not see kernels here: {seen}")
        return folder

    @MAIN
    @BOTH
    @pytest.mark.parametrize("p", [0.0, 0.1])
    @pytest.mark.parametrize(
        "shape", [(16, 32, 56, 56), (16, 64, 7, 7), (4096, 256), (16, 1, 64, 64), (2, 4096)], ids=str
    )
    def test_launches(self, shape, p, layout, dtype, folder):
        kind = fusednorm.FusedBatchNorm1d if len(shape) == 2 else fusednorm.FusedBatchNorm2d
        layer = kind(shape[1], act="relu", drop=p, device=GPU)
        x = leaf(lay_out(torch.randn(shape, device=GPU).to(dtype), layout))
        g = lay_out(torch.randn(shape, device=GPU).to(dtype), layout)
        kept = []
        forward = launches(lambda: kept.append(layer(x)), folder)
        assert 1 <= len(forward) <= 4, forward

        def clear():
            x.grad = None
            layer.zero_grad(set_to_none=True)

        def backward():
            clear()
            kept.pop().backward(g)

        backward_names = launches(backward, folder)
        assert 1 <= len(backward_names) <= 3, backward_names

    @MAIN
    @BOTH
    @pytest.mark.parametrize("save", [False, True])
    def test_memory(self, save, layout, dtype, save_mask):
        """Allocated, not only saved by autograd's account: beyond output and gradient at most a bit per element."""
        save_mask(save)
        layer = fusednorm.FusedBatchNorm2d(64, act="relu", drop=0.3, device=GPU)
        x = leaf(lay_out(torch.randn(64, 64, 56, 56, device=GPU).to(dtype), layout))
        g = torch.randn_like(x)
        unit, bits = x.numel() * x.element_size(), x.numel() / 8 * save
        small = 4e6  # per-channel vectors and the partial sums of blocks
        layer(x).backward(g)
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = layer(x)
        assert torch.cuda.memory_allocated() - before <= unit + bits + small
        assert torch.cuda.max_memory_allocated() - before <= unit + bits + small
        torch.cuda.reset_peak_memory_stats()
        y.backward(g)
        assert torch.cuda.max_memory_allocated() - before <= 2 * unit + bits + small


# ---- choices that must not show --------------------------------------------------------------------------------------
# One block, clusters, several channels per block, and channels that fit nowhere.
FITS = ((4, 8, 14, 14), (16, 16, 56, 56), (32, 4, 112, 112), (8, 64, 7, 7), (5, 33, 3, 3), (2, 3, 31, 33), (64, 2, 150))


class TestChoices:
    @DTYPES
    @pytest.mark.parametrize("act", ["relu", "gelu"])
    @GRANULARITIES
    @pytest.mark.parametrize("shape", FITS, ids=str)
    def test_residency(self, shape, granularity, act, dtype, residency):
        """All kernels are right, and differ in the last places only; the noise does not differ at all."""
        problem = Problem(shape, dtype, "first", act, 0.4, granularity)
        results = {}
        for name in RESIDENCIES:
            residency(name)
            results[name] = on_gpu(problem, "first").check()
        for name in ("automatic", "always"):
            for key, value in results[name].items():
                assert torch.isfinite(value).all()
                tolerance = max(TOLERANCE[value.dtype], TOLERANCE[problem.opmath])
                close(value, results["never"][key].double(), problem.scale[key].to(GPU), f"{name} {key}", 2 * tolerance)

    @MAIN
    @BOTH
    @pytest.mark.parametrize("act", ["relu", "tanh"])
    @pytest.mark.parametrize("name", RESIDENCIES)
    def test_saved_mask_or_redrawn(self, name, act, layout, dtype, save_mask, residency):
        residency(name)
        results = []
        for save in (False, True):
            save_mask(save)
            results.append(on_gpu(Problem((6, 40, 9, 11), dtype, layout, act, 0.4), layout).check())
        for key, value in results[0].items():
            torch.testing.assert_close(value, results[1][key], rtol=1e-3 if dtype == torch.float32 else 1e-2, atol=1e-3)

    @MAIN
    @BOTH
    @pytest.mark.parametrize("name", RESIDENCIES)
    @pytest.mark.parametrize(
        "shape", [(16, 1, 64, 64), (32, 64, 14, 14), (4096, 33), (60_000, 1), (2, 200, 7, 7)], ids=str
    )
    def test_same_bits_on_every_run(self, shape, name, layout, dtype, residency):
        residency(name)
        problem = on_gpu(Problem(shape, dtype, layout, "tanh", 0.3), layout)
        start = problem.running_mean.clone(), problem.running_var.clone()
        first, others = None, []
        for run in range(8):
            problem.running_mean, problem.running_var = (t.clone() for t in start)
            if run % 2:  # other work beside it
                torch.randn(1 << 22, device=GPU).sort()
            results = problem.fused() | {"mean": problem.running_mean, "var": problem.running_var}
            if first is None:
                first = results
            else:
                others.append(results)
        for other in others:
            for key, value in first.items():
                assert same_bits(value, other[key]), key


class TestSeeds:
    def test_manual_seed(self):
        like = torch.empty(3, device=GPU)
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append([torch.ops.fusednorm.draw_seed(like) for _ in range(4)])
        assert all(s.device == GPU and s.dtype == torch.int64 and s.shape == () for s in runs[0])
        assert [int(s) for s in runs[0]] == [int(s) for s in runs[1]]
        assert len({int(s) for s in runs[0]}) == 4

    def test_generator_state(self):
        """A saved state gives the seeds again, and other draws in between give others."""
        like = torch.empty(3, device=GPU)
        state = torch.cuda.get_rng_state()
        first = int(torch.ops.fusednorm.draw_seed(like))
        torch.rand(5, device=GPU)
        second = int(torch.ops.fusednorm.draw_seed(like))
        torch.cuda.set_rng_state(state)
        assert int(torch.ops.fusednorm.draw_seed(like)) == first
        assert int(torch.ops.fusednorm.draw_seed(like)) != second

    def test_cpu_generator_is_left_alone(self):
        before = torch.get_rng_state()
        fusednorm.FusedBatchNorm1d(4, drop=0.5, device=GPU)(torch.randn(8, 4, device=GPU))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled(self, backend):
        """Eager and compiled training steps draw the same seeds and give the same masks."""
        torch._dynamo.reset()
        layer = fusednorm.FusedBatchNorm2d(8, act="relu", drop=0.5, device=GPU)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend=backend)
        x, g = torch.randn(4, 8, 10, 10, device=GPU), torch.randn(4, 8, 10, 10, device=GPU)
        for _ in range(2):
            results = []
            for run, module in ((layer, layer), (compiled, twin)):
                torch.manual_seed(9)
                module.zero_grad(set_to_none=True)
                leaf_x = leaf(x)
                y = run(leaf_x)
                y.backward(g)
                results.append((y.detach(), leaf_x.grad, module.weight.grad, module.running_var.clone()))
            assert torch.equal(results[0][0] == 0, results[1][0] == 0)
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)
        torch._dynamo.reset()
