"""The operator's passes apart: parts of a batch, each as a process has it, against the whole batch in one call.

Every part computes what a process computes; what processes would exchange is added up here. tests/test_synchronised.py
has real ones.
"""

import zlib

import pytest
import torch
from common import FLOATS, TOLERANCE, close

import fusednorm
from fusednorm import _apart, _operators, reference
from fusednorm._operators import Chain

pytestmark = pytest.mark.cpu

SHAPES = {"rows": (9, 6), "maps": (9, 6, 5, 5), "long": (7, 3, 600), "many channels": (6, 130, 4), "one": (8, 1, 40)}
CUTS = (3, 0, 5)  # the last part takes the rest; the second one has no samples
ORDERS = [order for order in reference.ORDERS if "act" in order or "drop" in order] + ["norm"]


class Parts:
    """A batch in parts, with noise of their own."""

    def __init__(
        self, shape, order, act, p=0.4, noise="bernoulli", granularity="element", dtype=torch.float64, last=False
    ):
        draw = torch.Generator().manual_seed(zlib.crc32(f"{shape} {order}".encode()))
        layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format

        def tensor(like=shape, scale=1.0):
            t = torch.randn(like, generator=draw, dtype=torch.float64) * scale
            return t.to(dtype).contiguous(memory_format=layout) if len(like) == len(shape) else t.float().to(dtype)

        self.x, self.g = tensor(), tensor()
        self.x.add_(1)
        c = shape[1:2]
        self.weight, self.bias = tensor(c).abs() + 0.5, tensor(c)
        self.residual = tensor() if "add" in order else None
        self.act_weight = tensor(c).abs() if act == "prelu" and "act" in order else None
        name, parameters = reference.resolve_activation(act if "act" in order and act != "prelu" else None)
        name = "prelu" if self.act_weight is not None else name
        self.chain = Chain(1e-5, order, name, parameters, noise, p if "drop" in order else 0.0, granularity, 0)
        self.seeds = [torch.tensor(10 + i) for i in range(len(CUTS))]

    def cut(self, t):
        if t is None:
            return [None] * len(CUTS)
        return t.split([*CUTS[:-1], len(t) - sum(CUTS[:-1])])

    def multiplier(self):
        if not self.chain.drops():
            return None
        c = self.chain
        return torch.cat(
            [
                fusednorm.noise(
                    part.shape, c.p, seed=seed, kind=c.noise, granularity=c.granularity, dtype=torch.float64
                )
                for part, seed in zip(self.cut(self.x), self.seeds, strict=True)
            ]
        )

    def expected(self):
        """(output, mean, var, gradients of x, weight, bias, residual, act_weight), in float64."""
        leaves = [self.x, self.weight, self.bias, self.residual, self.act_weight]
        leaves = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
        x, weight, bias, residual, act_weight = leaves
        act = ("prelu", act_weight) if act_weight is not None else self.chain.act
        m = self.multiplier()
        y = reference.batch_norm_act_drop(
            x, None, None, weight, bias, True, act=act, order=self.chain.order, residual=residual, noise=m
        )
        y.backward(self.g.double())
        u = reference.run_stages(reference.parse_order(self.chain.order)[0], x.detach(), act, m)
        return y.detach(), *reference.moments(u.detach()), *[None if t is None else t.grad for t in leaves]


@pytest.fixture
def alone(monkeypatch):
    """_apart's exchanges as they are among parts that run one after another: by what these leave here."""
    left = {}

    def gather(own, dim, group):
        left.setdefault("moments", []).append(own)
        return torch.cat(left["all"]) if "all" in left else own

    monkeypatch.setattr(_apart, "_all_gather", gather)
    monkeypatch.setattr(_apart.collectives, "wait_tensor", lambda t: t)
    return left


