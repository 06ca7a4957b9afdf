"""A captured graph fused: one call in the place of each chain, where that is not slower, and what became of each."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg

from .. import functional
from .graph import called, inputs_of, is_in_place, is_lone_dropout, norm_of, tensor_of
from .graph_chains import Chain, Search
from .measure import Like, Small, why_not
from .report import Report, Row


def fuse_graphs(gm: GraphModule, small: Small, dropouts: bool, evaluation: bool) -> Report:
    """Fuses the chains of a graph and of those that it calls; what became of each batch norm.

    Args:
        small, dropouts: see :func:`fusednorm.fuse`.
        evaluation: fuse those that neither take statistics nor draw noise, too.
    """
    report = Report()
    for part in gm.modules():
        if isinstance(part, GraphModule):
            _fuse_chains(part, small, evaluation, report)
            if dropouts:
                _fuse_dropouts(part, report)
    return report


def _fuse_chains(part: GraphModule, small: Small, evaluation: bool, report: Report) -> None:
    if all(norm_of(node) is None for node in part.graph.nodes):
        return
    follow_in_place(part.graph)
    chosen = []
    for chain in Search(part.graph).find():
        reason = chain.unfit
        if reason is None and not evaluation and not chain.is_live:
            reason = "in evaluation it is left to the inner compiler"
        reason = reason or _too_small(chain, small)
        report.rows.append(_row(chain, reason))
        if reason is None:
            chosen.append(chain)
    rewrite(part.graph, chosen)
    part.recompile()


def _fuse_dropouts(part: GraphModule, report: Report) -> None:
    """Those outside any chain that are still calls of torch's function."""
    lone = [node for node in part.graph.nodes if is_lone_dropout(node)]
    for node in lone:
        node.target = functional.dropout
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        node.args = node.args[:3]
        report.dropouts.append(_module_of(node) or node.name)
    if lone:
        part.recompile()


# ---- one call in the place of a chain --------------------------------------------------------------------------------
def follow_in_place(graph: Graph) -> None:
    """Whoever reads what was written in place since, reads what the writer gave: the same tensor, but in order."""
    for node in graph.nodes:
        written = next(iter(inputs_of(node)), None)
        if written is None or not is_in_place(node) or not isinstance(node.meta.get("example_value"), Tensor):
            continue
        if len(written.users) > 1 and tensor_of(node) is written.meta.get("example_value"):
            later, after = set(), node.next
            while after.op != "root":
                later.add(after)
                after = after.next
            written.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def rewrite(graph: Graph, chains: list[Chain]) -> None:
    """One call for each chain."""
    instead: dict[Node, Node] = {}

    def now(node: Node) -> Node:
        while node in instead:
            node = instead[node]
        return node

    for chain in chains:
        nodes, last = chain.nodes, chain.nodes[-1]
        with graph.inserting_before(last):
            call = graph.call_function(functional.batch_norm_act_drop, *_arguments(chain, now))
        call.meta |= last.meta | {k: v for k, v in chain.norm.node.meta.items() if k == "nn_module_stack"}
        last.replace_all_uses_with(call)
        instead[last] = call
        for node in reversed(nodes):
            graph.erase_node(node)


def _arguments(chain: Chain, now: Callable[[Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = chain.norm.arguments
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return map_arg(((chain.input, *(given[name] for name in names)), chain.keywords()), now)


# ---- alone, for its times --------------------------------------------------------------------------------------------
def _too_small(chain: Chain, small: Small) -> str | None:
    constants: Any = [(called(n), str(map_arg((n.args, n.kwargs), lambda _: None))) for n in chain.nodes]
    training = chain.norm.arguments["training"] and torch.is_grad_enabled()

    def make() -> tuple[GraphModule, GraphModule, list[Tensor]]:
        tensors = [Like.of(tensor_of(node)).filled(training and node not in chain.moves) for node in chain.reads]
        return _alone(chain, False), _alone(chain, True), tensors

    return why_not(small, tuple(constants), Like.of(tensor_of(chain.input)), training, make)


def _alone(chain: Chain, fused: bool) -> GraphModule:
    """The chain as a function of what it reads, as it stands or as one call."""
    graph, new = Graph(), dict[Node, Any]()
    for node in chain.reads:
        new[node] = graph.placeholder(node.name)
    written = [stage.writes for stage in chain.stages]
    for node in chain.reads:
        if node in written:
            new[node] = graph.call_method("clone", (new[node],))

    def there(node: Node) -> Any:
        return new[node] if node in new else tensor_of(node).node.hint  # a number

    if fused:
        output = graph.call_function(functional.batch_norm_act_drop, *_arguments(chain, there))
    else:
        for node in chain.nodes:
            output = new[node] = graph.node_copy(node, there)
    graph.output(output)
    return GraphModule(torch.nn.Module(), graph)


# ---- what is said of them --------------------------------------------------------------------------------------------
def _module_of(node: Node) -> str:
    """The name of the module whose code the node is, in the model that was compiled."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = str(stack[-1][0]) if stack else ""
    return re.sub(r"\._modules\['([^']+)'\]", r".\1", re.sub(r"^[LG]\['\w+'\]\.?", "", name))


def _row(chain: Chain, left: str | None) -> Row:
    name = _module_of(chain.norm.node) or chain.norm.node.name
    # Names begin anew behind a graph break.
    key = next(reversed(chain.norm.node.meta.get("nn_module_stack") or {"": ""}))
    if left is not None:
        return Row(name, None, (), left, key)
    ends = [stage.nodes[-1] for stage in chain.stages]
    taken = tuple(" ".join(filter(None, (called(node), _module_of(node)))) for node in ends)
    return Row(name, chain.order, taken, chain.reason, key)
