"""Classes of the census's rows: by pixels per channel, and by what stands around the norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

PIXELS = (25, 64, 128, 256, 1600)  # where a class of pixels per channel ends; what is more is the last one
PATTERNS = ("bare", "act", "add", "dropout")


def pixels(shape: Iterable[int]) -> int:
    """Pixels per channel of one sample: 1 for rows."""
    return math.prod(tuple(shape)[2:])


def pixel_class(shape: Iterable[int]) -> int:
    """Index of the class, from 0 to len(PIXELS)."""
    return sum(pixels(shape) > end for end in PIXELS)


def pattern_class(order: str) -> str:
    """The dearest thing beside the norm: noise before an addition, that before an activation."""
    stages = order.split("-")
    return "dropout" if "drop" in stages else "add" if "add" in stages else "act" if "act" in stages else "bare"
