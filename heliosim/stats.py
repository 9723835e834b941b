"""Intervals from independent replications, warm-up, and whether a run ever settled.

One run of a simulation is one draw. Everything said of a system rests on replications: each gives one value per metric
(a percentile too), the values are independent, and Student's t says how far their mean may lie from the truth. Where
that cannot be said (one replication, no data) the interval is *unavailable*, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval. ``half_width`` None: unavailable. ``count``: replications."""

    mean: float | None
    half_width: float | None
    count: int
    confidence: float = 0.95

    @property
    def low(self) -> float | None:
        return None if self.mean is None or self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.mean is None or self.half_width is None else self.mean + self.half_width

    @property
    def relative_half_width(self) -> float | None:
        """Half-width over the mean's size; None where either is unavailable or the mean is 0 but the spread is not."""
        if self.mean is None or self.half_width is None:
            return None
        if self.half_width == 0:
            return 0.0
        return self.half_width / abs(self.mean) if self.mean else None

    def holds(self, value: float) -> bool:
        """Whether a value lies inside; False where the interval is unavailable."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def t_interval(values: Sequence[float | None], confidence: float = 0.95) -> Interval:
    """Student-t interval of the mean of independent values. A missing value makes the interval unavailable: leaving
    it out would favour the replications that went well.

    Raises ValueError unless 0 < confidence < 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    known = [v for v in values if v is not None]
    if not known:
        return Interval(None, None, len(values), confidence)
    mean = math.fsum(known) / len(known)
    if len(known) < max(2, len(values)):
        return Interval(mean, None, len(values), confidence)
    variance = math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)
    quantile = t_quantile(0.5 + confidence / 2, len(known) - 1)
    return Interval(mean, quantile * math.sqrt(variance / len(known)), len(known), confidence)


def t_quantile(share: float, degrees: int) -> float:
    """The ``share`` quantile of Student's t."""
    from scipy.special import stdtrit  # far cheaper to import than scipy.stats

    return float(stdtrit(degrees, share))


@dataclass(frozen=True)
class Difference:
    """Paired difference of two systems under common random numbers.

    ``variance_ratio``: variance that independent runs would have had over that of the pairs: how many times fewer
    replications the pairing needs (above 1: pairing helped); None with fewer than two pairs or constant differences.
    """

    interval: Interval
    variance_ratio: float | None


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """Interval of mean(a - b), replication by replication. Raises ValueError for unequal lengths."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} replications cannot be paired")
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    ratio = None
    if len(gaps) >= 2 and (spread := float(np.var(gaps, ddof=1))) > 0:
        ratio = float(np.var(a, ddof=1) + np.var(b, ddof=1)) / spread
    return Difference(t_interval(gaps, confidence), ratio)


def mser5(values: Sequence[float] | Floats, batch: int = 5) -> int | None:
    """How many leading observations to leave out as warm-up: MSER-5 (White, Cobb and Spratt 2000).

    Batches of five are cut off until the remaining mean is known best, as marginal standard error tells. None if the
    best cut lies in the second half: the series is too short to show that it settled.
    """
    means = np.asarray(values, dtype=np.float64)
    count = len(means) // batch
    if count < 4:
        return None
    means = means[: count * batch].reshape(count, batch).mean(axis=1)
    means -= means.mean()  # or squares of a large offset drown the differences
    left = np.arange(count, 0, -1)
    tail_sum, tail_square = np.cumsum(means[::-1])[::-1], np.cumsum(means[::-1] ** 2)[::-1]
    error = (tail_square - tail_sum**2 / left) / left**2
    best = int(np.argmin(error[:-2]))  # the last few batches say nothing
    return best * batch if best <= count // 2 else None


def delay_drift(arrival_s: Sequence[float] | Floats, delay_s: Sequence[float] | Floats) -> float | None:
    """Seconds of waiting gained per second of arrivals, by least squares over the later half of the arrivals.

    A queue that receives rho times what it can serve gains rho - 1 for ever; a stable one has no trend. None for
    fewer than 20 requests or arrivals that are all at once.
    """
    if len(arrival_s) < 20:
        return None
    order = np.argsort(np.asarray(arrival_s, dtype=np.float64), kind="stable")
    at, delay = np.asarray(arrival_s, dtype=np.float64)[order], np.asarray(delay_s, dtype=np.float64)[order]
    at, delay = at[len(at) // 2 :], delay[len(delay) // 2 :]
    spread = float(np.var(at))
    if spread == 0:
        return None
    return float(np.mean((at - at.mean()) * (delay - delay.mean()))) / spread


def is_saturated(
    arrival_s: Sequence[float] | Floats, delay_s: Sequence[float] | Floats, largest_drift: float = 0.02
) -> bool:
    """Whether waiting grew without end: by more than ``largest_drift`` per second, and in each quarter more than in the
    one before. Percentiles of such a run only tell how long it lasted.
    """
    drift = delay_drift(arrival_s, delay_s)
    if drift is None or drift <= largest_drift:
        return False
    order = np.argsort(np.asarray(arrival_s, dtype=np.float64), kind="stable")
    quarters = [float(q.mean()) for q in np.array_split(np.asarray(delay_s, dtype=np.float64)[order], 4)]
    return all(later > earlier for earlier, later in pairwise(quarters))


@dataclass(frozen=True)
class StoppingRule:
    """When enough replications were run: each watched metric's interval is narrow enough, or ``most`` is reached.

    ``relative_half_width``: target for half-width over mean. Checked from ``least`` replications on.
    """

    least: int = 5
    most: int = 50
    relative_half_width: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.least < 2:
            raise ValueError(f"least must be at least 2 for an interval, not {self.least}")
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) must be at least least ({self.least})")
        if not 0 < self.relative_half_width < 1:
            raise ValueError(f"relative_half_width must lie between 0 and 1, not {self.relative_half_width}")

    def is_done(self, samples: Mapping[str, Sequence[float | None]]) -> bool:
        """``samples``: values by metric, one per replication so far. A metric that lacks a value cannot narrow and
        is not waited for.
        """
        count = min((len(v) for v in samples.values()), default=0)
        if count < self.least:
            return False
        if count >= self.most:
            return True
        return all(self._is_narrow(values) for values in samples.values())

    def _is_narrow(self, values: Sequence[float | None]) -> bool:
        interval = t_interval(values, self.confidence)
        if interval.half_width is None:
            return True
        relative = interval.relative_half_width
        return relative is not None and relative <= self.relative_half_width
