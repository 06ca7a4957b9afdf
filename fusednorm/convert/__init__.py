"""Whole models to fused layers and back. Knows modules, never kernels."""

from .fold import fold
from .fuse import fuse
from .report import Report
from .rewire import unfuse

__all__ = ["Report", "fold", "fuse", "unfuse"]
