"""What `make cuda` says of counted kernels: occupancy, predictions, which rows have become worse, the tables.
tests/test_cuda_machine.py has what counts them."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (ROOT / "benchmarks" / "cuda_model.py").is_file(), reason="needs the source tree"),
]

# A launch that nothing slows down: no instructions, and its bytes are what a test adds.
KERNEL = {"kernel": "k<float,4>", "threads": 256, "registers": 32, "shared": 0, "blocks": 10**6}
KERNEL |= dict.fromkeys(("issued", "alu", "multiply", "float_", "loaded", "stored", "in_flight"), 0) | {"useful": 1}


@pytest.fixture
def model(benchmarks):
    return benchmarks("cuda_model")


# ---- occupancy -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "gpu, threads, registers, shared, blocks, limit",
    [  # what cuda_occupancy.h says
        ("H100", 256, 128, 0, 2, "registers"),
        ("H100", 256, 129, 0, 1, "registers"),
        ("H100", 256, 80, 0, 3, "registers"),
        ("H100", 256, 64, 0, 4, "registers"),
        ("H100", 256, 65, 0, 3, "registers"),
        ("H100", 128, 73, 0, 6, "registers"),  # handed out eight at a time: as 80
        ("H100", 32, 104, 0, 16, "registers"),  # of each quarter by itself: all of them together would do for 19
        ("H100", 96, 104, 0, 5, "registers"),
        ("H100", 1024, 65, 0, 0, "registers"),
        ("B200", 256, 128, 0, 2, "registers"),
        ("H100", 256, 24, 0, 8, "warps"),
        ("L4", 256, 24, 0, 6, "warps"),
        ("H100", 33, 24, 0, 32, "warps"),  # a second warp for one thread
        ("H100", 32, 24, 0, 32, "blocks"),
        ("A100", 32, 24, 0, 32, "blocks"),
        ("L4", 32, 24, 0, 24, "blocks"),
        ("H100", 256, 72, 102912, 2, "shared"),
        ("H100", 256, 24, 115712, 2, "shared"),  # with the reserved kilobyte, exactly half
        ("H100", 256, 24, 115713, 1, "shared"),
        ("H100", 256, 24, 232448, 1, "shared"),
        ("H100", 256, 24, 232449, 0, "shared"),
        ("A100", 256, 24, 83000, 1, "shared"),
        ("A100", 256, 24, 32560, 4, "shared"),  # handed out 128 bytes at a time
        ("A100", 256, 24, 166913, 0, "shared"),
        ("L4", 256, 40, 33000, 3, "shared"),
        ("RTX 4090", 256, 24, 50176, 2, "shared"),
    ],
)
def test_occupancy(model, gpu, threads, registers, shared, blocks, limit):
    launch = model.Counted(**KERNEL | {"threads": threads, "registers": registers, "shared": shared})
    found = launch.occupancy(model.GPUS[gpu])
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == launch.resident_warps(model.GPUS[gpu]) == blocks * math.ceil(threads / 32)


@pytest.mark.parametrize("blocks, resident, limit", [(1, 1, "grid"), (132, 1, "grid"), (133, 2, "registers")])
def test_a_launch_of_few_blocks(model, blocks, resident, limit):
    found = model.Counted(**KERNEL | {"registers": 128, "blocks": blocks}).occupancy(model.GPUS["H100"])
    assert (found.blocks, found.limit) == (resident, limit)


# ---- predictions -----------------------------------------------------------------------------------------------------
def slowed(model, gpu, **by):
    """A kernel that takes a millisecond for each of what it has; bytes in 16 warps' loads."""
    clocks = gpu.clock * gpu.multiprocessors * 1e-3
    rates = {"issued": 4 * clocks, "alu": 2 * clocks, "multiply": 2 * clocks, "float_": gpu.floats * clocks}
    rates |= dict.fromkeys(("loaded", "stored", "useful"), gpu.bandwidth * gpu.copies * 1e-3)
    rates["in_flight"] = gpu.bandwidth * gpu.copies * model.LATENCY / (16 * gpu.multiprocessors)
    return model.Counted(**KERNEL | {"registers": 128} | {name: rates[name] * factor for name, factor in by.items()})


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "L4", "RTX 4090", "B200"])
@pytest.mark.parametrize(
    "by, bound, milliseconds, of_floor",
    [
        ({"issued": 3, "alu": 2, "loaded": 1, "useful": 1, "in_flight": 1}, "issue", 3, 1 / 3),
        ({"issued": 2, "alu": 3, "loaded": 1, "useful": 1, "in_flight": 1}, "alu", 3, 1 / 3),
        ({"multiply": 2, "loaded": 1, "useful": 1, "in_flight": 1}, "fma", 2, 1 / 2),
        ({"float_": 2, "loaded": 1, "useful": 1, "in_flight": 1}, "fma", 2, 1 / 2),
        ({"multiply": 2, "float_": 1, "loaded": 1, "useful": 1, "in_flight": 1}, "fma", 3, 1 / 3),
        ({"alu": 1, "loaded": 1, "stored": 1, "useful": 2, "in_flight": 4}, "memory", 2, 1),
        ({"stored": 2, "useful": 2}, "memory", 2, 1),  # nobody waits for a store
        ({"loaded": 2, "useful": 1, "in_flight": 4}, "memory", 2, 1 / 2),  # half of each sector is not asked for
        ({"loaded": 1, "useful": 2, "in_flight": 4}, "memory", 1, 1),  # threads that ask for the same are no gain
        ({"loaded": 1, "useful": 1, "in_flight": 0.25}, "latency", 4, 1 / 4),
    ],
)
def test_prediction(model, gpu, by, bound, milliseconds, of_floor):
    gpu = model.GPUS[gpu]
    kernel = slowed(model, gpu, **by)
    assert kernel.bound(gpu)[0] == bound
    assert max(kernel.seconds(gpu).values()) == kernel.seconds(gpu)[bound] == pytest.approx(milliseconds * 1e-3)
    assert kernel.of_floor(gpu) == pytest.approx(of_floor)


