"""Times that cuda_model predicts from counted machine code beside those that a run has measured, launch by launch.

A launch is found by its row and its kernel. Where the GPU is not in the model's table nothing is predicted. The counts
are of code for one architecture, cut into blocks as for an H100.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass

from benchmarks import cuda_model


@dataclass(frozen=True)
class Pair:
    """One launch: microseconds measured on the device, and predicted; `bound` is the term that decides the latter."""

    row: str
    variant: str
    kernel: str
    measured: float
    predicted: float
    bound: str

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted


def short(name: str) -> str:
    """A kernel's name without its namespace, template arguments and parameters."""
    return name.replace("void ", "").split("<")[0].split("(")[0].split("::")[-1].strip()


def gpu_of(facts: dict) -> cuda_model.GPU | None:
    """The GPU at hand in the model's table: the same name, and as many multiprocessors, as names have several kinds."""
    for gpu in cuda_model.GPUS.values():
        named = re.search(rf"\b{re.escape(gpu.name)}\b", facts.get("gpu") or "")
        if named and facts.get("multiprocessors") == gpu.multiprocessors:
            return gpu
    return None


@functools.cache
def _stored() -> tuple[str, dict[tuple[str, str], cuda_model.Counted]]:
    """The architecture, and what was counted by row and kernel; without the file, nothing."""
    if not cuda_model.STORED.exists():
        return "", {}
    stored = json.loads(cuda_model.STORED.read_text())
    by_kernel = {(row["row"], short(row["kernel"])): cuda_model.Counted.of(row) for row in stored["rows"]}
    return stored["machine"]["architecture"], by_kernel


def counted(label: str, kernel: str) -> cuda_model.Counted | None:
    """What was counted of a row's kernel, by its name in a trace. A kernel is one for so many values at a time: another
    one than was counted has no prediction."""
    found = _stored()[1].get((label, short(kernel)))
    return found if found and found.kernel.split(",")[-1] in kernel.replace(" ", "") else None


def predicted_us(label: str, kernel: str, gpu: cuda_model.GPU | None) -> float | None:
    found = counted(label, kernel)
    return found.bound(gpu)[1] * 1e6 if found and gpu else None


def pairs(rows: list[dict], gpu: cuda_model.GPU | None) -> list[Pair]:
    found = []
    for row in rows:
        for variant, modes in row.get("launches", {}).items():
            for launch in (launch for launches in modes.values() for launch in launches):
                kernel = counted(row["label"], launch["name"])
                if gpu and kernel and launch["us"] > 0:
                    bound, seconds = kernel.bound(gpu)
                    found.append(Pair(row["label"], variant, kernel.kernel, launch["us"], seconds * 1e6, bound))
    return found


def worst(rows: list[dict], facts: dict, count: int) -> list[str]:
    """The launches whose measured time is farthest from the predicted one, either way; of a row's kernel one."""
    by_kernel: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs(rows, gpu_of(facts)), key=lambda pair: -abs(math.log(pair.ratio))):
        by_kernel.setdefault((pair.row, pair.kernel), pair)
    return [
        f"  {pair.ratio:.2f} measured/predicted: {pair.kernel} of {pair.variant}, {pair.row}: measured "
        f"{pair.measured:.1f} us, predicted {pair.predicted:.1f} us, bound by {pair.bound}"
        for pair in list(by_kernel.values())[:count]
    ]


def summary(data: dict, count: int = 8) -> list[str]:
    gpu, architecture = gpu_of(data["machine"]), _stored()[0]
    if gpu is None:
        return ["\nNothing is predicted for this GPU: benchmarks/cuda_model.py does not know it."]
    rows = [row for row in data["rows"] if "launches" in row]
    ratios = sorted(pair.ratio for pair in pairs(rows, gpu))
    if not ratios:
        return [f"\nNo launch yet of those that are predicted for the {gpu.name}."]
    copies = gpu.bandwidth * gpu.copies / 1e9
    return [
        f"\nMeasured time of {len(ratios)} launches over the time predicted from counts of {architecture} for the "
        f"{gpu.name}: median {ratios[len(ratios) // 2]:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}.",
        f"  a copy: measured {data['copy']['bandwidth']['gb_per_s']:.0f} GB/s, the prediction assumes {copies:.0f}",
        *worst(rows, data["machine"], count),
    ]
