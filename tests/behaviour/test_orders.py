"""What orders of service promise, on whole runs: nobody idles or starves, theory's waiting times, the same live."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from heliosim.engines.replay import ReplayEngine
from heliosim.formats.profile import Profile
from heliosim.formats.results import RunResults
from heliosim.live import serve_live
from heliosim.metrics import summarise
from heliosim.predictors import LengthPredictor, Predictor, RankPredictor
from heliosim.queueing import QueueCase, shortest_first_mean_wait, simulate_waits
from heliosim.recorder import TableRecorder
from heliosim.runs import run_simulated
from heliosim.serving.controller import FixedPlacement
from heliosim.serving.memory import MemoryPool
from heliosim.serving.ordered_batcher import OrderedBatcher
from heliosim.serving.ordering import Feedback, Order, PriorityClasses, ShortestJob, ShortestRemaining
from heliosim.serving.server import Server
from heliosim.simulate import simulate_server
from heliosim.stats import t_interval
from heliosim.streams import stream
from heliosim.types import Arrival, Content, ExitRule, Load, Prediction, Request
from heliosim.workload import OpenLoop
from tests.behaviour.test_parity import BusyEngine, assert_same_run
from tests.helpers import spec
from tests.profiles import scenario, workload, write_synthetic_profile

ORDERS: dict[str, dict[str, Any]] = {
    "sjf": {"kind": "sjf"},
    "srpt, limited": {"kind": "srpt", "preempt": "limited", "c": 0.5},
    "srpt, always": {"kind": "srpt", "preempt": "always"},
    "priority": {"kind": "priority", "ageing_s": 0.2},
    "priority, preempting": {"kind": "priority", "preempt": "always"},
    "feedback": {"kind": "feedback", "quantum_tokens": 4},
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


def crowded(profile: Profile, order: dict[str, Any] | None, rate_per_s: float = 400.0, **changes: Any) -> RunResults:
    """150 requests of 1 to 24 tokens at more than four rows can serve at once, in two classes."""
    load = workload(requests=150, rate_per_s=rate_per_s) | {
        "predictor": {"kind": "length", "sigma": 0.3},
        "priorities": {"shares": [0.4, 0.6]},
    }
    sections = {"controller": {"kind": "vanilla", "model": "small"}, "workload": load} | changes
    batcher = {"max_batch": 4, "token_budget": 64, "order": order}
    return run_simulated(scenario(profile, batcher=batcher, **sections), profile)


@pytest.mark.parametrize("order", list(ORDERS.values()), ids=list(ORDERS))
def test_nobody_idles_while_somebody_waits_and_all_are_served(order: dict[str, Any], profile: Profile) -> None:
    found = crowded(profile, order)
    assert set(found.requests["status"].to_pylist()) == {"finished"}
    rows = found.steps.to_pylist()
    gaps = [b["start_s"] - (a["start_s"] + a["seconds"]) for a, b in pairwise(rows) if a["waiting"] or a["running"]]
    assert max(gaps) == 0
    for row in rows:
        is_full = row["rows"] == 4 or row["prefill_tokens"] + row["decode_rows"] == 64
        assert row["kind"] != "run" or is_full or not row["waiting"], "memory is ample: nothing else holds them up"
    assert max(found.steps["waiting"].to_pylist()) > 20


@pytest.mark.parametrize("name", ["srpt, always", "feedback", "priority, preempting"])
def test_preemption_is_paid_for(name: str, profile: Profile) -> None:
    """What is given up is read again: more tokens are computed than by first come, first served, by as many."""
    plain, found = crowded(profile, None), crowded(profile, ORDERS[name])
    again = summarise(found).recomputed_tokens
    assert again is not None
    assert again > 0
    computed = [
        sum(run.steps["prefill_tokens"].to_pylist()) + sum(run.steps["decode_rows"].to_pylist())
        for run in (plain, found)
    ]
    assert computed[1] == computed[0] + again
    assert sum(found.requests["preemptions"].to_pylist()) > 0


@pytest.mark.parametrize("name", ["srpt, always", "feedback", "priority, preempting"])
def test_kept_kv_is_not_paid_for_while_memory_lasts(name: str, profile: Profile) -> None:
    """With ample memory nothing is read again but prompts that were interrupted half read; with little, more is."""
    order = ORDERS[name] | {"keep_kv": True}
    plain, found = crowded(profile, None), crowded(profile, order)
    assert sum(found.requests["preemptions"].to_pylist()) > 0
    again, without = summarise(found).recomputed_tokens, summarise(crowded(profile, ORDERS[name])).recomputed_tokens
    assert again is not None
    assert without is not None
    assert again < 0.1 * without
    computed = [
        sum(run.steps["prefill_tokens"].to_pylist()) + sum(run.steps["decode_rows"].to_pylist())
        for run in (plain, found)
    ]
    assert computed[1] == computed[0] + again
    tight = crowded(profile, order, memory={"budget_bytes": 9_000})
    given_up = summarise(tight).recomputed_tokens
    assert given_up is not None
    assert given_up > again
    assert set(tight.requests["status"].to_pylist()) == {"finished"}


def test_ageing_bounds_how_many_go_first(profile: Profile) -> None:
    """Under ageing nobody of class 1 starts behind one of class 0 who came more than an ageing time later; without
    it, some do.
    """

    def overtaken(order: dict[str, Any]) -> float:
        rows = crowded(profile, order, rate_per_s=900.0).requests.to_pylist()
        urgent = [r for r in rows if r["priority"] == 0]
        return max(
            float(u["arrival_s"] - r["arrival_s"])
            for r in rows
            if r["priority"] == 1
            for u in urgent
            if u["admitted_s"] < r["admitted_s"]
        )

    assert overtaken({"kind": "priority", "ageing_s": 0.02}) <= 0.02
    assert overtaken({"kind": "priority"}) > 0.04


def test_classes_and_predictions_show_in_the_summary(profile: Profile) -> None:
    found = summarise(crowded(profile, ORDERS["priority, preempting"]))
    urgent, other = found.by_class[0], found.by_class[1]
    assert urgent["mean_ttft_ms"] < other["mean_ttft_ms"]  # type: ignore[operator]
    assert found.prediction_tau is not None
    assert 0.6 < found.prediction_tau < 0.95
    assert found.prediction_mae_tokens is not None
    assert found.prediction_mae_tokens > 0


def mean_e2e(profile: Profile, order: dict[str, Any] | None, tau: float) -> float:
    load = workload(requests=300, rate_per_s=330.0) | {"predictor": {"kind": "rank", "tau": tau}}
    found = summarise(crowded(profile, order, workload=load)).mean_e2el_ms
    assert found is not None
    return found


def test_knowing_more_helps_and_knowing_nothing_does_not_hurt(profile: Profile) -> None:
    """Mean E2E under load: the better the ranks the better; those of tau 0 are about first come, first served."""
    first = mean_e2e(profile, None, 1.0)
    by_tau = [mean_e2e(profile, {"kind": "sjf"}, tau) for tau in (1.0, 0.5, 0.0, -1.0)]
    assert by_tau[0] < by_tau[1] < by_tau[2] < by_tau[3]
    assert by_tau[0] < 0.8 * first
    assert by_tau[2] == pytest.approx(first, rel=0.15)


@pytest.mark.parametrize("service", ["exponential", "erlang-2"])
@pytest.mark.parametrize(
    ("predictor", "truth"),
    [
        (LengthPredictor(sigma=0.0), shortest_first_mean_wait),
        (RankPredictor(tau=0.0), lambda case: case.mean_wait),
    ],
    ids=["perfect predictions", "useless predictions"],
)
def test_shortest_job_first_waits_as_theory_says(
    service: Any, predictor: Predictor, truth: Callable[[QueueCase], float]
) -> None:
    """M/G/1 at 70 %: with perfect predictions Phipps' formula; with useless ones that of any order blind to service
    times, Pollaczek-Khinchine's. Both within the 99 % interval of 12 replications, which is narrow enough to tell.
    """
    case = QueueCase(service, 0.7)
    means = [
        float(simulate_waits(case, 4000, seed, "orders", order=ShortestJob(), predictor=predictor)[300:].mean())
        for seed in range(12)
    ]
    found = t_interval(means, 0.99)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= truth(case) <= found.high
    others = {case.mean_wait, shortest_first_mean_wait(case)} - {truth(case)}
    assert not found.low <= others.pop() <= found.high


@pytest.mark.parametrize(
    "order",
    [
        ShortestJob(),
        ShortestRemaining("always"),
        ShortestRemaining("always", keep_kv=True),
        PriorityClasses(0.05, "always"),
        Feedback(4),
    ],
    ids=lambda order: type(order).__name__,
)
def test_a_live_log_drives_the_simulated_server_through_the_same_run(order: Order) -> None:
    """On the driver that really takes time, in a pool in which requests preempt each other."""
    model = spec("small")

    def made(recorder: TableRecorder) -> Server:
        batcher = OrderedBatcher(order, 3, 64)
        return Server(FixedPlacement(model, ExitRule("none")), batcher, MemoryPool(9_000), {"small": model}, recorder)

    def arrivals() -> list[Arrival]:
        rng, at, found = stream(1, "arrivals"), 0.0, []
        for k in range(60):
            at += float(rng.exponential(0.001))
            length = int(rng.integers(1, 20))
            told = Prediction(length * float(rng.lognormal(0, 0.4)), 5, (8.0, 12.0, 17.0, 22.0))
            request = Request(k, at, int(rng.integers(1, 40)), 20, int(rng.integers(0, 3)), told)
            found.append(Arrival(request, Content("", None, length)))
        return found

    live, again = TableRecorder(), TableRecorder()
    done = serve_live(made(live), BusyEngine(1), OpenLoop(arrivals()), "cpu")
    assert (sum(live.tables().requests["preemptions"].to_pylist()) > 0) == order.preempts
    assert order.keep_kv or any(not isinstance(a, Load) and a.evicted for a, _ in done.log) == order.preempts
    engine = ReplayEngine(done.log)
    simulate_server(made(again), engine, OpenLoop(arrivals()))
    assert engine.position == len(done.log)
    assert_same_run(live, again)
