"""A row's contestants, each at its own risk: who is at work is noted before each step, and an error costs the
contestant that raised it, not the row. Where it took the GPU's context along, the row goes on in the next process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from benchmarks.gpu_clock import Clock
from benchmarks.gpu_results import ESSENTIAL, Lost, Place, Results, blamed, told


class Attempts:
    def __init__(self, clock: Clock, results: Results, place: Place, row: dict):
        self.clock, self.results, self.place, self.row = clock, results, place, row
        self.given_up = results.given_up(row["layout"])
        place.write(row["key"], "", "beginning")

    def out(self, who: str, step: str) -> bool:
        """Whether it has failed, in this step or before, or is not tried again."""
        steps = self.row["errors"].get(who, {})
        if step in steps or any(essential in steps for essential in ESSENTIAL):
            return True
        blame = next((name for name in (who, step) if name in self.given_up), None)
        if blame is not None:
            why = f"left out: twice in this layout the process ended at {blame}"
            self.row["errors"].setdefault(who, {})[step] = why
        return blame is not None

    @contextlib.contextmanager
    def attempt(self, who: str, step: str) -> Iterator[None]:
        self.place.write(self.row["key"], who, step)
        error = None
        try:
            yield
        except Exception as raised:
            error = told(raised)
        # Behind the handler, which would keep alive what the failed call held.
        if error is not None:
            self._failed(who, step, error)

    def _failed(self, who: str, step: str, error: str) -> None:
        self.row["errors"].setdefault(who, {})[step] = error
        lost = not self.clock.recover()
        if lost:
            self.row["ended"].append(blamed(who, step))
        self.results.write()
        if lost:
            raise Lost(f"{step} of {who}: {error}")
