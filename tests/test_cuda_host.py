"""The CUDA kernels' own sources, run without a GPU: tests/cuda_host/README.md says how, and what that cannot see.

One executable takes cases from a file through csrc/cuda/backend.h, in three builds: plain, under many orders of
threads; with ASan and UBSan; with TSan, which sees a missing barrier even where its effect does not show. Results are
compared with the reference, fed the noise that csrc/math/noise.h defines. The last part breaks the kernels on purpose,
one line at a time.
"""

import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import definition
import numpy as np
import pytest
import torch
from common import FLOATS, same_bits
from cuda_host.cases import GRANULARITIES, KINDS, multipliers
from cuda_host.compiling import (
    BUILDS,
    COMPILER,
    FLAGS,
    REPORTED,
    SOURCES,
    UNITS,
    call,
    compile_or_fail,
    copy_sources,
    plant,
    run,
)
from cuda_host.mutations import MUTATIONS, RACE
from cuda_host.suites import FEW_ORDERS, ORDERS, Suite, all_cases, few_cases, kernels

import fusednorm

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the sources"),
]


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
        if mutation.old:
            plant(tree / "cuda" / mutation.file, mutation.old, mutation.new)
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


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return Suite(all_cases(), tmp_path_factory.mktemp("cases") / "all")


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
