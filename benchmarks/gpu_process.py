"""Processes of `make gpu`: each has a log and a time limit, and may be ended early when it hangs.

Nothing outside the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu_results

GRACE = 10.0  # seconds from the interrupt to the kill
MOST_TEXT = 8 << 20  # bytes of one log
POLL = 0.2  # seconds

# Exit statuses of `run` that are not the process's own.
OUT_OF_TIME, HUNG, KILLED = 124, 125, 137


def run(command: list[str], log: Path, limit: float, overdue: Callable[[], bool] | None = None, **where) -> int:
    """Runs with its output appended to `log`. OUT_OF_TIME: it was interrupted and ended; KILLED: it did not end;
    HUNG: `overdue` said so, and it was killed."""
    with open(log, "ab") as sink:
        sink.write(f"\n$ {' '.join(command)[:2000]}\n".encode())
        sink.flush()
        child = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, **where
        )
        try:
            return _wait(child, max(1.0, limit), overdue, sink)
        finally:
            _signal(child, signal.SIGKILL)  # what it may have left behind: a test runner or a compiler has workers
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it for ever
                child.wait(timeout=GRACE)
            shorten(log)


def _wait(child: subprocess.Popen, limit: float, overdue: Callable[[], bool] | None, sink) -> int:
    end = time.monotonic() + limit
    while (remaining := end - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=remaining if overdue is None else min(POLL, remaining))
        if overdue is not None and overdue():
            # Python cannot answer an interrupt while it waits for a GPU.
            sink.write(b"\nkilled: it hung\n")
            return HUNG
    sink.write(f"\nstopped after {limit:.0f} s\n".encode())
    _signal(child, signal.SIGINT)  # pytest ends with its summary on an interrupt
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=GRACE)
        return OUT_OF_TIME
    return KILLED


def _signal(child: subprocess.Popen, sent: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, sent)


def shorten(log: Path) -> None:
    size = log.stat().st_size
    if size > MOST_TEXT:
        with open(log, "rb") as source:
            head = source.read(MOST_TEXT // 4)
            source.seek(size - MOST_TEXT // 2)
            tail = source.read()
        log.write_bytes(head + b"\n... cut here ...\n" + tail)


class Watch:
    """Says when a measuring process hangs, by its note of where it is.

    A step is one turn of one contestant, which takes moments; compiling takes longest. A row's limit is there for steps
    that follow each other without end.
    """

    START, STEP, ROW = 90.0, 40.0, 90.0  # seconds

    def __init__(self, results: Path):
        self.place = gpu_results.Place(results)
        self.place.forget()  # an earlier process's
        self.at: dict | None = None
        self.row_since = self.step_since = time.monotonic()
        self.why = ""

    def overdue(self) -> bool:
        now, at = time.monotonic(), self.place.read()
        if at is not None and at != self.at:
            if self.at is None or at["key"] != self.at["key"]:
                self.row_since = now
            self.at, self.step_since = at, now
        step = self.START if self.at is None else self.STEP
        if now - self.step_since > step:
            self.why = f"hung: no sign of life for {step:g} s"
        elif self.at is not None and now - self.row_since > self.ROW:
            self.why = f"hung: more than {self.ROW:g} s for one row"
        return bool(self.why)
