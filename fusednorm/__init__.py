"""BatchNorm, activation and Dropout fused into one operator, forward and backward."""

from . import _library

__version__ = "0.2.0.dev0"

try:
    _library.load()
except ImportError:
    if not _library.reporting():  # `python -m fusednorm` reports it itself
        raise
else:
    from . import analysis, functional, recalibration, reference, uncertainty
    from .checkpoints import keep_act_keys
    from .convert import backend, convert_sync_batchnorm, fold, fuse, unfuse
    from .functional import noise
    from .modules import (
        FusedBatchNorm1d,
        FusedBatchNorm2d,
        FusedBatchNorm3d,
        ICLayer,
        LazyFusedBatchNorm1d,
        LazyFusedBatchNorm2d,
        LazyFusedBatchNorm3d,
    )
    from .noises import ConcreteDropout, Dropout, DropPath, GaussianDropout, UniformDropout, at_alpha
    from .recalibration import recalibrate, restore_running_var
    from .uncertainty import predict

    __all__ = [
        "ConcreteDropout",
        "DropPath",
        "Dropout",
        "FusedBatchNorm1d",
        "FusedBatchNorm2d",
        "FusedBatchNorm3d",
        "GaussianDropout",
        "ICLayer",
        "LazyFusedBatchNorm1d",
        "LazyFusedBatchNorm2d",
        "LazyFusedBatchNorm3d",
        "UniformDropout",
        "analysis",
        "at_alpha",
        "backend",
        "convert_sync_batchnorm",
        "fold",
        "functional",
        "fuse",
        "keep_act_keys",
        "noise",
        "predict",
        "recalibrate",
        "recalibration",
        "reference",
        "restore_running_var",
        "uncertainty",
        "unfuse",
    ]
