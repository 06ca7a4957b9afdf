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

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]  # behind the package that is to be tested

from cuda_machine import building  # noqa: E402

from benchmarks import cuda_launches, cuda_model, cuda_report, gpu_rows, publish, table  # noqa: E402
from benchmarks.workloads import Workload  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
REPORT = RESULTS / f"cuda-report-{building.ARCHITECTURE}.json"
COUNTED_FOR = cuda_model.GPUS["H100"]  # whose launches are executed
WORSE = 1.05  # than what is stored, and a row fails


def registers(listings: Iterable[Path]) -> dict[str, int]:
    """Of each kernel, by its symbol in a listing."""
    pattern = re.compile(r"EIATTR_REGCOUNT\n.*?index@\((\S+)\)\n.*?\.word\s+(0x[0-9a-f]+)", re.DOTALL)
    return {name: int(count, 16) for path in listings for name, count in pattern.findall(path.read_text())}


class Counter:
    """Executes rows and counts."""

    def __init__(self, launcher: cuda_launches.Launcher) -> None:
        self.launcher = launcher
        by_symbol = registers(launcher.listings)
        self.registers = {name: by_symbol[symbol] for symbol, name in building.spelled(by_symbol).items()}

    def count(self, row: Workload, gpu: cuda_model.GPU, residency: str) -> list[cuda_model.Counted]:
        """The launches of a training step, in order."""
        return [self._counted(launch) for launch in self.launcher.launches([cuda_launches.case(row, gpu, residency)])]

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
        for residency in cuda_launches.RESIDENCY:
            for counted in counter.count(row, gpu, residency):
                if counted.kernel in seen:
                    continue
                seen.add(counted.kernel)
                yield {"row": row.label, "elements": row.numel, **dataclasses.asdict(counted)}


def costs(row: dict) -> dict[str, float]:
    """What must not become more; `predicted` has what registers, shared memory and bytes in flight come to."""
    predicted = cuda_model.Counted.of(row).bound(COUNTED_FOR)[1]
    return {name: row[name] for name in ("issued", "alu", "loaded", "stored")} | {"predicted": predicted}


def worse(rows: list[dict], stored: list[dict]) -> list[str]:
    """The rows that have become worse by more than a little, and in what; and those that no kernel of that name has."""
    now = {(row["row"], row["kernel"]): row for row in rows}
    found = []
    for old in stored:
        name = f"{old['row']}, {old['kernel']}"
        row = now.get((old["row"], old["kernel"]))
        if row is None:
            found.append(f"{name}: is stored and no longer runs; --store, if that is meant")
            continue
        before = costs(old)
        for what, cost in costs(row).items():
            if cost > WORSE * before[what]:
                found.append(f"{name}: {what} {cost / before[what]:.2f} of what it was")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, help="that holds the machine code; without one, it is compiled")
    parser.add_argument("--report", action="store_true", help=f"every GPU, and write {REPORT.relative_to(ROOT)}")
    parser.add_argument("--store", action="store_true", help=f"that, and write {cuda_model.STORED.relative_to(ROOT)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        program, listings = building.executor(room), building.listings(args.library, room)
        launcher = cuda_launches.Launcher(program, listings, room)
        rows = list(rows_of(Counter(launcher), COUNTED_FOR))
        report = cuda_report.report(rows, launcher.plans(gpu_rows.MAIN))
    everything = args.report or args.store
    for shown in cuda_report.tables(report, COUNTED_FOR.name, everything):
        table.console().print(shown)
    machine = {"architecture": building.ARCHITECTURE}
    if everything:
        REPORT.write_text(publish.compact({"machine": machine | cuda_report.parts(), "rows": report}))
    if args.store:
        cuda_model.STORED.write_text(publish.compact({"machine": machine, "rows": rows}))
        return 0
    stored = json.loads(cuda_model.STORED.read_text())["rows"] if cuda_model.STORED.exists() else []
    failed = worse(rows, stored)
    print("\n".join(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
