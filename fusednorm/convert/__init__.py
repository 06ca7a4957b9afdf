"""Whole models to fused layers and back. Knows modules, never kernels."""

from .backend import backend
from .fold import fold
from .fuse import fuse
from .report import Report
from .rewire import unfuse

__all__ = ["Report", "backend", "fold", "fuse", "unfuse"]
