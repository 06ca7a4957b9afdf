"""BatchNorm, activation and Dropout fused into one operator, forward and backward."""

from . import _library

__version__ = "0.1.0"

try:
    _library.load()
except ImportError:
    if not _library.reporting():  # `python -m fusednorm` reports it itself
        raise
else:
    from . import functional, reference
    from .functional import noise
    from .modules import FusedBatchNorm1d, FusedBatchNorm2d, FusedBatchNorm3d

    __all__ = ["FusedBatchNorm1d", "FusedBatchNorm2d", "FusedBatchNorm3d", "functional", "noise", "reference"]
