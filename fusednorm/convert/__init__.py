"""Whole models to fused layers and back. Knows modules, never kernels."""

from .backend import backend
from .fold import fold
from .fuse import fuse
from .report import Report
from .rewire import unfuse
from .sync import convert_sync_batchnorm

__all__ = ["Report", "backend", "convert_sync_batchnorm", "fold", "fuse", "unfuse"]
