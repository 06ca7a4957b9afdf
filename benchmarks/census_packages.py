"""Packages of models beside a CPU build of torch.

PyPI's torchvision and torchaudio are built for CUDA and do not load their libraries here. The models need none of those
operators; their import does, so it finds stand-ins.
"""

from __future__ import annotations

import sys
import types

import torch

_libraries = []  # a library's definitions last as long as it does


def stand_in() -> None:
    """To be called before torchvision or torchaudio is imported; a second call does nothing."""
    if _libraries:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function
    sys.modules["torchaudio._extension"] = extension