def test_a_block_that_fits_nowhere_never_ends(model):
    gpu = model.GPUS["L4"]
    kernel = dataclasses.replace(slowed(model, gpu, loaded=1, useful=1, in_flight=1), shared=gpu.per_block + 1)
    assert kernel.seconds(gpu)["latency"] == math.inf


# ---- what may not become worse ---------------------------------------------------------------------------------------
# Its memory takes an H100 66 us, with the 16 warps that fit; with 8, waiting takes 95.
STORED = KERNEL | {"row": "(8, 4) float32", "elements": 32, "registers": 128, "issued": 10**6, "alu": 10**5}
STORED |= {"loaded": 10**8, "stored": 10**8, "useful": 2 * 10**8, "in_flight": 1000}


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"issued": 1.04, "alu": 1.04, "loaded": 1.04, "stored": 1.04}, None),
        ({"issued": 0.5, "loaded": 0.5}, None),
        ({"issued": 1.06}, "issued 1.06 of"),
        ({"alu": 1.06}, "alu 1.06 of"),
        ({"loaded": 1.06}, "loaded 1.06 of"),
        ({"stored": 1.06}, "stored 1.06 of"),
        ({"registers": 129 / 128}, "predicted 1.43 of"),
        ({"in_flight": 0.5}, "predicted 1.43 of"),
    ],
)
def test_worse(benchmarks, change, said):
    row = STORED | {what: round(STORED[what] * factor) for what, factor in change.items()}
    other = STORED | {"kernel": "new"}
    found = benchmarks("cuda_counts").worse([other, row], [STORED])
    assert len(found) == (said is not None)
    for line in found:
        assert line.startswith(f"(8, 4) float32, k<float,4>: {said}")


def test_a_kernel_that_is_gone(benchmarks):
    """Of another width, say: it would be compared with nothing."""
    (line,) = benchmarks("cuda_counts").worse([STORED | {"kernel": "k<float,2>"}], [STORED])
    assert line.startswith("(8, 4) float32, k<float,4>: ")
    assert "no longer runs" in line


def test_every_row_is_stored(benchmarks):
    stored = json.loads(benchmarks("cuda_model").STORED.read_text())["rows"]
    assert {row["row"] for row in stored} == {row.label for row in benchmarks("gpu_rows").MAIN}


