"""Caches that hold other data: what a layer of a large network finds when its turn comes.

Hot turns meet their tensors in cache where those fit, which flatters whoever passes over them most often.
"""

from __future__ import annotations

import functools

import torch

from benchmarks import machine

LEAST = 64 << 20  # bytes


@functools.cache
def _other_data() -> torch.Tensor:
    return torch.ones(max(LEAST, 2 * machine.last_level_bytes()) // 4)


def walk() -> None:
    """Reads more than the last-level cache holds, with all threads, so that private caches are swept too."""
    _other_data().sum()
