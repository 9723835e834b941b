"""What the tokens of decoding requests will do, laid out by decode step, for a simulated engine to read in one go.

A row is a tick (a decode step of all requests), a column a request. Columns are given out from left to right as
requests begin to decode, so the cells of some rows, read in order, are the tokens of those steps in batch order; cells
without a token hold NaN. When rows or columns run out, what is left of the running requests moves to a new table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heliosim.behaviour import Walk
from heliosim.types import RequestId

CONFIDENCES, EXIT_LAYERS, LOGPROBS, AGREES = "confidences", "exit_layers", "logprobs", "agrees"
_PRESENT = "present"
_DTYPES: dict[str, Any] = {
    CONFIDENCES: np.float64, EXIT_LAYERS: np.int64, LOGPROBS: np.float64, AGREES: np.bool_,
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Lane:
    """One request's column: ``count`` tokens of ``walk`` from ``position`` on, at ticks ``tick`` on."""

    request: RequestId
    walk: Walk
    position: int
    tick: int
    count: int
    column: int = 0


class TokenTable:
    """Lanes by column. A quantity is laid out from when it is first asked for; confidences always are."""

    def __init__(self, rows: int = 256, columns: int = 64) -> None:
        self.lanes: dict[int, Lane] = {}
        self._base = 0
        self._next = 0
        self._planes: dict[str, npt.NDArray[Any]] = {}
        self._shape = (rows, columns)
        self._planes[CONFIDENCES] = self._blank(CONFIDENCES)

    def forget_planes(self) -> None:
        """Lay out confidences alone again, until something else is asked for."""
        self._planes = {CONFIDENCES: self._planes[CONFIDENCES]}

    def enter(self, lane: Lane, now: int) -> None:
        """Give a lane the next column. ``now``: the current tick; rows before it are not read again."""
        rows, columns = self._shape
        if self._next == columns or lane.tick + lane.count - self._base > rows:
            self._remake(lane, now)
        lane.column = self._next
        self._next += 1
        self.lanes[lane.column] = lane
        for name in self._planes:
            self._write(name, lane)

    def leave(self, lane: Lane, tick: int) -> None:
        """Take a lane out whose tokens from ``tick`` on will not come."""
        del self.lanes[lane.column]
        if tick < lane.tick + lane.count:
            self._planes[CONFIDENCES][max(0, tick - self._base) : lane.tick + lane.count - self._base, lane.column] = (
                np.nan
            )
        if lane.column == self._next - 1 and tick <= lane.tick:
            self._next -= 1  # it was never read

    def read(self, tick: int, steps: int) -> TokenBlock:
        """Tokens of ``steps`` steps from ``tick`` on, made when asked for; to be read before the table changes."""
        first = next(iter(self.lanes), 0)
        return TokenBlock(self, slice(tick - self._base, tick - self._base + steps), slice(first, self._next))

    def plane(self, name: str) -> npt.NDArray[Any]:
        """One quantity of every lane, [rows, columns]."""
        if name not in self._planes:
            self._planes[name] = self._blank(name)
            for lane in self.lanes.values():
                self._write(name, lane)
        return self._planes[name]

    def requests(self, columns: slice) -> npt.NDArray[np.int64]:
        """Request of each column; -1 for a column that is free again."""
        found = np.full(columns.stop - columns.start, -1, np.int64)
        for column, lane in self.lanes.items():
            if column >= columns.start:
                found[column - columns.start] = lane.request
        return found

    def _blank(self, name: str) -> npt.NDArray[Any]:
        return np.empty(self._shape, _DTYPES[name], order="F")  # a column is filled when it is given out

    def _write(self, name: str, lane: Lane) -> None:
        values = getattr(lane.walk, name)
        start = lane.tick - self._base
        skipped = max(0, -start)  # rows that have passed and are not kept
        position, count = lane.position + skipped, lane.count - skipped
        if position + count <= len(values):
            taken = values[position : position + count]
        else:
            taken = values[np.arange(position, position + count) % len(values)]
        column = self._planes[name][:, lane.column]
        if name == CONFIDENCES:
            column.fill(np.nan)
        column[start + skipped : start + skipped + count] = taken

    def _remake(self, coming: Lane, now: int) -> None:
        """Room for a lane more: rows from ``now`` on, running lanes side by side at the left."""
        lanes = list(self.lanes.values())
        tallest = max(lane.tick + lane.count - now for lane in (*lanes, coming))
        rows, columns = self._shape
        while rows < 4 * tallest:
            rows *= 2
        while columns < 4 * (len(lanes) + 1):
            columns *= 2
        if (rows, columns) != self._shape:
            self._shape = (rows, columns)
            self._planes = {name: self._blank(name) for name in self._planes}
        self._base = now
        self.lanes = {}
        for column, lane in enumerate(lanes):
            lane.column = column
            self.lanes[column] = lane
            for name in self._planes:
                self._write(name, lane)
        self._next = len(lanes)


class TokenBlock:
    """Tokens of some steps, in order of time and within a step in batch order; arrays [tokens]."""

    def __init__(self, table: TokenTable, rows: slice, columns: slice) -> None:
        self.table, self.rows, self.columns = table, rows, columns
        self._known: dict[str, npt.NDArray[Any]] = {}

    def first(self, steps: int) -> TokenBlock:
        """The first ``steps`` steps alone."""
        return TokenBlock(self.table, slice(self.rows.start, self.rows.start + steps), self.columns)

    @property
    def _present(self) -> npt.NDArray[np.bool_]:
        known = self._known.get(_PRESENT)
        if known is None:
            confidences = self.cells(CONFIDENCES)
            known = self._known[_PRESENT] = confidences == confidences  # all but NaN
        return known

    def cells(self, name: str) -> npt.NDArray[Any]:
        """A quantity as [steps, columns], with cells that hold no token."""
        return self.table.plane(name)[self.rows, self.columns]

    @property
    def confidences(self) -> npt.NDArray[np.float64]:
        return self._read(CONFIDENCES)

    @property
    def exit_layers(self) -> npt.NDArray[np.int64]:
        return self._read(EXIT_LAYERS)

    @property
    def logprobs(self) -> npt.NDArray[np.float64]:
        return self._read(LOGPROBS)

    @property
    def requests(self) -> npt.NDArray[np.int64]:
        present = self._present
        return np.broadcast_to(self.table.requests(self.columns), present.shape)[present]

    def agrees(self) -> npt.NDArray[np.bool_]:
        return self._read(AGREES)

    def _read(self, name: str) -> npt.NDArray[Any]:
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = self.cells(name)[self._present]
        return known
