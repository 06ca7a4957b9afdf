"""Times that follow from counted machine code, for GPUs of which some figures are known: predicted, never measured.

A kernel takes as long as the slowest of five: issuing its instructions, two pipes, moving its bytes, and waiting for
them with as many in flight as its warps ask for. Everything else (launches, partial waves, caches) is left out.

Approximated: instructions, registers and bytes are those of the machine code for 9.0, counted on the launch that an
H100 gets. Other GPUs cut a tensor into other blocks, and work done once per block weighs more or less there. Where that
was counted, for nine rows on an A100, an L4 and a B200, the times of 75 of 92 kernels came within 5% of those predicted
here; of channels-last maps of 14x14 and 7x7 they were up to 7% longer, and up to 23% shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

# What cuda_counts.py has counted.
STORED = Path(__file__).resolve().parent / "results" / "cuda-counts-sm_90.json"

# Instructions by the pipe that takes them. What is in neither costs its issue alone.
ALU = frozenset(
    ("IADD3", "VIADD", "LOP3", "SHF", "ISETP", "FSETP", "FSEL", "SEL", "FMNMX", "VIMNMX", "VIADDMNMX", "LEA", "PRMT")
    + ("PLOP3", "P2R", "R2P", "MOV", "I2FP", "IABS", "F2FP", "FCHK", "CS2R")
)
MULTIPLY = frozenset(("IMAD",))  # on half of the lanes that multiply floats
FLOAT = frozenset(("FADD", "FMUL", "FFMA", "HFMA2", "HADD2"))

LATENCY = 1e-6  # seconds from a load to its value under load: assumed, for all
PARTS = 4  # of a multiprocessor: each has its registers, and issues a warp's instruction a clock
PART_REGISTERS = 16384
RESERVED_SHARED = 1024  # bytes that the hardware keeps of each block's share
SHARED_UNIT = 128  # bytes that shared memory is handed out in


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b


@dataclass(frozen=True)
class GPU:
    """How many multiprocessors and what bandwidth: data sheets. What a multiprocessor holds: "Technical Specifications
    per Compute Capability" in the CUDA C++ Programming Guide. `clock`: the highest, unless measured; `copies`: what a
    copy reaches of the bandwidth, assumed unless measured."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    copies: float
    shared: int  # bytes of a multiprocessor
    per_block: int  # of these for one block
    warps: int  # of a multiprocessor
    cluster: int  # blocks
    source: str
    blocks: int = 32  # of a multiprocessor
    floats: int = 4  # warp instructions a clock of a multiprocessor that add or multiply floats


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 108, 1.41e9, 2.039e12, 0.9, 167936, 166912, 64, 1, "SXM 80 GB data sheet; 8.0", floats=2),
        GPU("H100", 132, 1.755e9, 3.35e12, 0.9, 233472, 232448, 64, 8, "SXM data sheet; 9.0; measured: GHz, 3.0 TB/s"),
        GPU("H200", 132, 1.755e9, 4.8e12, 0.9, 233472, 232448, 64, 8, "data sheet; 9.0; measured: 4.3 TB/s; GHz: H100"),
        GPU("L4", 58, 2.04e9, 0.3e12, 0.9, 102400, 101376, 48, 1, "data sheet; 8.9", blocks=24),
        GPU("RTX 4090", 128, 2.52e9, 1.008e12, 0.9, 102400, 101376, 48, 1, "Ada architecture paper; 8.9", blocks=24),
        GPU("B200", 148, 1.965e9, 8.0e12, 0.9, 233472, 232448, 64, 8, "HGX data sheet; 10.0; assumed: 9.0's pipes"),
    )
}


@dataclass(frozen=True)
class Occupancy:
    """What a multiprocessor holds at once, and which of its limits comes first."""

    blocks: int
    warps: int
    limit: str


@dataclass(frozen=True)
class Counted:
    """One launch on one row.

    Attributes:
        threads, registers, shared: of a block, of a thread, of a block in bytes.
        blocks: of the whole launch.
        issued, alu, multiply, float_: warp instructions of the whole launch.
        loaded, stored: bytes in sectors of global memory, and `useful` those that threads asked for.
        in_flight: bytes that a warp has asked for at once, at most.
    """

    kernel: str
    threads: int
    registers: int
    shared: int
    blocks: int
    issued: int
    alu: int
    multiply: int
    float_: int
    loaded: int
    stored: int
    useful: int
    in_flight: int

    @classmethod
    def of(cls, row: dict) -> Counted:
        """From a row of STORED."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def sectors(self) -> float:
        """Bytes moved over those asked for, which are more where threads ask for the same."""
        return max(1.0, (self.loaded + self.stored) / self.useful)

    @property
    def fma(self) -> int:
        """Instructions of the pipe that multiplies, integers or floats, and adds floats."""
        return self.multiply + self.float_

    def occupancy(self, gpu: GPU) -> Occupancy:
        """As many blocks as fit, as CUDA's calculator has it, or as there are."""
        warps = -(-self.threads // 32)
        by_registers = PART_REGISTERS // round_up(32 * self.registers, 256) * PARTS
        taken = round_up(self.shared + RESERVED_SHARED, SHARED_UNIT)
        limits = {
            "registers": by_registers // warps,
            "shared": gpu.shared // taken,
            "warps": gpu.warps // warps,
            "blocks": gpu.blocks,
            "grid": -(-self.blocks // gpu.multiprocessors),
        }
        limit = min(limits, key=lambda name: limits[name])
        return Occupancy(limits[limit], limits[limit] * warps, limit)

    def resident_warps(self, gpu: GPU) -> int:
        return self.occupancy(gpu).warps

    def flying(self, gpu: GPU) -> int:
        """Bytes that a multiprocessor has asked for at once, at most."""
        return self.in_flight * self.resident_warps(gpu)

    def seconds(self, gpu: GPU) -> dict[str, float]:
        """By term."""
        clocks = gpu.clock * gpu.multiprocessors
        latency = 0.0
        if self.in_flight:
            flying = self.flying(gpu) * gpu.multiprocessors
            latency = self.loaded * LATENCY / flying if flying else math.inf  # a block that fits nowhere
        return {
            "issue": self.issued / (PARTS * clocks),
            "alu": self.alu / (2 * clocks),
            "fma": (self.multiply / 2 + self.float_ / gpu.floats) / clocks,
            "memory": (self.loaded + self.stored) / (gpu.bandwidth * gpu.copies),
            "latency": latency,
        }

    def bound(self, gpu: GPU) -> tuple[str, float]:
        """The term that decides, and its seconds."""
        return max(self.seconds(gpu).items(), key=lambda term: term[1])

    def of_floor(self, gpu: GPU) -> float:
        """The time in which a copy would move the bytes that threads ask for, over the time predicted."""
        return self.seconds(gpu)["memory"] / self.sectors / self.bound(gpu)[1]
