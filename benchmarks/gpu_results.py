"""What a run on a GPU leaves behind: the results file, and a note of where the measuring process is.

The file is rewritten whole after every change, and the note before every step, so that a process that is killed loses
only the step it was at, and the one that watches it can say which. Nothing outside the standard library is imported:
the watching process has no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

# Exit statuses of the measuring process beside 0. Python itself ends with 1 on an error that nobody caught.
LOST = 3  # the GPU's context: nothing more can be measured in that process, and the row says why
ROWS_FAILED = 4

PARTS = ("rows", "small")
GIVEN_UP = 2  # times that the process ended at a contestant, or a step, in one layout: it is not tried again there
MODES = ("forward", "backward", "both")
# A contestant that fails in one of these is out of its row. One that fails in another (profile, memory) lacks only
# what that would have told.
ESSENTIAL = ("setup", *MODES)


def rewrite(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text)
    os.replace(new, path)


class Place:
    """Row, contestant (if any) and step that the measuring process is at. A count tells a step from its repetition."""

    def __init__(self, results: Path):
        self.path, self.count = results.with_suffix(".at"), 0

    def write(self, key: str, who: str, step: str) -> None:
        self.count += 1
        rewrite(self.path, json.dumps({"key": key, "who": who, "step": step, "count": self.count}))

    def read(self) -> dict | None:
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


class Results:
    """A row is `running` until it is measured or has `failed`. `errors` has by contestant and step what it raised or
    how it ended; `ended` has who or what is to blame each time that the process ended (`blamed`)."""

    def __init__(self, path: Path):
        self.path = path
        self.data = (
            json.loads(path.read_text()) if path.exists() else {"machine": {}, "copy": {}, "rows": [], "small": []}
        )

    def write(self) -> None:
        rewrite(self.path, json.dumps(self.data, indent=1) + "\n")

    def find(self, part: str, key: str) -> dict | None:
        return next((row for row in self.data[part] if row["key"] == key), None)

    def done(self, part: str, key: str) -> bool:
        row = self.find(part, key)
        return row is not None and "running" not in row

    def given_up(self, layout: str) -> set[str]:
        """What is known to end the process: each time costs a new one, or the wait for one that hangs."""
        ended = [name for row in self.data["rows"] if row["layout"] == layout for name in row["ended"]]
        return {name for name in ended if ended.count(name) >= GIVEN_UP}

    def run(self, part: str, start: dict, work: Callable[[dict], None]) -> dict:
        """Lets `work` fill a row: a new one, or the one that a process left unfinished."""
        row = self.find(part, start["key"])
        if row is None:
            row = start | {"errors": {}, "ended": [], "running": True}
            self.data[part].append(row)
        self.write()
        try:
            work(row)
        except KeyboardInterrupt:  # out of time, which says nothing about the row: what it has stays
            if not row.get("modes"):
                self.data[part].remove(row)
            self.write()
            raise
        except Lost:
            self.write()
            raise
        except Exception as error:
            row["failed"] = told(error)
        del row["running"]
        self.write()
        return row


class Lost(Exception):
    """The process cannot use the GPU any more; the row stays unfinished for the next one."""


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def blamed(who: str, step: str) -> str:
    """A contestant; but the step itself where all contestants do the same with other tools than their own."""
    return who if step in ESSENTIAL else step


def ended(path: Path, why: str, hung: bool) -> str | None:
    """Writes down that the measuring process died, or was killed because it hung, and says where. A death costs the
    contestant that was at work, and the row goes on without it; to hang costs the row. None: no row was under way.
    """
    place = Place(path).read()
    if place is None:
        return None
    results, who, step = Results(path), place["who"], place["step"]
    part, row = next(((part, row) for part in PARTS if (row := results.find(part, place["key"]))), (None, None))
    if row is None or "running" not in row:
        return None
    where = f"{why} at {step} of {who or 'the row'}"
    errors = row["errors"].setdefault(who, {}) if who else {step: why}
    if step not in errors:  # else it said why before it fell
        errors[step] = why
        row["ended"].append(blamed(who, step))
    if hung or not who or part == "small":
        row["failed"] = where
        del row["running"]
    results.write()
    return f"{row['key']}: {where}"
