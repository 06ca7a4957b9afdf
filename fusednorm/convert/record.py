"""One forward of a model, watched: which modules and functions took which tensor, and from where.

Modules that mean something to a conversion are leaves: what happens inside them is their own. Of everything else the
functions are recorded. Every tensor has a number, and nothing ever gives a tensor that it took: where it would (an
activation in place, nn.Identity, a dropout) it is made to give another one of the same memory. So to use a tensor from
before such a call is not to use what the call gave. No dropout draws: what comes out is the model's but for its noise.
"""

import copy
import gc
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import _children
from ..modules import _CONTAINERS
from .measure import Like

# Asking these of a tensor is no use of its values. `requires_grad` is: parameters are frozen here, and who asks may be
# about to hang a hook on the tensor.
_FACTS = {
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "stride", "ndimension", "__len__")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "is_contiguous")),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")),
}

_NOISE = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}

Place = tuple[nn.Module, str]  # a parent, and the name in it


@dataclass(frozen=True)
class Call:
    """Of a leaf, of a function, or of the hooks of some other module."""

    what: Any
    place: Place | None  # where the leaf was called from, if that is one place
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    likes: tuple[Like, Like] | None = None  # of a leaf: the first tensor taken, and the first given
    writes: tuple[int, ...] = ()  # those taken that it changed
    modes: tuple[Any, ...] = ()  # of autograd and autocast, in which it was made, and what keeps tensors for backward


