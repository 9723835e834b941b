"""Bootstrap over requests, for every statistic that is a function of sums: resampling is one matrix product.

Tokens of one text depend on each other, so it is requests that are drawn again, with all their texts. A statistic is
computed from per-request sums; a resample weights those sums by how often each request was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heliosim.streams import stream

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LEVEL = 0.95
DRAWS = 400
_AT_ONCE = 1 << 22
"""Weights held at a time (32 MiB)."""


@dataclass(frozen=True)
class Estimates:
    """Values with the bounds of their percentile intervals, all of one shape; NaN where a statistic has no value."""

    value: Floats
    low: Floats
    high: Floats


def sums_by(request: Ints, requests: int, columns: npt.NDArray[np.generic]) -> Floats:
    """Sums of each column over each request. ``request`` [n], ``columns`` [k, n]; returns [requests, k]."""
    found = [np.bincount(request, weights=column, minlength=requests) for column in np.atleast_2d(columns)]
    return np.stack(found, axis=1) if found else np.zeros((requests, 0))


def counts_by(request: Ints, requests: int, cell: Ints, cells: int, weights: Floats | None = None) -> Floats:
    """How many (or how much weight) of each cell every request has, [requests, cells]."""
    flat = np.bincount(request * cells + cell, weights=weights, minlength=requests * cells)
    return flat.reshape(requests, cells).astype(np.float64)


def estimates(
    sums: Floats, statistic: Callable[[Floats], Floats], *, seed: int, name: str, draws: int = DRAWS
) -> Estimates:
    """A statistic of summed columns with its interval. ``sums`` [requests, k]; ``statistic`` maps [..., k] to [..., m].

    The draws come from the stream ("behaviour", "bootstrap", name); fewer than two requests have no interval.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.asarray(statistic(sums.sum(axis=0)), np.float64)
        if len(sums) < 2:
            return Estimates(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
        rng = stream(seed, "behaviour", "bootstrap", name)
        each, found = max(1, _AT_ONCE // len(sums)), []
        chance = np.full(len(sums), 1 / len(sums))
        for first in range(0, draws, each):
            weights = rng.multinomial(len(sums), chance, size=min(each, draws - first))
            found.append(np.asarray(statistic(weights @ sums), np.float64))
    drawn = np.concatenate(found)
    tail = (1 - LEVEL) / 2
    low, high = _quantile(drawn, tail), _quantile(drawn, 1 - tail)
    return Estimates(value, np.where(np.isnan(value), np.nan, low), np.where(np.isnan(value), np.nan, high))


def _quantile(drawn: Floats, share: float) -> Floats:
    """Quantile over the first axis, without draws that have no value."""
    if not np.isnan(drawn).any():
        return np.asarray(np.quantile(drawn, share, axis=0), np.float64)
    some = ~np.isnan(drawn).all(axis=0)
    found = np.full(drawn.shape[1:], np.nan)
    found[some] = np.nanquantile(drawn[:, some], share, axis=0)
    return found
