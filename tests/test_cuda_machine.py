"""The CUDA kernels' machine code, executed without a GPU: tests/cuda_machine/README.md says how and what not.

Cases, launches and checks are those of test_cuda_host.py. What runs is what nvcc has made of the kernels: of the
library that FUSEDNORM_CUDA_LIBRARY names, as `make cuda` does, or else compiled here.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from common import FLOATS
from cuda_host import compiling
from cuda_host.suites import FOURS, STREAMING, Layer, Machine, Suite, all_cases, few_cases, kernels
from cuda_machine.building import compiled, executor, listings, spelled, symbols, tool
from cuda_machine.mutations import MUTATIONS

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(compiling.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(not compiling.SOURCES.is_dir(), reason="needs the sources"),
    pytest.mark.skipif(tool("nvcc") is None, reason="needs nvcc"),
    pytest.mark.skipif(tool("nvdisasm") is None, reason="needs nvdisasm: `make cuda` installs it, and runs this"),
]

ORDERS = ("forward", "reverse", "random:1")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda_machine")


@pytest.fixture(scope="module")
def program(room):
    return executor(room)


@pytest.fixture(scope="module")
def code(room):
    return listings(os.environ.get("FUSEDNORM_CUDA_LIBRARY"), room)


def execute(suite, program, code, orders=ORDERS):
    """The kernels that ran, as the source spells them; raises as Suite.run does."""
    compiling.ENVIRONMENT["FN_MACHINE_CODE"] = ":".join(map(str, code))
    return set(suite.run("plain", program, orders))


def test_kernels(program, code, room):
    """Right, the same bits whatever runs first; and there is no kernel, of no type and width, that does not run."""
    eights = Machine(residency=2, cluster=8, shared=4096)
    cases = all_cases() + few_cases(FLOATS)
    for dtype in FLOATS:
        cases += [
            Layer((2, 2, 1040), False, dtype, "relu", 0.3, machine=eights, mask=True, shift=shift) for shift in (0, 1)
        ]
    ran = execute(Suite(cases, room / "all"), program, code)
    assert {name.split("<")[0].removesuffix("_kernel") for name in ran} == kernels()
    assert ran == set(spelled(symbol for listing in code for symbol in symbols(listing)).values())


def test_plans(program, code, room, benchmarks):
    """How other GPUs' launches are cut, asked for without executing one: no clusters, so no residency, before 9.0."""
    rows = benchmarks("gpu_rows").MAIN[:1]
    plans = benchmarks("cuda_launches").Launcher(program, code, room).plans(rows)
    by_kernel = {kernel.split("<")[0]: found for (_, kernel), found in plans.items()}
    resident, streaming = (by_kernel[f"channels_first_{name}"] for name in ("resident_forward", "statistics"))
    assert set(resident) == {"H100", "H200", "B200"}
    assert all(plan["cluster"] > 1 and plan["default"] for plan in resident.values())
    assert {gpu for gpu, plan in streaming.items() if plan["default"]} == {"A100", "L4", "RTX 4090"}
    assert streaming["L4"]["blocks"] < streaming["A100"]["blocks"] < streaming["H100"]["blocks"]


# ---- broken on purpose -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def few(room):
    cases = []
    for machine in (STREAMING, FOURS):
        for shape, act in (((2, 2, 512), "relu"), ((64, 2, 16), "silu")):
            cases.append(Layer(shape, False, torch.bfloat16, act, 0.3, machine=machine, mask=True))
    return Suite(cases, room / "few")


@pytest.fixture(scope="module")
def planted(tmp_path_factory, request):
    """By name, jobs that compile what is to be tested."""
    tested = [item.name for item in request.session.items if "test_mutation" in item.name]
    pool = ThreadPoolExecutor(2)

    def listing(mutation):
        room = tmp_path_factory.mktemp(mutation.name)
        return compiled(mutation.planted(room), room)

    yield {m.name: pool.submit(listing, m) for m in MUTATIONS if any(m.name in name for name in tested)}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation(program, few, planted, mutation):
    """Bugs in what only the GPU's own code has: each of these is caught; `nothing` is not."""
    listing = planted[mutation.name].result()
    said = ""
    try:
        execute(few, program, [listing])
    except AssertionError as error:
        said = str(error)
    assert re.search(mutation.says, said) if mutation.says else not said, said[-3000:]


@pytest.fixture(scope="module")
def statistics(room):
    """The kernels that move running statistics, as a listing, and cases for them."""
    suite = Suite([case for case in all_cases() if case.operation == "update_statistics"], room / "statistics")
    (room / "state").mkdir()
    return suite, compiled(compiling.SOURCES / "cuda" / "state.cu", room / "state").read_text()


@pytest.mark.parametrize(
    "old, new, says",
    [
        (r"LDG\.E ", "LDG.E.128 ", "is not aligned|is outside of all tensors"),
        (r"STG\.E\.64 (.*)\.64\]", r"STG.E.64 \1.64+0x1]", "is not aligned"),
        (r"STG\.E\.64 (.*)\.64\]", r"STG.E.64 \1.64+0x1000]", "is outside of all tensors"),
        (r"\bDADD\b", "DADDLE", "unknown instruction DADDLE"),
        (r"\bDMUL\b", "DMUL.SIDEWAYS", r"unknown modifier \.SIDEWAYS"),
        (r"SR_TID\.X", "SR_TID.Q", "reads a register that is not known here"),
        (r"c\[0x0\]", "c[0x7]", "a constant outside of the arguments|reads a bank that is not there"),
        (r"\bEXIT\b", "NOP", "does not end|the code is left"),
        (r"(.*/\*0100\*/.*;\n)", "", "the listing leaves out something"),
    ],
)
def test_what_an_executor_must_not_swallow(program, statistics, tmp_path, old, new, says):
    """Changes to a listing: accesses that no memory has, and words that the executor does not know."""
    suite, text = statistics
    changed, count = re.subn(old, new, text)
    assert count
    listing = tmp_path / "changed.sass"
    listing.write_text(changed)
    with pytest.raises(AssertionError, match=says):
        execute(suite, program, [listing], ["forward"])
