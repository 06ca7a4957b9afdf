"""The modules that stand around a norm: which the operator knows, what each means to it, and how others are called.

A child is known by its exact type. One that carries hooks or a forward of its own, or is a subclass, is called: hooks
fire, and where the type is known the noise is still that of the fused path, so that to watch a layer changes nothing.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from . import functional, reference
from .noises import Dropout, DropPath, GaussianDropout, UniformDropout

ReadAct: TypeAlias = tuple[str, tuple[Any, ...]]  # name, parameters
ReadDrop: TypeAlias = tuple[str, float | Tensor, str]  # kind, strength, granularity

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
    nn.ReLU6: lambda m: ("relu6", ()) if (m.min_val, m.max_val) == (0.0, 6.0) else ("hardtanh", (m.min_val, m.max_val)),
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
    Dropout: (lambda m: ("bernoulli", m.p, "element"), _ANY_RANK),
    nn.Dropout1d: (lambda m: ("bernoulli", m.p, "channel"), (3,)),
    nn.Dropout2d: (lambda m: ("bernoulli", m.p, "channel"), (4,)),
    nn.Dropout3d: (lambda m: ("bernoulli", m.p, "channel"), (5,)),
} | {
    noise: (lambda m: (m.kind, m.strength, m.granularity), _ANY_RANK)
    for noise in (UniformDropout, GaussianDropout, DropPath)
}
# The same of other packages' modules, which are known by name: a class's module and its own. None: not as it is set.
_NAMED_DROPS: dict[tuple[str, str], Callable[[Any], ReadDrop | None]] = {
    ("timm.layers.drop", "DropPath"): lambda m: ("bernoulli", m.drop_prob, "sample") if m.scale_by_keep else None,
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): (
        lambda m: ("bernoulli", m.p, "sample") if m.mode == "row" else None
    ),
}
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


def noise_of(module: Any) -> tuple[ReadDrop, tuple[int, ...]] | None:
    """What a dropout multiplies by in training, and at which ranks; None for what is none that is known."""
    exact = type(module)
    entry = _DROPS.get(exact)
    if entry is not None:
        return entry[0](module), entry[1]
    named = _NAMED_DROPS.get((exact.__module__, exact.__qualname__))
    noise = named and named(module)
    return None if noise is None else (noise, _ANY_RANK)


def _known_noise(drop: nn.Module, rank: int) -> ReadDrop | None:
    known = noise_of(drop)
    if known is None or rank not in known[1]:
        return None
    kind, strength, granularity = known[0]
    if not drop.training:
        return kind, 0.0, granularity
    # Of torch's own modules a tensor is a number that somebody has put there.
    return kind, strength if type(drop) is Dropout and isinstance(strength, Tensor) else float(strength), granularity


def is_live(drop: nn.Module | None) -> bool:
    """Whether a dropout that is called may draw."""
    if drop is None or not drop.training:
        return False
    p = getattr(drop, "p", None)
    return isinstance(p, Tensor) or p != 0.0


def does_something(child: nn.Module | None) -> bool:
    """Whether a layer without this child would ever give other values."""
    if child is None or type(child) is nn.Identity:
        return False
    known = noise_of(child)
    return known is None or isinstance(known[0][1], Tensor) or known[0][1] > 0


def seedable(drop: nn.Module, rank: int) -> bool:
    """Whether a dropout that has to be called draws the noise of a seed all the same."""
    return "forward" not in drop.__dict__ and type(drop) in _DROPS and _known_noise(drop, rank) is not None


def call_drop(drop: nn.Module, input: Tensor, seed: int | Tensor | None) -> Any:
    """`drop(input)`, hooks and all, with the noise that the fused path draws at this seed where that is known."""
    if not seedable(drop, input.dim()):
        return drop(input)
    with _OurNoise(seed):
        return drop(input)


class _OurNoise(TorchFunctionMode):
    """Answers for torch's functions of dropout, which the modules call when their hooks have had their say."""

    _GRANULARITIES: dict[Any, str] = {
        F.dropout: "element",
        F.dropout1d: "channel",
        F.dropout2d: "channel",
        F.dropout3d: "channel",
    }

    def __init__(self, seed: int | Tensor | None) -> None:
        super().__init__()
        self.seed = seed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.dropout:  # of our own modules
            return function(*args, **kwargs | {"seed": self.seed})
        if function in self._GRANULARITIES:
            return self._drop(self._GRANULARITIES[function], *args, **kwargs)
        return function(*args, **kwargs)

    def _drop(
        self, granularity: str, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return functional.dropout(input, p, training, granularity=granularity, seed=self.seed)


def without_hooks(child: nn.Module, input: Tensor) -> Any:
    """What the child computes, unseen by those who watch it."""
    return child.forward(input.clone())  # it may write, or hold children that do
