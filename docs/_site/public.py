"""Fails the build where a public name has no place in the reference, or no docstring; and finds that place.

Docstrings call a function by the module that defines it, or by its bare name; the reference has it where users find it.

Public is what `__all__` of the package and of its public modules has.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

from sphinx.application import Sphinx
from sphinx.util import logging

MODULES = ("analysis", "convert", "functional", "noises", "recalibration", "reference", "uncertainty")
logger = logging.getLogger(__name__)


def names() -> Iterator[tuple[str, object]]:
    """Every public name with its object; some objects have two."""
    for module in ("fusednorm", *(f"fusednorm.{name}" for name in MODULES)):
        found = importlib.import_module(module)
        for name in found.__all__:
            yield f"{module}.{name}", getattr(found, name)


def check(app: Sphinx, env) -> None:
    domain = env.get_domain("py")
    documented = {*domain.objects, *domain.modules}
    called: dict[int, list[str]] = {}
    for name, value in names():
        called.setdefault(id(value), []).append(name)
        if not inspect.getdoc(value):
            logger.warning("the public name %s has no docstring", name)
    for aliases in called.values():
        if documented.isdisjoint(aliases):
            logger.warning("the reference lacks the public name %s", aliases[0])


def resolve(app: Sphinx, env, node, contnode):
    """A reference to one of this package's names, whatever it is called by."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not (target.startswith("fusednorm.") or "." not in target):
        return None
    domain, name = env.get_domain("py"), target.rpartition(".")[2]
    found = [full for full in domain.objects if full.rpartition(".")[2] == name and full.count(".") < 3]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, contnode)


def setup(app: Sphinx) -> dict:
    app.connect("missing-reference", resolve)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
