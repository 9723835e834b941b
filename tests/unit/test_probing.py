"""Bounds that are true, probes that agree with each other, and three plans against trying everything."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heliosim.bounds import CountBound, count_bound, step_floor
from heliosim.errors import InputError
from heliosim.executors import open_executor
from heliosim.formats.profile import Profile
from heliosim.max_rate import find_max_rate
from heliosim.metrics import summarise
from heliosim.planfile import Candidate, PlanFile, Quality, Replications, default_memory, load_plan, with_load
from heliosim.planning import Planner, PlanResult
from heliosim.prices import load_prices
from heliosim.probing import FIGURES, FleetJudge, Prober, Sample, Work, is_steady, measure
from heliosim.profile_view import open_profile
from heliosim.runs import run_simulated
from heliosim.scenario import Memory, Scenario
from heliosim.streams import replication_seed
from heliosim.workload import WorkloadSpec, build_arrivals

PLANS = Path(__file__).parents[2] / "heliosim" / "plans"
EXAMPLES = ("chat", "summarisation", "code")


@pytest.fixture(scope="module")
def here() -> Iterator[Executor]:
    with open_executor("local", 1) as executor:
        yield executor


@cache
def small(name: str) -> PlanFile:
    """A shipped plan at a fraction of its load, with few requests, replications and counts."""
    plan = load_plan(PLANS / f"{name}.yaml")
    load = {"chat": 0.5, "summarisation": 0.75, "code": 0.5}[name]
    workload = with_load(plan.workload, load).model_copy(update={"requests": 150})
    changes = {"workload": workload, "max_count": 4, "candidates": plan.candidates[:3]}
    changes["replications"] = plan.replications.model_copy(update={"least": 2, "most": 3})
    return plan.model_copy(update=changes)


def runs_of(plan: PlanFile, load: float) -> list[Any]:
    seeds = [replication_seed(plan.seed, k) for k in range(plan.replications.most)]
    return [build_arrivals(with_load(plan.workload, load), seed) for seed in seeds]


def solve(plan: PlanFile, judge: FleetJudge) -> PlanResult:
    profiles = {c.profile: open_profile(c.profile) for c in plan.candidates}
    return Planner(plan, load_prices(), profiles, lambda load: runs_of(plan, load), judge).run()


def bound_of(plan: PlanFile, candidate: Candidate, profile: Profile) -> CountBound:
    specs = {name: profile.spec(name) for name in candidate.models}
    costs = {name: profile.step_cost(name, profile.clock()) for name in candidate.models}
    floor = step_floor(candidate, specs, costs, default_memory(profile, candidate).budget_bytes)
    return count_bound(plan, floor, runs_of(plan, 1.0))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_plan_is_what_trying_everything_finds(name: str, here: Executor, tmp_path: Path) -> None:
    plan, prices = small(name), load_prices()
    judge = FleetJudge(plan, Prober(plan.rules, here, tmp_path))
    every = {(c.name, n): judge.judge(c, n) for c in plan.candidates for n in range(1, plan.max_count + 1)}

    def price(c: Candidate, count: int) -> float:
        return count * prices.price(c.gpu, plan.provider).price_per_gpu_hour * c.gpus_per_replica

    meeting = [(price(c, n), n, k, c.name) for k, c in enumerate(plan.candidates) for n in range(1, 5)
               if every[c.name, n].verdict == "meets"]  # fmt: skip
    result = solve(plan, judge)
    assert result.winner is not None
    assert result.answer == "feasible"
    confirmed = (m for m in sorted(meeting) if judge.judge(plan.candidates[m[2]], m[1], fresh=True).verdict == "meets")
    cheapest = next(confirmed)
    assert (result.winner.candidate.name, result.winner.count) == (cheapest[3], cheapest[1])
    others = [m for m in meeting if m[3] != cheapest[3]]
    assert (result.runner_up is None) == (not others)
    if result.runner_up is not None:
        assert result.runner_up.price_per_hour == min(others)[0]
    assert result.verified is not None
    assert result.verified.verdict == "meets"
    if result.winner.count != 1:
        assert result.one_fewer is not None
        assert result.one_fewer.verdict == "misses"
        assert "±" in result.one_fewer.reason
    for option in result.options:  # no bound removed a fleet that meets
        least = option.bound.least or plan.max_count + 1
        assert all(v.verdict != "meets" for (c, n), v in every.items() if c == option.candidate.name and n < least)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("load", [2.0, 4.0])
def test_fleets_below_the_bound_miss(name: str, load: float) -> None:
    plan = small(name).model_copy(update={"workload": with_load(small(name).workload, load)})
    for candidate in plan.candidates:
        profile = open_profile(candidate.profile)
        bound = bound_of(plan, candidate, profile)
        if bound.least is None or bound.least < 2:
            continue
        scenario = plan.scenario(candidate, profile, bound.least - 1)
        results = run_simulated(scenario, profile)
        arrival = np.sort(results.requests["arrival_s"].to_numpy())
        summary = summarise(results, float(arrival[int(plan.warm_up * len(arrival))]))
        limits = plan.slo.limits
        assert (summary.p99_ttft_ms or 0) > limits["p99_ttft_ms"] or (summary.p99_tpot_ms or 0) > limits["p99_tpot_ms"]


def test_the_bound_is_of_use() -> None:
    """Over many requests it is the utilisation law; a loose one would be true and of no use. Four A100 carry this."""
    plan = load_plan(PLANS / "chat.yaml")
    plan = plan.model_copy(update={"workload": plan.workload.model_copy(update={"requests": 6000})})
    plan = plan.model_copy(update={"replications": plan.replications.model_copy(update={"most": 2})})
    candidate = plan.candidates[0]
    bound = bound_of(plan, candidate, open_profile(candidate.profile))
    assert bound.least == 2
    assert bound.utilisation == pytest.approx(2.05, abs=0.1)


@pytest.mark.parametrize("limits", [{"p99_ttft_ms": 5}, {"p99_tpot_ms": 5}, {"p90_e2el_ms": 300}])
def test_targets_no_count_reaches_are_seen_without_running(limits: dict[str, float]) -> None:
    plan = small("chat")
    plan = plan.model_copy(update={"slo": plan.slo.model_copy(update={"limits": limits})})
    candidate = plan.candidates[0]
    assert bound_of(plan, candidate, open_profile(candidate.profile)).least is None


def test_overload_ends_within_seconds(here: Executor) -> None:
    plan = load_plan(PLANS / "chat.yaml")
    changes = {"workload": with_load(plan.workload, 4.0), "max_count": 6}
    # without a limit that has a deadline no bound helps: the saturation check must
    changes["slo"] = plan.slo.model_copy(update={"limits": {"p99_tpot_ms": 400.0}})
    plan = plan.model_copy(update=changes | {"candidates": plan.candidates[:1]})
    started = time.process_time()
    prober = Prober(plan.rules, here)
    result = solve(plan, FleetJudge(plan, prober))
    assert time.process_time() - started < 10
    assert result.answer == "infeasible"
    assert "saturated" in result.options[0].status
    assert prober.simulated <= 2 * 6  # two looks at a count


def test_a_rush_hour_of_a_trace_is_no_saturation(tmp_path: Path) -> None:
    """200 requests at the end of a quiet trace: waiting grows to the last, and the limits alone must judge it."""
    plan = small("chat")
    times = [*range(0, 40_000, 400), *(40_000 + 5 * k for k in range(200))]
    lines = [json.dumps({"timestamp": t, "input_length": 400, "output_length": 40}) for t in times]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    candidate = plan.candidates[0]
    scenario = plan.scenario(candidate, open_profile(candidate.profile), 1)
    trace = WorkloadSpec(trace=str(tmp_path / "trace.jsonl"))
    sample = measure(Work(scenario.model_copy(update={"workload": trace}), ("p99_ttft_ms",), 0.1))
    assert not sample.is_saturated
    assert (sample.values["p99_ttft_ms"] or 0) > 1000
    steady = WorkloadSpec(trace=trace.trace, arrivals={"kind": "poisson", "rate_per_s": 40})  # type: ignore[arg-type]
    assert measure(Work(scenario.model_copy(update={"workload": steady}), (), 0.1)).is_saturated


def test_done_probes_are_not_done_again_and_workers_change_nothing(tmp_path: Path, here: Executor) -> None:
    plan = small("code")
    plan = plan.model_copy(update={"candidates": plan.candidates[1:2], "max_count": 3})
    first = Prober(plan.rules, here, tmp_path / "a")
    one = solve(plan, FleetJudge(plan, first))
    again = Prober(plan.rules, here, tmp_path / "a")
    assert solve(plan, FleetJudge(plan, again)) == one
    assert again.simulated == 0
    with open_executor("local", 2) as two:
        other = Prober(plan.rules, two, tmp_path / "b")
        assert solve(plan, FleetJudge(plan, other)) == one


def test_other_loads_meet_the_same_requests_on_scaled_gaps() -> None:
    plan = small("summarisation")
    one, fast = (runs_of(plan, load)[1] for load in (1.0, 1.25))
    assert [(a.request.prompt_tokens, a.content) for a in one] == [(a.request.prompt_tokens, a.content) for a in fast]
    at, soon = (np.array([a.request.arrival_s for a in run]) for run in (one, fast))
    np.testing.assert_allclose(at / 1.25, soon, rtol=1e-6)


def test_a_sample_says_what_the_run_says() -> None:
    plan = small("code")
    candidate = plan.candidates[0]
    profile = open_profile(candidate.profile)
    scenario = plan.scenario(candidate, profile, 3)
    sample = measure(Work(scenario, ("p99_ttft_ms", "mean_tpot_ms", "p95_e2el_ms"), 0.0))
    results = run_simulated(scenario, profile)
    summary = summarise(results)
    assert sample.values["p99_ttft_ms"] == pytest.approx(summary.p99_ttft_ms)
    assert sample.values["mean_tpot_ms"] == pytest.approx(summary.mean_tpot_ms)
    assert summary.p90_e2el_ms < sample.values["p95_e2el_ms"] < summary.p99_e2el_ms  # type: ignore[operator]
    assert summary.energy_j is not None
    assert sample.values["energy_per_1000_j"] == pytest.approx(summary.energy_j / 150 * 1000)
    assert sample.values["agreement"] == 1.0


def test_refused_requests_miss_whatever_the_others_wait(here: Executor) -> None:
    plan = small("chat")
    tight = plan.candidates[0].model_copy(update={"memory": Memory(budget_bytes=14_200_000_000)})
    plan = plan.model_copy(update={"candidates": (tight,), "workload": with_load(plan.workload, 0.05)})
    judgement = FleetJudge(plan, Prober(plan.rules, here)).judge(plan.candidates[0], 4)
    refused = next(m for m in judgement.margins if m.limit.metric == "refused_share")
    assert judgement.verdict == "misses"
    assert refused.verdict == "misses"
    assert refused.interval.mean is not None
    assert 0 < refused.interval.mean < 1


def test_the_highest_rate_is_between_rates_that_meet_and_do_not(here: Executor) -> None:
    plan = small("code")
    candidate = plan.candidates[0]
    scenario = plan.scenario(candidate, open_profile(candidate.profile), 1)
    prober = Prober(plan.rules, here)
    found = find_max_rate(scenario, prober, tolerance=0.1)
    assert found.verdict == "feasible"
    assert found.sustained_per_s is not None
    assert found.failed_per_s is not None
    assert 1 < found.sustained_per_s < found.failed_per_s < 5
    assert found.sustained is not None
    assert found.sustained.verdict == "meets"
    assert found.failed is not None
    assert found.failed.verdict != "meets"
    assert found.verified is not None
    assert found.verified.verdict == "meets"


def test_a_bad_probe_file_is_named(tmp_path: Path, here: Executor) -> None:
    plan = small("code")
    judge = FleetJudge(plan, Prober(plan.rules, here, tmp_path))
    judge.judge(plan.candidates[2], 2)
    for file in tmp_path.iterdir():
        file.write_text(json.dumps({"values": {}}), encoding="utf-8")
    with pytest.raises(InputError, match="probe"):
        FleetJudge(plan, Prober(plan.rules, here, tmp_path)).judge(plan.candidates[2], 2)


def test_samples_survive_their_file(tmp_path: Path, here: Executor) -> None:
    sample = Sample({"p99_ttft_ms": 1.5, "agreement": None}, None, False)
    from heliosim.probing import read_sample, write_sample

    write_sample(tmp_path / "x.json", sample)
    assert read_sample(tmp_path / "x.json") == sample


def scenario_of(plan: PlanFile, count: int = 1, **changes: Any) -> Scenario:
    """The first candidate's, with fields of its plain data replaced."""
    candidate = plan.candidates[0]
    scenario = plan.scenario(candidate, open_profile(candidate.profile), count)
    return Scenario.model_validate(scenario.model_dump(mode="json") | changes)


