"""No silent wrong gradient: first and second order, forward mode, transforms, checkpoints, the raw operator."""

import contextlib
import copy
import functools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from common import (
    ACTIVATIONS,
    act_id,
    channels_last,
    double,
    generator,
    lay_out,
    leaf,
    noise,
    raw_backward,
    raw_forward,
    right_or_raises,
    spread,
)
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import FusedBatchNorm2d, functional, reference

acts = pytest.mark.parametrize("act", ACTIVATIONS, ids=act_id)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
layouts = pytest.mark.parametrize("layout", ["first", "last"])
strengths = pytest.mark.parametrize("p", [0.0, 0.5])

SHAPE = (3, 2, 2, 2)


def inputs(layout="first", shape=SHAPE, dtype=torch.float64):
    draw = generator(12)
    x = lay_out(spread(shape, draw).to(dtype), layout)
    weight = torch.linspace(0.6, 1.4, shape[1], dtype=dtype)
    bias = torch.linspace(-0.3, 0.4, shape[1], dtype=dtype)
    return leaf(x), leaf(weight), leaf(bias)


def statistics(channels=2, dtype=torch.float64):
    return torch.linspace(-0.1, 0.2, channels, dtype=dtype), torch.linspace(0.8, 1.3, channels, dtype=dtype)


def layer(act="relu", p=0.5, granularity="element", training=True, seed=5):
    """The function of (x, weight, bias) that the tests differentiate, and its twin in plain torch."""

    def fused(x, weight, bias):
        # Buffers of each call's own: a numerical derivative calls many times.
        mean, var = statistics(x.shape[1], x.dtype)
        return functional.batch_norm_act_drop(
            x,
            mean,
            var,
            weight,
            bias,
            training,
            act=act,
            p=p,
            granularity=granularity,
            drop_training=True,
            seed=seed,
        )

    def twin(x, weight, bias):
        mean, var = statistics(x.shape[1], x.dtype)
        m = noise(x.shape, p, seed, granularity, x.dtype)
        return reference.batch_norm_act_drop(x, mean, var, weight, bias, training, act=act, noise=m)

    return fused, twin


class TestGradcheck:
    @acts
    @training
    @layouts
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    def test_first_order(self, granularity, layout, training, act):
        fused, _ = layer(act, 0.4, granularity, training)
        assert torch.autograd.gradcheck(fused, inputs(layout))

    @acts
    @training
    @pytest.mark.parametrize(("layout", "granularity"), [("first", "element"), ("last", "channel")])
    def test_second_order(self, layout, granularity, training, act):
        fused, _ = layer(act, 0.4, granularity, training)
        assert torch.autograd.gradgradcheck(fused, inputs(layout, (3, 2, 2)), fast_mode=True)

    @training
    @pytest.mark.parametrize("act", [None, "tanh"])
    def test_second_order_without_affine(self, act, training):
        fused, _ = layer(act, 0.4, training=training)
        x = inputs(shape=(4, 2))[0]
        assert torch.autograd.gradgradcheck(lambda x: fused(x, None, None), (x,))

    @training
    def test_p_zero(self, training):
        fused, _ = layer("tanh", 0.0, training=training)
        assert torch.autograd.gradcheck(fused, inputs())
        assert torch.autograd.gradgradcheck(fused, inputs(shape=(4, 2)))


