"""Annotations tell the truth: what mypy and pyright check in `make lint` runs here, and values are what they say."""

import runpy
import types
import typing
from pathlib import Path

import pytest

import fusednorm

USER = Path(__file__).with_name("typing") / "correct.py"


def _is_a(value, kind):
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(_is_a(value, k) for k in arguments)
    if origin is dict:
        return type(value) is dict and all(_is_a(k, arguments[0]) and _is_a(v, arguments[1]) for k, v in value.items())
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return type(value) is tuple and all(map(_is_a, value, kinds)) and len(value) == len(kinds)
    return isinstance(value, kind)


@pytest.mark.cpu
def test_values_are_of_the_types_that_users_see(monkeypatch):
    seen = []

    def assert_type(value, kind):
        assert _is_a(value, kind), f"{value!r} is not a {kind}"
        seen.append(kind)

    monkeypatch.setattr(typing, "assert_type", assert_type)
    runpy.run_path(str(USER))
    assert len(seen) == USER.read_text().count("\nassert_type(")


@pytest.mark.parametrize("name", fusednorm.__all__)
def test_every_public_name_is_there(name):
    assert f" {name},\n" in USER.read_text()
