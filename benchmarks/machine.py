"""The machine: what it is, whether it is quiet, and the allocator settings under which everybody is timed.

glibc hands large blocks back to the kernel after each call, and page faults then dominate every provider's time; the
settings below make it keep them. They are read when a process starts, hence the restart. No torch is imported at the
top of this file: the restart comes first.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
QUIET = 0.5  # load average above which another program is taking a share of the cores


def tuned() -> bool:
    return "GLIBC_TUNABLES" in os.environ


def restart_tuned(arguments: list[str]) -> None:
    """Run the interpreter again, in this process, with the allocator settings."""
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *arguments])


def busy() -> str | None:
    """A sentence when the machine is too busy for honest ratios."""
    load = os.getloadavg()[0]
    if load <= QUIET:
        return None
    return (
        f"the load average was {load:.2f}: a busy core changes ratios by as much as two "
        f"(wait until it is below {QUIET}, or measure anyway with --force)"
    )


def level() -> str:
    """The vector level of the fused layer's kernels."""
    from fusednorm import _hooks  # which brings torch

    return _hooks.level()


def _first(path: str, field: str) -> str | None:
    try:
        with open(path) as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)
    except OSError:
        return None


def last_level_bytes() -> int:
    """Size of the last-level cache; 32 MB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes, default=32 << 20)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def gpu() -> dict:
    """The driver and the state that the GPU was in, as the driver's own tool tells; nothing is set."""
    fields = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {"driver": None, "gpu_state": None}
    driver, *state = done.stdout.strip().split(", ")
    return {"driver": driver, "gpu_state": ", ".join(state)}


def facts() -> dict:
    """What a reader needs to judge the figures."""
    import torch

    import fusednorm

    # A copy of the tree without its history can be told which commit it is.
    commit = _git("rev-parse", "--short", "HEAD") or os.environ.get("FUSEDNORM_COMMIT")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "level": level(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fusednorm": fusednorm.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": f"{commit}{'+changes' if changed else ''}" if commit else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def line(facts: dict) -> str:
    """Those that stand beside every figure, in words."""
    return f"{facts['cpu']}, {facts['threads']} threads, {facts['level']}, torch {facts['torch']}"
