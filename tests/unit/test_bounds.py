"""Lower bounds are true: nothing that may meet is below them. Each case here once lay below a bound that was wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from heliosim.bounds import Demand, StepFloor, count_bound, demands
from heliosim.metrics import summarise
from heliosim.planfile import PlanFile, Targets
from heliosim.planning import Planner
from heliosim.runs import run_simulated
from heliosim.types import Arrival
from heliosim.workload import build_arrivals
from tests.unit.test_planning import PRICES, PROFILES, Overruled, candidate, plan

NOTHING = StepFloor(0.01, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 64, 512, 10**6)
"""A floor on which only steps cost something."""
SPEC = PROFILES["llama2-a100-80gb"].spec("llama2-7b")


def holding(tokens: int) -> dict[str, int]:
    """Memory for the whole of llama2-7b and the KV of so many tokens."""
    return {"budget_bytes": SPEC.weights_bytes(SPEC.layers) + SPEC.block_bytes(SPEC.layers) * (tokens // 16)}


def asked(tokens: int = 4096, prompt: Any = 200, output: int = 41, **targets: Any) -> PlanFile:
    load = {
        "requests": 60,
        "arrivals": {"kind": "poisson", "rate_per_s": 2.0},
        "tasks": [{"task": "chat", "prompt_tokens": prompt, "output_tokens": output}],
    }
    slo = {"limits": {"p99_ttft_ms": 1000}} | targets
    return plan([candidate("a", memory=holding(tokens))], workload=load, slo=slo)


def arrivals(prompt: int, output: int, count: int = 20) -> list[Arrival]:
    """So many alike, a second apart."""
    load = asked(prompt=prompt, output=output).workload
    found = build_arrivals(load.model_copy(update={"requests": count}), 0)
    return [replace(a, request=replace(a.request, arrival_s=float(k))) for k, a in enumerate(found)]


def least(what: PlanFile) -> int | None:
    runs = [build_arrivals(what.workload, seed) for seed in range(4)]
    planner = Planner(what, PRICES, PROFILES, lambda load: runs, Overruled({}, {}))
    return planner.bound(what.candidates[0], 1.0).least


def test_requests_that_may_be_refused_need_no_memory() -> None:
    prompt = {"kind": "uniform", "low": 100, "high": 1000}
    assert least(asked(960, prompt)) is None
    assert least(asked(960, prompt, max_refused_share=0.2)) == 1
    assert least(asked(480, prompt, max_refused_share=0.2)) is None


def test_requests_that_may_be_refused_need_not_be_in_time() -> None:
    together = demands(Targets(limits={"p99_ttft_ms": 100}, max_refused_share=0.1))
    assert together == [Demand((0.99,), 0.2, np.inf, np.inf, 0.2)]
    assert together[0].allowed(100) == 20 + 1
    assert Demand((0.99,), 1, 1, 1).allowed(100) == 1


def test_the_last_token_needs_no_memory() -> None:
    what = asked(240)  # 200 + 41 - 1
    assert least(what) == 1
    profile = PROFILES["llama2-a100-80gb"]
    assert summarise(run_simulated(what.scenario(what.candidates[0], profile, 1), profile)).refused == 0
    assert least(asked(239)) is None


def test_what_a_request_costs_at_its_end_does_not_delay_its_first_token() -> None:
    floor = replace(NOTHING, ended=0.05)
    run = arrivals(100, 10)

    def bound(**limits: float) -> int | None:
        return count_bound(asked(limits=limits), floor, [run]).least

    assert bound(p99_ttft_ms=30) == 1
    assert bound(p99_e2el_ms=145) is None  # ten steps and the end take 150 ms
    assert bound(p99_e2el_ms=155) == 1
    dense = [replace(a, request=replace(a.request, arrival_s=0.01 * k)) for k, a in enumerate(run)]
    assert count_bound(asked(limits={"p99_ttft_ms": 30}), floor, [dense]).least == 1
    assert (count_bound(asked(limits={"p99_e2el_ms": 155}), floor, [dense]).least or 0) > 1


def test_limits_may_be_kept_by_different_replications() -> None:
    floor = replace(NOTHING, token=0.001, kv=0.001)
    slow_first, slow_next = arrivals(2000, 2), arrivals(10, 8000)  # 2 s and 2 s per token; 20 ms and 4 s per token
    what = asked(limits={"p50_ttft_ms": 1100, "p50_tpot_ms": 3100})  # both kept on average
    assert count_bound(what, floor, [slow_first]).least is None
    assert count_bound(what, floor, [slow_next]).least is None
    assert count_bound(what, floor, [slow_first, slow_next]).least is not None


def test_of_several_limits_some_replication_keeps_all_that_many_times_as_wide() -> None:
    attainment = {"share": 0.9, "ttft_ms": 100, "e2el_ms": 900}
    targets = Targets.model_validate({"limits": {"p99_ttft_ms": 200, "mean_tpot_ms": 5}, "attainment": attainment})
    *alone, together = demands(targets)
    assert [(d.first_s, d.each_s, d.all_s) for d in alone] == [
        (0.2, np.inf, np.inf),
        (np.inf, 0.05, np.inf),
        (0.1, np.inf, 0.9),
    ]
    assert (together.first_s, together.each_s, together.all_s) == pytest.approx((0.1, 0.15, 0.9))
    assert together.shares == pytest.approx((0.99, 0.9, 0.7))
    assert together.allowed(50) == 1 + 5 + 15
    half = Targets.model_validate({"limits": {"p99_ttft_ms": 200}, "attainment": attainment | {"share": 0.5}})
    assert demands(half)[-1].allowed(50) == 50  # twice as many as half may be late: all


def test_answers_of_one_token_have_no_pace() -> None:
    with np.errstate(all="raise"):
        assert count_bound(asked(), NOTHING, [arrivals(200, 1)]).least == 1


def test_requests_that_come_with_the_first_counted_one_count() -> None:
    """All at once none is left out: of 22 a p90 lets three go, of the 20 behind a warm-up two."""
    run = [*arrivals(100, 10, 19), *arrivals(2000, 10, 3)]
    at_once = [replace(a, request=replace(a.request, arrival_s=0.0)) for a in run]
    what = asked(limits={"p90_ttft_ms": 1000}).model_copy(update={"warm_up": 0.1})
    assert count_bound(what, replace(NOTHING, token=0.001), [at_once]).least is not None
