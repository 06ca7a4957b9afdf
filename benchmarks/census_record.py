"""What stands around every BatchNorm of a model, read off one training-mode forward.

`Recorder` sees each function of torch that the model calls, whatever module or plain code calls it, and follows the
tensors: which call made a value, which calls take it. `chains` then reads from each norm forwards, as long as a value
has one taker and that is an activation, a dropout that drops or an addition, and likewise backwards. Only shapes
matter, so models run under FakeTensorMode where they can: no memory, no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fusednorm import reference

# torch's names, functional and method, in place and not -> ours. What is not here ends a chain.
_SPELLED = {
    "relu": (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    "leaky_relu": (F.leaky_relu, F.leaky_relu_),
    "elu": (F.elu, F.elu_),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "tanh": (F.tanh, torch.tanh, Tensor.tanh, Tensor.tanh_, torch.tanh_),
    "sigmoid": (F.sigmoid, torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, torch.sigmoid_),
    "hardtanh": (F.hardtanh, F.hardtanh_),
    "relu6": (F.relu6,),
    "hardswish": (F.hardswish,),
    "mish": (F.mish,),
    "softplus": (F.softplus,),
}
ACTIVATIONS = {function: name for name, functions in _SPELLED.items() for function in functions}
_PARAMETERS = {
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "hardtanh": ("min_val", "max_val"),
    "softplus": ("beta", "threshold"),
}
DROPS = {F.dropout: "element", torch.dropout: "element", F.dropout1d: "channel"}
DROPS |= {F.dropout2d: "channel", F.dropout3d: "channel"}
_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
_NORMS = {F.batch_norm, torch.batch_norm}


@dataclass(eq=False)
class Value:
    """A tensor between two calls: an in-place call makes a new value of the same tensor."""

    maker: Call | None = None
    takers: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    function: object
    args: tuple
    kwargs: dict
    takes: list[Value]
    in_place: bool = False
    gives: Value | None = None
    claimed: bool = False

    def argument(self, position: int, name: str, default):
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Chain:
    shape: tuple[int, ...]
    layout: str
    order: str
    act: tuple | None  # (name, *parameters)
    p: float
    granularity: str
    inplace: tuple[str, ...]


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an id must not come back as another tensor's

    def _value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._values:
            self._values[id(tensor)] = Value()
            self._alive.append(tensor)
        return self._values[id(tensor)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if given and not self._is_nothing(function, args, kwargs, taken, given):
            call = Call(function, args, kwargs, [self._value(tensor) for tensor in taken])
            for value in call.takes:
                value.takers.append(call)
            call.in_place = any(given[0] is tensor for tensor in taken)
            for tensor in given:
                self._value(tensor)
                self._values[id(tensor)] = Value(call)
            call.gives = self._values[id(given[0])] if len(given) == 1 else None
            self.calls.append(call)
        elif given:
            self._value(given[0])
            self._values[id(given[0])] = self._value(taken[0])
        return result

    @staticmethod
    def _is_nothing(function, args, kwargs, taken, given) -> bool:
        """A call that hands its tensor on: `.contiguous` of one that is so already, dropout that drops none."""
        if function in DROPS:
            call = Call(function, args, kwargs, [])
            live = call.argument(2, "train" if function is torch.dropout else "training", True)
            return not live or not call.argument(1, "p", 0.5)
        same = len(given) == 1 and len(taken) == 1 and given[0] is taken[0]
        name = getattr(function, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") or name.startswith("__i") or kwargs.get("inplace")
        return same and not writes and function not in ACTIVATIONS

    def chains(self) -> list[Chain]:
        """One per norm that takes its statistics from its input, in the order of their calls."""
        found = [Walk(call) for call in self.calls if call.function in _NORMS and _in_training(call)]
        for walk in found:
            walk.forwards()
        for walk in found:  # what follows one norm is not what precedes the next one
            walk.backwards()
        return [walk.chain() for walk in found]


def _in_training(call: Call) -> bool:
    by_torch = call.function is torch.batch_norm
    return (
        bool(call.argument(5, "training", False)) or call.argument(3 if by_torch else 1, "running_mean", None) is None
    )


def _stage(call: Call) -> str | None:
    """What a call is to the operator: "act", "drop", "add", or None."""
    if call.function in ACTIVATIONS:
        return "act"
    if call.function in DROPS:
        return "drop"
    if call.function in _ADDS and call.args and len(call.takes) == 2 and call.argument(2, "alpha", 1) == 1:
        one, other = call.args[0], call.argument(1, "other", None)
        if isinstance(other, Tensor) and one.shape == other.shape and call.takes[0] is not call.takes[1]:
            return "add"
    return None


class Walk:
    """The stages around one norm, at most once each, as an order of the operator has them."""

    def __init__(self, norm: Call):
        self.norm, self.before, self.after = norm, [], []
        norm.claimed = True

    def _has(self, stage: str) -> bool:
        return stage in (_stage(call) for call in (*self.before, *self.after))

    def forwards(self) -> None:
        call = self.norm
        while call.gives is not None and len(call.gives.takers) == 1:
            value, call = call.gives, call.gives.takers[0]
            stage = _stage(call)
            if stage is None or call.claimed or self._has(stage):
                return
            # An addition of two norms' results is one layer's: that of its first operand, where it is a norm's.
            if stage == "add" and call.takes[1] is value and _ends_chain(call.takes[0]):
                return
            call.claimed = True
            self.after.append(call)

    def backwards(self) -> None:
        value = self.norm.takes[0]
        while value.maker is not None and len(value.takers) == 1:
            call = value.maker
            stage = _stage(call)
            if stage in (None, "add") or call.claimed or self._has(stage):
                return
            call.claimed = True
            self.before.insert(0, call)
            value = call.takes[0]

    def chain(self) -> Chain:
        x = self.norm.args[0]
        calls = [*self.before, self.norm, *self.after]
        stages = ["norm" if call is self.norm else _stage(call) for call in calls]
        act, p, granularity = None, 0.0, "element"
        for call in calls:
            if call.function in ACTIVATIONS:
                act = _activation(call)
            elif call.function in DROPS:
                p, granularity = float(call.argument(1, "p", 0.5)), DROPS[call.function]
        inplace = [stage for stage, call in zip(stages, calls, strict=True) if call.in_place and stage != "norm"]
        return Chain(tuple(x.shape), _layout(x), "-".join(stages), act, p, granularity, tuple(inplace))


def _ends_chain(value: Value) -> bool:
    """Whether a value, taken once, comes from a norm through stages alone."""
    while value.maker is not None and len(value.takers) == 1:
        if value.maker.function in _NORMS:
            return True
        if _stage(value.maker) not in ("act", "drop"):
            return False
        value = value.maker.takes[0]
    return False


def _activation(call: Call) -> tuple:
    name = ACTIVATIONS[call.function]
    if name == "gelu" and call.argument(1, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    defaults = reference.ACTIVATIONS[name][1]
    names = _PARAMETERS.get(name, ())
    given = tuple(float(call.argument(1 + i, names[i], default)) for i, default in enumerate(defaults))
    if name == "hardtanh" and given == (0.0, 6.0):
        return ("relu6",)  # nn.ReLU6 calls it so
    return (name,) if given == defaults else (name, *given)


def _layout(x: Tensor) -> str:
    if x.dim() == 2:
        return "rows"
    return "channels-last" if x.stride(1) == 1 and x.shape[2:].numel() > 1 and x.size(1) > 1 else "channels-first"
