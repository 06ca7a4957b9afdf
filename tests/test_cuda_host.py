"""The CUDA kernels' own sources, run without a GPU: tests/cuda_host/README.md says how, and what that cannot see.

One executable takes cases from a file through csrc/cuda/backend.h, in three builds: plain, under many orders of
threads; with ASan and UBSan; with TSan, which sees a missing barrier even where its effect does not show. Results are
compared with the reference, fed the noise that csrc/math/noise.h defines. The last part breaks the kernels on purpose,
one line at a time.
"""

import ctypes
import functools
import math
import os
import random
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import definition
import numpy as np
import pytest
import torch
from common import ACTIVATIONS, FLOATS, TOLERANCE, Problem, close, same_bits, slope
from cuda_host.mutations import MUTATIONS, RACE

import fusednorm
from fusednorm import reference

HERE = Path(__file__).resolve().parent / "cuda_host"
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the sources"),
]

UNITS = ("float32", "float64", "bfloat16", "float16", "state")
FLAGS = ["-std=c++17", "-g1", "-ffp-contract=off", "-fmax-errors=3", "-w"]
# -O0 where the compiler takes longer than the program.
BUILDS = {
    "plain": ["-O1"],
    "asan": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O0", "-fsanitize=thread"],
}
ENVIRONMENT = os.environ | {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # a stack that is not the thread's is none of LSan's
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
REPORTED = 3  # the exit code of scheduler.cpp's own reports


# ---- building --------------------------------------------------------------------------------------------------------
def call(command, timeout=300, **options):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, timeout=timeout, env=ENVIRONMENT, **options
    )


def compile_or_fail(*arguments):
    child = call([COMPILER, *FLAGS, *arguments])
    assert child.returncode == 0, child.stderr.decode()[-4000:]


def copy_sources(to):
    """csrc as the kernels see it, with the tests' device.cuh in the place of the real one."""
    shutil.copytree(SOURCES / "math", to / "math")
    shutil.copy(SOURCES / "call.h", to)
    shutil.copytree(SOURCES / "cuda", to / "cuda")
    for pattern in ("*.cpp", "*.h", "*.cuh"):
        for file in HERE.glob(pattern):
            shutil.copy(file, to / "cuda")
    return to


