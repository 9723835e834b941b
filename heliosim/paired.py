"""Two scenarios under common random numbers: the same replications of both, and their differences pair by pair.

What both draw from streams of the same name is the same: arrivals, tasks, lengths, the text each request stands for.
What they then do differently is the difference of the policies; luck that both share cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from typing import Any

from heliosim.errors import InputError
from heliosim.executors import run_all
from heliosim.replicate import (
    Replicated,
    Replication,
    WarmUp,
    find_warm_up,
    horizon_of,
    require_uncertain,
    run_replication,
    watched_of,
    width_of,
)
from heliosim.replicated import is_refused
from heliosim.scenario import Scenario, StatisticsSpec
from heliosim.stats import Difference, StoppingRule

COMPARED: tuple[str, ...] = (
    "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms", "p99_e2el_ms",
    "slo_attainment", "request_goodput", "mean_batch_size", "layers_per_token", "perplexity", "agreement", "energy_j",
)  # fmt: skip
"""Metrics of a table of differences, in order."""


@dataclass(frozen=True)
class Paired:
    """Equally many replications of two scenarios. ``watched``: metrics whose differences the rule looked at."""

    first: Replicated
    second: Replicated
    watched: tuple[str, ...]
    same_workload: bool

    @property
    def count(self) -> int:
        return self.first.count

    def difference(self, metric: str) -> Difference:
        """Second less first. Raises KeyError for an unknown metric."""
        return self.second.differences(self.first, metric)

    @property
    def samples(self) -> dict[str, Sequence[float | None]]:
        """Differences of the watched metrics that may be said."""
        is_either_saturated = self.first.is_saturated or self.second.is_saturated
        known = [m for m in self.watched if not (is_either_saturated and is_refused(m))]
        return {m: self._gaps(m) for m in known}

    def _gaps(self, metric: str) -> list[float | None]:
        both = zip(self.first.values(metric), self.second.values(metric), strict=True)
        return [None if a is None or b is None else b - a for a, b in both]

    @property
    def sizes(self) -> dict[str, float | None]:
        """What half-widths are compared with: the larger of the two means."""
        found: dict[str, float | None] = {}
        for metric in self.watched:
            means = [abs(m) for r in (self.first, self.second) if (m := r.interval(metric).mean) is not None]
            found[metric] = max(means, default=None)
        return found

    @property
    def is_done(self) -> bool:
        rule = self.first.rule
        samples = self.samples
        if not samples:
            return self.count >= rule.least
        return rule.is_done(samples, self.sizes)


def pair(
    first: Scenario,
    second: Scenario,
    rule: StoppingRule,
    *,
    executor: Executor,
    metrics: Sequence[str] = (),
    profile_uncertainty: bool | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> Paired:
    """Run both until the rule holds for the differences of ``metrics`` (default: what the first scenario watches).

    Of one workload both leave out as many requests, what the slower one to settle needs: so the requests that count are
    the same. Scenarios of different workloads have their own warm-up each. Raises InputError for scenarios of different
    seeds, or one steady and one terminating.
    """
    horizon = horizon_of(first)
    if first.seed != second.seed:
        raise InputError("seed", second.seed, f"scenario {first.name!r} has seed {first.seed}", "Give both the same.")
    if horizon != horizon_of(second):
        remedy = "Say the same statistics.horizon in both."
        raise InputError(f"scenario {second.name!r}, horizon", horizon_of(second), f"the other is {horizon}", remedy)
    watched = tuple(metrics) or watched_of(first)
    scenarios = (first, second)
    uncertain = [_is_uncertain(s, profile_uncertainty) for s in scenarios]
    same_workload = first.workload == second.workload
    warm_ups = [find_warm_up(s, horizon) for s in scenarios]
    sides = [
        Replicated(s.name, horizon, w, rule, watched, (), u)
        for s, w, u in zip(scenarios, _longest(warm_ups) if same_workload else warm_ups, uncertain, strict=True)
    ]
    so_far = Paired(sides[0], sides[1], watched, same_workload)
    width = width_of(executor)
    while not so_far.is_done:
        start = so_far.count
        count = max(rule.least - start, width) if width > 1 else 1
        items = [
            _Item(scenario, side.warm_up, side.profile_uncertainty, start + k)
            for k in range(count)
            for scenario, side in zip(scenarios, (so_far.first, so_far.second), strict=True)
        ]
        found: dict[int, Replication] = {}
        run_all(executor, _run, items, found.__setitem__)
        for k in range(count):
            so_far = replace(
                so_far,
                first=replace(so_far.first, replications=(*so_far.first.replications, found[2 * k])),
                second=replace(so_far.second, replications=(*so_far.second.replications, found[2 * k + 1])),
            )
            if so_far.is_done:
                break
        if on_progress is not None:
            on_progress(*_progress(so_far))
    return so_far


@dataclass(frozen=True)
class _Item:
    scenario: Scenario
    warm_up: WarmUp
    profile_uncertainty: bool
    index: int


def _run(item: _Item) -> Replication:
    return run_replication(item.scenario, item.warm_up, item.profile_uncertainty, item.index)


def _longest(warm_ups: Sequence[WarmUp]) -> list[WarmUp]:
    """Each with the cut of the longest."""
    longest = max(warm_ups, key=lambda w: w.requests)
    return [replace(longest, is_settled=longest.is_settled and w.is_settled) for w in warm_ups]


def _is_uncertain(scenario: Scenario, asked: bool | None) -> bool:
    uncertain = (scenario.statistics or StatisticsSpec()).profile_uncertainty if asked is None else asked
    if uncertain:
        require_uncertain(scenario)
    return uncertain


def _progress(so_far: Paired) -> tuple[str, float]:
    rule, count = so_far.first.rule, so_far.count
    if count < 2:
        return f"{count} pair", count / rule.least
    widest = rule.widest(so_far.samples, so_far.sizes)
    needed = min(rule.most, max(rule.least, count * widest**2))
    text = f"{count} pairs, widest difference ± {100 * widest * rule.relative_half_width:.1f} %"
    return text, min(0.99, count / needed)


def paired_dict(paired: Paired) -> dict[str, Any]:
    """Every figure as plain data."""
    from heliosim.metrics import SCALARS

    found: dict[str, Any] = {}
    for metric in SCALARS:
        difference = paired.difference(metric)
        found[metric] = {
            "first": asdict(paired.first.interval(metric)),
            "second": asdict(paired.second.interval(metric)),
            "difference": asdict(difference.interval),
            "variance_ratio": difference.variance_ratio,
            "values": [list(v) for v in zip(paired.first.values(metric), paired.second.values(metric), strict=True)],
        }
    return {
        "first": paired.first.name,
        "second": paired.second.name,
        "horizon": paired.first.horizon,
        "warm_up_requests": [paired.first.warm_up.requests, paired.second.warm_up.requests],
        "is_saturated": [paired.first.is_saturated, paired.second.is_saturated],
        "seeds": [str(r.seed) for r in paired.first.replications],
        "metrics": found,
    }
