"""What is measured on a GPU: stages of a ResNet-50 at batch 128 and their like, in both layouts and dtypes; then the
workloads of published models; layers so small that launches are all there is; and every other order and noise.

The rows are ordered by what is lost if the run is cut off after them: `MAIN` holds one of each kind, `REST` the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.workloads import FAMILY, HEADLINE, MODELS, Workload

# A target is set for tensors of at least this size, and for those below the other one.
LARGE, SMALL = 25e6, 1e6  # bytes

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Targets:
    """What the layer is to reach on an H200; `units` = time in passes over the tensor at the copy's bandwidth."""

    fraction: float = 0.85  # streaming: of the copy bandwidth, on the floor's bytes
    units: tuple[float, float] = (2.3, 3.5)  # resident: forward, backward
    eager: dict = None  # forward + backward, times faster: (streaming, resident)
    compile: tuple[float, float] = (1.3, 1.8)


TARGETS = Targets(eager={"bfloat16": (2.4, 3.0), "float32": (1.9, 2.8)})

# Passes over the tensor that the maths needs: forward, backward.
FLOOR = {"streaming": (3, 5), "resident": (2, 3)}


def floors(workload: Workload) -> dict[str, tuple[int, int]]:
    """The same of a row's order: an addition reads the residual, and backward writes its gradient unless the addition
    comes last, where that is the output's gradient itself. Saved bits are not counted."""
    if workload.order == "drop":
        return dict.fromkeys(FLOOR, (2, 2))
    written = workload.adds and not workload.order.endswith("-add")
    return {kind: (forward + workload.adds, backward + written) for kind, (forward, backward) in FLOOR.items()}


def _shape(n: int, c: int, side: int) -> tuple[int, ...]:
    return (n, c, side, side) if side else (n, c)


def _row(n: int, c: int, side: int, dtype: torch.dtype, last: bool = False) -> Workload:
    size = f"{n}x{c}x{side}x{side}" if side else f"{n}x{c}"
    return Workload(size, _shape(n, c, side), 0.1, dtype=dtype, channels_last=last)


def _rows(*sizes, dtypes=(BF16, F32)) -> list[Workload]:
    """Both layouts of every size (a matrix has one)."""
    return [
        _row(*size, dtype, last)
        for size in sizes
        for dtype in dtypes
        for last in ((False, True) if size[2] else (False,))
    ]


# First the large ones in both types and layouts: they say whether memory's speed is reached. Then small maps, where
# instructions count most, and matrices; last, sizes that lie between.
MAIN = (
    _rows((128, 256, 56))
    + _rows((128, 1024, 14), (128, 2048, 7), dtypes=(BF16,))
    + _rows((65536, 1024, 0), (128, 512, 28))
    + _rows((128, 64, 112), dtypes=(BF16,))
)

_FULL = {"mag_mlp": {"shape": (380_000, 512), "note": ""}}  # what only the CPU's memory asked to cut
REST = _rows((128, 1024, 14), (128, 2048, 7), (128, 64, 112), dtypes=(F32,))
REST += [
    replace(workload, name=workload.name.replace("_f32", ""), dtype=dtype, **_FULL.get(workload.name, {}))
    for dtype in (BF16, F32)
    for workload in HEADLINE + MODELS
    if workload.dtype == F32
]
REST += _rows((32, 256, 56), (32, 64, 56))

SMALL_ROWS = [
    Workload("head", (24, 512), 0.4, dtype=F32),
    Workload("head", (64, 1024), 0.25, dtype=BF16),
    Workload("late stage", (16, 128, 7, 7), 0.1, dtype=BF16),
    Workload("late stage, last", (16, 128, 7, 7), 0.1, dtype=BF16, channels_last=True),
    Workload("early stage", (8, 64, 14, 14), 0.1, dtype=F32),
]

_HALF = len(FAMILY) // 2  # all channels-first, then the same channels-last
ORDERS = [
    replace(workload, shape=(128, 256, 56, 56), dtype=BF16)
    for both in zip(FAMILY[:_HALF], FAMILY[_HALF:], strict=True)
    for workload in both
]

# Compiling takes most of a row's time, so torch.compile is met in the main rows alone.
PEERS = {"main": ("eager", "compile"), "rest": ("eager",), "orders": ("eager",)}

STAGES = {"main": MAIN, "rest": REST, "small": SMALL_ROWS, "orders": ORDERS}


def key(workload: Workload, p: float) -> str:
    return f"{workload.name} {workload.label} p={p:g}"


def tiny(rows: list[Workload]) -> list[Workload]:
    """Rows of the same kinds that a dry run finishes in a second or two: of two layouts one, of orders one a kind."""
    seen, picked = set(), []
    for row in rows:
        kind = row.layout if row.order == "norm-act-drop" else (row.adds, row.order == "drop")
        if kind not in seen and len(picked) < 5:
            seen.add(kind)
            n, c, *spatial = row.shape
            picked.append(replace(row, shape=(min(n, 6), min(c, 8), *(min(s, 5) for s in spatial))))
    return picked
