"""Intervals from independent replications, warm-up, and whether a run ever settled.

One run of a simulation is one draw. Everything said of a system rests on replications: each gives one value per metric
(a percentile too), the values are independent, and Student's t says how far their mean may lie from the truth. Where
that cannot be said (one replication, no data, the same value every time) the interval is *unavailable*, never zero.
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
    """A mean with its two-sided confidence interval. ``half_width`` None: unavailable, for the ``reason`` given.

    ``count``: replications. ``is_constant``: every replication gave the same value, so nothing that this metric depends
    on was random (or chance never showed): the value is known as far as it goes, its spread is not.
    """

    mean: float | None
    half_width: float | None
    count: int
    confidence: float = 0.95
    reason: str = ""
    is_constant: bool = False

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
    it out would favour the replications that went well. So do values that are all equal: they say nothing of a spread.

    Raises ValueError unless 0 < confidence < 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    known = [v for v in values if v is not None]
    if not known:
        return Interval(None, None, len(values), confidence, "no data")
    mean = math.fsum(known) / len(known)
    if len(known) < len(values):
        missing = len(values) - len(known)
        return Interval(mean, None, len(values), confidence, f"no data in {missing} of {len(values)} replications")
    if len(known) < 2:
        return Interval(mean, None, len(values), confidence, "one replication")
    if min(known) == max(known):
        return Interval(known[0], None, len(known), confidence, "the same every time", True)
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


def paired_difference(a: Sequence[float | None], b: Sequence[float | None], confidence: float = 0.95) -> Difference:
    """Interval of mean(a - b), replication by replication; a pair that lacks a value makes it unavailable.

    Raises ValueError for unequal lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} replications cannot be paired")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    gaps = [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
    ratio = None
    if len(pairs) == len(gaps) >= 2 and (spread := float(np.var([x - y for x, y in pairs], ddof=1))) > 0:
        ratio = float(np.var([x for x, _ in pairs], ddof=1) + np.var([y for _, y in pairs], ddof=1)) / spread
    return Difference(t_interval(gaps, confidence), ratio)


def mser5(values: Sequence[float] | Floats, batch: int = 5) -> int | None:
    """How many leading observations to leave out as warm-up: MSER-5 (White, Cobb and Spratt 2000).

    Batches of five are cut off until the marginal standard error of what remains is least; cuts up to half of the
    series are tried. None if the best of these is (nearly) the longest, or there are fewer than 20 observations: the
    series is too short to show that it settled.

    Do not cut a series by its own MSER-5 and average the rest: the rule favours cuts behind which, by chance, little
    happens, and such means of a queue are too small (by 5 to 10 % of the mean wait in docs/statistics.md). Cut by the
    MSER-5 of another, independent run.
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
    half = count // 2
    best = int(np.argmin(error[: half + 1]))
    return best * batch if best <= 0.9 * half else None


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
    most: int = 30
    relative_half_width: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.least < 2:
            raise ValueError(f"least must be at least 2 for an interval, not {self.least}")
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) must be at least least ({self.least})")
        if not 0 < self.relative_half_width < 1:
            raise ValueError(f"relative_half_width must lie between 0 and 1, not {self.relative_half_width}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, not {self.confidence}")

    @classmethod
    def exactly(cls, count: int, confidence: float = 0.95) -> StoppingRule:
        """Always ``count`` replications (2 at least), however wide the intervals are."""
        return cls(least=count, most=count, confidence=confidence)

    def is_done(
        self, samples: Mapping[str, Sequence[float | None]], sizes: Mapping[str, float | None] | None = None
    ) -> bool:
        """``samples``: values by metric, one per replication so far. A metric whose interval is unavailable cannot
        narrow and is not waited for. ``sizes``: what half-widths are compared with, where that is not the mean of the
        values (differences: the size of what differs).
        """
        count = min((len(v) for v in samples.values()), default=0)
        if count < self.least:
            return False
        return count >= self.most or self.widest(samples, sizes) <= 1.0

    def widest(
        self, samples: Mapping[str, Sequence[float | None]], sizes: Mapping[str, float | None] | None = None
    ) -> float:
        """Largest half-width of the samples, in multiples of what the rule allows; 0 if none is available."""
        return max((self._width(v, (sizes or {}).get(name)) for name, v in samples.items()), default=0.0)

    def _width(self, values: Sequence[float | None], size: float | None) -> float:
        interval = t_interval(values, self.confidence)
        if interval.half_width is None or interval.mean is None:
            return 0.0
        scale = abs(interval.mean if size is None else size)
        return interval.half_width / scale / self.relative_half_width if scale else math.inf
