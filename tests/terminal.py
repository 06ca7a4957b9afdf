"""The command line as people run it: in a process of its own, at a terminal of some width or into a pipe."""

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import fusednorm

PACKAGE = Path(fusednorm.__file__).parent
# Of `bench`, where it is not the figures that count.
TINY = ("--seconds", "0.1", "--threads", "1")
# What pip writes for the console script, in short.
SCRIPT = "import sys\nfrom fusednorm.cli import main\nsys.exit(main())\n"


def environment(*places, **variables):
    """With the package of this process, behind `places`, and one thread unless `variables` say otherwise."""
    path = os.pathsep.join(map(str, [*places, PACKAGE.parent]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TERM": "xterm"} | variables


def words(command, *more):
    """The arguments of a command line: `command` at its blanks, and then `more` as they are."""
    return [*command.split(), *map(str, more)]


def run(command, *more, start=("-m", "fusednorm"), cwd=None, env=None):
    """The finished process, what it wrote into pipes with it."""
    command = [sys.executable, *start, *words(command, *more)]
    return subprocess.run(command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=300)


def facts_of(result):
    """(status, data) of (status, stdout, stderr), or of a process, that has nothing but one object on stdout."""
    status, out = (result.returncode, result.stdout) if hasattr(result, "returncode") else result[:2]
    assert out.count("\n") == 1, out
    return status, json.loads(out)


def written(ours):
    """What a process writes into a pseudo-terminal, as it comes, until nobody holds the other end."""
    with contextlib.suppress(OSError):  # Linux's way to say so
        while chunk := os.read(ours, 4096):
            yield chunk
    os.close(ours)


class Session:
    """What a terminal showed of a process: the exit `status`, the `lines` left at the end, all that was `written`, and
    the `widest` line that there was at any time."""

    def __init__(self, columns, command, *more, cwd=None, env=None):
        import pyte

        # Wider than the terminal that the process is told of: a line that is too long shows, and does not wrap.
        screen = pyte.Screen(3 * columns, 200)
        screen.set_mode(pyte.modes.LNM)
        stream = pyte.ByteStream(screen)
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {k: v for k, v in (env or environment()).items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
        command = [sys.executable, "-m", "fusednorm", *words(command, *more)]
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.written, self.widest = b"", 0
        for chunk in written(ours):
            self.written += chunk
            stream.feed(chunk)
            self.widest = max(self.widest, *(len(line.rstrip()) for line in screen.display))
        self.status = process.wait(timeout=60)
        self.lines = [line.rstrip() for line in screen.display]
        while self.lines and not self.lines[-1]:
            self.lines.pop()
        self.cursor_hidden = screen.cursor.hidden
