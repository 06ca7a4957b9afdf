"""Whether a converted model still gives what the model gave."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-2}  # and what else is there, a tenth: to tell it from a mistake


def differ(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether results differ by more than rounding does, which grows through a deep model."""
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in found]:
        return True
    for a, b in zip(expected, found, strict=True):
        if not a.is_floating_point() or a.numel() == 0 or a.is_meta:
            continue
        limit, wide = _ROUNDING.get(a.dtype, 0.1), torch.float64 if a.dtype == torch.float64 else torch.float32
        a, b = a.to(wide).nan_to_num(), b.to(wide).nan_to_num()
        scale = a.square().mean().sqrt()
        if not (b - a).square().mean().sqrt() <= limit * (scale + 1e-2):
            return True
    return False
