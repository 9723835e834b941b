"""How much common random numbers help: the variance of a policy difference, paired and with independent seeds.

Three pairs of policies over a profile are simulated twice as often as needed: once both under the same seeds, once the
second one under seeds of its own. The ratio of the two variances of the difference says how many times
more replications independent seeds would take for the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from heliosim.examples import pair_of, scenario_for
from heliosim.executors import run_all
from heliosim.profile_view import open_profile
from heliosim.replicate import run_replication
from heliosim.replicated import Replication, WarmUp
from heliosim.scenario import Scenario
from heliosim.stats import Interval, paired_difference
from heliosim.streams import stream
from heliosim.workload import WorkloadSpec

METRICS = ("mean_tpot_ms", "mean_ttft_ms", "output_throughput")
TARGET = 3.0
"""Variance ratio that common random numbers must reach."""
_WARM_UP_SHARE = 8


@dataclass(frozen=True)
class CrnRow:
    """One metric of one pair of policies. ``difference``: second less first, paired; ``variance_ratio``: of the
    difference, independent seeds over common ones; None if every pair gave the same difference.
    """

    first: str
    second: str
    metric: str
    difference: Interval
    independent: Interval
    variance_ratio: float | None

    @property
    def passes(self) -> bool:
        if self.variance_ratio is None:
            return self.difference.is_constant and not self.independent.is_constant
        return self.variance_ratio >= TARGET


def policies(profile_name: str, rate_per_s: float, requests: int, seed: int) -> list[tuple[Scenario, Scenario]]:
    """The pairs: another threshold; exits against none; HELIOS against early exit."""
    profile = open_profile(profile_name)
    small, _ = pair_of(profile)
    controllers: dict[str, Mapping[str, Any]] = {
        "early exit 0.8": {"kind": "early-exit", "model": small, "threshold": 0.8},
        "early exit 0.9": {"kind": "early-exit", "model": small, "threshold": 0.9},
        "vanilla": {"kind": "vanilla", "model": small},
        "HELIOS": {"kind": "helios", "in_flight": "extend"},
    }
    workload = _workload(sorted(profile.facts.behaviour.tasks)[:4], rate_per_s, requests)
    made = {n: scenario_for(n, c, profile, workload, seed=seed) for n, c in controllers.items()}
    names = (("early exit 0.8", "early exit 0.9"), ("vanilla", "early exit 0.8"), ("early exit 0.8", "HELIOS"))
    return [(made[a], made[b]) for a, b in names]


def _workload(tasks: list[str], rate_per_s: float, requests: int) -> WorkloadSpec:
    lengths = {
        "prompt_tokens": {"kind": "uniform", "low": 30, "high": 90},
        "output_tokens": {"kind": "uniform", "low": 16, "high": 48},
    }
    return WorkloadSpec.model_validate(
        {
            "requests": requests,
            "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
            "tasks": [{"task": task, **lengths} for task in tasks],
            "order": "mix" if len(tasks) > 1 else None,
        }
    )


def run_crn(
    profile: str,
    *,
    pairs: int = 60,
    rate_per_s: float = 20.0,
    requests: int = 240,
    seed: int = 0,
    executor: Executor,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[CrnRow]:
    """Run the study; three metrics of three pairs of policies."""
    chosen = policies(profile, rate_per_s, requests, seed)
    other_seed = int(stream(seed, "independent").integers(2**63))
    known = {s.name: s for both in chosen for s in both}
    apart = {b.name: b.model_copy(update={"seed": other_seed}) for _, b in chosen}
    items = [(s, k) for s in (*known.values(), *apart.values()) for k in range(pairs)]
    found: dict[tuple[int, str, int], Replication] = {}

    def keep(at: int, one: Replication) -> None:
        scenario, k = items[at]
        found[scenario.seed, scenario.name, k] = one
        if on_progress is not None:
            on_progress(f"{len(found)} of {len(items)} runs", len(found) / len(items))

    run_all(executor, _run, items, keep)

    def values(scenario: Scenario, metric: str) -> list[float | None]:
        return [found[scenario.seed, scenario.name, k].values[metric] for k in range(pairs)]

    return [
        _row(metric, a, b, values(a, metric), values(b, metric), values(apart[b.name], metric))
        for a, b in chosen
        for metric in METRICS
    ]


def _run(item: tuple[Scenario, int]) -> Replication:
    scenario, index = item
    left_out = (scenario.workload.requests or 0) // _WARM_UP_SHARE
    return run_replication(scenario, WarmUp(left_out, "given"), False, index)


def _row(
    metric: str,
    first: Scenario,
    second: Scenario,
    mine: list[float | None],
    theirs: list[float | None],
    apart: list[float | None],
) -> CrnRow:
    together, independent = paired_difference(theirs, mine), paired_difference(apart, mine)
    gaps = [[y - x for x, y in zip(mine, other, strict=True) if x is not None and y is not None] for other in (theirs, apart)]
    spreads = [float(np.var(g, ddof=1)) if len(g) > 1 else 0.0 for g in gaps]
    ratio = spreads[1] / spreads[0] if spreads[0] > 0 else None
    return CrnRow(first.name, second.name, metric, together.interval, independent.interval, ratio)


def to_dict(row: CrnRow) -> dict[str, Any]:
    """A line as plain data."""
    return {**asdict(row), "passes": row.passes}
