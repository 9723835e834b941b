"""Tables of operator times: strict reading, and the one form that all sources are brought into. Seconds throughout."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from heliosim.errors import InputError
from heliosim.types import Seconds

Points = tuple[tuple[float, Seconds], ...]


class AttentionTime(NamedTuple):
    """One layer's attention over a prompt chunk of ``chunk`` tokens behind ``before`` others (0: no chunk), and
    ``rows`` decode rows that hold ``context`` tokens each.
    """

    chunk: float
    before: float
    rows: float
    context: float
    seconds: Seconds


@dataclass(frozen=True)
class OperatorTables:
    """What one model's operators take on one GPU.

    ``layer``: one layer without its attention, by tokens; ``head``: output head and sampler, by rows; ``once``: what a
    step does once, embedding and final norm, by tokens. ``source`` and ``licence`` as they are to be named.
    """

    layer: Points
    head: Points
    once: Points
    attention: tuple[AttentionTime, ...]
    source: str
    licence: str
    assumptions: tuple[str, ...] = ()
    """What stands in for what the tables lack, in words."""


class Rows:
    """A CSV file and the columns one wants of it. Errors name file, row (the header is 1), column, value and remedy."""

    remedy = "Export the table again, or leave the row out."

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(str(path.parent), path.name, "the file is missing", "Give the folder that holds it.")
        self.rows = self._read()
        if not self.rows:
            raise InputError(str(path), path.name, "has no rows", self.remedy)
        for column in columns:
            if column not in self.rows[0]:
                known = ", ".join(str(name) for name in self.rows[0])
                raise InputError(f"{path}, header", column, "column is missing", f"It has: {known}.")

    def _read(self) -> list[dict[str, Any]]:
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(str(self.path), self.path.name, f"is no readable CSV file: {error}", self.remedy) from None

    def where(self, row: int, column: str) -> str:
        """A cell, in words."""
        return f"{self.path}, row {row + 2}, {column}"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.rows[0])

    def text(self, row: int, column: str) -> str:
        value = self.rows[row][column]
        if not value:
            raise InputError(self.where(row, column), value, "is empty", self.remedy)
        return str(value)

    def number(self, row: int, column: str, least: float = 0.0) -> float:
        """A finite number of at least ``least``; times must be positive, which ``least`` cannot say (``seconds``)."""
        raw = self.rows[row][column]
        try:
            value = float(raw)
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            raise InputError(self.where(row, column), raw, f"must be a number of {least:g} or more", self.remedy)
        return value

    def seconds(self, row: int, column: str, unit: Seconds) -> Seconds:
        """A positive time, in seconds. ``unit``: seconds per unit of the column."""
        value = self.number(row, column)
        if value <= 0:
            raise InputError(self.where(row, column), self.rows[row][column], "a time must be positive", self.remedy)
        return value * unit

    def __len__(self) -> int:
        return len(self.rows)


class ParquetRows(Rows):
    """The same of a Parquet file, whose rows count from 0."""

    def _read(self) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows: list[dict[str, Any]] = pq.read_table(self.path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            said = str(error).splitlines()[0]
            raise InputError(
                str(self.path), self.path.name, f"is no readable Parquet file: {said}", self.remedy
            ) from None
        return rows

    def where(self, row: int, column: str) -> str:
        return f"{self.path}, row {row} (the first is 0), {column}"


def summed(times: Mapping[str, Mapping[float, Seconds]], names: Mapping[str, float], where: str) -> Points:
    """Times of several operators added up, each as often as ``names`` says, at the counts that all of them have.

    Raises InputError for an operator that is missing, or if they have fewer than two counts in common.
    """
    for name in names:
        if name not in times:
            raise InputError(where, name, "operator is missing", f"It has: {', '.join(sorted(times))}.")
    counts = sorted(set.intersection(*(set(times[name]) for name in names)))
    if len(counts) < 2:
        raise InputError(where, ", ".join(names), "have fewer than two counts in common", "Profile them on one grid.")
    return tuple((count, sum(often * times[name][count] for name, often in names.items())) for count in counts)


def rising_at_the_end(points: Points) -> Points:
    """Without last points that lie below the one before them, as measured times may: a curve goes on behind its end."""
    while len(points) > 2 and points[-1][1] < points[-2][1]:
        points = points[:-1]
    return points


def thinned(points: Sequence[tuple[float, Seconds]], error: float = 0.002) -> Points:
    """The fewest first points between which straight lines miss no other by more than ``error`` (a share)."""
    kept = [points[0]]
    start = 0
    while start < len(points) - 1:
        end = start + 1
        while end + 1 < len(points) and _is_straight(points[start : end + 2], error):
            end += 1
        kept.append(points[end])
        start = end
    return tuple(kept)


def _is_straight(points: Sequence[tuple[float, Seconds]], error: float) -> bool:
    (x0, y0), (x1, y1) = points[0], points[-1]
    return all(abs(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - y) <= error * y for x, y in points[1:-1])