class Workshop:
    """Compiles and runs, two jobs at a time, each at most once."""

    def __init__(self, room):
        self.room = room
        self.pool = ThreadPoolExecutor(2)
        self.jobs = {}
        self.tree = copy_sources(room / "csrc")

    def job(self, key, function, *arguments):
        if key not in self.jobs:
            self.jobs[key] = self.pool.submit(function, *arguments)
        return self.jobs[key]

    def object(self, build, unit):
        """A job that compiles one source file."""
        return self.job((build, unit), self._compile, build, unit)

    def _compile(self, build, unit):
        flags = BUILDS[build]
        if unit == "scheduler":  # never instrumented, for its order of fibers must not look like a synchronisation
            flags = ["-O2", f"-DFN_{build.upper()}"]
        file = {"main_float32": "main.cpp"}.get(unit) or f"{unit}.{'cu' if unit in UNITS else 'cpp'}"
        only = ["-DFN_ONLY_FLOAT32"] if unit == "main_float32" else []
        to = self.room / f"{build}-{unit}.o"
        compile_or_fail(*flags, *only, "-x", "c++", "-c", self.tree / "cuda" / file, "-o", to)
        return to

    def program(self, build, main="main"):
        units = ["scheduler", main, *(UNITS if main == "main" else ())]
        return self.link(build, [self.object(build, unit).result() for unit in units], self.room / f"{build}-{main}")

    def link(self, build, objects, to):
        if not to.exists():
            compile_or_fail(*BUILDS[build], *objects, "-o", to)
        return to

    def broken(self, mutation):
        """A job that makes the executable for float32 from sources with one change; its result: the program, or None
        where the compiler refuses."""
        needed = [self.object(mutation.build, unit) for unit in ("scheduler", "main_float32", "state")]
        return self.job(mutation, self._break, mutation, needed)

    def _break(self, mutation, needed):
        build, unit = mutation.build, "state" if mutation.file == "state.cu" else "float32"
        tree = shutil.copytree(self.tree, self.room / f"{mutation.name}-{build}")
        file = tree / "cuda" / mutation.file
        if mutation.old:
            old = r"\s+".join(re.escape(word) for word in mutation.old.split())  # whatever the formatter does
            text, count = re.subn(old, lambda _: mutation.new, file.read_text())
            assert count, f"{mutation.file} has no longer the text that this mutation changes:\n{mutation.old}"
            file.write_text(text)
        changed = tree / f"{unit}.o"
        flags = ["-O0", *BUILDS[build][1:]]
        source = tree / "cuda" / f"{unit}.cu"
        if call([COMPILER, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", changed]).returncode:
            return None
        objects = [job.result() for job in needed[: 2 if unit == "state" else 3]]
        if unit == "state":
            objects.append(self.object(build, "float32").result())
        return self.link(build, [*objects, changed], tree / "program")

    def start(self, selected):
        """Sets everything going that the selected tests will wait for, what is needed first in front."""
        for build in BUILDS:
            for unit in ("scheduler", "toys", "main", *UNITS):
                self.object(build, unit)
        for mutation in MUTATIONS:
            if any(mutation.name in name for name in selected):
                self.broken(mutation)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, request):
    workshop = Workshop(tmp_path_factory.mktemp("cuda_host"))
    workshop.start([item.name for item in request.session.items if "test_mutation" in item.name])
    yield workshop
    workshop.pool.shutdown(cancel_futures=True)


def fixed_addresses(program):
    """TSan of this age wants memory where it was before kernels spread addresses as widely as they do now."""
    return ["setarch", "-R", program] if shutil.which("setarch") else [program]


def run(build, program, *arguments, **options):
    child = call([*(fixed_addresses(program) if build == "tsan" else [program]), *arguments], **options)
    text = child.stderr.decode(errors="replace")
    if build == "tsan" and ("unexpected memory mapping" in text or "failed to set personality" in text):
        pytest.skip("ThreadSanitizer cannot start here")
    return child.returncode, child.stdout, text


# ---- the model: types ------------------------------------------------------------------------------------------------
def test_conversions(workshop):
    """The 16-bit types of the stand-in, bit for bit those of torch, but for which NaN a NaN becomes."""
    wide = torch.cat(
        [
            torch.arange(-(2**31), 2**31, 39119, dtype=torch.int64).to(torch.int32).view(torch.float32),
            torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float(),
            torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float(),
        ]
    )
    # The values between two neighbours of float16, and their own neighbours.
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    middles = ((halves[1:] + halves[:-1]) / 2).float()
    up = torch.nextafter(middles, torch.tensor(math.inf))
    wide = torch.cat([wide, middles, up, torch.nextafter(middles, torch.tensor(0.0)), torch.tensor([65519.0, 65520.0])])
    wide = torch.cat([wide, -wide])
    code, out, text = run("plain", workshop.program("plain", "toys"), "convert", input=wide.numpy().tobytes())
    assert code == 0, text
    n = wide.numel()
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        got = torch.frombuffer(bytearray(out[2 * n * i : 2 * n * (i + 1)]), dtype=torch.int16).view(dtype)
        expected = wide.to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert same_bits(got[number], expected[number]), dtype
        back = torch.frombuffer(bytearray(out[4 * n + 4 * 65536 * i :][: 4 * 65536]), dtype=torch.float32)
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        assert torch.equal(back.isnan(), every.isnan())
        assert same_bits(back[~back.isnan()], every[~back.isnan()].float()), dtype


# ---- the model: small kernels ----------------------------------------------------------------------------------------
RIGHT = ("block_sum", "warp_sum", "cluster", "unset")
# What each build must say of a wrong one, as a pattern, under any order; None: it may miss it.
POISONED = "AddressSanitizer: "
WRONG = {
    "two_writers": {"tsan": RACE},
    "two_blocks": {"tsan": RACE},
    "shuffle_for_barrier": {"tsan": RACE},
    "block_sum_1": {"tsan": RACE},
    "block_sum_2": {"tsan": RACE, "plain": "wrong"},
    "block_sum_3": {"tsan": RACE},
    "cluster_1": {"tsan": RACE, "plain": "wrong"},
    "cluster_2": dict.fromkeys(BUILDS, "cluster_peer"),
    "divergent": dict.fromkeys(BUILDS, r"toys.cpp:\d+: divergence: this thread came to a barrier while block \(0"),
    "early_return": dict.fromkeys(BUILDS, r"returned while block .* waits for the barrier|threads of the block have r"),
    "absent_lanes": dict.fromkeys(
        BUILDS, r"deadlock\n(.*\n)*.* waits with 15 others of 32 for the shuffle of the warp"
    ),
    "absent_lanes_return": dict.fromkeys(BUILDS, r"returned while .* waits for the shuffle|of the warp have returned"),
    "spins": dict.fromkeys(("plain", "asan"), "did not end within 1 s"),
    "shared_overrun_write": {"plain": "written 0 bytes beyond its end", "asan": POISONED + "use-after-poison"},
    "shared_overrun_read": {"asan": POISONED + "use-after-poison"},
    "global_overrun": {"asan": POISONED + "heap-buffer-overflow"},
    "misaligned": dict.fromkeys(BUILDS, r"toys.cpp:\d+: access of 8 bytes at 0x\w+, which is no multiple of that"),
    "too_many_threads": {"plain": "launch: threads: 512, but the limit is 256"},
    "too_much_shared": {"plain": "launch: bytes of shared memory: 1048576, but the limit is 232448"},
}
FEW_ORDERS = ("forward", "reverse", "random:1", "random:2", "random:3")


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("toy", RIGHT)
def test_right_toy(workshop, build, toy):
    for order in FEW_ORDERS if build == "plain" else FEW_ORDERS[2:3]:
        assert run(build, workshop.program(build, "toys"), toy, order)[0] == 0, order


@pytest.mark.parametrize("toy, build", [(toy, build) for toy, builds in WRONG.items() for build in builds])
def test_wrong_toy(workshop, toy, build):
    for order in FEW_ORDERS[:1] if toy == "spins" else FEW_ORDERS if build == "plain" else FEW_ORDERS[2:3]:
        code, out, text = run(build, workshop.program(build, "toys"), toy, order, timeout=60)
        assert code != 0 and re.search(WRONG[toy][build], out.decode() + text), f"{order}: {code} {out} {text[-2000:]}"


def test_portable_switch(workshop, tmp_path):
    """Elsewhere than on x86-64 fibers switch by ucontext, slowly."""
    scheduler = tmp_path / "scheduler.o"
    source = workshop.tree / "cuda" / "scheduler.cpp"
    compile_or_fail("-O0", "-DFN_UCONTEXT", "-c", source, "-o", scheduler)
    program = workshop.link("plain", [scheduler, workshop.object("plain", "toys").result()], tmp_path / "toys")
    assert run("plain", program, "block_sum", "random:1")[0] == 0
    assert run("plain", program, "divergent", "random:1")[0] == REPORTED


@pytest.mark.parametrize("toy", ["block_sum_1", "block_sum_3"])
def test_orders_differ(workshop, toy):
    """Some order of the threads shows what another one hides."""
    codes = [run("plain", workshop.program("plain", "toys"), toy, order)[0] for order in FEW_ORDERS]
    assert 0 in codes and 1 in codes, codes


@pytest.mark.parametrize(
    "body",
    [
        "__shared__ float scratch[32]; scratch[0] = *p;",
        "__syncthreads();",
        "toy<<<1, 32>>>(p);",
        "__shfl_sync(~0u, 1, 0);",
    ],
)
def test_bare_cuda_does_not_compile(workshop, tmp_path, body):
    source = tmp_path / "bare.cu"
    for text, compiles in (("*p = 1;", True), (body, False)):
        source.write_text(f'#include "device.cuh"\nFN_KERNEL(32, 1) toy(float* p) {{ {text} }}\n')
        code = call([COMPILER, *FLAGS, "-I", workshop.tree / "cuda", "-x", "c++", "-fsyntax-only", source]).returncode
        assert (code == 0) == compiles, text


# ---- cases -----------------------------------------------------------------------------------------------------------
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


STREAMING = Machine()
ONE_BLOCK = Machine(residency=2)
# So little shared memory that some hundred rows need a cluster.
PAIRS = Machine(residency=2, cluster=2, shared=9728)
FOURS = Machine(residency=2, cluster=4, shared=6144)
CROWDED = Machine(residency=2, cluster=4, shared=6144, crowded=1)
MACHINES = (STREAMING, ONE_BLOCK, PAIRS, FOURS, Machine(mp=1), Machine(mp=7, threads=128), Machine(threads=32))


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

    def write(self, file):
        tensors = [
            f"{'io' if name in self.outputs else 'in'}:{name}:{NUMBER[t.dtype]}:{t.numel()}"
            for name, t in self.inputs.items()
        ]
        tensors += [
            f"out:{name}:{NUMBER[dtype]}:{math.prod(shape)}"
            for name, (shape, dtype) in self.outputs.items()
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


def multipliers(shape, p, seed, granularity="element", kind="bernoulli"):
    """m in float64, of the given shape."""
    m = np.full(shape, 1.0 - (p if kind == "bernoulli" else 0.0))
    if p != 0 and not (kind == "bernoulli" and p == 1):
        n, c, s = shape[0], shape[1], math.prod(shape[2:])
        oracle()(1 + KINDS.index(kind), GRANULARITIES.index(granularity), p, seed, n, c, s, m.ctypes.data)
    return torch.from_numpy(m)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(kind, granularity):
    shape, p, seed = (21, 3, 5), 0.3, -5
    m = multipliers(shape, p, seed, granularity, kind).numpy()
    ours = fusednorm.noise(shape, p, seed=seed, kind=kind, granularity=granularity)
    assert np.array_equal(m, ours.double().numpy() if kind != "bernoulli" else np.where(ours == 0, 0, m.max()))
    if kind == "uniform":
        assert np.array_equal(m, definition.uniform(shape, p, seed, granularity))
    elif kind == "gaussian":
        np.testing.assert_allclose(m, definition.gaussian(shape, p, seed, granularity), rtol=0, atol=1e-6)
    elif granularity != "sample":
        assert np.array_equal(m, definition.bernoulli(shape, p, seed, granularity))


class Known(Problem):
    """A problem with that noise, which the CPU backend need not know."""

    def _exact(self, m, grad, dtype, grad_layout):
        o = self.options
        self.m = multipliers(tuple(self.x.shape), o["p"], o["seed"], o["granularity"], o["noise"])
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
            ghost_batch_size=len(groups[0]),
        )  # fmt: skip


class Layer(Case):
    """Forward and, from what that saved, backward. act: as Problem has it, and "prelu"."""

    def __init__(
        self, shape, last, dtype, act=None, p=0.0, granularity="element", training=True, *, machine=STREAMING,
        mask=False, shift=0, param_dtype=None, stat_dtype=None, weight=True, bias=True, dx=True, dw=True, dr=True,
        da=True, seed=5, offset=0.0, order="norm-act-drop", kind="bernoulli", ghost=0, matched=False,
    ):  # fmt: skip
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
        )
        name, parameters = ("prelu", ()) if act == "prelu" else reference.resolve_activation(act)
        n, c, s = shape
        words = {
            "N": n, "C": c, "S": s, "last": int(last), "act": name, "p": p, "kind": kind, "granularity": granularity,
            "order": order, "ghost": ghost, "training": int(training), "eps": q.eps, "shift": shift, **vars(machine),
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
            rows = (0, *range(2, u.dim()))
            var, mean = torch.var_mean(u, rows, correction=0)
            if not q.training:
                mean, var = q.running_mean.double(), q.running_var.double()
            # The errors of a mean are those of values as large as the standard deviation.
            close(got["mean"][i], mean, (u.abs().max() if q.training else mean.abs().max()), "mean")
            close(got["invstd"][i], (var + q.eps).rsqrt(), 0.0, "invstd")
            if "stat_mean" in got:
                u = quiet[group.start : group.stop]
                var, mean = torch.var_mean(u, rows, correction=0)
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

    def __init__(self, channels, running, batch, count, momentum, batches, threads=64, groups=1, last_count=None):
        draw = torch.Generator().manual_seed(channels)
        shapes = ((channels,), (groups, channels))
        self.values = [torch.rand(shapes[i // 2], generator=draw).to((running, batch)[i // 2]) for i in range(4)]
        self.counts = [count] * (groups - 1) + [count if last_count is None else last_count]
        self.momentum, self.batches = momentum, batches
        words = {"C": channels, "groups": groups, "count": count, "last_count": self.counts[-1]}
        words |= {"momentum": momentum or 0, "cumulative": int(momentum is None)}
        names = ("running_mean", "running_var", "mean", "var")
        inputs = dict(zip(names, self.values, strict=True))
        if batches is not None:
            inputs["batches"] = torch.tensor([batches])
        changed = {name: t for name, t in inputs.items() if name not in ("mean", "var")}
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


# The numbers of rows lie around those of a Philox call (8), a warp (32), a tile (256) and a chunk (512); S is one, odd,
# a multiple of every vector, longer than a tile, longer than a chunk.
SHAPES = (
    (2, 1, 1), (1, 3, 2), (1, 1, 7), (1, 8, 8), (9, 1, 1), (1, 3, 31), (2, 8, 16), (3, 33, 11), (5, 3, 49), (2, 64, 49),
    (4, 3, 64), (1, 33, 255), (2, 2, 128), (1, 1, 257), (20, 5, 13), (3, 8, 96), (2, 3, 300), (1, 8, 512),
    (2, 3, 520), (1, 1, 1300), (41, 1, 49), (3, 2, 700), (17, 2, 128), (1, 2, 2051), (2, 9, 64), (33, 3, 8),
    (64, 2, 16), (8, 1, 333),
)  # fmt: skip
# Channels-last has a loop of its own over columns; C is 1, odd, a multiple of every vector, more than a block takes.
COLUMNS = (
    (1, 3, 2), (2, 8, 1), (7, 1, 1), (9, 3, 1), (31, 8, 1), (5, 33, 7), (3, 64, 13), (2, 64, 49), (33, 8, 9),
    (1, 5, 300), (2, 128, 20), (3, 131, 8), (64, 16, 13), (2, 264, 9), (4, 2, 512),
)  # fmt: skip


CHANNEL = ("element", "channel")
ORDERS_OF_STAGES = [order for order in reference.ORDERS if order != "norm-act-drop"]


# Rows of a group that are and are not multiples of 8, or of a vector; groups of one sample, a last one that is short, a
# single channel.
GROUPED = (
    ((9, 3, 10), 3), ((9, 3, 12), 1), ((7, 2, 4), 3), ((5, 3, 49), 2), ((6, 2, 200), 2), ((20, 1, 1), 3),
    ((9, 8, 8), 2), ((30, 16, 13), 4), ((13, 6, 1), 5), ((40, 4, 1), 8), ((3, 2, 520), 1), ((100, 2, 3), 1),
)  # fmt: skip


def staged_cases(draw):
    """Every order in both layouts, with everything else drawn."""
    cases = []
    acts = ("relu", "relu", "prelu", "prelu", "gelu", ("hardtanh", -0.5, 1.0), "elu")
    for order in ORDERS_OF_STAGES * 2:
        for last in (False, True):
            shape, ghost = draw.choice(SHAPES + COLUMNS), 0
            if draw.random() < 0.4:
                shape, ghost = draw.choice(GROUPED)
            last = shape[1] > 1 if shape[2] == 1 else last
            kind = draw.choice(KINDS)
            p = draw.choice((0.3, 0.3, 0.3, 0.0, 1.0)) if kind == "bernoulli" else 0.3
            if p == 1 and order.find("drop") < order.find("norm"):
                p = 0.3  # statistics of zeros
            narrow = draw.choice((None, None, torch.bfloat16, torch.float64))
            cases.append(
                Layer(
                    shape, last, draw.choice(FLOATS), draw.choice(acts), p, draw.choice(GRANULARITIES),
                    draw.random() < 0.85, machine=draw.choice(MACHINES if not last else MACHINES[4:]),
                    mask=draw.random() < 0.7, shift=int(draw.random() < 0.25), param_dtype=narrow,
                    stat_dtype=narrow, weight=draw.random() < 0.8, bias=draw.random() < 0.8, dx=draw.random() < 0.9,
                    dw=draw.random() < 0.8, dr=draw.random() < 0.8, da=draw.random() < 0.8, order=order, kind=kind,
                    ghost=ghost, matched=draw.random() < 0.5, seed=draw.randrange(100),
                )
            )  # fmt: skip
    return cases


def all_cases():
    draw = random.Random(1)
    cases = []
    for shape in SHAPES + COLUMNS:
        # Where both layouts are the same memory, backends are given channels-last, but for a single channel.
        for last in (False, True) if shape[2] > 1 else (shape[1] > 1,):
            # Two of the types for the shapes of the other layout.
            for dtype in FLOATS if (shape in COLUMNS) == last else draw.sample(FLOATS, 2):
                p = draw.choice((0.0, 0.3, 0.3, 0.3, 1.0))
                narrow = draw.choice((None, None, torch.bfloat16, torch.float64, torch.float16))
                training = draw.random() < 0.75
                cases.append(
                    Layer(
                        shape, last, dtype, draw.choice((None, None, "relu", "gelu", "silu")), p,
                        draw.choice(("element",) * 3 + ("channel",)), training,
                        machine=draw.choice(MACHINES if not last else MACHINES[4:]),
                        mask=draw.random() < 0.5, shift=int(draw.random() < 0.25), param_dtype=narrow,
                        stat_dtype=narrow, weight=draw.random() < 0.8, bias=draw.random() < 0.8,
                        dx=draw.random() < 0.9, dw=draw.random() < 0.8,
                    )
                )  # fmt: skip
    for i, act in enumerate(ACTIVATIONS):
        for last in (False, True):
            for dtype in (torch.float32, torch.float64):
                cases.append(Layer((3, 4, 24), last, dtype, act, 0.3, training=i % 3 > 0, machine=MACHINES[i % 2]))
    # Resident, in clusters of every size up to 4, with a short last block; streaming, in several chunks.
    for dtype in FLOATS:
        for machine in (STREAMING, ONE_BLOCK, PAIRS, FOURS):
            for shape in ((1, 2, 900), (4, 3, 256), (37, 2, 49), (3, 1, 500)):
                for shift in (0, 1):
                    mask, granularity = shift == 0, "channel" if shape[0] == 37 else "element"
                    cases.append(
                        Layer(shape, False, dtype, "relu", 0.3, granularity, machine=machine, mask=mask, shift=shift)
                    )
    # Several visits of a warp to a channel of many samples: more channels than blocks in a few waves.
    for dtype in FLOATS:
        for shape in ((4, 16, 300), (9, 16, 128), (30, 16, 49)):
            cases.append(Layer(shape, False, dtype, "relu", 0.3, CHANNEL[shape[2] == 49], machine=Machine(mp=1)))
    # Channel noise where each sample is one value: that of the elements.
    for c in (1, 4):
        cases += [Layer((9, c, 1), c > 1, torch.float32, None, 0.3, "channel", machine=m) for m in MACHINES[:2]]
    # A mean far from zero.
    cases += [
        Layer((4, 3, 256), last, torch.float32, machine=m, offset=100.0) for last, m in ((0, PAIRS), (1, STREAMING))
    ]
    for i, dtype in enumerate(FLOATS):
        for shape in ((1, 1, 1), (3, 5, 7), (2, 3, 600), (300, 4, 1)):
            cases.append(NoiseItself(shape, dtype, (0.3, 0.0, 1.0, 0.9)[i]))
    cases += staged_cases(random.Random(2))
    for dtype in FLOATS:
        for kind in KINDS:
            for granularity in GRANULARITIES:
                for shape in ((9, 3, 12), (3, 8, 200), (20, 4, 1)):
                    last = shape[2] == 1 or draw.random() < 0.5
                    cases.append(
                        NoiseItself(
                            shape, dtype, 0.4, kind, granularity, last=last, times_x=draw.random() < 0.6,
                            shift=int(draw.random() < 0.3),
                        )
                    )  # fmt: skip
    for running in FLOATS:
        for momentum, batches in ((0.1, None), (0.3, 4), (None, 2), (1.0, 0)):
            cases.append(Statistics(70, running, torch.float32, 12, momentum, batches))
    cases += [Statistics(3, torch.float32, torch.float64, count, None, 0) for count in (0, 1, 2)]
    cases += [
        Statistics(70, torch.float32, torch.float32, 12, momentum, 3, groups=groups, last_count=last_count)
        for momentum, groups, last_count in ((0.1, 2, 5), (None, 9, 1), (0.3, 4, 12))
    ]
    return cases + [DrawSeed(7, 8), DrawSeed(-1, 2**40, 12)]


def few_staged(dtype, other):
    """Orders, noises and groups: a case or two for each place where they differ. other: a granularity."""

    def layer(shape, last, act, order, granularity="element", **options):
        return Layer(shape, last, dtype, act, 0.3, granularity, order=order, **options)

    return [
        layer((5, 3, 49), False, "prelu", "act-drop-norm-add", kind="gaussian", ghost=2, matched=True),
        layer((9, 3, 12), False, "prelu", "norm-drop-act", ghost=1),
        layer((2, 1, 300), False, "prelu", "norm-drop-act", ghost=1),
        layer((9, 3, 8), False, "relu", "norm-add-act-drop", mask=True),
        layer((3, 2, 200), False, "prelu", "norm-add-drop-act", kind="uniform", ghost=2, machine=ONE_BLOCK),
        layer((2, 2, 512), False, "gelu", "drop-norm-add-act", "sample", kind="gaussian", machine=FOURS),
        layer((2, 2, 512), False, "elu", "drop-act-norm", matched=True, mask=True, machine=FOURS),
        layer((20, 3, 49), False, None, "norm-drop-add", other, kind="gaussian"),
        layer((2, 2, 264), False, "relu", "norm-drop-add-act", mask=True),
        layer((30, 16, 13), True, "prelu", "drop-act-norm-add", kind="gaussian", ghost=4, matched=True),
        layer((9, 8, 24), True, "relu", "norm-add-act-drop", mask=True, machine=Machine(mp=1, threads=32)),
        layer((5, 3, 49), True, "prelu", "norm-drop-add-act", other, kind="uniform"),
        layer((2, 16, 64), True, ("hardtanh", -0.5, 1.0), "drop-norm-add-act", mask=True),
        layer((9, 3, 1), True, "elu", "drop-norm-act", "sample", training=False),
        NoiseItself((2, 3, 300), dtype, 0.3, "gaussian", times_x=True),
        NoiseItself((9, 4, 13), dtype, 0.3, "uniform", "sample", last=True, times_x=True),
    ]


def few_cases(dtypes):
    """Every kernel once or twice, in few threads."""
    cases = []
    for i, dtype in enumerate(dtypes):
        for machine in (STREAMING, FOURS):
            cases.append(Layer((2, 2, 512), False, dtype, "relu", 0.3, machine=machine, mask=True))
            cases.append(Layer((5, 3, 49), False, dtype, "silu", 0.3, CHANNEL[i == 0], machine=machine))
        cases.append(Layer((1, 1, 700), False, dtype, "relu", 0.3, machine=FOURS, mask=True, shift=1))
        cases.append(Layer((1, 1, 1040), False, dtype, None, 0.3, machine=FOURS))
        cases.append(Layer((1, 2, 260), False, dtype, None, 0.3, machine=STREAMING))
        cases.append(Layer((4, 3, 256), False, dtype, None, 0.3, machine=ONE_BLOCK))
        cases.append(Layer((5, 8, 13), True, dtype, "relu", 0.3, mask=True))
        cases.append(Layer((3, 33, 30), True, dtype, None, 0.3, shift=1))
        cases.append(Layer((2, 16, 128), True, dtype, None, 0.3, CHANNEL[i == 0]))
        cases.append(Layer((5, 3, 49), False, dtype, "relu", 0.3, training=False, dx=bool(i)))
        cases.append(Layer((9, 3, 1), True, dtype, "relu", 0.3, training=False, dw=False))
        cases.append(NoiseItself((2, 3, 300), dtype, 0.3))
    for i, dtype in enumerate(dtypes):
        cases += few_staged(dtype, other=CHANNEL[i == 0])
    cases.append(Layer((2, 2, 512), False, dtypes[0], "relu", 0.3, machine=CROWDED))
    # Several visits of a warp, and a sample's end between them.
    cases.append(Layer((4, 16, 300), False, dtypes[0], "relu", 0.3, machine=Machine(mp=1), mask=True))
    cases += [Statistics(70, torch.float32, torch.float32, 12, 0.1, 3, groups=3, last_count=4), DrawSeed(7, 8)]
    cases.append(Statistics(70, torch.float32, torch.float32, 12, None, 3))
    return cases


class Suite:
    """A file of cases, and their check."""

    def __init__(self, cases, file):
        self.cases, self.file = cases, file
        with open(file, "wb") as f:
            for case in cases:
                case.write(f)

    def run(self, build, program, orders, check=True):
        """The kernels that ran. Raises where something is wrong, with the case in words."""
        results = program.parent / (program.name + ".results")
        code, out, text = run(build, program, self.file, results, *orders)
        assert code == 0, f"exit code {code}:\n{text[text.rfind('case ') :][:6000]}"
        with open(results, "rb") as f:
            for case in self.cases:
                got = case.read(f)
                try:
                    case.check(got)
                except AssertionError as error:
                    raise AssertionError(f"{case.operation} {case.words}: {error}") from None
        return out.decode().split()


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return Suite(all_cases(), tmp_path_factory.mktemp("cases") / "all")


def kernels():
    """The names of the kernels in the sources, as launches spell them."""
    text = "".join(path.read_text() for path in sorted((SOURCES / "cuda").glob("*.cu*")) if path.name != "device.cuh")
    names = re.findall(r"^FN_KERNEL\(.*\)\s*(\w+)\(", text, re.MULTILINE)
    return {name.removesuffix("_kernel") for name in names}


ORDERS = ("forward", "reverse", *(f"random:{seed}" for seed in range(1, 5)))


def test_kernels(workshop, suite):
    """Right, and the same bits whatever runs first. The cases reach every kernel that there is."""
    assert set(suite.run("plain", workshop.program("plain"), ORDERS)) == kernels()


def test_kernels_asan(workshop, suite, tmp_path):
    some = Suite(suite.cases[::4] + few_cases([torch.float32]), tmp_path / "some")
    assert set(some.run("asan", workshop.program("asan"), ["random:1"])) == kernels()


def test_kernels_tsan(workshop, tmp_path):
    """Fewer cases: a race that is there shows in one order, and fibers are dear to TSan."""
    few = Suite(few_cases(FLOATS), tmp_path / "few")
    assert set(few.run("tsan", workshop.program("tsan"), ["random:1"])) == kernels()


# ---- broken on purpose -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def float32_suite(tmp_path_factory):
    return Suite(few_cases([torch.float32]), tmp_path_factory.mktemp("cases") / "float32")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation(workshop, float32_suite, mutation):
    """Each of these is caught by the build that it names; `nothing` is not."""
    program = workshop.broken(mutation).result()
    said = "refused"
    if program is not None:
        try:
            float32_suite.run(mutation.build, program, FEW_ORDERS if mutation.build == "plain" else ["random:1"])
            said = ""
        except AssertionError as error:
            said = str(error)
    if mutation.says:
        assert re.search(mutation.says, said), said or "not caught"
    else:
        assert not said, said
