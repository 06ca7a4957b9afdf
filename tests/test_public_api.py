"""The public names, with their signatures and defaults, are those of public_api.txt: a change of them is a decision.

`python -m tests.test_public_api` in the root of the sources writes that file again. Types are left out: tests/typing
has those, as users see them.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch

from fusednorm import functional, modules

LISTED = Path(__file__).with_name("public_api.txt")
MODULES = ("", ".functional", ".analysis", ".uncertainty", ".recalibration", ".noises", ".reference", ".convert")


def signature(function) -> str:
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def of_class(cls: type) -> Iterator[str]:
    """What the package adds to the classes of others, its own base classes first."""
    for base in cls.__bases__:
        if base.__module__.startswith("fusednorm"):
            yield from of_class(base)
    name = full_name(cls)
    yield f"class {name}({', '.join(map(full_name, cls.__bases__))}) {signature(cls)}"
    own = vars(cls)
    for member in sorted({*own, *inspect.get_annotations(cls)}):
        value = own.get(member)
        if member.startswith("_"):
            continue
        if isinstance(value, (classmethod, staticmethod)):
            yield f"{name}.{member}{signature(getattr(cls, member))}  # {type(value).__name__}"
        elif inspect.isfunction(value):
            yield f"{name}.{member}{signature(value)}"
        else:
            plain = isinstance(value, (bool, int, float, str, tuple))
            yield f"{name}.{member}{f' = {value!r}' if plain else ''}"


def of_module(module) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield f"{module.__name__}.{name}: {full_name(value)}"
            yield from of_class(value)
        elif not inspect.ismodule(value):
            yield f"{module.__name__}.{name}{signature(value)}"


def public_api() -> list[str]:
    modules = (importlib.import_module(f"fusednorm{module}") for module in MODULES)
    lines = [line for module in modules for line in of_module(module)]
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusednorm::"))
    for name in names:
        lines += map(str, torch._C._jit_get_schemas_for_operator(name))
    return list(dict.fromkeys(lines))


def test_public_api_is_as_listed():
    change = difflib.unified_diff(LISTED.read_text().splitlines(), public_api(), "listed", "found", lineterm="", n=0)
    told = "\n".join(change)
    assert not told, f"{told}\n\nIf that is meant: python -m tests.test_public_api, and a line in CHANGELOG.md"


def changed(monkeypatch, owner, name, value) -> set[str]:
    """The lines that are there only before or only after `owner` has another value for `name`."""
    before = set(public_api())
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        return before ^ set(public_api())


def test_changes_are_seen(monkeypatch):
    layer = "fusednorm.modules._FusedBatchNorm"
    assert changed(monkeypatch, functional, "noise", lambda shape, p=0.5: None) == {
        line for line in public_api() if line.startswith("fusednorm.functional.noise(")
    } | {"fusednorm.functional.noise(shape, p=0.5)"}
    assert changed(monkeypatch, modules._FusedBatchNorm, "freeze", lambda self, deep: None) == {
        f"{layer}.freeze(self)",
        f"{layer}.freeze(self, deep)",
    }
    assert changed(monkeypatch, modules._FusedBatchNorm, "frozen", True) == {
        f"{layer}.frozen = False",
        f"{layer}.frozen = True",
    }
    without = [name for name in functional.__all__ if name != "activations"]
    assert changed(monkeypatch, functional, "__all__", without) == {"fusednorm.functional.activations()"}


if __name__ == "__main__":
    LISTED.write_text("\n".join(public_api()) + "\n")
