"""The command line: `python -m fusednorm`, or `fusednorm` where the package is installed.

A command gives an `Outcome`, plain data and lines that say the same; here it is chosen, run and printed. `info` and
`doctor` work where the library does not load, and all of it works without the packages that only make it prettier.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator

from .. import _library
from .arguments import parser
from .output import Failed, Outcome, Refused, complain, show

_NEED_NO_LIBRARY = ("info", "doctor")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that `arguments` ask for (None: those of the process); returns the exit status.

    0: it went well. 1: something is wrong with this installation, or with what was found. 2: the arguments are wrong.
    """
    commands = parser()
    asked = commands.parse_args(arguments)
    if asked.command is None:
        commands.print_help()
        return 0
    try:
        # On stdout there is nothing but the result, whatever a user's own module prints while it is imported.
        with to_stderr():
            if asked.command not in _NEED_NO_LIBRARY:
                _library.load()
            # Not before, as these need the library, and torch.
            outcome: Outcome = importlib.import_module(f".{asked.command}", __name__).run(asked)
    except Refused as error:
        return complain(asked.command, error, 2)
    except (Failed, ImportError) as error:
        return complain(asked.command, error, 1)
    except KeyboardInterrupt:
        return complain(asked.command, "interrupted", 130)
    return written(outcome, asked)


def written(outcome: Outcome, asked: argparse.Namespace) -> int:
    """Prints it; the exit status, which is another one where nobody reads on or nothing can be written."""
    try:
        if asked.json:
            print(json.dumps({"command": asked.command, **outcome.facts}))
        else:
            show(outcome.lines)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain when it flushes at its end
    except (OSError, UnicodeError) as error:
        return complain(asked.command, f"the result cannot be written: {error}", 1)
    return outcome.status


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """What is written to stdout meanwhile goes to stderr, by other programs and by libraries as well."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
