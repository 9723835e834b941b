"""Work of the pages What if and Compare, done in a worker process; answers are plain data, so that they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heliosim_app.jobs import Report

from heliosim.scenario import Scenario


def what_if(scenario: Scenario, replications: int, report: Report) -> dict[str, Any]:
    """A setting tried out."""
    from heliosim.what_if import plain_tried, try_out

    return plain_tried(try_out(scenario, replications, on_progress=report))


def compare(
    systems: Mapping[str, Scenario], focus_per_s: float | None, replications: int, report: Report
) -> dict[str, Any]:
    """Systems over a load sweep around what they can serve."""
    from heliosim.comparing import Plan, run_study
    from heliosim.study_rates import suggested_rates
    from heliosim.study_tables import plain_study

    report("looking for rates to compare at", 0.0)
    rates, focus = suggested_rates(systems, focus_per_s)
    return plain_study(run_study(Plan(systems, rates, focus, replications), on_progress=report))


def fleet_map(
    name: str, scenario: Scenario, focus_per_s: float, replications: int, most_replicas: int, report: Report
) -> dict[str, Any]:
    """Attainment of fleets of one system over load and servers."""
    from heliosim.comparing import Plan, run_study
    from heliosim.study_rates import fleet_rates
    from heliosim.study_tables import plain_study

    report("looking for rates", 0.0)
    plan = Plan(
        {name: scenario},
        (),
        focus_per_s,
        replications,
        fleet_of=name,
        fleet_rates_per_s=fleet_rates(scenario, most_replicas),
        replicas=tuple(range(1, most_replicas + 1)),
    )
    return plain_study(run_study(plan, on_progress=report))
