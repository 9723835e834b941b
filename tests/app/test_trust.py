"""Calibration and Exits: whether a profile can be trusted, and where its tokens leave."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

from heliosim.profile_view import open_profile
from heliosim.trust import Asked, asked_of, trust
from tests.app.helpers import open_page
from tests.app.test_pages import sentence
from tests.synthetic_runs import synthetic_run

TINY = "tiny-opt-cpu"


def test_inside_the_range_a_measured_profile_is_judged_by_its_errors() -> None:
    profile = open_profile(TINY)
    found = trust(profile, ["tiny-opt-s"], "cpu", Asked(4, 64, 64))
    assert not any("extrapolated" in f.what for f in found.findings)
    assert all("held-out" in f.what for f in found.findings)


@pytest.mark.parametrize(("times", "verdict"), [(1.5, "with care"), (3.0, "no")])
def test_outside_the_range_the_remedy_is_named(times: float, verdict: str) -> None:
    profile = open_profile(TINY)
    fit = profile.model("tiny-opt-s").step["cpu"]
    found = trust(profile, ["tiny-opt-s"], "cpu", Asked(int(times * fit.max_rows), 1, 1))
    assert found.verdict == verdict
    first = found.findings[0]
    assert "rows in a step" in first.what
    assert "--max-batch" in first.remedy


def test_what_was_not_measured_is_never_trusted_outright() -> None:
    found = trust(open_profile("llama2-a100-80gb"), ["llama2-7b"], "wall", Asked(1, 1, 1))
    assert found.verdict != "yes"
    assert any("Derived, not measured" in f.what for f in found.findings)


def test_what_a_run_asks_is_read_from_its_steps() -> None:
    run = synthetic_run("vanilla", "tiny-opt-m")
    found = asked_of(run)
    assert found.rows == max(run.steps["rows"].to_pylist())
    assert found.context > max(run.requests["prompt_tokens"].to_pylist())


def settled(app: AppTest) -> AppTest:
    """The page when its simulation is done."""
    from heliosim_app.work import desk

    for ticket in list(desk().tickets.values()):
        ticket.wait(60)
    return app.run()


def test_calibration_opens_with_a_verdict_and_compares() -> None:
    app = settled(open_page("calibration", against="llama2-h100-80gb"))
    assert not app.exception
    assert sentence(app).split(">")[1].startswith(("Yes", "With care", "No"))
    titles = [one.value for one in app.subheader]
    assert titles == [
        "How well the step times fit",
        "Errors and range of the step times",
        "Beside another profile",
        "Where it comes from",
    ]
    assert any("difference (%)" in one.value.columns for one in app.dataframe)


def test_exits_follow_the_threshold() -> None:
    app = open_page("exits", th="0.9")
    assert not app.exception
    before = sentence(app)
    assert "threshold of 0.9" in before
    app.slider(key="th").set_value(0.5).run()
    assert sentence(app) != before
    assert app.query_params["th"] == "0.5"
