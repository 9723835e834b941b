"""Timeline: opens answered, follows load and stretch, shows run folders, explains what cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("streamlit")
from heliosim_app.course_jobs import at_load, capacity_of, quiet_percent
from heliosim_app.courses import DEFAULT_PERCENT, shipped_course
from heliosim_app.question import Question
from heliosim_app.run import one_run

from heliosim.formats.results import save_run
from tests.app.helpers import open_page
from tests.app.test_pages import sentence
from tests.synthetic_runs import synthetic_run


def test_it_opens_answered() -> None:
    app = open_page("timeline")
    assert not app.exception
    assert "p99 TTFT is" in sentence(app)
    assert f"at {DEFAULT_PERCENT} % load" in sentence(app)
    assert not app.error
    assert app.subheader[0].value == "Decisions and loads, with reasons"


def test_the_link_says_the_stretch_and_buttons_change_it() -> None:
    app = open_page("timeline", from_s="5", to_s="9")
    assert not app.exception
    assert app.slider(key="stretch").value == (5.0, 9.0)
    app.button(key="stretch-all").click().run()
    assert "from_s" not in app.query_params
    app.button(key="stretch-slow").click().run()
    assert 0 < float(app.query_params["to_s"]) < 60
    app.slider(key="stretch").set_value((2.0, 4.0)).run()
    assert (app.query_params["from_s"], app.query_params["to_s"]) == ("2", "4")


def test_a_run_folder_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_run(tmp_path / "one", synthetic_run("helios", "tiny-opt-s", mode="live"))
    monkeypatch.setattr(sys, "argv", ["main.py", "--runs", str(tmp_path)])
    app = open_page("timeline", course="one")
    assert not app.exception
    assert not app.error
    assert "The slowest" in sentence(app)
    other = open_page("timeline", course="gone")
    assert any("gone" in one.value for one in other.warning)
    assert "p99 TTFT is" in sentence(other)


def test_what_is_shipped_is_what_would_be_computed() -> None:
    found = shipped_course(quiet_percent(DEFAULT_PERCENT))
    assert found is not None, "run  python -m heliosim_app.courses"
    per_s, run = found
    question = at_load(Question(), per_s, quiet_percent(DEFAULT_PERCENT))
    again = one_run(question, report=lambda text, share: None)
    assert again.steps.equals(run.steps)
    assert again.requests.equals(run.requests)


def test_capacity_needs_enough_requests() -> None:
    assert capacity_of(synthetic_run("vanilla", "tiny-opt-m", requests=4)) is None
    run = synthetic_run("vanilla", "tiny-opt-m", requests=60)
    rate = capacity_of(run)
    finish = run.requests["finish_s"].to_pylist()
    assert rate is not None
    assert 0.2 * 60 / max(finish) < rate < 5 * 60 / max(finish)
