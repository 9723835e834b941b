"""Figures of behaviour tables: what they hold is what the tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliosim.behaviour_order import breach_table
from heliosim.behaviour_rows import verdict_lines
from heliosim.behaviour_source import Opened, open_behaviour
from heliosim.behaviour_summary import ALL_TASKS, BehaviourSummary, summarise_behaviour
from heliosim.charts import DARK, Style
from heliosim.charts import behaviour as charts
from heliosim.charts import behaviour_order as order

STYLE = Style({}, "caption")
MODELS = ["tiny-opt-l", "tiny-opt-s"]


@pytest.fixture(scope="module")
def opened() -> Opened:
    return open_behaviour("tiny-opt-cpu")


@pytest.fixture(scope="module")
def summary(opened: Opened) -> BehaviourSummary:
    return summarise_behaviour(opened.tokens, 0.8, models=MODELS, fits=True)


def test_exit_shares_fill_every_bar(summary: BehaviourSummary) -> None:
    figure = charts.exit_share_figure({m: s.by_task for m, s in summary.models.items()}, STYLE)
    assert len(figure.data) == 6
    totals = sum(bar.x for bar in figure.data[:3])
    assert totals == pytest.approx([100] * 6)


def test_lines_of_thresholds_and_depths(summary: BehaviourSummary) -> None:
    models = summary.models
    curve = charts.threshold_figure({m: s.curve for m, s in models.items()}, 0.8, STYLE)
    assert len(curve.data) == 4
    assert curve.data[0].y[-1] == pytest.approx(100)
    figure = charts.depth_quality_figure(
        {m: s.depths for m, s in models.items()}, {m: s.quality for m, s in models.items()}, STYLE
    )
    assert [t.name for t in figure.data if t.showlegend] == [
        f"{m}, {w} loop" for m in MODELS for w in ("open", "closed")
    ]
    assert list(figure.data[0].y) == pytest.approx(list(100 * models["tiny-opt-l"].depths["agreement"]))


def test_without_perplexity_there_is_one_panel_less(summary: BehaviourSummary) -> None:
    depths = summary.models["tiny-opt-s"].depths.drop(columns=["perplexity"])
    assert len(charts.depth_quality_figure({"tiny-opt-s": depths}, {}, STYLE).data) == 1


def test_the_joint_figure_holds_all_tokens(summary: BehaviourSummary) -> None:
    figure = charts.joint_figure(summary.pairs[0].joint, STYLE)
    assert figure.data[0].z.sum() == pytest.approx(100)


def test_order_figures(opened: Opened, summary: BehaviourSummary) -> None:
    models = summary.models
    exits = {m: s.exits for m, s in models.items()}
    assert len(order.correlation_figure({m: s.correlation for m, s in models.items()}, exits, STYLE).data) == 4
    assert len(order.run_figure({m: s.runs for m, s in models.items()}, STYLE).data) == 4
    tokens = opened.tokens.of(sources=["tiny-opt-s:full"])
    data = order.breach_data(tokens, ["tiny-opt-s"], 0.8)
    table = breach_table(tokens, "tiny-opt-s", 0.8).set_index("depth")
    for depth, part in data.groupby("depth"):
        assert len(part) == table.loc[depth, "windows"]
        assert part["breaches"].std(ddof=0) == pytest.approx(table.loc[depth, "std"])
    assert len(order.breach_figure(data, STYLE).data) == 3


def test_fitted_models_stand_beside_the_record(summary: BehaviourSummary) -> None:
    fits = summary.models["tiny-opt-s"].fits
    assert fits is not None
    whole = fits[fits["task"] == ALL_TASKS]
    figure = order.fit_check_figure(whole, STYLE)
    inside = [abs(x) <= 1 for trace in figure.data for x in trace.x]
    assert [bool(m) for m in whole["is_met"]][: len(inside)].count(True) >= inside.count(True)
    assert set(summary.models["tiny-opt-s"].sufficient) == {
        ALL_TASKS,
        "chat",
        "qa",
        "arithmetic",
        "lists",
        "code",
        "prose",
    }


def test_dark_paper(summary: BehaviourSummary) -> None:
    figure = charts.joint_figure(summary.pairs[0].joint, Style({}, "", DARK))
    assert figure.layout.paper_bgcolor == DARK.paper


def test_one_source_and_one_task_can_be_asked_for(opened: Opened) -> None:
    found = summarise_behaviour(opened.tokens, 0.8, source="tiny-opt-s:threshold", task="qa")
    assert {s.source for s in found.models.values()} == {"tiny-opt-s:threshold"}
    assert found.tasks == ["qa"]
    assert found.models["tiny-opt-s"].fits is None


def test_the_page_says_what_the_check_says(summary: BehaviourSummary) -> None:
    """Verdicts in docs/measured-behaviour.md are those of the shipped profile, computed."""
    page = (Path(__file__).parents[2] / "docs" / "measured-behaviour.md").read_text(encoding="utf-8")
    for line in verdict_lines(summary):
        assert line in " ".join(page.split())
