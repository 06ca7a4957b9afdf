"""Times that follow from counted machine code, for GPUs of which some figures are known: predicted, never measured.

A kernel takes as long as the slowest of five: issuing its instructions, two pipes, moving its bytes, and waiting for
them with as many in flight as its warps ask for. Everything else (launches, partial waves, caches) is left out.
"""

from __future__ import annotations

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
WARP_REGISTERS = 65536 // 32  # of a multiprocessor, for one register of each lane


@dataclass(frozen=True)
class GPU:
    """Figures of NVIDIA's data sheets and architecture papers; `copies` is what a copy reaches of the bandwidth."""

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


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 108, 1.41e9, 2.039e12, 0.9, 167936, 166912, 64, 1, "A100 80 GB SXM; copies: assumed"),
        GPU("H100", 132, 1.755e9, 3.35e12, 0.9, 233472, 232448, 64, 8, "H100 SXM; clock and 3.0 TB/s measured"),
        GPU("H200", 132, 1.755e9, 4.8e12, 0.9, 233472, 232448, 64, 8, "H200 SXM; 4.3 TB/s measured"),
        GPU("L4", 58, 2.04e9, 0.3e12, 0.9, 102400, 101376, 48, 1, "L4; copies: assumed"),
        GPU("RTX 4090", 128, 2.52e9, 1.008e12, 0.9, 102400, 101376, 48, 1, "RTX 4090; copies: assumed"),
        GPU("B200", 148, 1.965e9, 8.0e12, 0.9, 233472, 232448, 64, 8, "B200; copies: assumed"),
    )
}


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

    def resident_warps(self, gpu: GPU) -> int:
        """Of a multiprocessor: as many blocks as fit, or as there are."""
        warps = -(-self.threads // 32)
        by_registers = WARP_REGISTERS // (-(-self.registers // 8) * 8 * warps)
        by_shared = gpu.shared // (self.shared + 1024)
        there = -(-self.blocks // gpu.multiprocessors)
        return min(by_registers, by_shared, gpu.warps // warps, there) * warps

    def seconds(self, gpu: GPU) -> dict[str, float]:
        """By term."""
        clocks = gpu.clock * gpu.multiprocessors
        moved = (self.loaded + self.stored) / (gpu.bandwidth * gpu.copies)
        flying = self.in_flight * self.resident_warps(gpu) * gpu.multiprocessors
        return {
            "issue": self.issued / (4 * clocks),
            "alu": self.alu / (2 * clocks),
            "fma": (2 * self.multiply + self.float_) / (4 * clocks),
            "memory": moved,
            "latency": self.loaded * LATENCY / flying if flying else 0.0,
        }

    def bound(self, gpu: GPU) -> tuple[str, float]:
        """The term that decides, and its seconds."""
        return max(self.seconds(gpu).items(), key=lambda term: term[1])
