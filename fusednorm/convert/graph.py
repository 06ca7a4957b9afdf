"""What a node of a graph that torch.compile has captured means to a chain around a batch norm, and what it writes.

The graph calls torch's functions on tensors; modules are gone but for their names. Every node carries a fake tensor of
its value, which knows shape, dtype and whose memory it is.
"""

import inspect
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node, map_arg
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from .. import functional, reference

# ---- what is called --------------------------------------------------------------------------------------------------
_NORMS: dict[Any, dict[str, Any]] = {  # arguments with their defaults, in the order of the function
    F.batch_norm: dict.fromkeys(("input", "running_mean", "running_var", "weight", "bias"))
    | {"training": False, "momentum": 0.1, "eps": 1e-5},
    torch.batch_norm: dict.fromkeys(
        ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
    ),
}
# Parameters of the activations behind their input, as torch's functions take them.
_ACT_PARAMETERS: dict[str, dict[str, Any]] = {
    "relu": {},
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "gelu": {"approximate": "none"},
    "silu": {},
    "tanh": {},
    "sigmoid": {},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "relu6": {},
    "hardswish": {},
    "mish": {},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "prelu": {"weight": None},
}


def _spellings(name: str) -> Iterator[Any]:
    """What a node that calls `name` may have as its target: functions, and names of Tensor's methods."""
    for spelling in (name, f"{name}_"):
        yield from {getattr(home, spelling) for home in (F, torch) if hasattr(home, spelling)}
        if hasattr(Tensor, spelling):
            yield spelling


_ACTS = {target: name for name in _ACT_PARAMETERS for target in _spellings(name)}
_DROPS: dict[Any, int | None] = {F.dropout: None, torch.dropout: None} | {  # and the rank at which it drops channels
    getattr(F, f"dropout{rank}d"): rank + 2 for rank in (1, 2, 3)
}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__", "__iadd__"}
_MULS = {operator.mul, torch.mul, "mul", "__mul__"}
# Python's own operators that write their first argument where it is a tensor.
_WRITERS: set[Any] = {operator.setitem, "__setitem__"}
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    _WRITERS |= {getattr(operator, f"__i{_name}__"), f"__i{_name}__"}


