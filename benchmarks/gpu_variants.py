"""The fused layer's switches for measuring on a GPU: which kernels a channels-first call gets, and whether forward
saves bits for backward or backward draws the noise again. A switch that the library lacks is reported, not fatal.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from fusednorm._hooks import set_residency


@dataclass(frozen=True)
class Variant:
    name: str
    residency: str = "automatic"
    save_mask: bool | None = None  # None: as the library decides


# "fused" is what users get; the others force one choice each.
DEFAULT = Variant("fused")
STREAMING = (Variant("streaming", "never", False), Variant("streaming+bits", "never", True))
RESIDENT = (Variant("resident", "always", False), Variant("resident+bits", "always", True))


def mask_policy() -> dict | None:
    from fusednorm import _autograd

    return getattr(_autograd, "SAVE_MASK", None)


def available(workload, p: float) -> list[Variant]:
    """The variants that mean something for this row and that the library can be told. The choices are studied on the
    default order."""
    variants = [DEFAULT]
    if workload.order != "norm-act-drop" or workload.noise != "bernoulli":
        return variants
    told = set_residency("automatic")
    for group in (STREAMING, RESIDENT if workload.layout == "channels-first" else ()):
        for variant in group:
            redraws = p == 0 or workload.granularity != "element"
            if variant.save_mask and (redraws or mask_policy() is None):
                continue
            if told:
                variants.append(variant)
    return variants


def profiled(variants: list[Variant], x) -> set[str]:
    """One of each choice of kernels, by name. Saved bits change how long kernels take and not which ones run: the one
    that saves them where users get that."""
    from fusednorm import _autograd

    saves = _autograd._saves_mask(x)
    picked = {}
    for variant in variants:
        if variant.residency not in picked or variant.save_mask == saves:
            picked[variant.residency] = variant.name
    return set(picked.values())


@contextlib.contextmanager
def use(variant: Variant):
    """Calls in this context, forward and backward, run that variant."""
    policy = mask_policy()
    before = dict(policy) if policy is not None else None
    told = variant.residency != "automatic" and set_residency(variant.residency)
    if policy is not None and variant.save_mask is not None:
        policy.update(dict.fromkeys(policy, variant.save_mask))
    try:
        yield
    finally:
        if told:
            set_residency("automatic")
        if policy is not None:
            policy.update(before)