def apart(q, left, save_mask=True, matched=False):
    """What `Parts.expected` gives, part by part, and what the running statistics learn."""
    chain, settings = q.chain, q.chain[:7]
    ahead = chain.order[: chain.order.index("norm") + 4]
    own, parts = [], list(zip(q.cut(q.x), q.cut(q.g), q.cut(q.residual), q.seeds, strict=True))
    for x, _, _, seed in parts:
        found = _operators.statistics(x, q.act_weight, seed, ahead, *chain[2:7], matched)
        pairs = [found[:2]] + ([(found[2], found[3])] if matched and found[2].numel() else [])
        own.append((pairs, torch.tensor(x.numel() // x.shape[1]).double()))
        _apart._merge(*own[-1], None)
    left["all"] = list(left["moments"])
    merged, count = _apart._merge(*own[0], None)
    mean, var = (t.to(_operators.opmath(q.x)) for t in merged[0])
    saved, outputs, sums = [], [], []
    for x, g, residual, seed in parts:
        given = (x, q.weight, q.bias, mean, var, residual, q.act_weight, seed)
        y, save_mean, invstd, _, _, mask = _operators.forward(*given, False, *chain, False, save_mask)
        outputs.append(y)
        reads = residual if _operators.add_precedes_act(chain) else None
        saved.append((g, x, q.weight, q.bias, reads, q.act_weight, save_mean, invstd, mask, seed))
        sums.append(_operators.gradient_sums(*saved[-1], *settings))
        assert sums[-1].dtype == torch.float64
    total = sum(sums)[:2]
    grads = [
        _operators.backward_given(*s, torch.cat([total, mine[2:]]), count, *settings, [True] * 3)
        for s, mine in zip(saved, sums, strict=True)
    ]
    dx, dr = (torch.cat([g[i] for g in grads]) for i in (0, 1))
    da = sum(g[2] for g in grads) if q.act_weight is not None else None
    dr = dr if q.residual is not None else None
    dw, db = (total[1] * saved[0][7]).to(q.weight.dtype), total[0].to(q.bias.dtype)
    return (torch.cat(outputs), *merged[0], dx, dw, db, dr, da), merged[-1]


NAMES = ("output", "mean", "var", "dx", "dweight", "dbias", "dresidual", "dact_weight")


def compare(found, expected, dtype):
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b, b.abs().max(), name, 4 * max(TOLERANCE[a.dtype], TOLERANCE[opmath]))


@pytest.mark.parametrize("act", ["relu", "gelu", "prelu"])
@pytest.mark.parametrize("order", ORDERS)
def test_orders(order, act, alone):
    shape = list(SHAPES.values())[ORDERS.index(order) % len(SHAPES)]
    q = Parts(shape, order, act, last=ORDERS.index(order) % 2 == 0)
    compare(apart(q, alone)[0], q.expected(), torch.float64)


@pytest.mark.parametrize("save_mask", [True, False], ids=["saved", "redrawn"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, last, dtype, save_mask, alone):
    for order, act in (("norm-act-drop", "relu"), ("act-drop-norm", "elu"), ("norm-add-act-drop", "relu")):
        alone.clear()
        q = Parts(SHAPES[shape], order, act, dtype=dtype, last=last)
        compare(apart(q, alone, save_mask)[0], q.expected(), dtype)


@pytest.mark.parametrize("granularity", ["element", "channel", "sample"])
@pytest.mark.parametrize("noise", ["bernoulli", "uniform", "gaussian"])
def test_noises(noise, granularity, alone):
    for order in ("norm-act-drop", "drop-act-norm"):
        alone.clear()
        q = Parts((9, 6, 5, 5), order, "silu", 0.3, noise, granularity)
        compare(apart(q, alone)[0], q.expected(), torch.float64)


def test_matched_statistics_are_those_without_noise(alone):
    q = Parts((9, 6, 5, 5), "act-drop-norm", "tanh")
    _, learned = apart(q, alone, matched=True)
    for name, a, b in zip(("mean", "var"), learned, reference.moments(q.x.tanh()), strict=True):
        close(a, b, b.abs().max(), name)


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"sums": torch.zeros(3, 6, dtype=torch.float64)}, RuntimeError, r"sums: expected shape \[2, 6\]"),
        ({"sums": torch.zeros(2, 6)}, RuntimeError, "sums: expected .* of float64"),
        ({"count": torch.zeros(1, dtype=torch.float64)}, RuntimeError, r"count: expected shape \[\]"),
        ({"count": torch.zeros(())}, RuntimeError, "count: expected .* of float64"),
    ],
)
def test_bad_sums(change, error, says):
    x = torch.randn(4, 6)
    given = {"sums": torch.zeros(2, 6, dtype=torch.float64), "count": torch.ones((), dtype=torch.float64)} | change
    vector, none = torch.ones(6), torch.empty(0, dtype=torch.int32)
    with pytest.raises(error, match=says):
        _operators.backward_given(
            *(x, x, None, None, None, None, vector, vector, none, None, given["sums"], given["count"]),
            *Chain(1e-5)[:7],
            [True] * 3,
        )


def test_fake_tensors_have_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for act in ("relu", "prelu"):
        q = Parts((9, 6, 5, 5), "act-norm-drop-add", act)
        found = {}
        for mode in ("real", "fake"):
            context = FakeTensorMode(allow_non_fake_inputs=True) if mode == "fake" else torch.no_grad()
            with context as fake:
                x, g, r, w = (
                    t if t is None or mode == "real" else fake.from_tensor(t)
                    for t in (q.x, q.g, q.residual, q.act_weight)
                )
                seed = q.seeds[0] if mode == "real" else fake.from_tensor(q.seeds[0])
                statistics = _operators.statistics(x, w, seed, "act-norm", *q.chain[2:7], False)
                mean, var = statistics[:2]
                y, save_mean, invstd, _, _, mask = _operators.forward(
                    *(x, None, None, mean, var, r, w, seed), False, *q.chain, False, True
                )
                saved = (g, x, None, None, None, w, save_mean, invstd, mask, seed)
                sums = _operators.gradient_sums(*saved, *q.chain[:7])
                count = sums.new_zeros(())
                grads = _operators.backward_given(*saved, sums, count, *q.chain[:7], [True] * 3)
                found[mode] = [(t.shape, t.dtype, t.stride()) for t in (*statistics, y, sums, *grads)]
        assert found["real"] == found["fake"]