def fleet_on(profile: str) -> Scenario:
    return scenario_of(small("code"), fleet={"replicas": [{"name": "g", "count": 2, "profile": profile}]})


def test_probes_of_fleets_on_other_profiles_are_kept_apart(tmp_path: Path, here: Executor) -> None:
    prober = Prober(small("code").rules, here, tmp_path)
    verdicts = [prober.judge_scenario(fleet_on(p), p) for p in ("llama2-a100-80gb", "llama2-h100-80gb")]
    assert prober.remembered == 0
    assert verdicts[0].margins != verdicts[1].margins


@dataclass
class Told(Prober):
    """A prober whose replications drown or not as told: by (replication, whether of fewer requests)."""

    hopeless: frozenset[tuple[int, bool]] = frozenset()
    asked: list[tuple[int, bool]] = field(default_factory=list)

    def _measure(self, works: Sequence[Work]) -> list[Sample]:
        seeds = [replication_seed(small("code").seed, k) for k in range(10)]
        looks = [(seeds.index(w.scenario.seed), w.requests is not None) for w in works]
        self.asked += looks
        values: dict[str, float | None] = dict.fromkeys((*FIGURES, *small("code").slo.limits), 1.0)
        return [Sample(values | {"refused_share": 0.0}, 0.9, True) if look in self.hopeless else
                Sample(values | {"refused_share": 0.0}, 0.0, False) for look in looks]  # fmt: skip


