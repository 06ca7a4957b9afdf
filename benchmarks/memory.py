"""What a training step keeps and what it peaks at, counted in bytes of tensors.

Saved bytes come from autograd's own hooks, the peak from the profiler's record of every allocation and release. Both
are exact and repeatable; the resident size of the process is neither, as the allocator is tuned to keep what is freed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from fusednorm.cli.saved import saved_bytes as saved_bytes
from fusednorm.cli.saved import vectors as vectors

# The profiler announces each start and stop on stderr, through the progress display.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")


def peak_bytes(step: Callable[[], object], device=None) -> int | None:
    """Most bytes of tensors alive at one time during `step`, above those alive before it: on `device`, a GPU, by its
    allocator, else by the profiler. None where the running torch's profiler does not tell.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = step()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as record:
        kept = step()  # what a caller would hold is released after the record ends
    del kept
    try:
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    except AttributeError:
        return None
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # negative for a release
        peak = max(peak, alive)
    return peak
