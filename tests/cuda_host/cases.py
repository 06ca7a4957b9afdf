"""Calls of csrc/cuda/backend.h as lines for main.cpp: their inputs, and what is to come of them.

Noise, dropped elements and saved bits as csrc/math/noise.h defines them, exactly; values as the reference in float64
with that noise, to rounding.
"""

import ctypes
import functools
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import TOLERANCE, Problem, close, same_bits, slope
from cuda_host.compiling import HERE, SOURCES, compile_or_fail

from fusednorm import reference

NUMBER = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4, torch.uint8: 5}


@dataclass(frozen=True)
class Machine:
    """Two multiprocessors, so that a few thousand values are already several chunks; blocks of two warps."""

    mp: int = 2
    shared: int = 232448
    cluster: int = 1
    threads: int = 64
    residency: int = 1  # 1: never, 2: wherever it fits
    crowded: int = 0  # no cluster finds room


STREAMING = Machine(cluster=8)  # where kernels are launched early, too


# Activations whose derivative is 0 or 1.
ONE_BIT = ("relu", "relu6", "hardtanh")


def memory(x, last):
    return (x.movedim(1, -1) if last else x).contiguous()


@dataclass
class Case:
    """A line for the executable with its inputs, and what its outputs should be."""

    operation: str
    words: dict
    inputs: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)  # name: (shape in memory, dtype)
    blanks: dict = field(default_factory=dict)  # likewise: zeros that nobody writes or reads

    def write(self, file):
        tensors = [
            f"{'io' if name in self.outputs else 'in'}:{name}:{NUMBER[t.dtype]}:{t.numel()}"
            for name, t in self.inputs.items()
        ]
        others = {"out": self.outputs, "blank": self.blanks}
        tensors += [
            f"{direction}:{name}:{NUMBER[dtype]}:{math.prod(shape)}"
            for direction, those in others.items()
            for name, (shape, dtype) in those.items()
            if name not in self.inputs
        ]
        words = [f"{key}={value}" for key, value in self.words.items()]
        file.write((" ".join([self.operation, *words, *tensors]) + "\n").encode())
        for t in self.inputs.values():
            file.write(bytes(t.detach().contiguous().flatten().view(torch.uint8).numpy()))

    def read(self, file):
        got = {}
        for name, (shape, dtype) in self.outputs.items():
            count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
            got[name] = torch.frombuffer(bytearray(file.read(count)), dtype=dtype).reshape(shape)
        return got


# ---- the noise -------------------------------------------------------------------------------------------------------
KINDS = ("bernoulli", "uniform", "gaussian")
GRANULARITIES = ("element", "channel", "sample")


@functools.cache
def oracle():
    """multipliers() of oracle.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder, "oracle.so"), Path(folder, "cuda", "oracle.cpp")
        shutil.copytree(SOURCES / "math", Path(folder, "math"))
        source.parent.mkdir()
        shutil.copy(HERE / "oracle.cpp", source)
        compile_or_fail("-O1", "-shared", "-fPIC", source, "-o", library)
        function = ctypes.CDLL(str(library)).multipliers
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double, *[ctypes.c_int64] * 4, ctypes.c_void_p]
    return function


def multipliers(shape, p, seed, granularity="element", kind="bernoulli", sample=0):
    """m in float64, of the given shape; of a batch that begins at that sample of a larger one."""
    shape = (shape[0] + sample, *shape[1:])
    m = np.full(shape, 1.0 - (p if kind == "bernoulli" else 0.0))
    if p != 0 and not (kind == "bernoulli" and p == 1):
        n, c, s = shape[0], shape[1], math.prod(shape[2:])
        oracle()(1 + KINDS.index(kind), GRANULARITIES.index(granularity), p, seed, n, c, s, m.ctypes.data)
    return torch.from_numpy(m[sample:])


class Known(Problem):
    """A problem with that noise, which the CPU backend need not know."""

    def __init__(self, *args, sample, **options):
        self.sample = sample
        super().__init__(*args, **options)

    def _exact(self, m, grad, dtype, grad_layout):
        o = self.options
        self.m = multipliers(tuple(self.x.shape), o["p"], o["seed"], o["granularity"], o["noise"], self.sample)
        super()._exact(self.m, grad, dtype, grad_layout)

    def stages(self):
        """Those before and behind the norm, without what does nothing."""
        dead = set() if self.act else {"act"}
        if torch.equal(self.m, torch.ones_like(self.m)):
            dead.add("drop")
        return [tuple(stage for stage in side if stage not in dead) for side in reference.parse_order(self.order)]

    def prelu(self):
        """The activation, with the weight of its own, if it has one."""
        return self.act if self.act_weight is None else ("prelu", self.act_weight.detach().double())

    def z(self, groups):
        vectors = [None if v is None else v.detach().double() for v in (self.running_mean, self.running_var)]
        parameters = [None if v is None else v.detach().double() for v in (self.weight, self.bias)]
        return reference.batch_norm_act_drop(
            self.u.detach(), *vectors, *parameters, self.training, eps=self.eps, order="norm",
            ghost_batch_size=len(groups[0]), mask=self.rows,
        )  # fmt: skip


def counting(kind, samples, length, seed):
    """(N, S) bool, of rows that count: of samples that are padded, single ones that are not, or none."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "padding":
        return torch.arange(length) < torch.randint(0, length + 1, (samples, 1), generator=draw)
    return torch.rand(samples, length, generator=draw) < {"holes": 0.6, "none": -1.0}[kind]


