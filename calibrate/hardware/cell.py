"""Cells: one thing to measure each, and what came of it.

A cell is a kind of measurement at some coordinates (``rows=4, context=128``) of one model, or of the machine. Its key
names it in files, so a calibration that was interrupted knows what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MACHINE = ""
"""Model of cells that are of the machine alone."""
AT_LEAST = 3
"""Samples of a cell below which it counts as not measured."""

Coordinate = int | str


@dataclass(frozen=True, slots=True)
class Cell:
    """``estimate_s``: about how long measuring it takes; no part of what it is."""

    model: str
    kind: str
    at: tuple[tuple[str, Coordinate], ...] = ()
    region: str = ""
    estimate_s: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, model: str, kind: str, region: str = "", estimate_s: float = 0.0, **at: Coordinate) -> Cell:
        return cls(model, kind, tuple(sorted(at.items())), region, estimate_s)

    @property
    def key(self) -> str:
        return f"{self.model}/{self.kind}/" + ",".join(f"{name}={value}" for name, value in self.at)

    @property
    def where(self) -> dict[str, Coordinate]:
        return dict(self.at)

    def number(self, name: str) -> int:
        """A coordinate that is a whole number; 0 where the cell has none of this name."""
        return int(self.where.get(name, 0))


@dataclass(frozen=True, slots=True)
class Row:
    """What a cell gave: ``values`` in ``unit``, or none and the ``reason``.

    ``drift``: the reference cell over its usual time when this was measured. ``tries``: how often it was measured, all
    but the last rejected. ``facts``: further figures by name.
    """

    cell: Cell
    unit: str
    values: tuple[float, ...] = ()
    reason: str = ""
    drift: float = 1.0
    is_steady: bool = True
    tries: int = 1
    facts: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        return bool(self.values)

    @property
    def value(self) -> float:
        """The median."""
        return float(np.median(self.values))

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 where the median is."""
        low, middle, high = np.percentile(self.values, [25, 50, 75])
        return float((high - low) / abs(middle)) if middle else 0.0

    @property
    def noise(self) -> float:
        """Relative standard error of the median, from the spread (normal errors: IQR = 1.349 sigma)."""
        return 1.2533 * self.spread / 1.349 / float(np.sqrt(max(1, len(self.values))))

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        c = self.cell
        cell = {"model": c.model, "kind": c.kind, "at": c.where, "region": c.region}
        return {
            **cell, "unit": self.unit, "values": list(self.values), "reason": self.reason, "drift": self.drift,
            "is_steady": self.is_steady, "tries": self.tries, "facts": dict(self.facts),
        }  # fmt: skip


def row_of(plain: Mapping[str, Any]) -> Row:
    """The inverse of ``Row.plain``."""
    cell = Cell.of(plain["model"], plain["kind"], plain["region"], 0.0, **plain["at"])
    return Row(
        cell,
        plain["unit"],
        tuple(plain["values"]),
        plain["reason"],
        plain["drift"],
        plain["is_steady"],
        plain["tries"],
        plain["facts"],
    )


def of_kind(rows: Sequence[Row], kind: str, model: str | None = None) -> list[Row]:
    """Measured rows of a kind, in the order they came."""
    return [r for r in rows if r.cell.kind == kind and r.is_measured and model in (None, r.cell.model)]


def absent(cell: Cell, unit: str, reason: str) -> Row:
    """A cell that cannot be measured here, and why."""
    return Row(cell, unit, reason=reason)
