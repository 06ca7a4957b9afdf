"""What a conversion did, BatchNorm by BatchNorm: printable, and plain data for JSON."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One BatchNorm of the model; of a captured graph, which may serve several modules that are alike, one call.

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
    key: str = dataclasses.field(default="", repr=False, compare=False)  # of names that may be those of several


class Report:
    """What a conversion did; `print` it, or take :meth:`to_dict`.

    Of :func:`fusednorm.fuse`, :func:`fusednorm.backend` or :func:`fusednorm.fold`, which is `done`.
    """

    def __init__(self, rows: Iterable[Row] = (), dropouts: Iterable[str] = (), done: str = "fused") -> None:
        self.rows, self.done = list(rows), done
        self.dropouts = list(dropouts)  # names of those outside any chain that have this package's noise now

    def add(self, other: "Report") -> None:
        """What is said of a graph, in the place of what was said of the same norms: it may be captured again."""
        keys = {row.key or row.name for row in other.rows}
        self.rows = [row for row in self.rows if (row.key or row.name) not in keys] + other.rows
        self.dropouts = list(dict.fromkeys(self.dropouts + other.dropouts))

    @property
    def fused(self) -> list[Row]:
        """Those that took something along, or are one call of ours by themselves."""
        return [row for row in self.rows if row.order is not None]

    @property
    def counted(self) -> str:
        """How many, in words; what norms alone gain is little."""
        if not self.rows:
            return "no BatchNorm in this model"
        with_others = sum(bool(row.taken) for row in self.rows)
        return (
            f"{len(self.fused)} of {len(self.rows)} BatchNorms {self.done}, {with_others} with what stands beside them"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        names = "name", "order", "taken", "reason"
        rows = [{name: getattr(row, name) for name in names} for row in self.rows]
        return {"rows": rows, "dropouts": self.dropouts}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [self.counted]
        for row in self.rows:
            what = row.order or "left as it is"
            taken = f" with {', '.join(row.taken)}" if row.taken else ""
            reason = f": {row.reason}" if row.reason else ""
            lines.append(f"  {row.name:{width}}  {what}{taken}{reason}")
        if self.dropouts:
            lines.append(f"dropouts with the noise of fusednorm: {', '.join(self.dropouts)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.counted}>"
