"""The driver, server and batcher reproduce queueing theory when steps take known times."""

from __future__ import annotations

import numpy as np
import pytest

from heliosim.recorder import TableRecorder
from heliosim.simulate import simulate_server
from heliosim.streams import stream
from heliosim.types import Served, tick
from heliosim.workload import OpenLoop
from tests.helpers import StubEngine, arrival, server

MEAN_S = 0.01


class _Keep(TableRecorder):
    """Keeps Served records as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Served] = []

    def served(self, record: Served) -> None:
        self.kept.append(record)


def run_single_server(load: float, kind: str, requests: int, seed: int) -> list[Served]:
    """One request at a time, one token each: a queue with one server whose service time is the step's."""
    gaps = stream(seed, "arrivals").exponential(MEAN_S / load, requests)
    service = stream(seed, "service").exponential(MEAN_S, requests)
    arrivals = [arrival(k, at=float(t), prompt=1, output=1) for k, t in enumerate(np.cumsum(gaps))]
    times = {k: MEAN_S if kind == "D" else max(1e-9, float(s)) for k, s in enumerate(service)}
    engine = StubEngine(seconds=lambda run: times[run.batch.requests[0]])
    recorder = _Keep()
    simulate_server(server(max_batch=1, recorder=recorder), engine, OpenLoop(arrivals))
    return recorder.kept


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize(("kind", "factor"), [("M", 1.0), ("D", 0.5)])
def test_waiting_time_matches_pollaczek_khinchine(load: float, kind: str, factor: float) -> None:
    """Mean wait = rho/(1-rho) * s for M/M/1 and half of that for M/D/1, within the spread of six independent runs."""
    means = []
    for seed in range(6):
        served = run_single_server(load, kind, 20_000, seed)
        waits = [s.admitted_s - s.arrival_s for s in served if s.admitted_s is not None]
        means.append(np.mean(waits[1000:]))
    expected = factor * load / (1 - load) * MEAN_S
    half_width = 2.571 * np.std(means, ddof=1) / np.sqrt(len(means))  # Student t, 5 degrees of freedom, 95 %
    assert abs(np.mean(means) - expected) <= max(1.5 * half_width, 0.02 * expected)
    assert half_width < 0.15 * expected


def test_littles_law_holds_exactly() -> None:
    """Time-averaged number in system = arrival rate x mean time in system, over a run that starts and ends empty."""
    served = run_single_server(0.7, "M", 5_000, 3)
    end = max(s.finish_s for s in served)
    area = sum(s.finish_s - s.arrival_s for s in served)
    events = sorted([(s.arrival_s, 1) for s in served] + [(s.finish_s, -1) for s in served])
    integral, inside, last = 0.0, 0, 0.0
    for at, change in events:
        integral += inside * (at - last)
        inside, last = inside + change, at
    assert inside == 0
    assert integral / end == pytest.approx(len(served) / end * (area / len(served)), rel=1e-9)


def test_more_load_means_longer_waits() -> None:
    waits = []
    for load in (0.3, 0.6, 0.9):
        served = run_single_server(load, "M", 5_000, 1)
        waits.append(np.mean([s.admitted_s - s.arrival_s for s in served if s.admitted_s is not None]))
    assert waits[0] < waits[1] < waits[2]


def test_times_are_on_the_clock_grid() -> None:
    for record in run_single_server(0.8, "M", 300, 5):
        assert record.finish_s == tick(record.finish_s)
        assert record.admitted_s is not None
        assert record.first_token_s is not None
        assert record.arrival_s <= record.admitted_s < record.first_token_s <= record.finish_s
