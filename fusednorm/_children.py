"""The modules that stand around a norm: which the operator knows, what each means to it, and how others are called.

A child is known by its exact type. One that carries hooks or a forward of its own, or is a subclass, is called: hooks
fire, and where the type is known the noise is still that of the fused path, so that to watch a layer changes nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional, reference
from .noises import DropPath, GaussianDropout, UniformDropout

ReadAct: TypeAlias = tuple[str, tuple[Any, ...]]  # name, parameters
ReadDrop: TypeAlias = tuple[str, float, str]  # kind, strength, granularity

# Exact type -> (operator's name, parameters) from a live module.
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], ReadAct]] = {
    nn.Identity: lambda m: ("identity", ()),
    nn.ReLU: lambda m: ("relu", ()),
    nn.LeakyReLU: lambda m: ("leaky_relu", (m.negative_slope,)),
    nn.ELU: lambda m: ("elu", (m.alpha,)),
    nn.GELU: lambda m: reference.resolve_activation(("gelu", m.approximate)),
    nn.SiLU: lambda m: ("silu", ()),
    nn.Tanh: lambda m: ("tanh", ()),
    nn.Sigmoid: lambda m: ("sigmoid", ()),
    nn.Hardtanh: lambda m: ("hardtanh", (m.min_val, m.max_val)),
    nn.ReLU6: lambda m: ("relu6", ()),
    nn.Hardswish: lambda m: ("hardswish", ()),
    nn.Mish: lambda m: ("mish", ()),
    nn.Softplus: lambda m: ("softplus", (m.beta, m.threshold)),
    nn.PReLU: lambda m: ("prelu", (m.weight,)),
}
# Operator's name -> module, for act given by name.
_MODULES: dict[str, Callable[..., nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "prelu": nn.PReLU,
}
# Exact type -> (kind, strength, granularity) of a live module, and the input ranks at which it means that: torch's
# modules for channels mean something else at other ranks (nn.Dropout1d on (N, C) drops rows), and are called.
_ANY_RANK = (2, 3, 4, 5)
_DROPS: dict[type[nn.Module], tuple[Callable[[Any], ReadDrop], tuple[int, ...]]] = {
    nn.Dropout: (lambda m: ("bernoulli", m.p, "element"), _ANY_RANK),
    nn.Dropout1d: (lambda m: ("bernoulli", m.p, "channel"), (3,)),
    nn.Dropout2d: (lambda m: ("bernoulli", m.p, "channel"), (4,)),
    nn.Dropout3d: (lambda m: ("bernoulli", m.p, "channel"), (5,)),
} | {
    noise: (lambda m: (m.kind, m.strength, m.granularity), _ANY_RANK)
    for noise in (UniformDropout, GaussianDropout, DropPath)
}
_UNKNOWN: tuple[Any, tuple[int, ...]] = (None, ())
NO_ACT: ReadAct = ("identity", ())
NO_NOISE: ReadDrop = ("bernoulli", 0.0, "element")


def make_act(act: reference.Activation | nn.Module, device: Any = None, dtype: Any = None) -> nn.Module | None:
    """The module of an activation given by name, `(name, *parameters)`, as a module, or None."""
    if act is None or isinstance(act, nn.Module):
        return act
    if isinstance(act, str) and act == "prelu":
        return nn.PReLU(device=device, dtype=dtype)
    name, parameters = reference.resolve_activation(act)
    if name == "prelu":
        raise ValueError("act: expected nn.PReLU(...) or 'prelu', as a layer has the weight as its own parameter")
    return _MODULES[name](*parameters)


def make_drop(drop: Any) -> nn.Module | None:
    """The module of a dropout given as a probability, a module, or None."""
    if isinstance(drop, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        raise TypeError(
            f"drop: expected a multiplicative noise, but {type(drop).__name__} adds as well, and keeps the variance of "
            "selu's output only"
        )
    if drop is None or isinstance(drop, nn.Module):
        return drop
    p = functional.as_number(drop)
    if p is None:
        raise ValueError(f"drop: expected a probability, a module or None, but got {drop!r}")
    return nn.Dropout(p)


def _is_plain(child: nn.Module) -> bool:
    own = child.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _has_any_global_hook()  # profilers and trackers watch every module of a model by these
    )


def read_act(act: nn.Module | None) -> ReadAct | None:
    """(name, parameters) as the operator takes them, or None: it has to be called."""
    if act is None:
        return NO_ACT
    read = _ACTIVATIONS.get(type(act))
    return read(act) if read is not None and _is_plain(act) else None


def read_drop(drop: nn.Module | None, rank: int) -> ReadDrop | None:
    """(kind, strength, granularity) as the operator takes them, or None: it has to be called."""
    if drop is None:
        return NO_NOISE
    known = _known_noise(drop, rank)
    return known if known is None or _is_plain(drop) else None


def _known_noise(drop: nn.Module, rank: int) -> ReadDrop | None:
    read, ranks = _DROPS.get(type(drop), _UNKNOWN)
    if rank not in ranks:
        return None
    kind, strength, granularity = read(drop)
    return kind, float(strength) if drop.training else 0.0, granularity


def is_live(drop: nn.Module | None) -> bool:
    """Whether a dropout that is called may draw."""
    return drop is not None and drop.training and getattr(drop, "p", None) != 0.0


def does_something(child: nn.Module | None) -> bool:
    """Whether a layer without this child would ever give other values."""
    if child is None or type(child) is nn.Identity:
        return False
    known = _DROPS.get(type(child))
    return known is None or known[0](child)[1] > 0


def seedable(drop: nn.Module, rank: int) -> bool:
    """Whether a dropout that has to be called draws the noise of a seed all the same."""
    # What a compiler traces cannot be given another forward for a moment.
    return "forward" not in drop.__dict__ and _known_noise(drop, rank) is not None and not torch.compiler.is_compiling()


def call_drop(drop: nn.Module, input: Tensor, seed: int | Tensor | None) -> Any:
    """`drop(input)`, hooks and all, with the noise that the fused path draws at this seed where that is known."""
    if not seedable(drop, input.dim()):
        return drop(input)
    kind, p, granularity = _known_noise(drop, input.dim())  # type: ignore[misc]  # seedable: not None

    def forward(input: Tensor) -> Tensor:
        return functional.dropout(input, p, noise=kind, granularity=granularity, seed=seed)

    with _forward_of(drop, forward):
        return drop(input)


@contextlib.contextmanager
def _forward_of(child: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    child.__dict__["forward"] = forward
    try:
        yield
    finally:
        del child.__dict__["forward"]


def without_hooks(child: nn.Module, input: Tensor) -> Any:
    """What the child computes, unseen by those who watch it."""
    return child.forward(input.clone())  # it may write, or hold children that do
