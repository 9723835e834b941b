"""Closed forms of queues against tables and each other, and the serving code against the textbook's recursions."""

from __future__ import annotations

import numpy as np
import pytest

from heliosim.queueing import QueueCase, erlang_c, simulate_waits
from heliosim.streams import stream

EVERY = [
    QueueCase(service, load, servers)
    for service, servers in (("exponential", 1), ("constant", 1), ("erlang-2", 1), ("exponential", 4))
    for load in (0.5, 0.8, 0.9)
]  # fmt: skip


@pytest.mark.parametrize(
    ("servers", "load", "value"), [(1, 0.7, 0.7), (2, 0.5, 1 / 3), (4, 0.5, 0.173913), (3, 2 / 3, 0.444444)]
)
def test_erlang_c_by_hand(servers: int, load: float, value: float) -> None:
    assert erlang_c(servers, load) == pytest.approx(value, abs=1e-5)


def test_erlangs_series_by_hand() -> None:
    """M/D/1 at load 0.5: P(W = 0) = 0.5, P(W <= 1) = 0.5 e^0.5, P(W <= 2) = 0.5 (e - 0.5 e^0.5)."""
    queue = QueueCase("constant", 0.5)
    assert queue.wait_cdf(0.0) == pytest.approx(0.5)
    assert queue.wait_cdf(1.0 - 1e-12) == pytest.approx(0.5 * np.exp(0.5))
    assert queue.wait_cdf(2.0 - 1e-12) == pytest.approx(0.5 * (np.e - 0.5 * np.exp(0.5)))


@pytest.mark.parametrize("queue", EVERY, ids=lambda q: f"{q.name}-{q.load:g}")
def test_the_mean_is_the_integral_of_the_tail(queue: QueueCase) -> None:
    """Two formulas of different origin (Pollaczek-Khinchine or Erlang for means, distributions here) agree."""
    times = np.linspace(0, 24, 40_001)
    tail = np.array([1 - queue.wait_cdf(float(t)) for t in times])
    integral = np.trapezoid(tail, times)
    if tail[-1] > 1e-6:  # beyond 24 it is exponential
        integral += tail[-1] * 12 / np.log(tail[20_000] / tail[40_000])
    assert integral == pytest.approx(queue.mean_wait, rel=1e-3)


@pytest.mark.parametrize("queue", EVERY, ids=lambda q: f"{q.name}-{q.load:g}")
def test_quantiles_invert_the_distribution(queue: QueueCase) -> None:
    top = queue.wait_quantile(0.95)
    assert queue.wait_cdf(top) == pytest.approx(0.95, abs=1e-9)
    assert queue.wait_quantile(0.01) == 0.0


def test_the_quantile_of_mm1_is_the_formula() -> None:
    assert QueueCase("exponential", 0.9).wait_quantile(0.95) == pytest.approx(np.log(0.9 / 0.05) / 0.1)


@pytest.mark.parametrize("load", [0.0, 1.0])
def test_loads_without_a_steady_state_are_refused(load: float) -> None:
    with pytest.raises(ValueError, match="load"):
        QueueCase("constant", load)


def _draws(queue: QueueCase, customers: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals and service times as ``simulate_waits`` draws them."""
    rng = stream(seed, "queue", "here")
    gaps = rng.exponential(1 / (queue.load * queue.servers), customers)
    if queue.service == "constant":
        return np.cumsum(gaps), np.ones(customers)
    return np.cumsum(gaps), rng.gamma(2.0, 0.5, customers) if queue.service == "erlang-2" else rng.exponential(
        1.0, customers
    )


@pytest.mark.parametrize("queue", EVERY, ids=lambda q: f"{q.name}-{q.load:g}")
def test_the_serving_code_waits_as_the_recursion_says(queue: QueueCase) -> None:
    """Kiefer and Wolfowitz: each customer goes to the server that is free first. Equal, but for rounding to ticks."""
    arrivals, service = _draws(queue, 800, 3)
    free_at = np.zeros(queue.servers)
    expected = []
    for at, needs in zip(arrivals, service, strict=True):
        first = int(free_at.argmin())
        start = max(at, free_at[first])
        expected.append(start - at)
        free_at[first] = start + needs
    assert simulate_waits(queue, 800, 3, "here") == pytest.approx(np.array(expected), abs=1e-2)
    assert max(expected) > 1
