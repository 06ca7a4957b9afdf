"""Chains around a BatchNorm: the modules before and behind it that a fused layer can take along, or why it cannot.

A chain goes on from a tensor to the next call only where that call is the tensor's one use.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import _children, reference
from ..modules import _FusedBatchNorm
from . import foreign
from .record import Call, Place, Record

NORMS: dict[type[nn.Module], str] = {nn.BatchNorm1d: "1d", nn.BatchNorm2d: "2d", nn.BatchNorm3d: "3d"}


def kind(module: Any) -> str | None:
    """ "norm", "act", "drop", "fused", "nothing" or "whole" for a leaf, None for any other thing that is called."""
    exact = type(module)
    if exact is nn.Identity:
        return "nothing"
    if exact in NORMS:
        return "norm"
    if exact in _children._ACTIVATIONS:
        return "act"
    if _children.noise_of(module) is not None:
        return "drop"
    if foreign.is_whole(module):
        return "whole"
    return "fused" if isinstance(module, _FusedBatchNorm) else None


def is_leaf(module: nn.Module) -> bool:
    return kind(module) is not None


def order_of(layer: Any) -> str:
    """The order of a fused layer, without those stages that do nothing in it."""
    there = {"norm", "add"} | {kind for kind in ("act", "drop") if _children.does_something(getattr(layer, kind))}
    return "-".join(stage for stage in layer.order.split("-") if stage in there)


def _stays_ahead(record: Record, stage: Call) -> str | None:
    """Why a stage ahead of the norm cannot be computed where the norm is."""
    if getattr(stage.what, "inplace", False):
        return None if record.is_private(stage) else "what the activation ahead of it writes has other readers"
    # Stock may keep for backward what the stage gives; the layer keeps what it takes.
    if record.written_after(stage.takes[0], stage):
        return "what the stage ahead of it takes is written later"
    return None


def outermost(model: nn.Module) -> list[nn.Module]:
    """Its modules, but for those inside one that is a norm and more."""
    inside = {id(m) for whole in model.modules() if kind(whole) == "whole" for m in whole.modules() if m is not whole}
    return [m for m in model.modules() if id(m) not in inside]


@dataclass(frozen=True)
class Stage:
    """An activation or a dropout, and where it stood."""

    kind: str
    module: nn.Module
    place: Place


@dataclass
class Chain:
    """A BatchNorm with the stages around it, and why there are no more."""

    norm: nn.Module
    before: list[Stage] = field(default_factory=list)
    after: list[Stage] = field(default_factory=list)
    reason: str | None = None

    @property
    def stages(self) -> list[Stage]:
        return self.before + self.after

    @property
    def order(self) -> str:
        return "-".join([*(s.kind for s in self.before), "norm", *(s.kind for s in self.after)])


# Functions that a chain could have in it, if its forward were rewritten.
_FUNCTIONS = {*reference.ACTIVATIONS, "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d", "add", "iadd", "radd"}


def _stage(call: Call) -> Stage | str | None:
    """The stage that a call is, or why it is none, or None for something of another kind."""
    found = kind(call.what)
    if call.what == "hooks":
        return "a hook looks at what comes out"
    if found is None and getattr(call.what, "__name__", "").strip("_") in _FUNCTIONS:
        return f"{call.what.__name__.strip('_')} in the model's own code comes next"
    if found not in ("act", "drop", "nothing"):
        return None
    if call.place is None:
        return f"{type(call.what).__name__} stands in several places, and which of them is called cannot be told"
    if not _children._is_plain(call.what):
        return f"{type(call.what).__name__} has hooks or a forward of its own"
    return Stage(found, call.what, call.place)


def _walk(record: Record, norm: Call, forward: bool, taken: set[str]) -> tuple[list[Stage], str | None]:
    """The stages behind a norm, or before it, nearest first; and why there are no more, if something else is there."""
    stages: list[Stage] = []
    kinds, call = set(taken), norm
    while True:
        values = call.gives if forward else call.takes
        if len(values) != 1:
            return stages, None
        value = values[0]
        maker = record.makers.get(value)
        if not forward and maker is None:
            return stages, None
        takers = record.takers[value]
        uses = len(takers) + (value in record.results)
        if uses != 1 or not takers:
            return stages, f"what it gives is used {uses} times" if forward and uses > 1 and not stages else None
        call = takers[0] if forward else maker  # type: ignore[assignment]  # there is one, as of above
        if kind(call.what) == "nothing" and _children._is_plain(call.what):
            continue
        stage = _stage(call)
        if not isinstance(stage, Stage):
            return stages, stage if forward else None
        if stage.kind in kinds:
            return stages, None
        if call.modes != norm.modes:
            return (
                stages,
                f"{type(stage.module).__name__} is called in another mode (gradients, autocast, a checkpoint)",
            )
        if not forward and (reason := _stays_ahead(record, call)) is not None:
            return stages, reason
        kinds.add(stage.kind)
        stages.append(stage)


def find(record: Record, norms: list[nn.Module]) -> list[Chain]:
    """The chain of each of `norms`: a stage is in one where every call of it is in the chain of some norm."""
    at_place = Counter(_key(call.place) for call in record.calls if call.place is not None)
    chains = [Chain(norm) for norm in norms]
    called = [chain for chain in chains if record.calls_of(chain.norm) and kind(chain.norm) != "whole"]
    behind = _claims(record, called, at_place, forward=True)
    for chain, (stages, reason) in zip(called, behind, strict=True):
        chain.after, chain.reason = stages, reason
        for stage in stages:
            del at_place[_key(stage.place)]
    for chain, (stages, _) in zip(called, _claims(record, called, at_place, forward=False), strict=True):
        chain.before = stages[::-1]
    return chains


def _key(place: Place) -> tuple[int, str]:
    return id(place[0]), place[1]


def _claims(
    record: Record, chains: list[Chain], at_place: Mapping[tuple[int, str], int], forward: bool
) -> list[tuple[list[Stage], str | None]]:
    """The stages on one side of each norm, nearest first, and why there are no more."""
    found = []
    for chain in chains:
        walks = [_walk(record, call, forward, {s.kind for s in chain.stages}) for call in record.calls_of(chain.norm)]
        same = all(other == walks[0][0] for other, _ in walks)
        found.append(walks[0] if same else ([], "what comes next differs from call to call"))
    while True:  # what one norm gives up, others have to, and what stands further out as well
        claims: Counter[tuple[int, str]] = Counter()
        for chain, (stages, _) in zip(chains, found, strict=True):
            claims.update({_key(stage.place): len(record.calls_of(chain.norm)) for stage in stages})
        before = found
        found = [_as_far_as(stages, reason, claims, at_place) for stages, reason in before]
        if found == before:
            return found


def _as_far_as(
    stages: list[Stage],
    reason: str | None,
    claims: Mapping[tuple[int, str], int],
    at_place: Mapping[tuple[int, str], int],
) -> tuple[list[Stage], str | None]:
    for i, stage in enumerate(stages):
        calls = at_place.get(_key(stage.place))
        if calls != claims[_key(stage.place)]:
            elsewhere = f"{type(stage.module).__name__} is called elsewhere in the same forward, too"
            return stages[:i], elsewhere if calls else reason
    return stages, reason
