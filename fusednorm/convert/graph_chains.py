"""The chains around the batch norms of a captured graph.

A chain goes on from a value to the node that is its one reader. One call is to stand where its last node stands, so
that all of it is computed later than it was; nothing between its first and its last node may write what it reads, or
read the running statistics that it moves.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import functional
from .graph import (
    Memory,
    Norm,
    Stage,
    alike,
    called,
    inputs_of,
    keeps_layout,
    norm_of,
    silu_of,
    stage_of,
    states_of,
    tensor_of,
    tensors_of,
)


@dataclass
class Chain:
    """A batch norm with the stages around it, and why there are no more; or why it is none for the operator."""

    norm: Norm
    before: list[Stage] = field(default_factory=list)
    after: list[Stage] = field(default_factory=list)
    reason: str | None = None
    unfit: str | None = None

    @property
    def stages(self) -> list[Stage]:
        return [stage for stage in self.before + self.after if stage.kind != "nothing"]

    @property
    def nodes(self) -> list[Node]:
        """From the first to the last."""
        parts = [stage.nodes for stage in self.before], [(self.norm.node,)], [stage.nodes for stage in self.after]
        return [node for part in parts for nodes in part for node in nodes]

    @property
    def order(self) -> str:
        before, after = ([s.kind for s in stages if s.kind != "nothing"] for stages in (self.before, self.after))
        return "-".join([*before, "norm", *after])

    @property
    def input(self) -> Node:
        """What its first stage takes."""
        return self.before[0].input if self.before else self.norm.arguments["input"]

    @property
    def reads(self) -> list[Node]:
        """The tensors that it takes from outside, its input first."""
        others = *self.norm.tensors, *(s.also for s in self.stages if s.also is not None)
        return list(dict.fromkeys((self.input, *others)))

    @property
    def moves(self) -> list[Node]:
        """The running statistics, in training."""
        given = self.norm.arguments
        found = [given["running_mean"], given["running_var"]] if given["training"] else []
        return [node for node in found if isinstance(node, Node)]

    @property
    def is_live(self) -> bool:
        """Whether it takes statistics of the batch, or draws noise."""
        return self.norm.arguments["training"] or any(stage.kind == "drop" for stage in self.stages)

    def keywords(self) -> dict[str, Any]:
        """Of `batch_norm_act_drop`."""
        given: dict[str, Any] = {} if self.order == "norm" else {"order": self.order}
        for stage in self.stages:
            given |= stage.keywords
        return given


class Search:
    """The chains of a graph, no node of which is in two of them."""

    def __init__(self, graph: Graph) -> None:
        self.memory = Memory(graph)
        self.states = states_of(graph)
        self.nodes = list(graph.nodes)
        self.claimed: set[Node] = set()

    def find(self) -> list[Chain]:
        norms = [norm for node in self.nodes if node.op == "call_function" and (norm := norm_of(node)) is not None]
        chains = [Chain(norm, unfit=_unfit(norm)) for norm in norms]
        fit = [chain for chain in chains if chain.unfit is None]
        self.claimed |= {chain.norm.node for chain in chains}
        for chain in fit:
            self._go_on(chain)
        for chain in fit:
            self._go_back(chain)
        return chains

    def _go_on(self, chain: Chain) -> None:
        """Takes in the stages behind the norm."""
        value, idle = chain.norm.node, list[Stage]()
        while True:
            stage = self._reader(value)
            if not isinstance(stage, Stage):
                chain.reason = stage
                return
            problem = self._problem(chain, stage, [*chain.after, *idle, stage], ahead=False)
            if problem is not None:
                chain.reason = problem or None
                return
            value = stage.nodes[-1]
            idle.append(stage)
            if stage.kind != "nothing":
                chain.after += idle
                self.claimed |= {node for s in idle for node in s.nodes}
                idle = []

    def _reader(self, value: Node) -> Stage | str | None:
        """The stage that is the one reader of a value, or why there is none, if there is a reason to give."""
        readers = [node for node in value.users if node not in self.claimed]
        if len(value.users) == 2 and len(readers) == 2:
            for product in readers:
                if (silu := silu_of(product, value)) is not None:
                    return silu
        if len(value.users) != 1:
            return f"what it gives is used {len(value.users)} times" if len(value.users) > 1 else None
        return stage_of(readers[0], value) if readers else None

    def _go_back(self, chain: Chain) -> None:
        """Takes in the stages ahead of the norm."""
        idle: list[Stage] = []
        while True:
            maker = idle[0].input if idle else chain.input
            if maker in self.claimed or not maker.op.startswith("call"):
                return
            stage = self._making(maker)
            if stage is None or stage.kind == "add" or len(maker.users) != 1:
                return
            if self._problem(chain, stage, [stage, *idle, *chain.before], ahead=True) is not None:
                return
            idle.insert(0, stage)
            if stage.kind != "nothing":
                chain.before[:0] = idle
                self.claimed |= {node for s in idle for node in s.nodes}
                idle = []

    def _making(self, maker: Node) -> Stage | None:
        """The stage whose value `maker` is."""
        inputs = tensors_of(maker)
        for value in inputs[:2]:
            alone = len(value.users) == 2 and value.op.startswith("call")
            if alone and (silu := silu_of(maker, value)) is not None and silu.nodes[0] not in self.claimed:
                return silu
        return stage_of(maker, inputs[0]) if inputs else None

    def _problem(self, chain: Chain, stage: Stage, stages: list[Stage], ahead: bool) -> str | None:
        """Why the chain does not take in the stage, "" where that goes without saying; None: it does."""
        if stage.kind != "nothing" and stage.kind in {s.kind for s in chain.stages}:
            return ""
        if any(self.states[node] != self.states[chain.norm.node] for node in stage.nodes):
            return f"{called(stage.nodes[-1])} is called with gradients or autocast switched otherwise"
        if not alike(stage.nodes[-1], chain.norm.node):
            return f"{called(stage.nodes[-1])} gives another shape, layout or dtype"
        if stage.kind == "add" and not alike(stage.also, chain.norm.node):  # type: ignore[arg-type]
            return "what is added to it has another shape, layout or dtype"
        # What a norm has given is written by its chain alone.
        apart = stage.writes is not None and (ahead or stage.writes is stage.also)
        if apart and not self.memory.is_private(stage.nodes[-1]):
            return "what is written in place has other readers"
        longer = Chain(chain.norm, stages if ahead else chain.before, chain.after if ahead else stages)
        return self._moved(longer) or self._kept(longer)

    def _moved(self, chain: Chain) -> str | None:
        """Why it cannot be computed where its last node stands."""
        nodes = chain.nodes
        own, reads, moves = set(nodes), chain.reads, chain.moves
        at = self.memory.at
        for node in self.nodes[at[nodes[0]] + 1 : at[nodes[-1]]]:
            if node in own:
                continue
            there = [read for read in reads if at[read] < at[node]]  # and not what the node helps to make
            if self.memory.may_write(node, there) or any(self.memory.shared(taken, moves) for taken in inputs_of(node)):
                return f"{node.name} comes between, and writes what it reads"
        return None

    def _kept(self, chain: Chain) -> str | None:
        """Why it cannot keep what its backward reads, and that of its stages need not."""
        kinds = [stage.kind for stage in chain.after]
        kept = [chain.input] if chain.before else []
        if "add" in kinds and "act" in kinds[kinds.index("add") :]:
            kept += [stage.also for stage in chain.after if stage.kind == "add" and stage.also is not None]
        for node in self.nodes[self.memory.at[chain.nodes[-1]] + 1 :] if kept else ():
            if self.memory.may_write(node, kept):
                return f"{node.name} writes later what it would keep"
        return None


def _unfit(norm: Norm) -> str | None:
    """Why a norm is none for the operator."""
    value = tensor_of(norm.arguments["input"])
    if type(value) is not torch._subclasses.FakeTensor:
        return f"its input is a {type(value).__name__}"
    if value.dtype not in functional.DTYPES:
        return f"its input is of {value.dtype}"
    if not 2 <= value.dim() <= 5:
        return f"its input has {value.dim()} dimensions"
    return None if keeps_layout(norm) else "the function gives another layout than the operator"
