"""Figures of what requests went through."""

from __future__ import annotations

import pytest

from heliosim.charts import phases
from heliosim.charts.style import Style
from tests.unit.test_course import told

STEPS = [{"start_s": float(k), "seconds": 1.0} for k in range(6)]
ONE = {"arrival_s": 0.0, "admitted_s": 1.0, "first_token_s": 2.0, "finish_s": 6.0}


def test_phases_are_bars_with_their_means_in_words() -> None:
    run = told(STEPS, [{"id": k, **ONE} for k in range(4)])
    data = phases.phases_data(run, 0.0, 6.0, most=2)
    assert (data.requests, data.present) == (2, 4)
    assert set(data.phases["request_id"]) == {0, 3}
    said = phases.phases_alt(data)
    assert "2 requests" in said
    assert "waiting 1 s, prefill 1 s, decode 4 s" in said
    figure = phases.phases_figure(data, Style({}))
    assert {bar.name: list(bar.x) for bar in figure.data} == {"waiting": [1, 1], "prefill": [1, 1], "decode": [4, 4]}


def test_waits_are_in_milliseconds_with_the_limit() -> None:
    run = told(STEPS, [{"id": k, **ONE} for k in range(4)])
    data = phases.waits_data(run, 500.0)
    assert list(data.points["ttft_ms"]) == pytest.approx([2000.0] * 4)
    assert data.p99_ms == pytest.approx(2000.0)
    names = [trace.name for trace in phases.waits_figure(data, Style({}), (0.0, 6.0)).data]
    assert "limit on p99 500 ms" in names
