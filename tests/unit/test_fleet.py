"""The fleet's driver on hand-made replicas: what happens first at one moment, failures, waiting, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliosim.costs import LOAD_TERMS, TERMS, StepCost
from heliosim.engines.base import Engine
from heliosim.engines.sim import SimEngine
from heliosim.errors import InputError
from heliosim.fleet import NO_REPLICA, FleetRun, Outage
from heliosim.fleet_tables import merged
from heliosim.recorder import TableRecorder, Tables
from heliosim.replica import Life
from heliosim.runs import ANY_STRIDE
from heliosim.serving.routing import LeastKv, LeastOutstanding, ReplicaStatus, RoundRobin, Router
from heliosim.types import Arrival, Request
from heliosim.workload import Body, ClosedLoop, OpenLoop, Source
from tests.helpers import StubEngine, arrival, server, spec

STEP_S = 0.125


def stub() -> Engine:
    return StubEngine(seconds=lambda run: STEP_S, load_s=0.5)


def simulated(watts: float | None = None, strides: bool = True) -> Engine:
    """Every step takes the same time, every load half a second, both to the last bit."""
    costs = StepCost(tuple(STEP_S if t == "step" else 0.0 for t in TERMS), 64, 512, 512)
    loads = dict.fromkeys(LOAD_TERMS, 0.0) | {"load": 0.5}
    return SimEngine({"m": spec()}, {"m": costs}, {"m": loads}, None, seed=0, watts=watts, strides=strides)


def fleet(
    count: int,
    source: Source,
    router: Router | None = None,
    outages: Sequence[Outage] = (),
    *,
    engine: Callable[[], Engine] = stub,
    max_stride: int = 1,
    budget: int = 100_000,
    max_batch: int = 8,
    gaps: float = 1.0,
) -> FleetRun:
    def begin(name: str) -> Callable[[int], Life]:
        def life(_: int) -> Life:
            recorder = TableRecorder(replica=name)
            one = server(recorder=recorder, budget=budget, max_batch=max_batch)
            one.max_stride = max_stride
            return Life(one, engine(), recorder)

        return life

    members = [(f"r-{k}", begin(f"r-{k}")) for k in range(count)]
    nobody, chosen = TableRecorder(replica=None), router or RoundRobin()
    return FleetRun(members, chosen, source, outages, recorder=nobody, gaps=gaps, may_hurry=max_stride > 1)


def tables(run: FleetRun) -> Tables:
    lives = [life.recorder for replica in run.replicas for life in replica.lives]
    return merged((*lives, run.recorder), run.retries)


def ran(*arguments: Any, **options: Any) -> Tables:
    run = fleet(*arguments, **options)
    run.run()
    return tables(run)


def by_id(found: Tables) -> dict[int, dict[str, Any]]:
    return {row["request_id"]: row for row in found.requests.to_pylist()}


def events(found: Tables, kind: str) -> list[dict[str, Any]]:
    rows = [row for row in found.events.to_pylist() if row["kind"] == kind]
    return [{"time_s": row["time_s"], "replica": row["replica"], **json.loads(row["detail"])} for row in rows]


# --- one moment -------------------------------------------------------------------------------------------------------


def test_a_step_that_ends_when_a_request_arrives_counts_as_ended() -> None:
    """Request 0 leaves r-0 at 0.75 s, request 1 is still at r-1: the one that arrives then goes to r-0."""
    arrivals = [arrival(0, 0.0, output=2), arrival(1, 0.0, output=9), arrival(2, 0.75, output=1)]
    found = by_id(ran(2, OpenLoop(arrivals), LeastOutstanding()))
    assert found[0]["finish_s"] == 0.75
    assert found[2]["replica"] == "r-0"
    assert found[2]["admitted_s"] == 0.75


def test_a_replica_that_comes_back_when_a_request_arrives_takes_it() -> None:
    arrivals = [arrival(0, 0.0, output=40), arrival(1, 2.0, output=1)]
    found = by_id(ran(2, OpenLoop(arrivals), LeastOutstanding(), [Outage(1, 1.0, 2.0)]))
    assert found[1]["replica"] == "r-1"
    assert found[1]["admitted_s"] == 2.5  # behind the load


def test_who_fails_when_a_request_arrives_does_not_get_it() -> None:
    found = by_id(ran(2, OpenLoop([arrival(0, 1.0)]), LeastOutstanding(), [Outage(0, 1.0, None)]))
    assert found[0]["replica"] == "r-1"
    assert found[0]["retries"] == 0


def test_a_step_that_ends_at_the_failure_is_done() -> None:
    found = ran(2, OpenLoop([arrival(0, 0.0, output=2)]), LeastOutstanding(), [Outage(0, 0.75, None)])
    assert by_id(found)[0] | {"replica": "r-0", "retries": 0, "finish_s": 0.75} == by_id(found)[0]


def test_two_that_fail_together_send_nothing_to_each_other() -> None:
    arrivals = [arrival(k, 0.0, output=40) for k in range(6)]
    found = ran(3, OpenLoop(arrivals), LeastOutstanding(), [Outage(0, 1.0, None), Outage(1, 1.0, None)])
    assert {row["replica"] for row in by_id(found).values()} == {"r-2"}
    assert [row["retries"] for _, row in sorted(by_id(found).items())] == [1, 1, 0, 1, 1, 0]
    assert [e["to"] for e in events(found, "rerouted")] == [{"r-2": 2}, {"r-2": 2}]
    # in order of arrival, whichever replica lost them
    assert [by_id(found)[k]["finish_s"] for k in (0, 1, 3, 4)] == sorted(
        by_id(found)[k]["finish_s"] for k in (0, 1, 3, 4)
    )


# --- failures ---------------------------------------------------------------------------------------------------------


def test_the_step_under_way_is_lost_and_counted() -> None:
    """Load [0, 0.5], prompt [0.5, 0.625], tokens each 0.125 s; the failure at 1.03125 s is a quarter into a step."""
    run = fleet(
        2, OpenLoop([arrival(0, 0.0, output=30)]), RoundRobin(), [Outage(0, 1.03125, 3.0)],
        engine=lambda: simulated(watts=40.0), max_stride=1000,
    )  # fmt: skip
    run.run()
    found = tables(run)
    (lost,) = [row for row in found.steps.to_pylist() if row["kind"] == "lost"]
    assert (lost["start_s"], lost["seconds"], lost["energy_j"]) == (1.0, 0.03125, 40.0 * 0.03125)
    assert (lost["rows"], lost["decode_rows"], lost["tokens_out"], lost["running"]) == (1, 1, 0, 0)
    assert lost["kv_used_bytes"] == 2 * 16 * 6 * 2  # 20 + 4 tokens in two blocks
    before = [row for row in found.steps.to_pylist() if row["replica"] == "r-0" and row["start_s"] < 1.0]
    assert [row["kind"] for row in before] == ["load", *["run"] * 4]
    assert sum(row["tokens_out"] for row in before) == 4
    row = by_id(found)[0]
    assert (row["replica"], row["retries"], row["output_tokens"]) == ("r-1", 1, 30)
    assert row["admitted_s"] == 1.03125
    assert row["first_token_s"] == 1.03125 + STEP_S
    (failed,) = events(found, "failed")
    assert failed == {
        "time_s": 1.03125, "replica": "r-0", "running": 1, "waiting": 0, "placement": "m@6", "lost_s": 0.03125
    }  # fmt: skip


def test_a_load_can_be_lost() -> None:
    found = ran(1, OpenLoop([arrival(0, 0.0)]), RoundRobin(), [Outage(0, 0.25, 1.0)])
    rows = [(r["kind"], r["start_s"], r["seconds"]) for r in found.steps.to_pylist()][:3]
    assert rows == [("lost", 0.0, 0.25), ("load", 1.0, 0.5), ("run", 1.5, STEP_S)]
    assert [e["from"] for e in events(found, "transition")] == [None]


def test_an_idle_replica_loses_no_time() -> None:
    found = ran(1, OpenLoop([arrival(0, 5.0)]), RoundRobin(), [Outage(0, 1.0, 2.0)])
    rows = [(r["kind"], r["start_s"], r["seconds"]) for r in found.steps.to_pylist()][:3]
    assert rows == [("load", 0.0, 0.5), ("lost", 1.0, 0.0), ("load", 2.0, 0.5)]
    assert events(found, "rerouted") == []


def test_requests_wait_until_a_replica_is_back() -> None:
    arrivals = [arrival(0, 0.0, output=30), arrival(1, 1.5, output=1)]
    found = ran(1, OpenLoop(arrivals), RoundRobin(), [Outage(0, 1.0, 4.0)])
    assert [row["admitted_s"] for _, row in sorted(by_id(found).items())] == [4.5, 4.5]
    assert events(found, "rerouted")[0]["to"] == {}
    assert events(found, "restarted")[0]["requests_waiting"] == 2


@pytest.mark.parametrize("closed", [False, True])
def test_requests_no_replica_will_take_are_refused(closed: bool) -> None:
    arrivals = [arrival(k, 0.75 * k, output=8) for k in range(6)]
    bodies = [Body(a.request.prompt_tokens, a.request.max_tokens, a.content) for a in arrivals]
    source = ClosedLoop(bodies, 2, 0.25) if closed else OpenLoop(arrivals)
    found = by_id(ran(2, source, LeastOutstanding(), [Outage(0, 1.0, None), Outage(1, 2.0, None)]))
    assert sorted(found) == list(range(6))
    refused = [row for row in found.values() if row["status"] == "refused"]
    assert refused
    for row in refused:
        assert (row["refusal"], row["replica"], row["output_tokens"]) == (NO_REPLICA, None, 0)
        assert row["finish_s"] >= 2.0


def test_what_comes_after_the_last_request_is_no_part_of_the_run() -> None:
    found = ran(2, OpenLoop([arrival(0)]), RoundRobin(), [Outage(0, 100.0, 200.0)])
    assert events(found, "failed") == []
    assert max(r["start_s"] for r in found.steps.to_pylist()) < 100


def test_a_router_that_chooses_who_is_down_is_told() -> None:
    class Stubborn:
        def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
            return 0

    with pytest.raises(InputError, match=r"fleet\.router: the router chose a replica that is down .*r-0"):
        fleet(2, OpenLoop([arrival(0, 2.0)]), Stubborn(), [Outage(0, 1.0, None)]).run()


@pytest.mark.parametrize("max_stride", [1000, ANY_STRIDE])
def test_a_status_is_read_only_and_counts_what_is_under_way(max_stride: int) -> None:
    seen: list[tuple[int, int, int, int]] = []

    class Watching:
        def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
            r = replicas[0]
            seen.append((r.outstanding, r.waiting, r.running, r.kv_used_bytes))
            with pytest.raises(AttributeError):
                r.outstanding = 0  # type: ignore[misc]
            return 0

    arrivals = [arrival(0, 0.0, prompt=20, output=60), arrival(1, 3.0), arrival(2, 3.01), arrival(3, 3.02)]
    run = fleet(1, OpenLoop(arrivals), Watching(), engine=simulated, max_stride=max_stride)
    run.run()
    block = 16 * 6 * 2
    # at 3 s a step of 39 tokens ends; at 3.01 s the prompt of request 1 is read; request 2 waits behind that step
    assert seen == [(0, 0, 0, 0), (1, 0, 1, 3 * block), (2, 0, 2, 5 * block), (3, 1, 2, 5 * block)]


@pytest.mark.parametrize("max_stride", [1000, ANY_STRIDE])
def test_a_status_is_true_in_the_middle_of_a_stride(max_stride: int) -> None:
    """Replica 0 reads 20 tokens up to 0.625 s, then decodes; its step from 2.125 s on takes the third block."""
    seen: list[tuple[float, int, int, int]] = []

    class Watching:
        def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
            r = replicas[0]
            seen.append((request.arrival_s, r.outstanding, r.running, r.kv_used_bytes // 192))
            return 0 if request.id < 2 else 1

    arrivals = [arrival(0, 0.0, prompt=20, output=60), arrival(1, 0.0, prompt=20, output=16)]
    arrivals += [arrival(k, t) for k, t in enumerate((0.5625, 0.625, 2.0, 2.125, 2.25, 2.375, 2.5), 2)]
    ran(2, OpenLoop(arrivals), Watching(), engine=simulated, max_stride=max_stride, gaps=100.0)
    assert seen[2:] == [
        (0.5625, 2, 2, 4), (0.625, 2, 2, 4), (2.0, 2, 2, 4), (2.125, 2, 2, 4), (2.25, 2, 2, 6), (2.375, 2, 2, 6),
        (2.5, 1, 1, 3),
    ]  # fmt: skip


# --- strides ----------------------------------------------------------------------------------------------------------

ticks = st.integers(0, 40).map(lambda k: k * STEP_S)


@st.composite
def arrivals_on_the_beat(draw: st.DrawFn) -> list[Arrival]:
    """Arrivals when steps end, most of them."""
    times = sorted(draw(st.lists(st.one_of(ticks, st.just(1.03)), min_size=1, max_size=12)))
    return [arrival(k, t, draw(st.integers(1, 40)), draw(st.integers(1, 40))) for k, t in enumerate(times)]


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(arrivals=arrivals_on_the_beat(), outages=st.lists(st.tuples(ticks, ticks), max_size=3), kv=st.booleans())
def test_strides_change_nothing_when_all_is_due_at_once(
    arrivals: list[Arrival], outages: list[tuple[float, float]], kv: bool
) -> None:
    falls = [Outage(k, at, at + after if after else None) for k, (at, after) in enumerate(outages)]
    falls.sort(key=lambda o: (o.at_s, o.index))

    def run(stride: int) -> Tables:
        router = LeastKv() if kv else LeastOutstanding()
        source = OpenLoop(arrivals)
        return ran(
            3,
            source,
            router,
            falls,
            engine=lambda: simulated(2.0, stride > 1),
            max_stride=stride,
            budget=6500 + 20 * 192,
        )

    whole, single = run(1000), run(1)
    for name in ("requests", "steps", "events"):
        assert getattr(whole, name).to_pylist() == getattr(single, name).to_pylist(), name
