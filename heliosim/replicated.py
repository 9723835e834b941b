"""What independent replications of a scenario gave, and what may be said of it.

Values by metric, one per replication in order of index; intervals of their means; and the figures that are refused
because the system was saturated. It knows neither how a run is made nor where this is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from heliosim.metrics import SCALARS
from heliosim.stats import Difference, Interval, StoppingRule, paired_difference, t_interval
from heliosim.types import Seconds

Horizon = Literal["steady", "terminating"]
SATURATED = "saturated"
_FAMILIES_THAT_GROW = ("ttft", "e2el", "queue")
_POINTS = ("median", "p90", "p99")


@dataclass(frozen=True)
class WarmUp:
    """How many of the first requests, in order of arrival, are left out of every replication, and why so many.

    ``source``: ``mser-5`` (found in a pilot run), ``given`` (by the scenario), ``none`` (a terminating run).
    ``is_settled``: False if the pilot showed no steady state; then half of its requests are left out.
    """

    requests: int
    source: Literal["mser-5", "given", "none"]
    is_settled: bool = True


@dataclass(frozen=True)
class Replication:
    """One run in numbers. ``values``: every scalar metric of ``metrics.Summary``; ``requests``: how many counted;
    ``after_s``: arrival of the first of them; ``drift``: seconds of waiting gained per second, None if too few to say;
    ``is_saturated``: whether waiting grew without end.
    """

    index: int
    seed: int
    requests: int
    after_s: Seconds
    drift: float | None
    is_saturated: bool
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Replicated:
    """Replications 0, 1, ... of one scenario, as many as the rule asked for. ``watched``: metrics the rule looked at.

    ``profile_uncertainty``: each replication had step costs of its own, drawn from what the calibration measured.
    """

    name: str
    horizon: Horizon
    warm_up: WarmUp
    rule: StoppingRule
    watched: tuple[str, ...]
    replications: tuple[Replication, ...]
    profile_uncertainty: bool = False

    @property
    def count(self) -> int:
        return len(self.replications)

    @property
    def grows(self) -> bool:
        """Whether waiting grew from beginning to end in more than half of the replications."""
        return 2 * sum(r.is_saturated for r in self.replications) > self.count

    @property
    def is_saturated(self) -> bool:
        """Whether there is no steady state to speak of. A terminating run has its figures whatever it does."""
        return self.horizon == "steady" and self.grows

    def values(self, metric: str) -> list[float | None]:
        """One value per replication. Raises KeyError for an unknown metric."""
        if metric not in SCALARS:
            raise KeyError(metric)
        return [r.values.get(metric) for r in self.replications]

    def interval(self, metric: str) -> Interval:
        """Student-t interval of a metric's mean over replications; unavailable, with the reason, where it cannot be
        said. Of a saturated system it has no mean either if it is a figure that only tells how long the run was.

        Raises KeyError for an unknown metric.
        """
        values = self.values(metric)
        if self.is_saturated and is_refused(metric):
            return Interval(None, None, self.count, self.rule.confidence, SATURATED)
        return t_interval(values, self.rule.confidence)

    def differences(self, other: Replicated, metric: str) -> Difference:
        """This system less the other one, pair by pair, over the replications both have.

        Raises ValueError if they did not use the same random numbers, KeyError for an unknown metric.
        """
        pairs = list(zip(self.replications, other.replications, strict=False))
        if any(a.seed != b.seed for a, b in pairs):
            raise ValueError(f"{self.name} and {other.name} used different seeds")
        if (self.is_saturated or other.is_saturated) and is_refused(metric):
            return Difference(Interval(None, None, len(pairs), self.rule.confidence, SATURATED), None)
        mine, theirs = self.values(metric)[: len(pairs)], other.values(metric)[: len(pairs)]
        return paired_difference(mine, theirs, self.rule.confidence)

    @property
    def is_done(self) -> bool:
        """Whether the rule asks for no more replications. Looks at what there is in order of index, so how many were
        computed at a time makes no difference to where it stops.
        """
        if self.count < self.rule.least:
            may_stop = self.horizon == "steady" and self.rule.least < self.rule.most  # else so many were asked for
            return may_stop and 2 * sum(r.is_saturated for r in self.replications) > self.rule.least
        return self.rule.is_done(self.samples)

    @property
    def samples(self) -> dict[str, Sequence[float | None]]:
        """Values of the watched metrics that may be said."""
        known = [m for m in self.watched if not (self.is_saturated and is_refused(m))]
        return {m: self.values(m) for m in known or self.watched}


def is_refused(metric: str) -> bool:
    """Whether a saturated system has no such figure: waiting and whatever includes it, shares that depend on it, and
    all percentiles of latencies. Rates, means per step and token, and quality remain.
    """
    if metric in ("slo_attainment", "request_goodput"):
        return True
    point, _, family = metric.removesuffix("_ms").partition("_")
    if not metric.endswith("_ms"):
        return False
    return family in _FAMILIES_THAT_GROW or point in _POINTS
