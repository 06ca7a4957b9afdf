"""Every way of differentiating, eager and compiled, over p and orders: equal to the reference fed the same noise.

The oracle of a cell is the same transform, in eager mode, of `reference.batch_norm_act_drop`. A cell may not raise:
what cannot be done at all is listed in REFUSED with torch's reason.
"""

import itertools

import pytest
import torch
from common import generator, noise, spread
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import functional, reference

ORDERS = ("norm-act-drop", "drop-act-norm", "norm-drop-add-act")
SHAPE, SEED = (4, 3), 5


def arguments():
    draw = generator(3)
    x, residual = spread(SHAPE, draw), spread(SHAPE, draw)
    return x, torch.linspace(0.6, 1.4, 3, dtype=torch.float64), residual


def functions(order, p):
    """(x, weight, residual) -> y by us, and by the reference."""
    adds = "add" in order
    m = noise(SHAPE, p, SEED)
    options = {"act": "tanh", "order": order}

    def ours(x, weight, residual):
        added = residual if adds else None
        return functional.batch_norm_act_drop(
            x, None, None, weight, None, True, p=p, residual=added, seed=SEED, **options
        )

    def twin(x, weight, residual):
        added = residual if adds else None
        return reference.batch_norm_act_drop(x, None, None, weight, None, True, residual=added, noise=m, **options)

    return ours, twin


def leaves(args):
    return [a.detach().clone().requires_grad_() for a in args]


def scalar(f):
    return lambda *args: f(*args).pow(3).sum()


class Layer(torch.nn.Module):
    """What functional_call needs: the weight as a parameter."""

    def __init__(self, f, weight):
        super().__init__()
        self.f, self.weight = f, torch.nn.Parameter(weight.clone())

    def forward(self, x, residual):
        return self.f(x, self.weight, residual)


def backward(f, wrap, args):
    args = leaves(args)
    y = wrap(lambda *a: f(*a))(*args)
    return torch.autograd.grad(y.pow(3).sum(), args, allow_unused=True)


def create_graph(f, wrap, args):
    args = leaves(args)
    (grad,) = torch.autograd.grad(wrap(scalar(f))(*args), args[0], create_graph=True)
    return torch.autograd.grad(grad.pow(3).sum(), args, allow_unused=True)


def in_checkpoint(use_reentrant):
    def run(f, wrap, args):
        args = leaves(args)
        y = wrap(lambda *a: checkpoint(f, *a, use_reentrant=use_reentrant))(*args)
        return torch.autograd.grad(y.pow(3).sum(), args, allow_unused=True)

    def backward_pass(f, wrap, args):  # the reentrant kind has no autograd.grad
        args = leaves(args)
        wrap(lambda *a: checkpoint(f, *a, use_reentrant=True))(*args).pow(3).sum().backward()
        return [a.grad for a in args]

    return backward_pass if use_reentrant else run


def functional_call(f, wrap, args):
    x, weight, residual = args
    layer = Layer(f, weight)
    weights = {"weight": (2 * weight).requires_grad_()}
    y = wrap(lambda w, x, r: torch.func.functional_call(layer, w, (x, r)))(weights, x, residual)
    return torch.autograd.grad(y.pow(3).sum(), list(weights.values()))


def vjp(f, wrap, args):
    def pull(*args):
        y, back = torch.func.vjp(f, *args)
        return y, *back(torch.cos(y))

    return wrap(pull)(*args)


def late_vjp(f, wrap, args):
    """Pulled back after the transform has returned, as eager users do."""
    y, back = torch.func.vjp(wrap(f), *args)
    return y, *back(torch.cos(y))


def jvp(f, wrap, args):
    return wrap(lambda *a: torch.func.jvp(f, a, tuple(torch.cos(t) for t in a)))(*args)


def linearize(f, wrap, args):
    y, push = torch.func.linearize(f, *args)
    return y, wrap(push)(*(torch.cos(t) for t in args))


def vmap_grad(f, wrap, args):
    batch = [torch.stack([a, 2 * a, a - 1]) for a in args]
    return wrap(torch.func.vmap(torch.func.grad(scalar(f), (0, 1, 2))))(*batch)


