"""The CUDA kernels on the rows of the GPU benchmark, without a GPU: instructions, sectors and bytes in flight, counted
in their machine code, and the times that follow from them. `make cuda` prints both.

A few blocks of each launch are executed (tests/cuda_machine) and stand for the others. Counted, and predicted from
counts: none of it is measured.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]  # behind the package that is to be tested

from cuda_host import compiling  # noqa: E402
from cuda_host.cases import Case, Machine  # noqa: E402
from cuda_machine import building  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks import cuda_model, gpu_rows, publish, table  # noqa: E402
from benchmarks.workloads import Workload  # noqa: E402

CHUNKS = 4  # of the first channels: the blocks, or clusters, that are executed
WORSE = 1.05  # than what is stored, and a row fails
RESIDENCY = {"automatic": 0, "never": 1}


def case(row: Workload, gpu: cuda_model.GPU, residency: str) -> Case:
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


def registers(listings: Iterable[Path]) -> dict[str, int]:
    """Of each kernel, by its symbol in a listing."""
    pattern = re.compile(r"EIATTR_REGCOUNT\n.*?index@\((\S+)\)\n.*?\.word\s+(0x[0-9a-f]+)", re.DOTALL)
    return {name: int(count, 16) for path in listings for name, count in pattern.findall(path.read_text())}


class Counter:
    """Executes rows and counts."""

    def __init__(self, program: Path, listings: list[Path], room: Path) -> None:
        self.program, self.listings, self.room = program, listings, room
        by_symbol = registers(listings)
        self.registers = {name: by_symbol[symbol] for symbol, name in building.spelled(by_symbol).items()}

    def count(self, row: Workload, gpu: cuda_model.GPU, residency: str) -> list[cuda_model.Counted]:
        """The launches of a training step, in order."""
        cases, found = self.room / "cases", self.room / "counts.json"
        with open(cases, "wb") as file:
            case(row, gpu, residency).write(file)
        compiling.ENVIRONMENT |= {
            "FN_MACHINE_CODE": ":".join(map(str, self.listings)),
            "FN_MACHINE_COUNTS": str(found),
            "FN_MACHINE_COLUMNS": "1",
            "FN_MACHINE_CHUNKS": str(CHUNKS),
        }
        child = compiling.call([self.program, cases, self.room / "results", "forward"])
        if child.returncode:
            raise RuntimeError(child.stderr.decode()[-2000:])
        return [self._counted(launch) for launch in json.loads(found.read_text())]

    def _counted(self, launch: dict) -> cuda_model.Counted:
        scale = math.prod(launch["grid"]) / launch["blocks"]
        opcodes: collections.Counter[str] = collections.Counter()
        moved = {"L": 0, "S": 0}
        useful = 0
        for text, executed, _, asked, parts in launch["code"]:
            words = text.split()
            opcode = words[words[0].startswith("@")].split(".")[0]
            opcodes[opcode] += executed
            if opcode in ("LDG", "STG"):
                moved[opcode[0]] += 32 * parts
                useful += asked

        def of(pipe: frozenset[str]) -> int:
            return round(scale * sum(count for opcode, count in opcodes.items() if opcode in pipe))

        return cuda_model.Counted(
            launch["kernel"],
            threads=launch["block"][0] * launch["block"][1],
            registers=self.registers[launch["kernel"]],
            shared=launch["shared"],
            blocks=math.prod(launch["grid"]),
            issued=round(scale * opcodes.total()),
            alu=of(cuda_model.ALU),
            multiply=of(cuda_model.MULTIPLY),
            float_=of(cuda_model.FLOAT),
            loaded=round(scale * moved["L"]),
            stored=round(scale * moved["S"]),
            useful=round(scale * useful),
            in_flight=launch["in_flight"],
        )


# ---- rows ------------------------------------------------------------------------------------------------------------
def rows_of(counter: Counter, gpu: cuda_model.GPU) -> Iterator[dict]:
    """One for each kernel, shape and type."""
    for row in gpu_rows.MAIN:
        seen = set()
        for residency in RESIDENCY:
            for counted in counter.count(row, gpu, residency):
                if counted.kernel in seen:
                    continue
                seen.add(counted.kernel)
                yield {"row": row.label, "elements": row.numel, **dataclasses.asdict(counted)}


def worse(rows: list[dict], stored: list[dict]) -> list[str]:
    """The rows that have become worse by more than a little, and in what."""
    before = {(row["row"], row["kernel"]): row for row in stored}
    found = []
    for row in rows:
        old = before.get((row["row"], row["kernel"]))
        for what in ("issued", "alu", "loaded", "stored"):
            if old is not None and row[what] > WORSE * old[what]:
                found.append(f"{row['row']}, {row['kernel']}: {what} {row[what] / old[what]:.2f} of what it was")
    return found


def render(rows: list[dict]) -> Table:
    """Counts of each, and what they predict."""
    shown = Table(title="CUDA kernels: counted in machine code for 9.0, times predicted for an H100")
    for name in (
        "row",
        "kernel",
        "registers",
        "instructions",
        "ALU",
        "sectors",
        "KB in flight",
        "bound by",
        "of memory",
    ):
        shown.add_column(name)
    gpu = cuda_model.GPUS["H100"]
    for row in rows:
        counted = cuda_model.Counted.of(row)
        bound, longest = counted.bound(gpu)
        per_element = 32 / row["elements"]
        shown.add_row(
            row["row"],
            counted.kernel,
            str(counted.registers),
            f"{counted.issued * per_element:.1f}",
            f"{counted.alu * per_element:.1f}",
            f"{counted.sectors:.2f}",
            f"{counted.in_flight * counted.resident_warps(gpu) / 1e3:.0f}",
            bound,
            f"{counted.seconds(gpu)['memory'] / counted.sectors / longest:.0%}",
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, help="that holds the machine code; without one, it is compiled")
    parser.add_argument("--store", action="store_true", help=f"write {cuda_model.STORED.relative_to(ROOT)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        counter = Counter(building.executor(room), building.listings(args.library, room), room)
        rows = list(rows_of(counter, cuda_model.GPUS["H100"]))
    table.console().print(render(rows))
    if args.store:
        found = {"machine": {"architecture": building.ARCHITECTURE}, "rows": rows}
        cuda_model.STORED.write_text(publish.compact(found))
        return 0
    stored = json.loads(cuda_model.STORED.read_text())["rows"] if cuda_model.STORED.exists() else []
    failed = worse(rows, stored)
    print("\n".join(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