class TestHigherOrder:
    @acts
    @training
    @layouts
    def test_gradient_penalty(self, layout, training, act):
        """The gradient of the norm of a gradient, the common use of create_graph."""
        results = []
        for function in layer(act, 0.4, training=training):
            arguments = inputs(layout, (5, 3, 2, 2))
            y = function(*arguments)
            (grad,) = torch.autograd.grad(y.square().sum(), arguments[0], create_graph=True)
            (grad.square().sum() + y.sum()).backward()
            results.append([y, grad, *(a.grad for a in arguments)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def test_third_order(self):
        results = []
        for function in layer("tanh", 0.3):
            arguments = inputs(shape=(5, 2))
            value = function(*arguments).pow(3).sum()
            for _ in range(3):
                (grad,) = torch.autograd.grad(value, arguments[0], create_graph=True)
                value = grad.pow(2).sum()
            results.append(value)
        torch.testing.assert_close(*results)

    def test_create_graph_in_float32(self):
        results = []
        for function in layer("relu", 0.4):
            arguments = inputs(shape=(6, 3, 4), dtype=torch.float32)
            y = function(*arguments)
            grads = torch.autograd.grad(y.square().sum(), arguments, create_graph=True)
            sum(g.square().sum() for g in grads).backward()
            results.append([*grads, *(a.grad for a in arguments)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

    @layouts
    def test_retained_graph(self, layout):
        fused, _ = layer("gelu", 0.4)
        arguments = inputs(layout)
        y = fused(*arguments)
        g = torch.randn(SHAPE, dtype=torch.float64)
        first = torch.autograd.grad(y, arguments, g, retain_graph=True)
        again = torch.autograd.grad(y, arguments, g)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_freed_graph(self):
        fused, _ = layer()
        y = fused(*inputs())
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()

    def test_input_changed_in_place(self):
        """The version counter of what backward needs is watched."""
        fused, _ = layer()
        x, weight, bias = inputs()
        y = fused(x * 1, weight, bias)
        y.sum().backward()
        inner = x * 1
        y = fused(inner, weight, bias)
        with torch.no_grad():
            inner.zero_()
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.sum().backward()


class TestForwardMode:
    @strengths
    @training
    def test_func_jvp(self, training, p):
        fused, twin = layer("tanh", p, training=training)
        primals = tuple(a.detach() for a in inputs())
        tangents = tuple(torch.randn_like(a) for a in primals)
        expected = torch.func.jvp(twin, primals, tangents)
        right_or_raises(lambda: torch.func.jvp(fused, primals, tangents), expected)

    @strengths
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_dual_numbers(self, which, requires_grad, p):
        fused, twin = layer("tanh", p)
        primals = [a.detach().requires_grad_(requires_grad) for a in inputs()]
        tangent = torch.randn_like(primals[which])

        def tangent_of(function):
            with forward_ad.dual_level():
                dual = [forward_ad.make_dual(a, tangent) if i == which else a for i, a in enumerate(primals)]
                return [forward_ad.unpack_dual(function(*dual)).tangent]

        right_or_raises(lambda: tangent_of(fused), tangent_of(twin))

    @strengths
    def test_tangent_of_a_gradient(self, p):
        """The forward ran before there were tangents."""
        primals, tangent = inputs(), torch.randn(SHAPE, dtype=torch.float64)

        def tangent_of(function):
            y = function(*primals)
            with forward_ad.dual_level():
                grads = torch.autograd.grad(y, primals, forward_ad.make_dual(torch.ones_like(y), tangent))
                return [forward_ad.unpack_dual(g).tangent for g in grads]

        fused, twin = layer("tanh", p)
        right_or_raises(lambda: tangent_of(fused), tangent_of(twin))

    @strengths
    def test_module(self, p):
        primal, tangent = torch.randn(6, 4), torch.randn(6, 4)
        ours = fusednorm.FusedBatchNorm1d(4, act="tanh", drop=p).eval()
        ours.drop.train()

        def twin(x):
            z = torch.nn.functional.batch_norm(x, ours.running_mean, ours.running_var, ours.weight, ours.bias)
            return torch.tanh(z) * noise((6, 4), p, 3, dtype=torch.float32)

        expected = torch.func.jvp(twin, (primal,), (tangent,))
        right_or_raises(lambda: torch.func.jvp(lambda x: ours(x, seed=3), (primal,), (tangent,)), expected)


class TestTransforms:
    @strengths
    @training
    def test_vmap(self, training, p):
        fused, twin = layer("relu", p, training=training)
        _, weight, bias = (a.detach() for a in inputs())
        x = torch.randn(4, *SHAPE, dtype=torch.float64)
        expected = torch.stack([twin(each, weight, bias) for each in x])
        right_or_raises(lambda: [torch.func.vmap(fused, (0, None, None))(x, weight, bias)], [expected], 10.0)

    @strengths
    def test_vmap_over_parameters(self, p):
        fused, twin = layer("relu", p)
        x, weight, bias = (a.detach() for a in inputs())
        weights = torch.stack([weight, 2 * weight, -weight])
        expected = torch.stack([twin(x, each, bias) for each in weights])
        right_or_raises(lambda: [torch.func.vmap(fused, (None, 0, None))(x, weights, bias)], [expected], 10.0)

    @strengths
    def test_func_grad(self, p):
        fused, twin = layer("tanh", p)
        arguments = tuple(a.detach() for a in inputs())
        expected = torch.func.grad(lambda *a: twin(*a).square().sum(), (0, 1, 2))(*arguments)
        got = lambda: torch.func.grad(lambda *a: fused(*a).square().sum(), (0, 1, 2))(*arguments)  # noqa: E731
        right_or_raises(got, expected, 10.0)

    @strengths
    def test_func_hessian(self, p):
        fused, twin = layer("tanh", p)
        x, weight, bias = (a.detach() for a in inputs(shape=(3, 2)))
        expected = torch.func.hessian(lambda x: twin(x, weight, bias).square().sum())(x)
        right_or_raises(
            lambda: [torch.func.hessian(lambda x: fused(x, weight, bias).square().sum())(x)], [expected], 100.0
        )

    @strengths
    def test_batched_gradients(self, p):
        fused, twin = layer("tanh", p)
        x, weight, bias = inputs(shape=(3, 2))
        eye = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)
        expected = torch.autograd.grad(twin(x, weight, bias), x, eye, is_grads_batched=True)
        y = fused(x, weight, bias)
        right_or_raises(lambda: torch.autograd.grad(y, x, eye, is_grads_batched=True), expected, 10.0)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize(
        "options", [{"act": "leaky_relu"}, {"order": "norm-add-act-drop"}, {"act": "prelu"}], ids=str
    )
    def test_compiled_autograd(self, options, backend):
        module = FusedBatchNorm2d(2, **{"act": "relu", "drop": 0.3} | options)
        x, residual, results = torch.randn(SHAPE), leaf(torch.randn(SHAPE)), []
        for compiled in (False, True):
            x = leaf(x.detach())
            y = module(x, residual, seed=3) if "add" in module.order else module(x, seed=3)
            compiler = torch.compile(backend=backend)
            with torch._dynamo.compiled_autograd._enable(compiler) if compiled else contextlib.nullcontext():
                y.sin().sum().backward()
            results.append([t.grad for t in (x, residual, *module.parameters())])
            residual.grad = None
            module.zero_grad()
        torch.testing.assert_close(*results)

    @training
    def test_vmap_of_modules(self, training):
        """Parameters that require gradients, unbatched and (an ensemble, as torch's recipe has it) batched."""
        options = {"act": "relu", "drop": 0.3, "track_running_stats": not training, "dtype": torch.float64}
        layers = [FusedBatchNorm2d(3, **options).train(training) for _ in range(2)]
        for index, own in enumerate(layers):
            torch.nn.init.constant_(own.weight, 0.5 + index)
        x = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=generator(1))
        fused, (parameters, buffers) = layers[0], torch.func.stack_module_state(layers)

        def ensemble(parameters, buffers, x):
            return torch.func.functional_call(fused, (parameters, buffers), (x,), {"seed": 3})

        got = torch.func.vmap(ensemble)(parameters, buffers, x)
        expected = torch.stack([own(each, seed=3) for own, each in zip(layers, x, strict=True)])
        torch.testing.assert_close(got, expected)
        got.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(parameters["weight"].grad, torch.stack([own.weight.grad for own in layers]))
        torch.testing.assert_close(torch.func.vmap(lambda x: fused(x, seed=3))(x)[0], expected[0])

    @strengths
    @pytest.mark.parametrize("order", ["norm-act-drop", "drop-norm-act", "act-norm-drop"])
    def test_jacobians(self, order, p):
        """Reverse mode, that is vmap over the gradient, against forward mode, which goes through plain torch."""
        weight = torch.rand(4, dtype=torch.float64, generator=generator(1))
        x = torch.randn(3, 4, dtype=torch.float64, generator=generator(2))

        def call(x, weight):
            options = {"act": "tanh", "p": p, "seed": 3, "order": order}
            return functional.batch_norm_act_drop(x, None, None, weight, None, True, **options)

        both = (0, 1)
        for got, expected in zip(
            torch.func.jacrev(call, both)(x, weight), torch.func.jacfwd(call, both)(x, weight), strict=True
        ):
            torch.testing.assert_close(got, expected)

        def loss(weight, x):
            return call(x, weight).square().sum()

        samples = torch.randn(5, 3, 4, dtype=torch.float64, generator=generator(3))
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, samples)
        torch.testing.assert_close(per_sample, torch.stack([torch.func.grad(loss)(weight, each) for each in samples]))

    def test_noise_alone(self):
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        m = functional.dropout(torch.ones(6, 4, dtype=torch.float64), 0.3, seed=3)
        drop = functools.partial(functional.dropout, p=0.3, seed=3)
        torch.func.vmap(drop)(x[None]).sum().backward()
        torch.testing.assert_close(x.grad, m)
        jacobian = torch.func.jacrev(drop)(x.detach()).reshape(24, 24)
        torch.testing.assert_close(jacobian, m.reshape(-1).diag())


class TestRawOperator:
    """torch.ops.fusednorm.* called directly: differentiates rightly or raises, and never returns constants."""

    @strengths
    @training
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_forward_requires_grad(self, which, training, p):
        arguments = [a.detach().requires_grad_(i == which) for i, a in enumerate(inputs())]
        mean, var = statistics()
        _, twin = layer("tanh", p, training=training)
        expected = torch.autograd.grad(twin(*arguments).sum(), arguments[which])

        def gradient():
            y = raw_forward(*arguments, mean, var, torch.tensor(5), training=training, act="tanh", p=p)[0]
            assert y.requires_grad, "the result came back as a constant"
            return torch.autograd.grad(y.sum(), arguments[which])

        right_or_raises(gradient, expected, 10.0)

    @strengths
    def test_forward_with_a_tangent(self, p):
        x, weight, bias = (a.detach() for a in inputs())
        tangent = torch.randn_like(x)
        _, twin = layer("tanh", p)

        def tangent_of(function):
            with forward_ad.dual_level():
                return [forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent]

        expected = tangent_of(lambda x: twin(x, weight, bias))
        right_or_raises(
            lambda: tangent_of(lambda x: raw_forward(x, weight, bias, seed=torch.tensor(5), act="tanh", p=p)[0]),
            expected,
        )

    @strengths
    def test_backward_requires_grad(self, p):
        x, weight, bias = inputs()
        seed = torch.tensor(5)
        with torch.no_grad():
            _, mean, invstd, *_, mask = raw_forward(x, weight, bias, seed=seed, act="tanh", p=p, save_mask=True)
        g = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
        _, twin = layer("tanh", p)
        x64 = leaf(x)
        (grad,) = torch.autograd.grad(twin(x64, weight, bias), x64, g, create_graph=True)
        expected = torch.autograd.grad(grad.square().sum(), g)

        def gradient():
            grad_x = raw_backward(g, x, weight, bias, mean, invstd, mask, seed, act="tanh", p=p)[0]
            assert grad_x.requires_grad, "the result came back as a constant"
            return torch.autograd.grad(grad_x.square().sum(), g)

        right_or_raises(gradient, expected, 10.0)

    def test_statistics_are_no_way_out(self):
        """Nobody differentiates through save_mean in silence."""
        x, weight, bias = inputs()
        try:
            mean = raw_forward(x, weight, bias)[1]
        except RuntimeError:
            return
        if mean.requires_grad:
            (grad,) = torch.autograd.grad(mean.sum(), x)
            torch.testing.assert_close(grad, torch.full_like(x, 1 / 12))


class TestRecomputation:
    @strengths
    @layouts
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoint(self, use_reentrant, layout, p):
        module = fusednorm.FusedBatchNorm2d(3, act="gelu", drop=p)
        x = lay_out(torch.randn(4, 3, 5, 5), layout).requires_grad_()
        g = torch.randn(4, 3, 5, 5)
        results = []
        for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
            torch.manual_seed(9)
            x.grad = module.weight.grad = module.bias.grad = None
            y = run(x)
            y.backward(g)
            results.append((y.detach(), x.grad, module.weight.grad, module.bias.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    @strengths
    @layouts
    @pytest.mark.parametrize("hooks", ["save_on_cpu", "contiguous copies", "channels-last copies"])
    def test_offloading(self, hooks, layout, p):
        """What comes back may lie otherwise in memory: save_on_cpu with pinned memory returns everything contiguous."""
        pack = {"contiguous copies": lambda t: t.detach().clone(memory_format=torch.contiguous_format)}.get(
            hooks, lambda t: channels_last(t.detach()) if t.dim() == 4 else t.detach().clone()
        )
        module = fusednorm.FusedBatchNorm2d(3, act="gelu", drop=p)
        x = lay_out(torch.randn(4, 3, 5, 5), layout).requires_grad_()
        g = torch.randn(4, 3, 5, 5)
        plain = torch.autograd.grad(module(x, seed=4), (x, *module.parameters()), g)
        context = (
            torch.autograd.graph.save_on_cpu()
            if hooks == "save_on_cpu"
            else torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        )
        with context:
            y = module(x, seed=4)
        offloaded = torch.autograd.grad(y, (x, *module.parameters()), g)
        for a, b in zip(plain, offloaded, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.kernel
    @strengths
    @layouts
    @pytest.mark.parametrize("act", ["relu", "tanh"])
    @pytest.mark.parametrize(("shape", "granularity"), [((4, 33, 5, 5), "element"), ((4, 33, 5, 5), "channel")])
    def test_input_returns_in_the_other_layout(self, shape, granularity, act, layout, p):
        fused, twin = layer(act, p, granularity)
        other = "last" if layout == "first" else "first"
        arguments = inputs(layout, shape)
        pack = torch.autograd.graph.saved_tensors_hooks(
            lambda t: lay_out(t.detach(), other) if t.shape == shape else t, lambda t: t
        )
        with pack:
            y = fused(*arguments)
        g = torch.randn(shape, dtype=torch.float64)
        got = torch.autograd.grad(y, arguments, g)
        expected = torch.autograd.grad(twin(*arguments), arguments, g)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_checkpointed_buffers_move_once(self):
        """The recomputation ends with the last tensor to save, before the statistics are updated a second time."""
        module = fusednorm.FusedBatchNorm2d(3, act="relu", drop=0.3)
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        checkpoint(module, x, use_reentrant=False).sum().backward()
        assert int(module.num_batches_tracked) == 1


class TestMemory:
    @layouts
    @training
    @pytest.mark.parametrize("act", ["relu", "tanh", "gelu", None])
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 4.2), (torch.bfloat16, 2.2)])
    def test_saved_bytes(self, dtype, limit, granularity, act, training, layout):
        x = lay_out(torch.randn(16, 32, 28, 28).to(dtype), layout).requires_grad_()
        weight, bias = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
        saved = []

        def pack(tensor):
            if tensor.numel() > 32:
                saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = functional.batch_norm_act_drop(
                x,
                torch.zeros(32),
                torch.ones(32),
                weight,
                bias,
                training,
                act=act,
                p=0.3,
                granularity=granularity,
                drop_training=True,
                seed=1,
            )
        assert saved, "nothing passed the hooks: memory that autograd does not see"
        assert sum(saved) / x.numel() <= limit
        y.sum().backward()

    def test_nothing_is_kept_without_gradients(self):
        saved = []
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
            fusednorm.FusedBatchNorm2d(3, act="relu", drop=0.5)(torch.randn(4, 3, 5, 5))
        assert not saved

    def test_buffers_are_not_saved(self):
        """Statistics that change after forward, by a broadcast or a second forward, do not reach backward."""
        module = fusednorm.FusedBatchNorm2d(3, act="tanh", drop=0.5).eval()
        module.drop.train()
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        expected = torch.autograd.grad(module(x, seed=1).sum(), x)[0]
        y = module(x, seed=1)
        module.running_mean.add_(5)
        module.running_var.mul_(9)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_training_equals_the_stock_model_step_by_step():
    """Ten steps of SGD in float64 beside the plain composition with our noise: the parameters stay together."""
    torch.manual_seed(1)
    ours = torch.nn.Sequential(
        torch.nn.Linear(6, 16), fusednorm.FusedBatchNorm1d(16, act="silu", drop=0.4), torch.nn.Linear(16, 1)
    ).double()
    first, bn, last = copy.deepcopy(ours[0]), torch.nn.BatchNorm1d(16).double(), copy.deepcopy(ours[2])
    theirs = torch.nn.ModuleList([first, bn, last])
    optimisers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (ours, theirs)]
    for step in range(10):
        x = torch.randn(20, 6, dtype=torch.float64)
        m = noise((20, 16), 0.4, step)
        outputs = (
            ours[2](ours[1](ours[0](x), seed=step)),
            last(torch.nn.functional.silu(bn(first(x))) * m),
        )
        for optimiser, y in zip(optimisers, outputs, strict=True):
            optimiser.zero_grad()
            (y - x.sum(1, keepdim=True)).square().mean().backward()
            optimiser.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert math.isfinite(double(outputs[0]).sum().item())
