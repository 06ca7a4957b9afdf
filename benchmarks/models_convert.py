"""A public model converted in each way, and whether it is still the same model.

The ways are `fusednorm.fuse` with an example and the backend of torch.compile. Chains are counted on the stock model by
`census_record.py`, which knows nothing of either; a chain counts as fused where its norm took a stage along, and as
whole where it took all that were counted. Equality is that of outputs, gradients, buffers and evaluation in float64,
with noise switched off everywhere.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fusednorm
from benchmarks.census_record import Recorder
from benchmarks.models_table import WAYS
from fusednorm import functional
from fusednorm.convert import Report
from fusednorm.convert.chains import order_of
from fusednorm.modules import _FusedBatchNorm


def sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def tensors(inputs: tuple, most: int | None = None) -> tuple:
    """Values for a model's inputs, which are shapes or functions; `most` samples where all are shapes."""
    cut = most is not None and all(isinstance(given, tuple) for given in inputs)
    return tuple(
        torch.randn(min(given[0], most or 0) if cut else given[0], *given[1:]) if isinstance(given, tuple) else given()
        for given in inputs
    )


def loss_of(model: Callable, inputs: tuple) -> tuple[Tensor, list[Tensor]]:
    """Some loss that reaches every output, and the outputs."""
    found = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([output.square().mean() for output in found if output.requires_grad]).sum(), found


# ---- conversions -----------------------------------------------------------------------------------------------------
def fused(model: nn.Module, inputs: tuple, small: str = "measure", dropouts: bool = False) -> nn.Module:
    return fusednorm.fuse(model, inputs, small=small, dropouts=dropouts)


def compiled(model: nn.Module, small: str = "measure", dropouts: bool = False) -> tuple[Callable, Report]:
    """The model under the backend, and the report that fills as it is called."""
    report = Report()
    options = {"small": small, "report": report.add, "dropouts": dropouts}
    return torch.compile(model, backend=fusednorm.backend, options=options), report


# ---- counts ----------------------------------------------------------------------------------------------------------
def chains_of(model: nn.Module, inputs: tuple) -> collections.Counter:
    """How many chains of each order one training forward has; bare norms are none."""
    with Recorder() as recorder:
        model(*inputs)
    return collections.Counter(chain.order for chain in recorder.chains() if chain.order != "norm")


def orders_called(model: nn.Module, inputs: tuple) -> collections.Counter:
    """How often one forward calls fused layers of each order."""
    called: collections.Counter = collections.Counter()

    def note(layer, *_):
        called[order_of(layer)] += 1

    layers = [layer for layer in model.modules() if isinstance(layer, _FusedBatchNorm)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return called


# ---- equality --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def silent(*models: nn.Module):
    """No noise in what these models compute, of modules and of functions."""
    for model in models:
        for module in model.modules():
            for name in ("p", "drop_prob"):
                if name in module.__dict__ and isinstance(module.__dict__[name], float):
                    setattr(module, name, 0.0)
    names = ("dropout", "dropout1d", "dropout2d", "dropout3d")
    kept = {name: getattr(F, name) for name in names}
    try:
        for name in names:
            setattr(F, name, lambda input, *_, **__: input)
        yield
    finally:
        for name, function in kept.items():
            setattr(F, name, function)


def results(run: Callable, model: nn.Module, inputs: tuple) -> dict[str, list[Tensor]]:
    """What a training step and an evaluation of `run`, which is `model` somehow, leave to see."""
    model.train().zero_grad()
    torch.manual_seed(1)
    loss, outputs = loss_of(run, inputs)
    loss.backward()
    found = {"outputs": [output.detach().clone() for output in outputs]}
    found["gradients"] = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
    found["buffers"] = [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = tree_leaves(run(*inputs))
    found["evaluation"] = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found


def difference(stock: dict[str, list[Tensor]], ours: dict[str, list[Tensor]]) -> float:
    """The largest of all, each in units of the largest value of its tensor."""
    errors = [0.0]
    for what, wanted in stock.items():
        # Beside the largest of its kind: a gradient that is zero but for rounding has no scale of its own.
        least = 1e-6 * max((float(t.abs().amax()) for t in wanted if t.numel()), default=0.0)
        for a, b in zip(wanted, ours[what], strict=True):
            if a.numel():
                error = float((b - a).abs().amax() / a.abs().amax().clamp_min(least or 1.0))
                errors.append(error if error == error else float(not torch.equal(a.isnan(), b.isnan())))
    return max(errors)


def _error(way: str, model: nn.Module, inputs: tuple, wanted: dict[str, list[Tensor]]) -> float:
    """How far a copy of the model in that way, with every chain fused, is from what stock gives."""
    if way == "fuse":
        ours = fused(model, inputs, "always")
        if list(ours.state_dict()) != list(model.state_dict()):
            raise AssertionError("the keys of its state dict differ")
        error = difference(wanted, results(ours, ours, inputs))
        if [type(m) for m in fusednorm.unfuse(ours).modules()] != [type(m) for m in model.modules()]:
            raise AssertionError("unfuse gives other modules")
        return error
    ours = copy.deepcopy(model)
    return difference(wanted, results(compiled(ours, "always")[0], ours, inputs))


@contextlib.contextmanager
def calls_of_graphs():
    """Counts the fused calls of each order in graphs that are captured from here on, as they run."""
    counted: collections.Counter = collections.Counter()
    function = functional.batch_norm_act_drop

    def counting(*arguments, order="norm", **keywords):
        counted[order] += 1
        return function(*arguments, order=order, **keywords)

    functional.batch_norm_act_drop = counting
    try:
        yield counted
    finally:
        functional.batch_norm_act_drop = function


def _count(way: str, model: nn.Module, inputs: tuple, chains: collections.Counter) -> dict:
    if way == "fuse":
        orders = orders_called(fused(model, inputs, "always"), inputs)
    else:
        with calls_of_graphs() as orders:
            run, _ = compiled(model, "always")
            run(*inputs)
            orders.clear()  # a first call may be made again
            run(*inputs)
    return {"fused": sum(n for order, n in orders.items() if order != "norm"), "whole": (chains & orders).total()}


def checked(build: Callable[[], nn.Module], inputs: tuple, most: int | None = None) -> dict:
    """A row: how many chains the model has, and of each way how many it fused and the error; or why it is none.

    Args:
        most: samples in a batch.

    Raises:
        What the stock model raises.
    """
    torch.manual_seed(0)
    model, given = build().train(), tensors(inputs, most)
    chains = chains_of(copy.deepcopy(model), given)
    stock = copy.deepcopy(model).double()
    doubled = tuple(x.double() if x.is_floating_point() else x for x in given)
    row: dict = {"chains": chains.total()}
    with silent(stock):
        wanted = results(copied := copy.deepcopy(stock), copied, doubled)
    for way in WAYS:
        torch._dynamo.reset()
        try:
            row[way] = _count(way, copy.deepcopy(model), given, chains)
            torch._dynamo.reset()
            with silent():
                row[way]["error"] = _error(way, stock, doubled, wanted)
        except Exception as error:
            row[way] = {"failed": sentence(error)}
    return row
