"""Which layer cell to measure next, and when a region needs no more.

Every cell is predicted by a fit of the cells before it, then measured: an honest hold-out error for nothing. A region
ends when its last cells were all predicted within their noise, or when its error no longer falls; the next cell is
always one of the region that is predicted worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .cell import Cell, Row
from .fit import fit_layer, predict

FIRST = 4
"""Cells of every region that are measured whatever they say."""
LAST = 3
"""Cells that are looked at to see whether the error still falls."""
GOOD = 0.03
"""Relative error below which nothing needs to improve."""


class Chooser:
    """``waiting``: cells by region, in order. ``errors``: by region, of the cells predicted so far."""

    def __init__(self, cells: Mapping[str, Sequence[Cell]]) -> None:
        self.waiting = {region: list(some) for region, some in cells.items()}
        self.rows: list[Row] = []
        self.errors: dict[str, list[float]] = {region: [] for region in cells}
        self.seen: dict[str, int] = dict.fromkeys(cells, 0)
        self.ended: dict[str, str] = {}

    def next(self) -> Cell | None:
        """The most informative cell; None: every region has ended."""
        open_regions = [r for r, cells in self.waiting.items() if cells and r not in self.ended]
        if not open_regions:
            return None
        young = [r for r in open_regions if self.seen[r] < FIRST]
        if young:  # handed out, perhaps not yet measured
            region = min(young, key=lambda r: self.seen[r])
        else:
            region = max(open_regions, key=lambda r: float(np.mean(self.errors[r][-LAST:] or [1.0])))
        self.seen[region] += 1
        return self.waiting[region].pop(0)

    def learn(self, cell: Cell, row: Row) -> None:
        """What a cell gave; also of one measured by an earlier call."""
        region = cell.region
        if cell in self.waiting.get(region, ()):
            self.waiting[region].remove(cell)
            self.seen[region] += 1
        if not row.is_measured or row.value <= 0:
            return
        if len(self.rows) >= FIRST:
            said = predict(fit_layer(self.rows), row)
            self.errors.setdefault(region, []).append(abs(said / row.value - 1.0))
        self.rows.append(row)
        self._end(region, row)

    def _end(self, region: str, row: Row) -> None:
        errors = self.errors[region]
        if self.seen[region] < FIRST or len(errors) < LAST:
            return
        last = errors[-LAST:]
        if max(last) <= max(GOOD, 2 * row.noise):
            self.ended[region] = "predicted within its noise"
        elif len(errors) >= 2 * LAST and np.mean(last) >= 0.95 * np.mean(errors[-2 * LAST : -LAST]):
            self.ended[region] = "its error no longer falls"

    @property
    def saved(self) -> int:
        """Cells that need not be measured because their regions ended."""
        return sum(len(self.waiting[region]) for region in self.ended)
