"""Which rates to compare systems at: from about what each of them can serve."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from heliosim.arrivals import Gaps
from heliosim.max_rate import base_rate
from heliosim.metrics import summarise
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.sweep import open_once

BURST = 120
"""Requests of the burst that tells what a system can serve."""
POINTS = 8
LEAST, MOST = 0.3, 1.6
"""Ends of a suggested sweep: of what the slowest system can serve, and of what the fastest can."""
FOCUS = 0.6
"""The suggested rate in focus, of what the slowest system can serve."""


def capacity_per_s(scenario: Scenario) -> float:
    """About what one server of a scenario can serve, requests per second: those of a burst over the time it takes.

    The last requests of a burst leave the batch half empty, so this is a little less than the truth: good enough to
    choose rates by, not to be reported.
    """
    workload = scenario.workload
    if isinstance(workload.arrivals, Gaps):
        arrivals = workload.arrivals.model_copy(update={"rate_per_s": 1e4})
        counted = {} if workload.requests is None else {"requests": min(BURST, workload.requests)}
        workload = workload.model_copy(update={"arrivals": arrivals, **counted})
    results = run_simulated(scenario.model_copy(update={"workload": workload}), open_once(scenario.profile))
    return summarise(results).request_throughput or base_rate(scenario)


def suggested_rates(
    systems: Mapping[str, Scenario], focus_per_s: float | None = None
) -> tuple[tuple[float, ...], float]:
    """A sweep from little load to more than the fastest system can serve, each rate the same multiple of the
    last, and the rate in focus (given, or one that all should keep up with); two significant digits each.
    """
    known = [capacity_per_s(scenario) for scenario in systems.values()]
    rates = [two_digits(float(rate)) for rate in np.geomspace(LEAST * min(known), MOST * max(known), POINTS)]
    return tuple(dict.fromkeys(rates)), focus_per_s or two_digits(FOCUS * min(known))


def two_digits(value: float) -> float:
    """A positive number to two significant digits."""
    return float(f"{value:.2g}")


def fleet_rates(scenario: Scenario, most_replicas: int) -> tuple[float, ...]:
    """Rates of a fleet from half of what one server can serve to a little more than all can, requests per second."""
    one = capacity_per_s(scenario)
    return tuple(dict.fromkeys(two_digits(float(k) * one) for k in np.linspace(0.5, 1.6 * most_replicas, 5)))
