"""The search for the smallest fleet and the highest rate, and what makes a verdict. Pure: it asks a callable, whatever
answers it.

A verdict is *meets*, *misses* or *undecided*: an interval over replications either clears a limit or straddles it.
The search takes for granted that more replicas, and a lower rate, never turn *meets* into *misses*. It asks once on the
safe side of its answer whether that holds, and if not, trusts it no longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from heliosim.stats import Interval, t_interval

Verdict = Literal["meets", "misses", "undecided"]
Sense = Literal["most", "least"]


@dataclass(frozen=True)
class Limit:
    """A bound on one metric: ``most`` or ``least`` it may be."""

    metric: str
    sense: Sense
    bound: float


@dataclass(frozen=True)
class Margin:
    """How one limit stands: the interval of the metric over replications beside its bound."""

    limit: Limit
    interval: Interval
    verdict: Verdict

    @property
    def slack(self) -> float | None:
        """How far the mean stays within the bound, relative to the bound; negative: beyond it."""
        if self.interval.mean is None or not self.limit.bound:
            return None
        gap = (self.limit.bound - self.interval.mean) / abs(self.limit.bound)
        return gap if self.limit.sense == "most" else -gap


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on. ``reason``: in words, the limit that decided it. ``replications``: how many."""

    verdict: Verdict
    reason: str
    margins: tuple[Margin, ...] = ()
    replications: int = 0
    figures: Mapping[str, Interval] = field(default_factory=dict)


def compare(limit: Limit, values: Sequence[float | None], confidence: float) -> Margin:
    """Whether the mean over replications keeps a bound, as far as Student's t can tell.

    Without an interval (one value, or a missing one) it is undecided. "0 at most" is broken by any value above. A
    metric that is the same in every replication (a share of 1, no refusals) has no spread and is compared as it is.
    """
    interval = t_interval(values, confidence)
    if len(values) > 1 and interval.mean is not None and len(set(values)) == 1:
        is_kept = interval.mean <= limit.bound if limit.sense == "most" else interval.mean >= limit.bound
        return Margin(limit, interval, "meets" if is_kept else "misses")
    if limit.sense == "most" and limit.bound == 0 and interval.mean is not None:
        return Margin(limit, interval, "meets" if interval.mean == 0 else "misses")
    low, high = interval.low, interval.high
    if low is None or high is None:
        return Margin(limit, interval, "undecided")
    keeps, breaks = high <= limit.bound, low > limit.bound
    if limit.sense == "least":
        keeps, breaks = low >= limit.bound, high < limit.bound
    return Margin(limit, interval, "meets" if keeps else "misses" if breaks else "undecided")


def overall(margins: Sequence[Margin]) -> Verdict:
    """One broken limit is enough to miss; all must be kept to meet."""
    verdicts = {m.verdict for m in margins}
    if "misses" in verdicts:
        return "misses"
    return "undecided" if "undecided" in verdicts else "meets"


def deciding(margins: Sequence[Margin]) -> Margin | None:
    """The limit that says most about a verdict: of those with the overall verdict, the one with the least slack; for
    *meets*, of times before anything else (a share near 1 never has much slack).
    """
    verdict = overall(margins)
    those = [m for m in margins if m.verdict == verdict]
    times = [m for m in those if m.limit.metric.endswith("_ms")] if verdict == "meets" else []
    return min(times or those, key=lambda m: math.inf if m.slack is None else m.slack, default=None)


# --- how many -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capacity:
    """What a search over counts found. ``count``: the smallest shown to meet; None: none up to ``high``.

    ``verdicts``: of every count asked. ``is_monotone``: whether no larger count missed where a smaller one met, the
    next larger one among them; if it is False every smaller count was asked.
    """

    count: int | None
    verdicts: Mapping[int, Verdict]
    is_monotone: bool

    @property
    def verdict(self) -> Verdict:
        """*meets* if a count does; *undecided* if none does and one is not known to miss."""
        if self.count is not None:
            return "meets"
        return "undecided" if "undecided" in self.verdicts.values() else "misses"


def find_capacity(judge: Callable[[int], Verdict], low: int, high: int) -> Capacity:
    """The smallest count in ``low`` to ``high`` that meets: doubling steps up from ``low``, then bisection.

    ``low`` must be a lower bound on the answer: counts below are not asked. Raises ValueError unless 1 <= low <= high.
    """
    if not 1 <= low <= high:
        raise ValueError(f"need 1 <= low <= high, not {low} and {high}")
    seen: dict[int, Verdict] = {}

    def meets(count: int) -> bool:
        if count not in seen:
            seen[count] = judge(count)
        return seen[count] == "meets"

    failed, good, step = low - 1, low, 1
    while not meets(good):
        failed = good
        if good == high:
            return Capacity(None, dict(sorted(seen.items())), _is_monotone(seen))
        good, step = min(high, good + step), 2 * step
    while good - failed > 1:
        middle = (good + failed) // 2
        if meets(middle):
            good = middle
        else:
            failed = middle
    if good < high:
        meets(good + 1)
    monotone = _is_monotone(seen)
    if not monotone:
        good = next(count for count in range(low, good + 1) if meets(count))
    return Capacity(good, dict(sorted(seen.items())), monotone)


def _is_monotone(seen: Mapping[int, Verdict] | Mapping[float, Verdict]) -> bool:
    met = min((k for k, v in seen.items() if v == "meets"), default=None)
    return met is None or not any(v == "misses" and k > met for k, v in seen.items())


CHECK = 0.9
"""Below a rate that meets, this much slower must meet too: asked once."""


# --- how fast -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """What a search over rates found. ``sustained``: the highest factor shown to meet, None if none was;
    ``failed``: the lowest above it that does not, None if every one met. ``verdicts``: of every factor asked.
    """

    sustained: float | None
    failed: float | None
    verdicts: Mapping[float, Verdict]
    is_monotone: bool


def find_rate(
    judge: Callable[[float], Verdict], *, tolerance: float = 0.02, least: float = 1 / 64, most: float = 64.0
) -> Rate:
    """The highest factor on a load that still meets, bracketed to ``tolerance`` (relative): doubling or halving from 1,
    then bisection of the logarithm.

    Looks between ``least`` and ``most``. Raises ValueError unless 0 < tolerance < 1 and least <= 1 <= most.
    """
    if not (0 < tolerance < 1 and 0 < least <= 1 <= most):
        raise ValueError(f"need 0 < tolerance < 1 and 0 < least <= 1 <= most, not {tolerance}, {least}, {most}")
    seen: dict[float, Verdict] = {}

    def meets(factor: float) -> bool:
        if factor not in seen:
            seen[factor] = judge(factor)
        return seen[factor] == "meets"

    good, bad = (1.0, None) if meets(1.0) else (None, 1.0)
    while good is not None and bad is None and good < most:
        further = min(most, 2 * good)
        good, bad = (further, None) if meets(further) else (good, further)
    while good is None and bad is not None and bad > least:
        nearer = max(least, bad / 2)
        good, bad = (nearer, bad) if meets(nearer) else (None, nearer)
    while good is not None and bad is not None and bad / good > 1 + tolerance:
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if meets(middle) else (good, middle)
    if good is not None and good * CHECK >= least:
        meets(good * CHECK)
    return Rate(good, bad, dict(sorted(seen.items())), _is_monotone({-k: v for k, v in seen.items()}))
