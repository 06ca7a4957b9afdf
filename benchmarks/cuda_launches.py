"""Launches of the GPU benchmark's rows, through csrc/cuda/backend.h: a few of their blocks executed, or none: that only
asks how each GPU's launches are cut."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import torch
from cuda_host.cases import Case, DrawSeed, Machine

from benchmarks.cuda_model import GPU, GPUS
from benchmarks.workloads import Workload

CHUNKS = 4  # of the first channels: the blocks, or clusters, that are executed
RESIDENCY = {"automatic": 0, "never": 1}
BETWEEN = DrawSeed(0, 0)  # two steps, where many are asked for at once


class Plan(TypedDict):
    """How a GPU's launch of a kernel is cut; `default`: it is what runs there unless somebody asks for streaming."""

    threads: int
    blocks: int
    shared: int
    cluster: int
    default: bool


# By row and kernel, then by GPU: those that a launch of the kernel can have on that row.
Plans = dict[tuple[str, str], dict[str, Plan]]


def case(row: Workload, gpu: GPU, residency: str) -> Case:
    """The call as main.cpp of tests/cuda_host takes it, on zeros."""
    n, c, *spatial = row.shape
    s = torch.Size(spatial).numel()
    last = row.channels_last or not spatial
    saves = row.p > 0 and row.dtype != torch.float32
    machine = Machine(gpu.multiprocessors, gpu.per_block, gpu.cluster, 256, RESIDENCY[residency])
    words = {
        "N": n, "C": c, "S": s, "last": int(last), "act": row.act or "identity", "p": row.p, "kind": row.noise,
        "granularity": row.granularity, "order": row.order, "ghost": 0, "training": 1, "eps": 1e-5, "shift": 0,
        **vars(machine),
    }  # fmt: skip
    tensors = dict.fromkeys(("x", "g", "y", "dx"), ((n, c, s), row.dtype)) | {"seed": ((1,), torch.int64)}
    tensors |= dict.fromkeys(("weight", "bias", "mean", "invstd", "stat_var", "dw", "db"), ((c,), torch.float32))
    if saves:
        tensors["mask"] = ((-(-n * s // 8), c), torch.uint8)
    return Case("layer", words, blanks=tensors)


@dataclasses.dataclass
class Launcher:
    """tests/cuda_machine's program at work on listings."""

    program: Path
    listings: list[Path]
    room: Path

    def launches(self, cases: Iterable[Case], chunks: int = CHUNKS) -> list[dict]:
        """As counts.cpp has them, in order."""
        lines, found = self.room / "cases", self.room / "counts.json"
        with open(lines, "wb") as file:
            for each in cases:
                each.write(file)
        environment = {
            "FN_MACHINE_CODE": ":".join(map(str, self.listings)),
            "FN_MACHINE_COUNTS": str(found),
            "FN_MACHINE_COLUMNS": "1",
            "FN_MACHINE_CHUNKS": str(chunks),
        }
        command = [str(self.program), str(lines), str(self.room / "results"), "forward"]
        child = subprocess.run(command, capture_output=True, env=os.environ | environment, check=False)
        if child.returncode:
            raise RuntimeError(child.stderr.decode()[-2000:])
        return json.loads(found.read_text())

    def plans(self, rows: list[Workload]) -> Plans:
        """Of all GPUs."""
        asked = [(row, gpu, residency) for row in rows for gpu in GPUS.values() for residency in RESIDENCY]
        cases = [untouched(case(*each)) for each in asked]
        launches = self.launches((c for each in cases for c in (each, BETWEEN)), chunks=0)
        found: Plans = {}
        for (row, gpu, residency), step in zip(asked, steps(launches), strict=True):
            for launch in step:
                plan = found.setdefault((row.label, launch["kernel"]), {})
                plan.setdefault(gpu.name, plan_of(launch, residency == "automatic"))
        return found


def untouched(whole: Case) -> Case:
    """The same call where nothing is executed, so that tensors need no memory."""
    return dataclasses.replace(whole, blanks={name: ((1,), dtype) for name, (_, dtype) in whole.blanks.items()})


def steps(launches: list[dict]) -> list[list[dict]]:
    """Cut behind each step, where BETWEEN was launched."""
    found: list[list[dict]] = [[]]
    for launch in launches:
        if launch["kernel"].startswith(BETWEEN.operation):
            found.append([])
        else:
            found[-1].append(launch)
    return found[:-1]


def plan_of(launch: dict, default: bool) -> Plan:
    (blocks_x, blocks_y), (threads_x, threads_y) = launch["grid"], launch["block"]
    return {
        "threads": threads_x * threads_y,
        "blocks": blocks_x * blocks_y,
        "shared": launch["shared"],
        "cluster": launch["cluster"],
        "default": default,
    }