# ---- plans and tables ------------------------------------------------------------------------------------------------
def test_steps(benchmarks):
    launches = [
        {"kernel": name} for name in ("a", "b", "draw_seed_kernel", "draw_seed_kernel", "c", "draw_seed_kernel")
    ]
    assert benchmarks("cuda_launches").steps(launches) == [launches[:2], [], launches[4:5]]


PLAN = {"threads": 256, "blocks": 10**6, "shared": 0, "cluster": 1, "default": True}


@pytest.fixture
def reported(benchmarks, model):
    """Of one kernel, on GPUs with plans of their own; an RTX 4090 cannot run it."""
    counted = {"issued": 400, "alu": 100, "multiply": 20, "float_": 30, "loaded": 64, "useful": 32, "in_flight": 64}
    row = {"row": "(8, 4) float32", "elements": 3200} | KERNEL | {"registers": 128} | counted
    plans = {gpu: dict(PLAN) for gpu in model.GPUS if gpu != "RTX 4090"}
    plans["L4"] |= {"blocks": 58}
    plans["B200"] |= {"shared": 150_000, "cluster": 8, "default": False}
    return benchmarks("cuda_report").report([row], {(row["row"], row["kernel"]): plans})


@pytest.mark.parametrize(
    "gpu, resident, warps, limit, in_flight",
    [
        ("A100", 2, 16, "registers", 1024),
        ("H100", 2, 16, "registers", 1024),
        ("L4", 1, 8, "grid", 512),
        ("B200", 1, 8, "shared", 512),
    ],
)
def test_a_gpu_has_its_own_plan(reported, gpu, resident, warps, limit, in_flight):
    there = reported[0]["gpus"][gpu]
    assert (there["resident_blocks"], there["resident_warps"], there["limit"]) == (resident, warps, limit)
    assert there["bytes_in_flight"] == in_flight
    assert there["predicted_us"] == there["terms_us"][there["bound"]] == max(there["terms_us"].values())


def test_report(reported):
    assert reported[0]["instructions"] == {"issued": 4.0, "alu": 1.0, "fma": 0.5, "other": 2.5}
    assert reported[0]["sectors_over_ideal"] == 2.0
    assert "RTX 4090" not in reported[0]["gpus"]


@pytest.mark.parametrize("everything, tables", [(False, 1), (True, 3)])
def test_tables(benchmarks, model, reported, everything, tables):
    """The short one has an H100's columns; the others every GPU, and where the figures are from."""
    shown = list(benchmarks("cuda_report").tables(reported, "H100", everything))
    assert len(shown) == tables
    console = Console(width=190, file=io.StringIO())
    for each in shown[:2]:
        console.print(each)
    text = console.file.getvalue()
    assert "measured" not in text
    assert "counted" in text
    assert "predicted" in text
    for gpu in model.GPUS:
        assert (gpu in text) == (everything or gpu == "H100")
    assert ("(0.0) us" in text) == everything  # a B200 runs it only where it is told to


def test_residency_is_what_is_predicted_to_be_faster():
    """plan.h chooses by constants; on each GPU and for each row that has both ways, as the stored predictions would."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "cuda-report-sm_90.json").read_text())
    ways = {}
    for row in stored["rows"]:
        kernel = row["kernel"].split("<")[0].removeprefix("channels_first_")
        if kernel == row["kernel"].split("<")[0]:
            continue
        forward = kernel.endswith(("statistics", "apply", "forward"))
        resident = kernel.startswith(("resident", "flat"))
        for gpu, at in row["gpus"].items():
            both = ways.setdefault((row["row"], forward, gpu), {})
            way = both.setdefault(resident, {"predicted_us": 0, "default": at["default"]})
            way["predicted_us"] += at["predicted_us"]
    ways = {key: both for key, both in ways.items() if len(both) == 2}
    assert {gpu for *_, gpu in ways} >= {"H100", "H200", "B200"}
    for key, both in ways.items():
        chosen = next(way for way in both.values() if way["default"])
        assert chosen["predicted_us"] == min(way["predicted_us"] for way in both.values()), key
