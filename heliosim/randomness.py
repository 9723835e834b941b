"""How much common random numbers help: the variance of a policy difference, paired and with independent seeds.

Three pairs of policies over a profile are simulated twice as often as needed: once both under the same seeds, once the
second one under seeds of its own. The ratio of the two variances of the difference says how many times
more replications independent seeds would take for the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from heliosim.stats import Interval, paired_difference, t_quantile
from heliosim.streams import stream
from heliosim.workload import WorkloadSpec

METRICS = ("mean_tpot_ms", "mean_ttft_ms", "output_throughput")
TARGET = 3.0
"""Variance ratio that common random numbers must reach, except where a policy's own chance decides: HELIOS with two
models to choose from goes through other transitions as soon as anything differs."""
_WARM_UP_SHARE = 8


@dataclass(frozen=True)
class CrnRow:
    """One metric of one pair of policies. ``difference``: second less first, paired; ``independent_half_width``: what
    as many independent runs of both would give it; ``variance_ratio``: of the difference, independent seeds over common
    ones; None if every pair gave the same difference. ``target``: what that must reach; None: nothing.
    """

    first: str
    second: str
    metric: str
    difference: Interval
    independent_half_width: float
    variance_ratio: float | None
    target: float | None

    @property
    def passes(self) -> bool:
        if self.target is None:
            return True
        if self.variance_ratio is None:
            return self.difference.is_constant and self.independent_half_width > 0
        return self.variance_ratio >= self.target


def policies(profile_name: str, rate_per_s: float, requests: int, seed: int) -> list[tuple[Scenario, Scenario]]:
    """The pairs: another threshold; exits against none; HELIOS on one model and on two against early exit."""
    profile = open_profile(profile_name)
    small, _ = pair_of(profile)
    controllers: dict[str, Mapping[str, Any]] = {
        "early exit 0.8": {"kind": "early-exit", "model": small, "threshold": 0.8},
        "early exit 0.9": {"kind": "early-exit", "model": small, "threshold": 0.9},
        "vanilla": {"kind": "vanilla", "model": small},
        "HELIOS on one model": {"kind": "helios", "in_flight": "extend", "candidates": [small]},
        "HELIOS": {"kind": "helios", "in_flight": "extend"},
    }
    workload = _workload(sorted(profile.facts.behaviour.tasks)[:4], rate_per_s, requests)
    made = {n: scenario_for(n, c, profile, workload, seed=seed) for n, c in controllers.items()}
    names = (
        ("early exit 0.8", "early exit 0.9"),
        ("vanilla", "early exit 0.8"),
        ("early exit 0.8", "HELIOS on one model"),
        ("early exit 0.8", "HELIOS"),
    )
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
    """Run the study; three metrics of each pair of policies."""
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
    found = paired_difference(theirs, mine)
    own, other = _known(mine), _known(theirs) + _known(apart)
    independent = float(np.var(own, ddof=1) + np.var(other, ddof=1))
    gaps = _known([None if x is None or y is None else y - x for x, y in zip(mine, theirs, strict=True)])
    spread = float(np.var(gaps, ddof=1))
    return CrnRow(
        first=first.name,
        second=second.name,
        metric=metric,
        difference=found.interval,
        independent_half_width=t_quantile(0.975, len(own) - 1) * math.sqrt(independent / len(own)),
        variance_ratio=independent / spread if spread > 0 else None,
        target=None if second.controller.get("kind") == "helios" and "candidates" not in second.controller else TARGET,
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def to_dict(row: CrnRow) -> dict[str, Any]:
    """A line as plain data."""
    return {**asdict(row), "passes": row.passes}
