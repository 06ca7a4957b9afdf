"""Rivals: the same work by libraries that are not torch, timed beside ours with `--rivals` where they can do it.

There is one, oneDNN's batch normalisation with its fused ReLU (`onednn.py`, `onednn.cpp`; `make rivals` compiles it).
In the row's own layout it is "onednn", and where that is channels-first it runs in the one of oneDNN's networks, too,
as "onednn_blocked" (nChw16c: 16 channels innermost, the tensors already in it). It is timed bare, which is to its
advantage: a call each way through ctypes, no autograd, outputs allocated once, no running statistics. What it gives is
compared with the stock layers first.

One thing is to its disadvantage, and only where the machine is not quiet: its threads wait for each other inside a
call, in loops that do not yield, so that on a busy core it takes up to ten times as long. In a plain channels-first
layout it has no vectorised code ("ncsp_bnorm:any" among the row's facts), only what a compiler made of loops.
"""

from __future__ import annotations

import torch

from benchmarks.workloads import Workload

RIVALS = ("onednn", "onednn_blocked")
MODES = ("forward", "backward", "both")
DTYPES = (torch.float32, torch.bfloat16)


class Unavailable(RuntimeError):
    """No rival can be timed here; the message says why."""


def of(workload: Workload, p: float) -> tuple[str, ...]:
    """The rivals that can do what this layer does: oneDNN has no noise, one activation and one order."""
    if p or workload.order != "norm-act-drop" or workload.act not in (None, "relu") or workload.dtype not in DTYPES:
        return ()
    return RIVALS if workload.layout == "channels-first" else RIVALS[:1]
