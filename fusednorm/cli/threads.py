"""Which threads of this process work, and how many processors it may use.

Asking torch tells how many threads were wished for. What is counted here is processor time, thread by thread, as the
kernel keeps it: neither a busy machine nor a single core, on which threads take turns, changes who got some.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import functional

_SHARE = 0.2  # of the busiest thread's time; what waits in a pool spins a little, and then goes to sleep


def clock_of_threads() -> dict[int, float]:
    """CPU seconds of every thread of this process; Linux tells them by the thread's id."""
    seconds = {}
    for tid in map(int, os.listdir("/proc/self/task")):
        try:
            seconds[tid] = time.clock_gettime((~tid << 3) | 6)
        except OSError:  # it has ended meanwhile
            continue
    return seconds


def at_work(step: Callable[[], object], seconds: float = 0.4) -> int:
    """How many threads have a share in the work of `step`, which is called again and again."""
    step()  # starts the threads
    before = clock_of_threads()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        step()
    spent = [now - before.get(tid, 0.0) for tid, now in clock_of_threads().items()]
    return sum(share > _SHARE * max(spent) for share in spent)


def large_call() -> Callable[[], object]:
    """A call of the operator with work for every thread that torch has."""
    rows = 8192 * torch.get_num_threads()
    x = torch.randn(rows, 64)

    def step() -> object:
        with torch.no_grad():
            return functional.batch_norm_act_drop(
                x, None, None, training=True, act="tanh", p=0.3, noise="gaussian", order="drop-norm-act", seed=1
            )

    return step


def processors(control_group: Path = Path("/sys/fs/cgroup")) -> float:
    """How many processors this process may use: those that it may run on, or the share that its container gets."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(control_group)
    return count if quota is None else min(count, quota)


def _quota(control_group: Path) -> float | None:
    try:
        if (control_group / "cpu.max").exists():  # version 2
            limit, period = (control_group / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            limit, period = ((control_group / "cpu" / name).read_text() for name in names)
        return float(limit) / float(period) if float(limit) > 0 else None
    except (OSError, ValueError):  # no limit ("max"), or no control groups
        return None