@pytest.mark.parametrize(
    ("requests", "hopeless", "verdict", "asked"),
    [
        (400, {(0, True)}, "meets", 6),  # the first look alone may be chance
        (400, {(0, True), (0, False)}, "meets", 6),  # and the same requests again are no second one
        (400, {(0, True), (1, False)}, "misses", 2),
        (150, {(0, False)}, "meets", 4),
        (150, {(0, False), (1, False)}, "misses", 2),
    ],
)
def test_a_hopeless_look_needs_another_seed_to_confirm_it(
    here: Executor, requests: int, hopeless: set[tuple[int, bool]], verdict: str, asked: int
) -> None:
    plan = small("code")
    plan = plan.model_copy(update={"workload": plan.workload.model_copy(update={"requests": requests})})
    rules = replace(plan.rules, quality=Quality(), replications=Replications(least=4, most=4))
    prober = Told(rules, here, hopeless=frozenset(hopeless))
    assert prober.judge_scenario(scenario_of(plan), "x").verdict == verdict
    assert len(prober.asked) == asked


def test_what_goes_on_alike_is_what_replications_take_for_steady() -> None:
    plan = small("code")
    assert is_steady(scenario_of(plan))
    assert not is_steady(scenario_of(plan, statistics={"horizon": "terminating"}))
    group = {"name": "g", "count": 2}
    failure = {"replica": "g-0", "at_s": 1.0, "restart_after_s": 5.0}
    assert is_steady(scenario_of(plan, fleet={"replicas": [group]}))
    assert not is_steady(scenario_of(plan, fleet={"replicas": [group], "failures": [failure]}))
    closed = scenario_of(plan).workload.model_dump(mode="json") | {"arrivals": {"kind": "closed", "users": 4}}
    assert not is_steady(scenario_of(plan, workload=closed, statistics={"horizon": "steady"}))


def test_derived_profiles_of_groups_are_named() -> None:
    from heliosim.max_rate import MaxRate
    from heliosim.plan_report import rate_json
    from heliosim.planner import Rate

    none = MaxRate(Rate(None, 1.0, {}, True), 1.0, "infeasible", None, None)
    notes = rate_json(fleet_on("llama2-h100-80gb"), none)["notes"]
    assert "llama2-h100-80gb" in notes[0]
    assert "llama2-a100-80gb" not in notes[0]
