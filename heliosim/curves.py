"""Piecewise-linear curves of time against a count: what a matrix product costs as the rows it is given grow.

Between its points a curve is a straight line, before the first it is level, and behind the last it goes on as steeply
as its last piece (which is extrapolation: who asks knows where the points end).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from heliosim.types import Seconds

Point = tuple[float, Seconds]


@dataclass(frozen=True, slots=True)
class Curve:
    """``counts`` ascending, ``seconds`` at each, ``slopes`` (seconds per count) of the piece behind each."""

    counts: tuple[float, ...]
    seconds: tuple[Seconds, ...]
    slopes: tuple[Seconds, ...]

    @staticmethod
    def of(points: Sequence[Sequence[float]]) -> Curve:
        """Raises ValueError for fewer than two points, counts that do not ascend, negative seconds or a last piece
        that falls.
        """
        if len(points) < 2:
            raise ValueError("a curve needs two points or more")
        counts = tuple(float(p[0]) for p in points)
        seconds = tuple(float(p[1]) for p in points)
        if counts[0] < 0 or any(a >= b for a, b in pairwise(counts)):
            raise ValueError("the counts of a curve must ascend from 0 or more")
        if min(seconds) < 0:
            raise ValueError("the seconds of a curve must not be negative")
        slopes = [(d - c) / (b - a) for (a, c), (b, d) in pairwise(zip(counts, seconds, strict=True))]
        if slopes[-1] < 0:
            raise ValueError("the last piece of a curve must not fall, for it goes on behind its last point")
        return Curve(counts, seconds, (*slopes, slopes[-1]))

    def at(self, count: float) -> Seconds:
        k = bisect_right(self.counts, count) - 1
        if k < 0:
            return self.seconds[0]
        return self.seconds[k] + self.slopes[k] * (count - self.counts[k])

    @property
    def last(self) -> float:
        """The count of its last point."""
        return self.counts[-1]

    def line_below(self, most: float, count: float) -> tuple[Seconds, Seconds]:
        """(a, b) of a line a + b x that is nowhere above the curve from 0 to ``most``, with a, b >= 0: an edge of the
        lower convex hull, the one above ``count``, or a line through the origin where that edge would start below it.
        """
        known = [(c, s) for c, s in zip(self.counts, self.seconds, strict=True) if 0 < c < most]
        points = [(0.0, self.at(0.0)), *known, (most, self.at(most))]
        hull: list[tuple[float, Seconds]] = []
        for x, y in points:
            while len(hull) > 1 and _is_above(hull[-2], hull[-1], (x, y)):
                hull.pop()
            hull.append((x, y))
        (x0, y0), (x1, y1) = next(edge for edge in pairwise(hull) if count <= edge[1][0] or edge[1] == hull[-1])
        slope = (y1 - y0) / (x1 - x0)
        if slope < 0:
            return min(y for _, y in points), 0.0
        if y0 - slope * x0 < 0:
            return 0.0, min(y / x for x, y in points if x > 0)
        return y0 - slope * x0, slope


def _is_above(a: Point, b: Point, c: Point) -> bool:
    """Whether ``b`` is on or above the line from ``a`` to ``c``."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