class Record:
    """The calls of a forward, in their order, and who took what each gave.

    Args:
        results: the tensors that somebody has hold of when the forward is over: what the model gives, or keeps.
        memory: whose memory each tensor has, by a number.
        numbers: of tensors, by their id.
        values: what came out.
        buffers: as they were then.
        uncalled: what is to be said of a module without a call.
    """

    def __init__(
        self,
        calls: list[Call],
        results: set[int],
        memory: Mapping[int, int] | None = None,
        numbers: Mapping[int, int] | None = None,
        values: Sequence[Tensor] = (),
        buffers: Sequence[Tensor] = (),
        uncalled: str = "it is not called with this example",
    ) -> None:
        self.calls = calls
        self.results = results
        self.values, self.buffers = values, buffers
        self.uncalled = uncalled
        self._memory, self._numbers = memory or {}, numbers or {}
        self._at = {id(call): i for i, call in enumerate(calls)}
        self.takers: dict[int, list[Call]] = defaultdict(list)
        self.makers: dict[int, Call] = {}
        self._of: dict[int, list[Call]] = defaultdict(list)
        for call in calls:
            for value in call.takes:
                self.takers[value].append(call)
            for value in call.gives:
                self.makers[value] = call
            self._of[id(call.what)].append(call)

    def calls_of(self, module: nn.Module) -> list[Call]:
        return self._of[id(module)]

    def reads(self, tensor: Tensor) -> bool:
        """Whether some call takes this tensor."""
        return bool(self.takers[self._numbers.get(id(tensor), -1)])

    def _family(self, value: int) -> set[int]:
        """The values of one memory."""
        home = self._memory.get(value)
        return {value} if home is None else {other for other, at in self._memory.items() if at == home}

    def is_private(self, writer: Call) -> bool:
        """Whether what a call writes is seen by nobody but through what it gives."""
        at, (value,) = self._at[id(writer)], writer.takes
        makers = {v: self.makers.get(v) for v in self._family(value)}
        earlier = {v for v, maker in makers.items() if maker is None or self._at[id(maker)] < at}
        if any(makers[v] is None or v in self.results for v in earlier):
            return False
        # What gives no tensor, as numpy() does, may have given hold of the memory.
        takers = [taker for v in earlier for taker in self.takers[v] if taker is not writer]
        return all(taker.gives and {*taker.gives} <= earlier for taker in takers)

    def written_after(self, value: int, call: Call) -> bool:
        """Whether a later call changes a value."""
        family = self._family(value)
        return any(family & {*later.writes} for later in self.calls[self._at[id(call)] + 1 :])


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_leaf = is_leaf
        self.calls: list[Call] = []
        self._stack: list[tuple[nn.Module, list[int]]] = []  # what is being called, and what it took
        self._inside = 0  # how many leaves are being called, one in another
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no two have the same id
        self._places: dict[int, list[Place]] = defaultdict(list)
        # Whose hooks see what goes in, and what comes out: but for the watch's own.
        self._seen_in = {id(m) for m in model.modules() if m._forward_pre_hooks}
        self._seen_out = {
            id(m) for m in model.modules() if m._forward_hooks or m._backward_hooks or m._backward_pre_hooks
        }
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._places[id(child)].append((parent, name))

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return self._numbers[id(tensor)]

    def numbers(self, tree: Any) -> tuple[int, ...]:
        return tuple(self.number(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

    def record(self, what: Any, place: Place | None, taken: Any, before: list[int], given: Any) -> Any:
        """Notes the call; returns `given`, of tensors that are not among those taken.

        Args:
            before: the versions of what was taken, before the call.
        """
        takes = self.numbers(taken)
        # A hook may have changed what the module takes: then there is nothing to compare.
        writes = tuple(n for n, a, b in zip(takes, before, _versions(taken), strict=False) if a != b)
        known = set(takes)

        def apart(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and self.number(leaf) in known:
                with torch._C.DisableTorchFunction():  # a view would have hold of its base, and count as a use
                    return leaf.view_as(leaf) if leaf.requires_grad else leaf.data
            return leaf

        given = tree_map(apart, given)
        gives = self.numbers(given)
        ends = [self._alive[values[0]] for values in (takes, gives) if values and isinstance(what, nn.Module)]
        likes = (Like.of(ends[0]), Like.of(ends[1])) if len(ends) == 2 else None
        self.calls.append(Call(what, place, takes, gives, likes, writes, _modes()))
        return given

    # ---- functions
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        noted = not self._inside and function not in _FACTS
        before = _versions((args, kwargs)) if noted else []
        given = (args[0] if args else kwargs["input"]) if function in _NOISE else function(*args, **kwargs)
        return self.record(function, None, (args, kwargs), before, given) if noted else given

    # ---- modules
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if id(module) in self._seen_in and not self._inside:
            self.calls.append(Call("hooks", None, self.numbers((args, kwargs)), ()))
        leaf = self.is_leaf(module)
        self._stack.append((module, _versions((args, kwargs)) if leaf and not self._inside else []))
        self._inside += leaf

    def leave(self, module: nn.Module, args: Any, kwargs: Any, given: Any) -> Any:
        _, before = self._stack.pop()
        self._inside -= self.is_leaf(module)
        if self._inside:
            return None
        if self.is_leaf(module):
            return self.record(module, self._place(module), (args, kwargs), before, given)
        if id(module) in self._seen_out:
            self.calls.append(Call("hooks", None, self.numbers(given), ()))
        return None

    def _place(self, module: nn.Module) -> Place | None:
        """Where a module stands that is being called: in the caller, if there, or else in the one place that it has."""
        places = self._places[id(module)]
        near = [place for place in places if self._stack and place[0] is self._stack[-1][0]]
        found = near or places
        return found[0] if len(found) == 1 else None

    def held(self) -> set[int]:
        """The tensors that somebody else has hold of."""
        gc.collect(1)  # what the forward has left in circles
        mine = _references([torch.empty(0)])
        return {n for n, count in enumerate(_references(self._alive)) if count > mine[0]}

    def memory(self) -> dict[int, int]:
        """Whose memory each tensor has."""
        known = {n: t for n, t in enumerate(self._alive) if t.layout == torch.strided}
        return {n: t.untyped_storage()._cdata for n, t in known.items()}


def _modes() -> tuple[Any, ...]:
    casts = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    keepers = torch._C._autograd._top_saved_tensors_default_hooks(True)  # a checkpoint has its own
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *casts, keepers


def _references(tensors: list[Tensor]) -> list[int]:
    return [sys.getrefcount(tensors[i]) for i in range(len(tensors))]


def _versions(tree: Any) -> list[int]:
    """How often each tensor has been written."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    with torch._C.DisableTorchFunction():  # or else the watch would see it
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers, modes, generators and what modules keep as attributes come back as they were.

    Meanwhile no parameter asks for a gradient, so that none are computed, though the model finds them switched on. And
    a norm's weight is not all 0, as it is where a branch begins as nothing: what is tried there would not show.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {id(b): (b, b.detach().clone()) for b in model.buffers()}
    owners = [(module, dict(module._buffers), _attributes(module)) for module in _own(model)]
    kept = [undo for _, _, held in owners for value in held.values() if (undo := _kept(value)) is not None]
    silent = [
        (w, w.data) for m in _own(model) if isinstance(m, _NormBase) if (w := m.weight) is not None and _is_zero(w)
    ]
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type not in ("cpu", "meta")}
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        for weight, zeros in silent:
            weight.data = torch.ones_like(zeros)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for kind in {device.type for device in devices}:
                of_kind = [device for device in devices if device.type == kind]
                stack.enter_context(torch.random.fork_rng(devices=of_kind, device_type=kind))
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()
        for weight, zeros in silent:
            weight.data = zeros
        for undo in kept:
            undo()
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for module, held, attributes in owners:
            module._buffers.clear()
            module._buffers.update(held)
            for name in _attributes(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        with torch.no_grad():
            for buffer, value in buffers.values():
                buffer.copy_(value)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own, `training` among them, but for what it keeps in containers."""
    return {name: value for name, value in vars(module).items() if name not in _CONTAINERS}


def _kept(value: Any) -> Callable[[], Any] | None:
    """What gives a container, or a generator, back what is in it now."""
    exact = type(value)
    if exact in (list, deque):
        held = list(value)
        return lambda: (value.clear(), value.extend(held))
    if exact in (dict, set, defaultdict, OrderedDict, Counter):
        copied: Any = value.copy()
        return lambda: (value.clear(), value.update(copied))
    if exact is torch.Generator:
        state = value.get_state()
        return lambda: value.set_state(state)
    return None


def _is_zero(weight: Tensor) -> bool:
    return not weight.is_meta and not weight.any()


def call_with(model: nn.Module, example: Any) -> Any:
    """model(example): a tuple or list are its arguments, a dict its keywords."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def observe(model: nn.Module, example: Any, is_leaf: Callable[[nn.Module], bool], other_mode: bool = False) -> Record:
    """What happens in `model(example)`, after which buffers, modes and random generators are as they were.

    Args:
        other_mode: in evaluation, if the model is training, and the other way round.

    Raises:
        What the model raises.
    """
    example = tree_map(_copy, example)
    watch = _Watch(model, is_leaf)
    with ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        if other_mode:
            model.train(not model.training)
        for module in _own(model):
            if _children.noise_of(module) is not None:
                module.training = False
            # Not torch's hooks for all modules: these leave a trace when they are removed.
            for handle in (
                module.register_forward_pre_hook(watch.enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(watch.leave, with_kwargs=True, prepend=True),
            ):
                stack.callback(handle.remove)
        with watch:
            results = call_with(model, example)
        values = [tensor.detach().clone() for tensor in _tensors(results)]
        buffers = [buffer.detach().clone() for buffer in model.buffers()]
        used = watch.held()  # while the results are there
    return Record(watch.calls, used, watch.memory(), watch._numbers, values, buffers)


def _copy(leaf: Any) -> Any:
    """Of something in an example, which the model may write."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    try:
        return copy.deepcopy(leaf)
    except Exception:  # it has no copies
        return leaf


def _own(model: nn.Module) -> list[nn.Module]:
    """Its modules that are Python."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def _tensors(tree: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in a tree, and in the attributes of what torch does not know to be one."""
    seen = set() if seen is None else seen
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _tensors(list(vars(leaf).values()), seen)
