"""Sets of running statistics beside a layer's own, and of weight and bias where these are not shared: one per domain.

Adaptive and split batch norms have one for each kind of input (AdaBN: Li et al. 2016; domain-specific batch norm: Chang
et al. 2019; auxiliary ones for adversarial examples: Xie et al. 2020).
"""

import copy
import numbers
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class DomainStatistics(nn.Module):
    """A layer's buffers once more, and its parameters if asked: under the names that they have there."""

    def __init__(self, layer: _BatchNorm, affine: bool) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(layer, name)
            self.register_buffer(name, None if buffer is None else buffer.detach().clone())
        for name in ("weight", "bias"):
            parameter = getattr(layer, name)
            if affine:
                self.register_parameter(name, copy.deepcopy(parameter))

    reset_running_stats = _BatchNorm.reset_running_stats
    track_running_stats = True


def check_domains(domains: Any) -> int:
    """Returns `domains` as an int, or raises ValueError unless it is a positive one."""
    if isinstance(domains, bool) or not isinstance(domains, numbers.Integral) or domains < 1:
        raise ValueError(f"domains: expected a positive int, but got {domains!r}")
    return int(domains)


def pick(others: Any, domain: Any) -> Any:
    """The statistics that a call asks for, of the first domain or of `others`: None are the layer's own.

    Raises:
        ValueError: a domain that the layer does not have, or none where it has several.
    """
    count = 1 + len(others)
    if domain is None and count == 1:
        return None
    if isinstance(domain, bool) or not isinstance(domain, numbers.Integral) or not 0 <= int(domain) < count:
        raise ValueError(f"domain: expected an int from 0 to {count - 1}, but got {domain!r}")
    return None if domain == 0 else others[int(domain) - 1]
