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
import threading
import time

STEP = re.compile(r"\[(\d+/\d+)\] (.*)")
SOURCE = re.compile(r"\S+\.(?:cpp|cu)\b")
OWN = "fusednorm: "  # setup.py's decisions
CLEAR = "\r\x1b[2K"


class Screen:
    """Where progress goes. In a terminal `status` is one line with the seconds so far, which tick; `line` stays."""

    def __init__(self, stream):
        self.stream, self.terminal = stream, stream.isatty()
        self.start, self.text = time.monotonic(), ""
        self.lock, self.closed = threading.Lock(), threading.Event()
        if self.terminal:
            threading.Thread(target=self.tick, daemon=True).start()

    def tick(self):
        while not self.closed.wait(1):
            self.draw()

    def draw(self):
        with self.lock:
            width = shutil.get_terminal_size().columns - 1
            text = f"    {self.text} ({time.monotonic() - self.start:.0f} s)"[:width] if self.text else ""
            self.stream.write(CLEAR + text)
            self.stream.flush()

    def status(self, text):
        self.text = text
        if self.terminal:
            self.draw()

    def step(self, text):
        self.status(text)
        if not self.terminal:
            print("    " + text, file=self.stream, flush=True)

    def line(self, text):
        self.status("")
        print(text, file=self.stream, flush=True)

    def close(self):
        self.status("")
        self.closed.set()


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
        if progress:
            screen.step(progress)
        else:
            said.append(line)
            screen.status(line)
    screen.close()
    status = process.wait()
    if status:
        screen.line("\n".join([*said, f"==> Failed with status {status}: {' '.join(command)}"]))
    return status if status >= 0 else 128 - status


def main():
    command = sys.argv[1:]
    if not command or not shutil.which(command[0]):
        print(f"{command[0]}: there is no such program" if command else __doc__.splitlines()[0], file=sys.stderr)
        return 127
    if os.environ.get("V") not in (None, "", "0"):
        os.execvp(command[0], command)
    try:
        return run(command, Screen(sys.stdout))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
