"""Routers choose by what they see, never a replica that is down, and the same again from the same seed."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosim.registry import ROUTERS
from heliosim.serving.routing import LeastKv, LeastOutstanding, PowerOfTwo, RoundRobin, Router
from heliosim.streams import stream
from heliosim.types import Request

ALL = ("least-kv", "least-outstanding", "power-of-two", "round-robin")


class Seen(NamedTuple):
    name: str = "r"
    is_up: bool = True
    outstanding: int = 0
    waiting: int = 0
    running: int = 0
    kv_used_bytes: int = 0
    kv_total_bytes: int = 100


def request(k: int = 0) -> Request:
    return Request(k, 0.0, 10, 10)


def built(name: str, seed: int = 0) -> Router:
    router: Router = ROUTERS.get(name)(partial(stream, seed, "router"))
    return router


def test_the_names_are_registered() -> None:
    assert set(ALL) <= set(ROUTERS.names())


def test_round_robin_goes_round_and_leaves_out_who_is_down() -> None:
    router = RoundRobin()
    three = [Seen(), Seen(), Seen()]
    assert [router.choose(request(k), three) for k in range(4)] == [0, 1, 2, 0]
    down = [Seen(), Seen(is_up=False), Seen()]
    assert [router.choose(request(k), down) for k in range(3)] == [2, 0, 2]
    assert [router.choose(request(k), three) for k in range(3)] == [0, 1, 2]


def test_least_outstanding_takes_the_first_of_equals() -> None:
    router = LeastOutstanding()
    assert router.choose(request(), [Seen(outstanding=3), Seen(outstanding=1), Seen(outstanding=1)]) == 1
    assert router.choose(request(), [Seen(outstanding=3), Seen(is_up=False), Seen(outstanding=4)]) == 0


def test_least_kv_compares_shares_then_outstanding_requests() -> None:
    router = LeastKv()
    big, small = Seen(kv_used_bytes=50, kv_total_bytes=1000), Seen(kv_used_bytes=20, kv_total_bytes=100)
    assert router.choose(request(), [small, big]) == 1
    assert router.choose(request(), [Seen(outstanding=2), Seen(outstanding=1), Seen(outstanding=1)]) == 1
    assert router.choose(request(), [small, Seen(kv_total_bytes=0, outstanding=1)]) == 1


def test_power_of_two_draws_pairs_evenly_and_takes_the_emptier() -> None:
    router = PowerOfTwo(partial(stream, 0))
    equal = [Seen() for _ in range(4)]
    counts = Counter(router.choose(request(k), equal) for k in range(6000))
    # the lower of two drawn without replacement: 0 in half of the pairs, 3 never
    assert [round(counts[k] / 6000, 1) for k in range(4)] == [0.5, 0.3, 0.2, 0.0]
    busy = [Seen(outstanding=9), *(Seen() for _ in range(3))]
    assert 0 not in {router.choose(request(k), busy) for k in range(500)}


def test_power_of_two_draws_depend_on_the_request_alone() -> None:
    statuses = [Seen(outstanding=k % 3) for k in range(7)]
    forward = [PowerOfTwo(partial(stream, 5)).choose(request(k), statuses) for k in (3000, 1, 1023, 1024)]
    router = PowerOfTwo(partial(stream, 5))
    assert [router.choose(request(k), statuses) for k in (3000, 1, 1023, 1024)] == forward
    others = [PowerOfTwo(partial(stream, 6)).choose(request(k), statuses) for k in range(40)]
    assert others != [PowerOfTwo(partial(stream, 5)).choose(request(k), statuses) for k in range(40)]


statuses = st.lists(
    st.builds(Seen, is_up=st.booleans(), outstanding=st.integers(0, 3), kv_used_bytes=st.integers(0, 100)),
    min_size=1,
    max_size=6,
).filter(lambda seen: any(s.is_up for s in seen))


@pytest.mark.parametrize("name", ALL)
@given(turns=st.lists(statuses, min_size=1, max_size=5), seed=st.integers(0, 3))
def test_nobody_chooses_a_replica_that_is_down(name: str, turns: list[list[Seen]], seed: int) -> None:
    router, again = built(name, seed), built(name, seed)
    for k, seen in enumerate(turns):
        chosen = router.choose(request(k), seen)
        assert seen[chosen].is_up
        assert again.choose(request(k), seen) == chosen


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.sampled_from(["least-outstanding", "power-of-two"]))
def test_counts_alone_suffice_where_all_are_up(counts: list[int], name: str) -> None:
    one, other = built(name), built(name)
    shown = [Seen(outstanding=count) for count in counts]
    for k in range(20):
        assert other.choose_among(request(k), counts) == one.choose(request(k), shown)  # type: ignore[attr-defined]


@given(st.integers(1, 9), st.lists(st.integers(0, 30), max_size=4))
def test_round_robin_deals_as_it_chooses(replicas: int, rounds: list[int]) -> None:
    one, other = RoundRobin(), RoundRobin()
    for requests in rounds:
        chosen = [one.choose(request(k), [Seen()] * replicas) for k in range(requests)]
        shares = [list(range(requests))[share] for share in other.deal(requests, replicas)]
        assert shares == [[k for k, place in enumerate(chosen) if place == own] for own in range(replicas)]
