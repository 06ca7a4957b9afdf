"""What every conversion begins with: a model that can be converted, and who calls what in it.

With an example a forward says that; without one, only what follows one another in an nn.Sequential is sure.
"""

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import foreign
from .record import Call, Record, observe


def study(
    model: nn.Module, example: Any, inplace: bool, is_leaf: Callable[[nn.Module], bool]
) -> tuple[nn.Module, dict[int, str], Record]:
    """What every conversion begins with: the model or a copy of it, its modules' names by id, and who calls them.

    Raises:
        TypeError, ValueError: a model that cannot be converted.
        What the model raises.
    """
    _check(model)
    if not inplace:
        model = copy.deepcopy(model)
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
    return model, names, _in_rows(model, is_leaf) if example is None else observe(model, example, is_leaf)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected one that is not scripted; fuse it first, then script it")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model: expected one that knows its sizes; call it once before")
    dynamo = sys.modules.get("torch._dynamo")  # which is slow to import, and was if it has compiled anything
    for module in model.modules():
        if module._compiled_call_impl is not None or (dynamo and isinstance(module, dynamo.OptimizedModule)):
            raise TypeError("model: expected one that is not compiled; fuse it first, then compile it")


def _in_rows(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Record:
    """The calls that are sure without a forward: modules of an nn.Sequential, one after the other."""
    calls: list[Call] = []
    value, memory = 0, {0: 0}
    rows = [module for module in model.modules() if _is_row(module)]
    # What stands elsewhere, too, may be called from there.
    others = [module for module in model.modules() if not _is_row(module)]
    elsewhere = {id(child) for module in others for child in module._modules.values()}
    inner = {id(child) for row in rows for child in row._modules.values() if _is_row(child) and not _is_seen(child)}
    for module in rows:
        if id(module) in inner - elsewhere:
            continue
        first = memory[value] = value
        for parent, name in _flat(module, elsewhere):
            child: Any = parent._modules[name]
            within, alone = foreign.inner_norm(child), id(child) not in elsewhere
            if within is not None and not _is_seen(child):
                parent, name, child = child, within, child._modules[within]
            calls.append(
                Call(child if alone and is_leaf(child) else type(child), (parent, name), (value,), (value + 1,))
            )
            fresh = next(child.parameters(), None) is not None  # or else it may give what it takes, or a view
            memory[value + 1] = value + 1 if fresh else memory[value]
            value += 1
        # Whoever calls the row gets what it gives, and may then write what it took.
        calls.append(Call(type(module), None, (value,), (), writes=(first,)))
        value += 1
    return Record(calls, set(), memory, uncalled="outside nn.Sequential only an example shows who calls it")


def _is_row(module: nn.Module | None) -> bool:
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and "forward" not in vars(module)


def _is_seen(row: Any) -> bool:
    return bool(row._forward_hooks or row._forward_pre_hooks or row._backward_hooks or row._backward_pre_hooks)


def _flat(row: nn.Module, elsewhere: set[int]) -> Iterable[tuple[nn.Module, str]]:
    for name, child in row._modules.items():
        if child is not None and _is_row(child) and not _is_seen(child) and id(child) not in elsewhere:
            yield from _flat(child, elsewhere)
        else:
            yield row, name
