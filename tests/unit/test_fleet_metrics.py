"""Metrics of two replicas against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosim import charts
from heliosim.fleet_metrics import by_replica, held_until, peak_together
from heliosim.fleet_tables import merged
from heliosim.fleet_view import failure_notes
from heliosim.formats.results import RunResults
from heliosim.metrics import Summary, summarise
from heliosim.recorder import TableRecorder
from heliosim.scenario import Failure, Fleet, ReplicaGroup
from heliosim.types import Tokens
from tests.unit.test_metrics import INFO, M4, N2, emit, served, step

LOAD: dict[str, Any] = {"kind": "load", "rows": 0, "layers_run": 0, "tokens_out": 0, "running": 0}
SMALL: dict[str, Any] = {"model": "n", "depth": 2, "layers_run": 2, "weights_bytes": 50}
YAML = """
controller: {kind: fixed, model: m, depth: 4, threshold: 0.6}
memory: {budget_bytes: 1000}
fleet:
  replicas:
    - {name: a, count: 1}
    - {name: b, count: 1, memory: {budget_bytes: 400}, controller: {kind: fixed, model: n, depth: 2, threshold: 0.9}}
"""


def two() -> RunResults:
    """a-0: load m@4 [0, 1], step [1, 3], fails at 4 while idle, load [6, 7], load n@2 [7, 8], step [8, 10].
    b-0: load n@2 [0, 2], steps [2, 3] and [3, 5].
    """
    first, second, other = (TableRecorder(replica=name) for name in ("a-0", "a-0", "b-0"))
    first.step(step(0.0, 1.0, reason="serve", **LOAD))
    emit(first, 3.0, M4, Tokens((0, 1), (4, 4), (0.7, 0.5), (-0.1, -0.1), (True, False)))
    first.step(step(1.0, 2.0, rows=2, tokens_out=2, kv_used_bytes=40))
    first.served(served(0, 0.0, 3.0, 1, admitted_s=1.0, first_token_s=3.0, placement=M4))
    first.step(step(4.0, 0.0, **(LOAD | {"kind": "lost", "energy_j": 0.0})))
    first.event(4.0, "failed", {"running": 1})
    first.event(4.0, "rerouted", {"requests": 1, "to": {"a-0": 1}})
    second.step(step(6.0, 1.0, reason="serve", **LOAD))
    second.step(step(7.0, 1.0, reason="switch", **{**LOAD, **SMALL, "layers_run": 0}))
    emit(second, 10.0, N2, Tokens((1,), (2,), (0.7,), (-0.1,), (True,)))
    second.step(step(8.0, 2.0, kv_used_bytes=20, running=0, **SMALL))
    second.served(served(1, 1.0, 10.0, 1, admitted_s=8.0, first_token_s=10.0, placement=N2))
    other.step(step(0.0, 2.0, reason="serve", **{**LOAD, **SMALL, "layers_run": 0}))
    emit(other, 3.0, N2, Tokens((2,), (2,), (0.7,), (-0.1,), (False,)))
    other.step(step(2.0, 1.0, kv_used_bytes=10, **SMALL))
    emit(other, 5.0, N2, Tokens((2,), (2,), (0.95,), (-0.1,), (True,)))
    other.step(step(3.0, 2.0, kv_used_bytes=30, running=0, **SMALL))
    other.served(served(2, 0.0, 5.0, 2, admitted_s=2.0, first_token_s=3.0, placement=N2))
    tables = merged((first, second, other, TableRecorder(replica=None)), {1: 1})
    info = INFO.model_copy(update={"deployed": {}})
    return RunResults(info, YAML, tables.requests, tables.steps, tables.tokens, tables.events)


@pytest.fixture(name="summary")
def _summary() -> Summary:
    return summarise(two())


EXPECTED: dict[str, float] = {
    "completed": 3,
    "duration": 10.0,
    "total_output_tokens": 4,
    "steps": 4,
    "mean_batch_size": 5 / 4,
    "utilisation": (1 + 2 + 1 + 1 + 2 + 2 + 1 + 2) / 10 / 2,
    "mean_weights_bytes": (100 * 4 + 100 * 1 + 50 * 3 + 50 * 10) / 10,
    "peak_weights_bytes": 150,
    # a-0's step of 40 B is held until the failure, b-0's as long as they last
    "mean_kv_bytes": (40 * 3 + 20 * 2 + 10 * 1 + 30 * 2) / 10,
    "peak_kv_bytes": 70,
    "transitions": 1,
    "initial_load_s": 2.0,
    "load_s": 2.0,
    "energy_j": 2.0 * 8,
    "layers_per_token": (4 + 2 + 2 + 2) / 4,
    # thresholds: 0.6 at a-0 (0.7 twice), 0.9 at b-0 (0.7, 0.95)
    "low_confidence_share": 1 / 4,
}


@pytest.mark.parametrize("metric", EXPECTED)
def test_two_replicas(summary: Summary, metric: str) -> None:
    assert summary.value(metric) == pytest.approx(EXPECTED[metric])


def test_loads_say_whose_they_are(summary: Summary) -> None:
    assert summary.transition_sequence == (
        "a-0: m@4 (serve)", "b-0: n@2 (serve)", "a-0: m@4 (serve)", "a-0: n@2 (switch)"
    )  # fmt: skip


def test_the_lost_attempt_leaves_no_token() -> None:
    run = two()
    assert run.tokens["request_id"].to_pylist() == [0, 2, 2, 1]
    assert run.tokens["position"].to_pylist() == [0, 0, 1, 0]
    assert [run.steps["replica"][k].as_py() for k in run.tokens["step"].to_pylist()] == ["a-0", "b-0", "b-0", "a-0"]
    assert sum(run.steps["tokens_out"].to_pylist()) > run.tokens.num_rows
    assert run.requests["retries"].to_pylist() == [0, 0, 1]
    assert run.budget_bytes == 1400


def test_each_replica() -> None:
    a, b = by_replica(two())
    assert (a.name, a.requests, a.share, a.failures, a.lost_requests) == ("a-0", 2, pytest.approx(2 / 3), 1, 1)
    assert (a.utilisation, a.output_throughput) == (pytest.approx(0.7), pytest.approx(0.2))
    assert a.p99_ttft_ms == pytest.approx(3000 + 0.99 * 6000)
    assert (b.name, b.requests, b.failures, b.p99_ttft_ms) == ("b-0", 1, 0, pytest.approx(3000))


def test_notes_of_failures() -> None:
    fleet = Fleet(
        replicas=(ReplicaGroup(name="a"), ReplicaGroup(name="b")),
        failures=(Failure(replica="a-0", at_s=4, restart_after_s=2), Failure(replica="b-0", at_s=40)),
    )
    run = two()
    notes = failure_notes(run, fleet, by_replica(run))
    assert notes[0].startswith("1 request was routed again")
    assert notes[1] == "1 of 2 failures came after the last request had left."


def test_the_timeline_sums_what_replicas_hold() -> None:
    data = charts.timeline_data(two())
    series = data.series.drop_duplicates("time_s", keep="last").set_index("time_s")
    assert data.budget_bytes == 1400
    assert series.loc[[0.0, 1.0, 4.0, 6.0, 8.0], "weights_bytes"].tolist() == [150, 150, 50, 150, 100]
    assert series.loc[[1.0, 2.0, 3.0, 4.0, 8.0, 10.0], "kv_bytes"].tolist() == [40, 50, 30, 30, 20, 0]
    assert series.loc[[2.0, 10.0], "rows"].tolist() == [3, 0]
    shown = sorted(zip(data.bands["start_s"], data.bands["end_s"], data.bands["model"], strict=True))
    assert shown == [(1.0, 3.0, "m"), (2.0, 5.0, "n"), (8.0, 10.0, "n")]
    assert len(data.loads) == 4


# --- memory of several replicas ---------------------------------------------------------------------------------------

whole = st.integers(0, 6)
row = st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(0, 9), st.booleans(), st.integers(0, 2))


@given(rows=st.lists(row, min_size=1, max_size=12), window=st.tuples(whole, st.integers(1, 9)))
def test_peak_of_the_sum_is_that_of_a_ledger(rows: list[tuple[int, ...]], window: tuple[int, int]) -> None:
    """Beside a ledger kept second by second. A row: gap and seconds, value, whether it ends with its step, whose."""
    clock = [0, 0, 0]
    made = []
    for gap, seconds, value, is_over, who in rows:
        start = clock[who] + gap
        made.append((start, start + seconds, value, is_over, who))
        clock[who] = start + seconds
    made.sort(key=lambda r: (r[0], r[4]))
    start, end, value, is_over, codes = (np.array(column) for column in zip(*made, strict=True))
    a, b = window[0], window[0] + window[1]
    held = np.zeros((3, 60), int)
    for who in range(3):
        own = [r for r in made if r[4] == who]
        for k, r in enumerate(own):
            until = r[1] if r[3] else own[k + 1][0] if k + 1 < len(own) else 60
            held[who, r[0] : until] = r[2]
    found = peak_together(start.astype(float), end.astype(float), value, is_over, codes, (a, b))
    expected = held.sum(axis=0)[max(a, int(start.min())) : b]
    assert found == (int(expected.max()) if len(expected) else None)


def test_each_row_is_held_until_its_replicas_next() -> None:
    start, end, codes = np.array([0.0, 0.5, 2.0, 3.0]), np.array([1.0, 1.5, 3.0, 9.0]), np.array([0, 1, 0, 1])
    assert held_until(start, end, codes, 5.0).tolist() == [2.0, 3.0, 5.0, 9.0]
    assert held_until(*(np.zeros(0) for _ in range(2)), np.zeros(0, int), 5.0).tolist() == []