def _bound(node: Node, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The node's arguments by name; None if it has others than these."""
    if len(node.args) > len(parameters) or not parameters.keys() >= node.kwargs.keys():
        return None
    return parameters | dict(zip(parameters, node.args, strict=False)) | node.kwargs


@dataclass(frozen=True)
class Norm:
    """A batch norm's arguments by name."""

    node: Node
    arguments: dict[str, Any]

    @property
    def tensors(self) -> list[Node]:
        names = ("running_mean", "running_var", "weight", "bias")
        return [self.arguments[name] for name in names if isinstance(self.arguments[name], Node)]


@dataclass(frozen=True)
class Stage:
    """Of a chain: "act", "drop" or "add", or "nothing", which hands on what it takes.

    Attributes:
        nodes: that it consists of; the last one gives its value.
        keywords: of `batch_norm_act_drop`, for what it does.
        also: the tensor that it takes beside the chain's.
        writes: the one of these that it writes.
    """

    kind: str
    nodes: tuple[Node, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    also: Node | None = None
    writes: Node | None = None

    @property
    def input(self) -> Node:
        return next(node for node in tensors_of(self.nodes[0]) if node is not self.also)


def norm_of(node: Node) -> Norm | None:
    parameters = _NORMS.get(node.target)
    arguments = None if parameters is None else _bound(node, parameters)
    if arguments is None or not isinstance(arguments["input"], Node):
        return None
    return Norm(node, arguments) if isinstance(arguments["training"], bool) else None


def stage_of(node: Node, value: Node) -> Stage | None:
    """The stage that `node` is of `value`, None for something else."""
    if inputs_of(node).count(value) != 1:
        return None
    if node.target in _ACTS:
        return _act(node, value)
    if node.target in _DROPS:
        return _drop(node, value)
    return _add(node, value) if node.target in _ADDS else None


def silu_of(product: Node, value: Node) -> Stage | None:
    """`value * sigmoid(value)`, which are two nodes."""
    if product.target not in _MULS or len(product.args) != 2 or product.kwargs:
        return None
    others = [argument for argument in product.args if argument is not value]
    factor = others[0] if len(others) == 1 else None
    if not isinstance(factor, Node) or _ACTS.get(factor.target) != "sigmoid" or is_in_place(factor):
        return None
    if len(factor.users) != 1 or inputs_of(factor) != [value]:
        return None
    return Stage("act", (factor, product), {"act": "silu"})


def _act(node: Node, value: Node) -> Stage | None:
    name = _ACTS[node.target]
    given = _bound(node, {"input": None} | _ACT_PARAMETERS[name] | {"inplace": False})
    if given is None or given["input"] is not value:
        return None
    parameters = [given[parameter] for parameter in _ACT_PARAMETERS[name]]
    if name == "prelu":
        (weight,) = parameters
        return Stage("act", (node,), {"act": (name, weight)}, weight) if isinstance(weight, Node) else None
    if not any(isinstance(parameter, Node) for parameter in parameters):  # or else numbers known when the graph runs
        try:
            name, parameters = reference.resolve_activation((name, *parameters))  # type: ignore[assignment]
        except ValueError:  # what torch takes, and the operator does not
            return None
    keywords = {"act": (name, *parameters) if parameters else name}
    return Stage("act", (node,), keywords, writes=_written(node))


def _drop(node: Node, value: Node) -> Stage | None:
    names = {"input": None, "p": 0.5, "training": True, "inplace": False}
    if node.target is torch.dropout:
        names = {"input": None, "p": None, "train": None}
    given = _bound(node, names)
    if given is None or given["input"] is not value:
        return None
    p, live = given["p"], given.get("train", given.get("training"))
    if not isinstance(live, bool):
        return None
    if not live or p == 0:
        return Stage("nothing", (node,))
    rank, tensor = _DROPS[node.target], tensor_of(value)
    if not isinstance(tensor, Tensor) or rank not in (None, tensor.dim()):
        return None
    keywords = {"p": p, "drop_training": True} | ({} if rank is None else {"granularity": "channel"})
    return Stage("drop", (node,), keywords, writes=_written(node))


def is_lone_dropout(node: Node) -> bool:
    """Whether it is a live nn.Dropout, or its function, that gives a new tensor."""
    if node.target is not F.dropout or not node.args or not isinstance(node.args[0], Node):
        return False
    stage, value = stage_of(node, node.args[0]), tensor_of(node)
    drops = stage is not None and stage.kind == "drop" and stage.writes is None
    return drops and type(value) is FakeTensor and value.dtype in functional.DTYPES


def _add(node: Node, value: Node) -> Stage | None:
    if len(node.args) != 2 or node.kwargs:  # alpha
        return None
    (other,) = (argument for argument in node.args if argument is not value)
    if not isinstance(other, Node):
        return None
    return Stage("add", (node,), {"residual": other}, other, writes=_written(node))


def _written(node: Node) -> Node | None:
    return inputs_of(node)[0] if is_in_place(node) else None


# ---- values and memory -----------------------------------------------------------------------------------------------
def inputs_of(node: Node) -> list[Node]:
    """The nodes among its arguments, as often as they are there."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def tensors_of(node: Node) -> list[Node]:
    """Those of its inputs that are tensors."""
    return [taken for taken in inputs_of(node) if isinstance(tensor_of(taken), Tensor)]


def tensor_of(node: Node) -> Any:
    """The fake tensor of its value, or what else that is."""
    return node.meta.get("example_value")


def alike(one: Node, other: Node) -> bool:
    """Whether two nodes surely have tensors of one kind, shape, layout, dtype and device."""
    a, b = tensor_of(one), tensor_of(other)
    if not isinstance(a, Tensor) or type(a) is not type(b):
        return False
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    return _same(a.shape, b.shape) and _same(a.stride(), b.stride())


def _same(sizes: Iterable[Any], others: Iterable[Any]) -> bool:
    # Asking whether they are equal would make it so: the graph would be compiled again for others.
    return all(statically_known_true(m == n) for m, n in zip(sizes, others, strict=True))


def keeps_layout(norm: Norm) -> bool:
    """Whether the operator gives the layout that the function gives."""
    given = torch.empty_like(tensor_of(norm.arguments["input"]))
    return _same(given.stride(), tensor_of(norm.node).stride())


def is_in_place(node: Node) -> bool:
    """Whether it writes its first argument."""
    name = called(node)
    if node.target in _WRITERS or name.endswith("_") and not name.endswith("__"):
        return True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function in C, or a method: those have underscores
        return False
    return bool(bound.arguments.get("inplace"))


def states_of(graph: Graph) -> dict[Node, tuple[Any, ...]]:
    """For each node whether gradients are on, and in which contexts (autocast, a transform) it is called."""
    found: dict[Node, tuple[Any, ...]] = {}
    grad, contexts = True, list[Node]()
    for node in graph.nodes:
        name = called(node)
        if name == "_set_grad_enabled":
            grad = node.args[0]
        elif name.startswith("_enter_") or name.endswith("_increment_nesting"):
            contexts.append(node)
        elif name.startswith("_exit_") or name.endswith("_decrement_nesting"):
            del contexts[-1:]
        found[node] = grad, *contexts
    return found


def called(node: Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


class Memory:
    """Whose memory the values of a graph are.

    Attributes:
        at: where each node stands.
    """

    def __init__(self, graph: Graph) -> None:
        self.at = {node: i for i, node in enumerate(graph.nodes)}
        self._of: dict[Node, set[int] | None] = {}  # None: it cannot be told, as of a transform's tensors
        self._sharing: dict[int, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            self._of[node] = _storages(tensor_of(node))
            for storage in self._of[node] or ():
                self._sharing[storage].append(node)

    def shared(self, one: Node, others: Iterable[Node]) -> bool:
        """Whether a value may have the memory of one of others."""
        mine = self._of[one]
        theirs = [self._of[other] for other in others]
        return any(mine is None or their is None or mine & their for their in theirs)

    def is_private(self, writer: Node) -> bool:
        """Whether what a node writes is read by nobody but through what the node gives."""
        family = {node for storage in self._of[writer] or () for node in self._sharing[storage]}
        earlier = {node for node in family if self.at[node] < self.at[writer]}
        return self._of[writer] is not None and all(
            node.op not in ("placeholder", "get_attr") and {*earlier, writer} >= node.users.keys() for node in earlier
        )

    def may_write(self, node: Node, tensors: Iterable[Node]) -> bool:
        """Whether the node may change one of `tensors`."""
        tensors = list(tensors)
        touched = [taken for taken in inputs_of(node) if self.shared(taken, tensors)]
        if not touched or node.op == "output":
            return False
        if (norm := norm_of(node)) is not None:
            return norm.arguments["training"] and any(tensor in touched for tensor in norm.tensors)
        if is_in_place(node):
            first: list[Node] = []
            map_arg(node.args[:1], first.append)
            return any(taken in touched for taken in first)
        return not _only_reads(node)


# Functions of torch that write what they are given without saying so in their names.
_UPDATING = {"batch_norm", "native_batch_norm", "instance_norm", "embedding", "embedding_bag"}


def _only_reads(node: Node) -> bool:
    """Whether a node that is not in place surely writes nothing."""
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    home = (getattr(node.target, "__module__", None) or "").split(".")[:2]
    plain = node.op == "call_method" or inspect.isroutine(node.target) and home[0] in ("torch", "_operator")
    return plain and "out" not in node.kwargs and called(node) not in _UPDATING


def _storages(value: Any) -> set[int] | None:
    found = set()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            try:
                found.add(leaf.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):
                return None
    return found
