"""How torch may place the operators' tensors where they are DTensors: importing this module registers it.

`_operators.beside` imports it when the first DTensor comes along, as torch.distributed.tensor takes most of a second.

Every operator can run with all tensors whole on every rank. Statistics of a batch need all of it, and the noise of an
element depends on its place in the whole tensor; where neither matters, each rank does its share without communication:
of the batch in evaluation, of the channels always. A seed comes from each rank's own generator, so ranks have to agree
on it as torch's random operations demand: `torch.manual_seed` of the same number on all of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from . import _operators
from ._operators import Chain

# Placements of results, and of arguments that are tensors (None for one that is not given).
Strategy: TypeAlias = tuple[list[Placement], list[Placement | None]]

WHOLE = Replicate()


class Layout(NamedTuple):
    """A way to share a call among ranks; what is neither (N, C, ...) nor (C,) is whole on every one."""

    elements: Placement  # (N, C, ...)
    vectors: Placement  # (C,)
    sums: Placement  # (C,), over all that a channel has
    totals: Placement  # one value, over everything


REPLICATED = Layout(WHOLE, WHOLE, WHOLE, WHOLE)
BY_CHANNEL = Layout(Shard(1), Shard(0), Shard(0), Partial())
BY_BATCH = Layout(Shard(0), WHOLE, Partial(), Partial())


def _layouts(training: bool, chain: Chain, bits: bool) -> list[Layout]:
    if bits or chain.drops() or (training and chain.ghost_batch_size):  # bits are packed over all elements
        return [REPLICATED]
    return [REPLICATED, BY_CHANNEL] if training else [REPLICATED, BY_CHANNEL, BY_BATCH]


def _given(tensors: Sequence[Any], placements: Sequence[Placement]) -> list[Placement | None]:
    return [None if t is None else p for t, p in zip(tensors, placements, strict=True)]


def _is_shared(act_weight: Any) -> bool:
    return act_weight is not None and act_weight.shape.numel() == 1


def _forward(*args: Any) -> list[Strategy]:
    tensors, training, chain, save_mask = args[:8], args[8], Chain(*args[9:17]), args[18]
    strategies = []
    for at in _layouts(training, chain, save_mask and _operators._saves_bits(chain)):
        act_weight = WHOLE if _is_shared(tensors[6]) else at.vectors
        arguments = [at.elements, *[at.vectors] * 4, at.elements, act_weight, WHOLE]
        strategies.append(([at.elements, *[at.vectors] * 3, WHOLE, WHOLE], _given(tensors, arguments)))
    return strategies


def _backward(*args: Any) -> list[Strategy]:
    tensors, training, chain, wanted = args[:10], args[10], Chain(*args[11:19]), args[19]
    strategies = []
    for at in _layouts(training, chain, tensors[8].shape.numel() > 0):
        act_weight, its_gradient = (WHOLE, at.totals) if _is_shared(tensors[5]) else (at.vectors, at.sums)
        arguments = [*[at.elements] * 2, *[at.vectors] * 2, at.elements, act_weight, *[at.vectors] * 2, WHOLE, WHOLE]
        gradients = [at.elements, at.sums, at.sums, at.elements, its_gradient]
        results = [gradient if w else WHOLE for gradient, w in zip(gradients, wanted, strict=True)]  # else empty
        strategies.append((results, _given(tensors, arguments)))
    return strategies


def _update_stats(*args: Any) -> list[Strategy]:
    vectors, moments = Shard(0), Shard(len(args[3].shape) - 1)  # (C,) and (C,) or (groups, C)
    by_channel = [vectors, vectors, WHOLE, moments, moments]
    return [([], _given(args[:5], placements)) for placements in ([WHOLE] * 5, by_channel)]


def _draw_seed(like: Any) -> list[Strategy]:
    shards = [Shard(dim) for dim in range(len(like.shape))]
    return [([WHOLE], [placement]) for placement in (WHOLE, Partial(), *shards)]  # its values are not looked at


def _whole(*args: Any) -> list[Strategy]:
    """Of an operator with one result, whose tensors come first."""
    return [([WHOLE], [WHOLE for a in args if hasattr(a, "placements")])]


def _register(operator: Any, strategies: Any) -> None:
    register_sharding(operator)(strategies)
    # Results are cached by what decides them, for which torch takes the arguments from the first int on. Here it is all
    # that is no tensor: an order decides about placements and saved bits, sizes about the noise's shape.
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    first = next((i for i, kind in enumerate(kinds) if "Tensor" not in kind), len(kinds))
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(first, needs_pytree=True)


for _name, _rule in {
    "draw_seed": _draw_seed,
    "forward": _forward,
    "backward": _backward,
    "update_stats_": _update_stats,
    "noise": _whole,
    "dropout": _whole,
}.items():
    _register(getattr(torch.ops.fusednorm, _name).default, _rule)


def replicated(seed: Tensor | None, input: Any) -> Tensor | None:
    """A plain seed as a DTensor beside `input`: what plain torch makes of it must be one."""
    if seed is None or isinstance(seed, DTensor):
        return seed
    mesh = input.device_mesh
    return DTensor.from_local(seed, mesh, [WHOLE] * mesh.ndim, run_check=False)
