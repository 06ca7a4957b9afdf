"""The command line: `python -m fusednorm`, or `fusednorm` where the package is installed.

A command gives an `Outcome`, plain data and lines that say the same; here it is chosen, run and printed. `info` and
`doctor` work where the library does not load, and all of it works without the packages that only make it prettier.
"""

import contextlib
import importlib
import json
import sys

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
        with contextlib.redirect_stdout(sys.stderr):
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
    if asked.json:
        print(json.dumps({"command": asked.command, **outcome.facts}))
    else:
        show(outcome.lines)
    return outcome.status