class Layer(Case):
    """Forward and, from what that saved, backward. act: as Problem has it, and "prelu". split: in four passes.

    rows: a kind of `counting`. live: the strength of the noise is known in device memory only. sample: which one of a
    larger batch is the first, known there too.
    """

    def __init__(
        self, shape, last, dtype, act=None, p=0.0, granularity="element", training=True, *, machine=STREAMING,
        mask=False, shift=0, param_dtype=None, stat_dtype=None, weight=True, bias=True, dx=True, dw=True, dr=True,
        da=True, seed=5, offset=0.0, order="norm-act-drop", kind="bernoulli", ghost=0, matched=False, split=False,
        rows=None, live=False, sample=0,
    ):  # fmt: skip
        n, c, s = shape
        self.rows = None if rows is None else counting(rows, n, s, seed)
        self.shape, self.last, self.dtype = shape, last, dtype
        self.problem = q = Known(
            shape,
            dtype,
            "last" if last else "first",
            ("prelu", "channel") if act == "prelu" else act,
            p,
            granularity,
            training,
            order=order,
            kind=kind,
            ghost_batch_size=ghost or None,
            param_dtype=param_dtype,
            stat_dtype=stat_dtype,
            weight=weight,
            bias=bias,
            seed=seed,
            offset=offset,
            rows=self.rows,
            sample=sample,
        )
        name, parameters = ("prelu", ()) if act == "prelu" else reference.resolve_activation(act)
        words = {
            "N": n, "C": c, "S": s, "last": int(last), "act": name, "p": p, "kind": kind, "granularity": granularity,
            "order": order, "ghost": ghost, "training": int(training), "eps": q.eps, "shift": shift,
            "split": int(split), "live": int(live), **vars(machine),
        } | dict(zip("ab", parameters, strict=False))  # fmt: skip
        self.groups = [range(n)]
        if training and 0 < ghost < n:
            self.groups = [range(i, min(i + ghost, n)) for i in range(0, n, ghost)]
        self.before, self.after = before, after = q.stages()
        drawn = "drop" in before + after and kind == "bernoulli" and 0 < p < 1 and granularity == "element"
        one_bit = name in ONE_BIT and "act" in after and "add" in after[: after.index("act")]
        self.holds_keep = drawn and (not one_bit or "drop" in after[after.index("add") :])
        self.holds_pass = one_bit
        self.saves = mask and len(self.groups) == 1 and (self.holds_keep or self.holds_pass)
        inputs = {"x": memory(q.x.detach(), last), "g": memory(q.grad, last)}
        inputs["seed"] = torch.tensor([seed])
        if split:  # of two processes, as main.cpp has it
            inputs["count"] = 2 * torch.ones(n * s if rows is None else int(self.rows.sum())).double().sum()[None]
        if self.rows is not None:
            eights = torch.nn.functional.pad(self.rows.flatten(), (0, -n * s % 8)).view(-1, 8)
            inputs["bits"] = (eights.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
            inputs["before"] = torch.nn.functional.pad(eights.sum(1).cumsum(0), (1, 0))
        if live:
            inputs["value"] = torch.tensor([p], dtype=torch.float64)
        if sample:
            inputs["sample"] = torch.tensor([sample])
        vectors = {"weight": q.weight, "bias": q.bias, "act_weight": q.act_weight}
        inputs |= {k: v for k, v in vectors.items() if v is not None}
        if q.residual is not None:
            inputs["residual"] = memory(q.residual.detach(), last)
        if not training:
            inputs |= {"running_mean": q.running_mean, "running_var": q.running_var}
        matrix, per_group = tuple(inputs["x"].shape), (len(self.groups), c)
        outputs = {"y": (matrix, dtype)} | {k: (per_group, q.opmath) for k in ("mean", "invstd", "stat_var")}
        if matched and training and "drop" in before:
            outputs["stat_mean"] = (per_group, q.opmath)
        if dx:
            outputs["dx"] = (matrix, dtype)
        if dr and q.residual is not None:
            outputs["dr"] = (matrix, dtype)
        for wanted, gradient, of in ((dw, "dw", q.weight), (dw, "db", q.bias), (da, "da", q.act_weight)):
            if wanted and of is not None:
                outputs[gradient] = ((c,), of.dtype)
        if self.saves:
            calls = -(-n * s // 8)
            outputs["mask"] = ((calls, c) if last else (c, calls), torch.uint8)
        super().__init__("layer", words, inputs, outputs)

    def logical(self, value):
        return value.movedim(-1, 1) if self.last else value

    def check(self, got):
        q = self.problem
        names = {"y": "y", "dx": "x", "dr": "residual", "dw": "weight", "db": "bias", "da": "act_weight"}
        for name, expected in names.items():
            if name in got:
                value = self.logical(got[name]) if name in ("y", "dx", "dr") else got[name]
                # As Problem.check: in 16-bit types the rounding of the result, else fifty roundings of float32.
                tolerance = max(TOLERANCE[value.dtype], TOLERANCE[q.opmath])
                close(value, q.expected[expected], q.scale[expected], name, tolerance)
        self.check_statistics(got)
        if self.after in (("drop",), ("act", "drop")) and q.act is None and q.options["noise"] == "bernoulli":
            assert torch.equal(self.logical(got["y"]) != 0, q.expected["y"] != 0), "other values are dropped"
        if self.saves:
            self.check_mask(got["mask"])

    def check_statistics(self, got):
        q = self.problem
        noisy = q.u.detach()
        quiet = reference.run_stages(self.before, q.x.detach().double(), q.prelu(), None)
        for i, group in enumerate(self.groups):
            u = noisy[group.start : group.stop]
            rows = None if q.rows is None else q.rows[group.start : group.stop]
            mean, var = reference.moments(u, rows)
            if not q.training:
                mean, var = q.running_mean.double(), q.running_var.double()
            # The errors of a mean are those of values as large as the standard deviation.
            close(got["mean"][i], mean, (u.abs().max() if q.training else mean.abs().max()), "mean")
            close(got["invstd"][i], (var + q.eps).rsqrt(), 0.0, "invstd")
            if "stat_mean" in got:
                u = quiet[group.start : group.stop]
                mean, var = reference.moments(u, rows)
                close(got["stat_mean"][i], mean, u.abs().max(), "stat_mean")
            close(got["stat_var"][i], var, var.max(), "stat_var")

    def check_mask(self, mask):
        """Bit i of a byte: that of row 8*k + i of its channel. What stands beyond the last row has no meaning."""
        n, c, s = self.shape
        q = self.problem
        bits, sure = torch.ones(self.shape, dtype=torch.bool), torch.ones(self.shape, dtype=torch.bool)
        if self.holds_keep:
            bits &= q.m != 0
        if self.holds_pass:
            z = q.z(self.groups)
            v = reference.run_stages(self.after[: self.after.index("act")], z, q.act, q.m, q.residual.detach().double())
            at = slope(q.act, v)
            bits &= at != 0
            sure = (slope(q.act, v - 1e-3) == at) & (slope(q.act, v + 1e-3) == at)
        if q.rows is not None:
            sure &= q.rows
        bytes_ = mask.T if self.last else mask
        got = (bytes_.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        got = got.reshape(c, -1)[:, : n * s].reshape(c, n, s).transpose(0, 1) != 0
        assert torch.equal(got[sure], bits[sure]), "mask"


class NoiseItself(Case):
    """m, or x times m."""

    def __init__(
        self, shape, dtype, p, kind="bernoulli", granularity="element", *, last=False, times_x=False, shift=0,
        machine=STREAMING, seed=3,
    ):  # fmt: skip
        self.m = multipliers(shape, p, seed, granularity, kind)
        self.dtype, self.last = dtype, last
        n, c, s = shape
        words = {
            "N": n, "C": c, "S": s, "act": "identity", "p": p, "kind": kind, "granularity": granularity,
            "last": int(last), "shift": shift, **vars(machine),
        }  # fmt: skip
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) if times_x else None
        inputs = {"seed": torch.tensor([seed])} | ({"x": memory(self.x, last)} if times_x else {})
        super().__init__("noise", words, inputs, {"y": (tuple(memory(self.m, last).shape), dtype)})

    def check(self, got):
        opmath = torch.float64 if self.dtype == torch.float64 else torch.float32
        y = self.m.to(opmath)
        if self.x is not None:
            y = y * self.x.to(opmath)
        got = got["y"].movedim(-1, 1) if self.last else got["y"]
        assert same_bits(got.contiguous(), y.to(self.dtype)), "noise"


class Statistics(Case):
    """update_stats_, which changes its buffers, group after group."""

    def __init__(
        self, channels, running, batch, count, momentum, batches, threads=64, groups=1, last_count=None, counts=None
    ):  # fmt: skip
        draw = torch.Generator().manual_seed(channels)
        shapes = ((channels,), (groups, channels))
        self.values = [torch.rand(shapes[i // 2], generator=draw).to((running, batch)[i // 2]) for i in range(4)]
        self.counts = [count] * (groups - 1) + [count if last_count is None else last_count]
        self.momentum, self.batches = momentum, batches
        words = {"C": channels, "groups": groups, "count": count, "last_count": self.counts[-1]}
        self.counts = self.counts if counts is None else counts
        words |= {"momentum": momentum or 0, "cumulative": int(momentum is None)}
        names = ("running_mean", "running_var", "mean", "var")
        inputs = dict(zip(names, self.values, strict=True))
        if batches is not None:
            inputs["batches"] = torch.tensor([batches])
        if counts is not None:
            inputs["counts"] = torch.tensor(counts, dtype=torch.float64)
        changed = {name: t for name, t in inputs.items() if name not in ("mean", "var", "counts")}
        outputs = {name: (tuple(t.shape), t.dtype) for name, t in changed.items()}
        super().__init__("update_statistics", words | vars(Machine(threads=threads)), inputs, outputs)

    def check(self, got):
        running_mean, running_var, mean, var = (v.double() for v in self.values)
        for i, count in enumerate(self.counts):
            factor = 1 / (self.batches + i + 1) if self.momentum is None else self.momentum
            if count:
                running_mean = (1 - factor) * running_mean + factor * mean[i]
                running_var = (1 - factor) * running_var + factor * var[i] * (count / max(count - 1, 1))
        close(got["running_mean"], running_mean, 0.0, "running_mean")
        close(got["running_var"], running_var, 0.0, "running_var")
        if self.batches is not None:
            assert got["batches"].item() == self.batches + len(self.counts)


class DrawSeed(Case):
    """The same state gives the same seed, captured or not; another state another seed (test_draw_seed)."""

    def __init__(self, seed, offset, in_graph=None):
        state = torch.tensor([seed, offset, in_graph or 0])
        words = {"captured": int(in_graph is not None), **vars(STREAMING)}
        super().__init__("draw_seed", words, {"state": state}, {"y": ((1,), torch.int64)})

    def check(self, got):
        pass