CELLS = {
    "backward": backward,
    "func.grad": lambda f, wrap, args: wrap(torch.func.grad(scalar(f), (0, 1, 2)))(*args),
    "vjp": vjp,
    "late vjp": late_vjp,
    "jvp": jvp,
    "jacrev": lambda f, wrap, args: wrap(torch.func.jacrev(f, (0, 1, 2)))(*args),
    "jacfwd": lambda f, wrap, args: wrap(torch.func.jacfwd(f, (0, 1, 2)))(*args),
    "hessian": lambda f, wrap, args: itertools.chain(*wrap(torch.func.hessian(scalar(f), (0, 1)))(*args)),
    "vmap(grad)": vmap_grad,
    "linearize": linearize,
    "functional_call": functional_call,
    "checkpoint": in_checkpoint(False),
    "reentrant checkpoint": in_checkpoint(True),
    "create_graph": create_graph,
}
# Cells that torch itself cannot run, with stock layers neither: test_refused holds that they raise, and what.
REFUSED = {
    ("create_graph", "aot_eager"): "does not currently support double backward",
    ("create_graph", "inductor"): "does not currently support double backward",
}

strengths = pytest.mark.parametrize("p", [0.0, 0.4])
orders = pytest.mark.parametrize("order", ORDERS)
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrap_with(backend):
    return (lambda f: f) if backend == "eager" else lambda f: torch.compile(f, backend=backend)


@strengths
@orders
@cells
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_cell(backend, cell, order, p):
    ours, twin = functions(order, p)
    if (cell, backend) in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[cell, backend]):
            CELLS[cell](ours, wrap_with(backend), arguments())
        return
    expected = list(CELLS[cell](twin, wrap_with("eager"), arguments()))
    got = list(CELLS[cell](ours, wrap_with(backend), arguments()))
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, i=index: f"{cell}, result {i}: {m}")
    assert any(t is not None and t.abs().max() > 1e-3 for t in got), "all of it is zero"


class TestModules:
    """Layers with their buffers, under transforms in training."""

    def test_ensemble(self):
        """torch's recipe, with live noise and running statistics of each member's own."""
        layers = [fusednorm.FusedBatchNorm1d(3, act="relu", drop=0.4) for _ in range(3)]
        parameters, buffers = torch.func.stack_module_state(layers)
        x = torch.randn(3, 8, 3)

        def call(parameters, buffers, x):
            return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

        for randomness in ("different", "same"):
            before = {name: b.clone() for name, b in buffers.items()}
            y = torch.func.vmap(call, randomness=randomness)(parameters, buffers, x)
            assert y.shape == x.shape
            stock = [torch.nn.BatchNorm1d(3) for _ in range(3)]
            for k, bn in enumerate(stock):
                bn.load_state_dict(
                    {name: b[k] for name, b in before.items()} | {name: p[k].detach() for name, p in parameters.items()}
                )
                z = bn(x[k]).relu()
                kept = y[k] != 0
                torch.testing.assert_close(y[k][kept], (z * (1 / 0.6))[kept], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(buffers["running_var"][k], bn.running_var)
                assert int(buffers["num_batches_tracked"][k]) == int(bn.num_batches_tracked)
        zeros = torch.func.vmap(call, randomness="same")(parameters, buffers, x[:1].expand_as(x)) == 0
        assert torch.equal(zeros[0], zeros[1])
        with pytest.raises(RuntimeError, match="random"):
            torch.func.vmap(call)(parameters, buffers, x)

    def test_unbatched_buffers_are_refused(self):
        layer = fusednorm.FusedBatchNorm1d(3, act="relu")
        with pytest.raises(RuntimeError, match="running_mean"):
            torch.func.vmap(layer)(torch.randn(2, 8, 3))

    def test_grad_moves_the_statistics_once(self):
        """Where stock layers refuse to move the buffers that they captured."""
        ours, stock = fusednorm.FusedBatchNorm1d(3, act="relu"), torch.nn.BatchNorm1d(3)
        x = torch.randn(8, 3)
        grad = torch.func.grad(lambda x: ours(x).pow(3).sum())(x)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(stock(leaf).relu().pow(3).sum(), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(a, b)
