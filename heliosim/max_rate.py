"""The highest rate a scenario sustains within its limits, by bisection over the factor on its load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from heliosim.metrics import significant
from heliosim.planfile import with_load
from heliosim.planner import Judgement, Rate, find_rate
from heliosim.planning import Answer
from heliosim.probing import Prober
from heliosim.runs import last_arrival
from heliosim.scenario import Scenario
from heliosim.workload import build_arrivals

MOST_STEPS_DOWN = 8
"""How often a rate that fresh seeds do not confirm is lowered."""


@dataclass(frozen=True)
class MaxRate:
    """The answer. ``base_per_s``: the scenario's own mean rate, requests per second; rates are multiples of it.

    ``sustained``, ``failed``: verdicts at the two ends of the bracket, None where there is no such end.
    """

    rate: Rate
    base_per_s: float
    verdict: Answer
    sustained: Judgement | None
    failed: Judgement | None
    verified: Judgement | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def sustained_per_s(self) -> float | None:
        return None if self.rate.sustained is None else self.rate.sustained * self.base_per_s

    @property
    def failed_per_s(self) -> float | None:
        return None if self.rate.failed is None else self.rate.failed * self.base_per_s


def scaled(scenario: Scenario, load: float) -> Scenario:
    """The scenario with its arrivals ``load`` times as fast."""
    return scenario.model_copy(update={"workload": with_load(scenario.workload, load)})


def base_rate(scenario: Scenario) -> float:
    """Mean arrivals per second of an open workload: the process's own, or the trace's."""
    rate = getattr(scenario.workload.arrivals, "rate_per_s", None)
    if rate is not None:
        return float(rate)
    count, last = len(build_arrivals(scenario.workload, scenario.seed)), last_arrival(scenario)
    return count / last if last else float("inf")


def find_max_rate(scenario: Scenario, prober: Prober, tolerance: float) -> MaxRate:
    """Search under common random numbers, then judge the answer once more with fresh seeds."""
    base = base_rate(scenario)
    known: dict[float, Judgement] = {}

    def judge(load: float) -> Judgement:
        if load not in known:
            known[load] = prober.judge_scenario(scaled(scenario, load), f"{significant(load * base)} requests/s")
        return known[load]

    rate = find_rate(lambda load: judge(load).verdict, tolerance=tolerance)
    notes = []
    if not rate.is_monotone:
        notes.append("a lower rate missed where a higher one met: the search's assumption does not hold here")
    load, verified = rate.sustained, None
    for _ in range(MOST_STEPS_DOWN if load is not None else 0):
        assert load is not None
        verified = prober.judge_scenario(scaled(scenario, load), f"{significant(load * base)} requests/s", fresh=True)
        if verified.verdict == "meets":
            break
        notes.append(f"{significant(load * base)} requests/s with fresh seeds: {verified.verdict}, {verified.reason}")
        load = load / (1 + 2 * tolerance)
    if verified is not None and verified.verdict != "meets":
        load = None
    bad = None if rate.failed is None else judge(rate.failed)
    is_open = rate.sustained is not None or "undecided" in rate.verdicts.values()
    verdict: Answer = "feasible" if load is not None else "undecided" if is_open else "infeasible"
    good = None if load is None else judge(load)
    found = replace(rate, sustained=load, verdicts={k: j.verdict for k, j in sorted(known.items())})
    return MaxRate(found, base, verdict, good, bad, verified, tuple(notes))
