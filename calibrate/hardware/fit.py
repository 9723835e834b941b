"""The physical form of a layer's time, and how far it is off on cells that it never saw.

    layer = launch + dense(tokens) + decode * (launch + a * rows + c * rows * context)
            + prefill * (launch + c' * products)

``dense`` is convex and piecewise linear in tokens: flat while weights are read, rising where arithmetic is the limit.
Attention is linear in the KV it reads, not in logarithms. Coefficients are non-negative least squares of relative
errors (``heliosim.fitting``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heliosim.fitting import relative_nnls

from .cell import Row
from .passes import shape_of

Array = npt.NDArray[np.float64]
BENDS = (1, 16, 64, 256, 1024)
"""Tokens at which a matrix product's time may begin to rise more steeply."""
TERMS = (
    "launch", *(f"token_beyond_{n}" for n in BENDS), "decode", "decode_many", "decode_row", "decode_kv",
    "decode_many_kv", "chunk", "chunk_product",
)  # fmt: skip
FOLDS = 5


@dataclass(frozen=True)
class Score:
    """Relative errors on cells that were kept out. ``noise``: median standard error of those cells' own medians."""

    cells: int
    median_abs: float
    p90_abs: float
    noise: float


def terms_of(row: Row) -> tuple[float, ...]:
    """Values of ``TERMS`` for a layer cell."""
    s = shape_of(row.cell)
    bends = tuple(float(max(0, s.tokens - n)) for n in BENDS)
    is_decoding, end = float(s.decode > 0), s.prefix + s.count
    decode = (is_decoding, float(s.decode > 1), float(s.decode), float(s.decode * s.context))
    many_kv = float((s.decode > 1) * s.decode * s.context)
    return (1.0, *bends, *decode, many_kv, float(s.count > 0), float(s.count * end))


def fit_layer(rows: Sequence[Row]) -> Array:
    """Seconds per term."""
    x = np.array([terms_of(r) for r in rows])
    y = np.maximum([r.value for r in rows], 1e-9)
    return relative_nnls(x, y)


def predict(coefficients: Array, row: Row) -> float:
    return float(np.array(terms_of(row)) @ coefficients)


def usable(rows: Sequence[Row]) -> list[Row]:
    """Rows whose median is a time."""
    return [r for r in rows if r.is_measured and r.value > 0]


def held_out(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Rows inside the measured range with what a fit predicts that did not see them, nor another fifth of their region.

    Corners of a kind's grid are always fitted: beyond them nothing is predicted anyway.
    """
    corners = _corners(rows)
    place: dict[str, int] = {}
    fold: list[int | None] = []
    for r in rows:
        region = r.cell.region
        fold.append(None if r.cell.key in corners else place.setdefault(region, 0) % FOLDS)
        place[region] = place.get(region, 0) + 1
    found = []
    for k in range(FOLDS):
        train = [r for r, f in zip(rows, fold, strict=True) if f != k]
        tested = [r for r, f in zip(rows, fold, strict=True) if f == k]
        if len(train) >= 2 and tested:
            coefficients = fit_layer(train)
            found += [(r, predict(coefficients, r)) for r in tested]
    return found


def _corners(rows: Sequence[Row]) -> set[str]:
    """Keys of the cells at an end of every coordinate of their kind."""
    found = set()
    for kind in {r.cell.kind for r in rows}:
        cells = [r.cell for r in rows if r.cell.kind == kind]
        names = [name for name, _ in cells[0].at]
        ends = {name: {min(c.number(name) for c in cells), max(c.number(name) for c in cells)} for name in names}
        found |= {c.key for c in cells if all(c.number(name) in ends[name] for name in names)}
    return found


def scores(pairs: Sequence[tuple[Row, float]]) -> dict[str, Score]:
    """By region, and ``all``."""
    groups: dict[str, list[tuple[Row, float]]] = {"all": list(pairs)}
    for row, said in pairs:
        groups.setdefault(row.cell.region, []).append((row, said))
    return {region: _score(group) for region, group in groups.items() if group}


def _score(group: Sequence[tuple[Row, float]]) -> Score:
    errors = np.abs([said / row.value - 1.0 for row, said in group])
    noise = float(np.median([row.noise for row, _ in group]))
    return Score(len(group), float(np.median(errors)), float(np.percentile(errors, 90)), noise)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Non-negative intercept and slope through (count, seconds), by relative least squares."""
    x = np.array([(1.0, n) for n, _ in points])
    y = np.maximum([s for _, s in points], 1e-12)
    a, b = relative_nnls(x, y) if len(points) > 1 else (float(y[0]), 0.0)
    return float(a), float(b)


def named(coefficients: Array) -> Mapping[str, float]:
    return {name: float(c) for name, c in zip(TERMS, coefficients, strict=True)}
