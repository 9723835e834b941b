"""The page Compare: it opens computed, follows its inputs, and explains what cannot be."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from heliosim_app.views.compare import report_bytes, sentence
from streamlit.testing.v1 import AppTest

from tests.app.helpers import open_page
from tests.studies import study

FEW = {"models": "tiny-opt", "device": "CPU", "rate": "5", "prompt": "30", "output": "16", "batch": "16",
       "step_tokens": "256", "study_requests": "50", "study_reps": "2", "replicas": "1",
       "compared": "early exit tiny-opt-l,vanilla tiny-opt-l"}  # fmt: skip


def said(app: AppTest) -> str:
    found = [one.body for one in app.get("html") if 'class="hs-sentence"' in one.body]
    return found[0] if found else ""


def settled(app: AppTest) -> AppTest:
    for _ in range(60):
        assert not app.exception
        if said(app) or app.error:
            return app
        app.run()
    raise AssertionError("no result")


def test_it_opens_with_the_shipped_comparison() -> None:
    app = open_page("compare")
    assert not app.exception
    assert "against early exit llama2-7b" in said(app)
    assert len(app.dataframe[0].value) == 6


@pytest.mark.parametrize("view", ["gains", "latency", "load", "trades", "fleets"])
def test_every_part_of_the_shipped_comparison_is_drawn(view: str) -> None:
    app = open_page("compare", view=view)
    assert not app.exception
    assert not app.error
    assert app.get("plotly_chart")


def test_inputs_are_compared() -> None:
    app = settled(open_page("compare", **FEW))
    assert not app.error
    assert "vanilla tiny-opt-l against early exit tiny-opt-l" in said(app)
    assert app.dataframe[0].value["System"].tolist() == ["early exit tiny-opt-l", "vanilla tiny-opt-l"]


def test_other_models_leave_out_systems_they_do_not_have() -> None:
    app = open_page("compare", compared="HELIOS,early exit opt-6.7b")
    assert any("no system called early exit opt" in one.value.replace("\\", "") for one in app.info)
    assert not app.exception


def test_a_limit_is_needed_for_the_map_of_fleets() -> None:
    app = settled(open_page("compare", **{**FEW, "ttft": "0", "tpot": "0", "view": "fleets"}))
    assert any("Give a limit" in one.value for one in [*app.info, *app.error])


def test_the_sentence_says_what_is_gained_and_what_is_not() -> None:
    text = sentence(study(), "vanilla m")
    assert text.startswith("HELIOS against vanilla m at 2 requests/s per server: TTFT, p99 −105 ms")
    assert "(better)" in text
    assert "no difference shown in Output throughput" in text


def test_the_report_holds_every_figure_and_its_words() -> None:
    page = report_bytes(study(), "vanilla m").decode()
    assert page.count("<figure") == page.count('role="img"') >= 7
    for word in (
        "Systems compared",
        "SLO attainment of HELIOS",
        "requests per server and run",
        "seed 7",
        "not measured",
    ):
        assert word in page
    assert "http" not in page.split("<body>")[1].split("<script>")[0]
