"""Routers over replicas that are queues with one server each: what queueing theory says of them."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from heliosim.registry import ROUTERS
from heliosim.streams import stream
from heliosim.workload import OpenLoop
from tests.helpers import StubEngine, arrival
from tests.unit.test_fleet import fleet, tables

MEAN_S = 0.01


def waits(router: str, servers: int, load: float, requests: int, seed: int) -> npt.NDArray[np.float64]:
    """Waiting times of requests of one exponential step each, one at a time; the first tenth left out."""
    times = np.cumsum(stream(seed, "arrivals").exponential(MEAN_S / load / servers, requests))
    service = np.maximum(1e-9, stream(seed, "service").exponential(MEAN_S, requests))
    arrivals = [arrival(k, at=float(t), prompt=1, output=1) for k, t in enumerate(times)]
    run = fleet(
        servers,
        OpenLoop(arrivals),
        ROUTERS.get(router)(partial(stream, seed, "router")),
        engine=lambda: StubEngine(seconds=lambda step: float(service[step.batch.requests[0]])),
        max_batch=1,
    )
    run.run()
    table = tables(run).requests
    order = np.argsort(table["request_id"].to_numpy())
    found = (table["admitted_s"].to_numpy() - table["arrival_s"].to_numpy())[order]
    return found[requests // 10 :]


def erlang_c_wait(servers: int, load: float) -> float:
    """Mean wait of M/M/c: one queue before c servers (Erlang's C formula)."""
    offered = servers * load
    busy = offered**servers / math.factorial(servers) / (1 - load)
    waiting = busy / (sum(offered**k / math.factorial(k) for k in range(servers)) + busy)
    return waiting * MEAN_S / (servers * (1 - load))


def round_robin_wait(servers: int, load: float) -> float:
    """Mean wait of GI/M/1 with every c-th arrival of a Poisson stream: sigma/(1-sigma) services, where sigma is the
    root below 1 of sigma = A*(mu (1 - sigma)), A* the transform of the gap of c arrivals.
    """
    rate, sigma = servers * load, 0.5
    for _ in range(500):
        sigma = (rate / (rate + 1 - sigma)) ** servers
    return sigma / (1 - sigma) * MEAN_S


@pytest.mark.parametrize("load", [0.6, 0.8])
def test_round_robin_is_a_queue_with_more_even_arrivals(load: float) -> None:
    means = [waits("round-robin", 2, load, 12_000, seed).mean() for seed in range(4)]
    half_width = 3.182 * np.std(means, ddof=1) / 2  # Student t, 3 degrees of freedom, 95 %
    expected = round_robin_wait(2, load)
    assert abs(np.mean(means) - expected) <= max(1.5 * half_width, 0.03 * expected)
    assert half_width < 0.25 * expected


def test_routers_stand_in_the_order_of_what_they_know() -> None:
    """Least outstanding waits longer than one queue for all would (M/M/c), less than two choices, less than none."""
    mean = {name: float(np.mean([waits(name, 4, 0.85, 8_000, seed).mean() for seed in range(2)])) for name in (
        "least-outstanding", "power-of-two", "round-robin"
    )}  # fmt: skip
    assert 0.8 * erlang_c_wait(4, 0.85) < mean["least-outstanding"]
    assert 1.1 * mean["least-outstanding"] < mean["power-of-two"]
    assert 1.1 * mean["power-of-two"] < mean["round-robin"]
