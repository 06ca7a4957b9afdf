"""What a conversion did, BatchNorm by BatchNorm: printable, and plain data for JSON."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One BatchNorm of the model.

    Attributes:
        name: where it stands, as in `model.named_modules()`.
        order: the stages that it has in it now, as of :class:`fusednorm.FusedBatchNorm1d`; None: it is as it was.
        taken: where those stages stood that it took along.
        reason: why it took no more, in a sentence; None: there was no more to take.
    """

    name: str
    order: str | None
    taken: tuple[str, ...] = ()
    reason: str | None = None


class Report:
    """What :func:`fusednorm.fuse` did, or :func:`fusednorm.backend`; `print` it, or take :meth:`to_dict`."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Rows of a graph, in the place of older ones of the same names: a graph that is captured again is known."""
        rows = list(rows)
        names = {row.name for row in rows}
        self.rows = [row for row in self.rows if row.name not in names] + rows

    @property
    def fused(self) -> list[Row]:
        """Those that took something along, or are one call of ours by themselves."""
        return [row for row in self.rows if row.order is not None]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        if not self.rows:
            return "no BatchNorm in this model"
        width = max(len(row.name) for row in self.rows)
        lines = [f"{len(self.fused)} of {len(self.rows)} BatchNorms fused"]
        for row in self.rows:
            what = row.order or "left as it is"
            taken = f" with {', '.join(row.taken)}" if row.taken else ""
            reason = f": {row.reason}" if row.reason else ""
            lines.append(f"  {row.name:{width}}  {what}{taken}{reason}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.fused)} of {len(self.rows)} BatchNorms fused>"
