"""What a command gives back, and how that is put on a terminal: no line is longer than the terminal is wide."""

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

# What stands in front, padded, and the text; a text that is wrapped goes on behind the front.
Line: TypeAlias = tuple[str, str]


class Outcome(NamedTuple):
    """Of a command: its exit status, plain data for JSON, and lines for people."""

    status: int
    facts: dict[str, Any]
    lines: list[Line]


class Refused(Exception):
    """Arguments that cannot be met, in a sentence that begins with the argument as it was written."""


class Failed(Exception):
    """What was asked for was tried and is not so, in a sentence."""


def first_line(error: BaseException) -> str:
    """The error in one line, with its type where it says nothing itself."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def complain(command: str, what: object, status: int) -> int:
    """One line on stderr; returns `status`."""
    print(f"fusednorm {command}: {' '.join(str(what).split())}", file=sys.stderr)
    return status


def show(lines: Iterable[Line]) -> None:
    """Prints the lines: wrapped on a terminal, whole where a program reads them."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for front, text in lines:
        print(front.rstrip() if not text else front + text if width is None else wrapped(front, text, width))


def wrapped(front: str, text: str, width: int) -> str:
    """`front` and `text` in lines of at most `width` characters."""
    hanging = len(front) if 0 < len(front) <= width // 2 else 2
    # Paths and orders ("norm-act-drop") are to be copied, and stay whole where they fit into a line.
    return textwrap.fill(front + text, width, subsequent_indent=" " * hanging, break_on_hyphens=False)
