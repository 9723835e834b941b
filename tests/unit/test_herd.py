"""A fleet hurried from arrival to arrival, against the same step by step under SimPy: its tables, what routers see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliosim.fleet import FleetRun
from heliosim.fleet_tables import merged
from heliosim.recorder import TableRecorder, Tables
from heliosim.replica import Life
from heliosim.runs import ANY_STRIDE
from heliosim.serving.routing import LeastKv, LeastOutstanding, PowerOfTwo, ReplicaStatus, RoundRobin, Router
from heliosim.streams import stream
from heliosim.types import Arrival, Request
from heliosim.workload import OpenLoop
from tests.helpers import arrival, server
from tests.unit.test_fleet import STEP_S, simulated

ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-outstanding": LeastOutstanding,
    "least-kv": LeastKv,
    "power-of-two": lambda: PowerOfTwo(lambda *name: stream(0, "router", *name)),
}


class Curious:
    """Takes turns by what it sees, and remembers all of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def choose(self, request: Request, replicas: Sequence[ReplicaStatus]) -> int:
        shown = [
            (r.name, r.is_up, r.outstanding, r.waiting, r.running, r.kv_used_bytes, r.kv_total_bytes) for r in replicas
        ]
        self.seen.append((request.id, *shown))
        return (request.id + sum(r[4] for r in shown)) % len(replicas)


def served(arrivals: Sequence[Arrival], router: Router, hurried: bool, max_stride: int, budget: int = 40_000) -> Tables:
    def begin(name: str) -> Callable[[int], Life]:
        def life(_: int) -> Life:
            recorder = TableRecorder(replica=name)
            one = server(recorder=recorder, budget=budget, max_batch=4)
            one.max_stride = max_stride
            return Life(one, simulated(2.0, strides=max_stride > 1), recorder)

        return life

    members = [(f"r-{k}", begin(f"r-{k}")) for k in range(3)]
    nobody = TableRecorder(replica=None)
    run = FleetRun(members, router, OpenLoop(arrivals), recorder=nobody, may_hurry=hurried)
    run.run()
    lives = [life.recorder for replica in run.replicas for life in replica.lives]
    return merged((*lives, nobody), run.retries)


ticks = st.integers(0, 60).map(lambda k: k * STEP_S)


@st.composite
def arrivals_on_the_beat(draw: st.DrawFn) -> list[Arrival]:
    """Arrivals when steps end, most of them; some together, some too long for the pool or the context."""
    times = sorted(
        draw(st.lists(st.one_of(ticks, st.floats(0, 8).map(lambda s: round(s, 2))), min_size=1, max_size=24))
    )
    lengths = st.one_of(st.integers(1, 60), st.just(300))
    return [arrival(k, t, draw(lengths), draw(st.integers(1, 40))) for k, t in enumerate(times)]


def assert_equal(one: Tables, other: Tables) -> None:
    for name in ("requests", "steps", "events"):
        assert getattr(one, name).to_pylist() == getattr(other, name).to_pylist(), name


@settings(deadline=None, derandomize=True, max_examples=99, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(
    arrivals=arrivals_on_the_beat(),
    name=st.sampled_from([*ROUTERS, "curious"]),
    budget=st.sampled_from([9000, 40_000]),
)
@pytest.mark.parametrize("max_stride", [1000, ANY_STRIDE])
def test_hurrying_changes_nothing(max_stride: int, arrivals: list[Arrival], name: str, budget: int) -> None:
    routers = [ROUTERS[name]() if name in ROUTERS else Curious() for _ in range(2)]
    hurried = served(arrivals, routers[0], True, max_stride, budget)
    assert_equal(hurried, served(arrivals, routers[1], False, 1, budget))
    if isinstance(routers[0], Curious) and isinstance(routers[1], Curious):
        assert routers[0].seen == routers[1].seen


def test_progress_is_told_in_order_of_time() -> None:
    told: list[float] = []
    members = [
        (f"r-{k}", lambda _, k=k: Life(server(), simulated(), TableRecorder(replica=f"r-{k}"))) for k in range(2)
    ]
    arrivals = [arrival(k, 0.1 * k, output=5) for k in range(6)]
    FleetRun(members, LeastOutstanding(), OpenLoop(arrivals), on_progress=told.append).run()
    assert len(told) > 3
    assert told == sorted(told)
