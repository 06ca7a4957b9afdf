"""Runs a command and shows what matters of it: `python tools/quiet.py COMMAND ...`; with V=1 in the environment, all.

Of ninja's lines the progress and the file, of setup.py's its own words. In a terminal the latest step is one line that
is rewritten; elsewhere each of ninja's steps is a line, and other programs' lines are none. A command that fails ends
with all that it said. For the Makefile, and before anything is installed: the standard library alone.
"""

import os
import re
import shutil
import subprocess
import sys
import time

STEP = re.compile(r"\[(\d+/\d+)\] (.*)")
SOURCE = re.compile(r"\S+\.(?:cpp|cu)\b")
OWN = "fusednorm: "  # setup.py's decisions
EVERY = 0.1  # seconds between two pictures of the same line


class Screen:
    """Where progress goes; `status` is forgotten as soon as there is more to say, `line` stays."""

    def __init__(self, stream):
        self.stream, self.terminal = stream, stream.isatty()
        self.start = self.drawn = time.monotonic()

    def status(self, text, force=False):
        now = time.monotonic()
        if self.terminal and (force or now - self.drawn > EVERY):
            self.drawn = now
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r\x1b[2K" + f"    {text} ({now - self.start:.0f} s)"[:width])
            self.stream.flush()

    def line(self, text):
        self.clear()
        print(text, file=self.stream, flush=True)

    def clear(self):
        if self.terminal:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()


def step(line):
    """ninja's progress with the source instead of the compiler's command, or None for another line."""
    found = STEP.match(line)
    if not found:
        return None
    source = SOURCE.findall(found[2])  # the last one: the .d and .o files before it are named after it
    return f"[{found[1]}] " + (os.path.relpath(source[-1]) if source else found[2].split()[0])


def run(command, screen):
    """The command's exit status."""
    env = os.environ | {"NINJA_STATUS": "[%f/%t] ", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    )
    said = []
    for line in process.stdout:
        line = line.rstrip()
        if line.startswith(OWN):
            screen.line(line)
            continue
        progress = step(line)
        if progress and screen.terminal:
            screen.status(progress, force=True)
        elif progress:
            screen.line("    " + progress)
        else:
            said.append(line)
            screen.status(line)
    screen.clear()
    status = process.wait()
    if status:
        screen.line("\n".join([*said, f"==> Failed with status {status}: {' '.join(command)}"]))
    return status if status >= 0 else 128 - status


def main():
    command = sys.argv[1:]
    if os.environ.get("V") not in (None, "", "0"):
        os.execvp(command[0], command)
    try:
        return run(command, Screen(sys.stdout))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
