"""Figures of load sweeps, trade-offs, fleets and settings: the numbers behind them, their words and their look."""

from __future__ import annotations

import re
from collections.abc import Callable

import plotly.graph_objects as go
import pytest

from heliosim import charts
from heliosim.charts import DARK, LIGHT, Style
from heliosim.charts.differences import relative
from heliosim.charts.look import wrapped
from heliosim.charts.pareto import dominated
from heliosim.what_if import differences
from tests.studies import study, tried

STUDY = study()
NOW = tried({"p99_ttft_ms": [100, 120, 110], "agreement": [0.9, 0.91, 0.92]})
BEFORE = tried({"p99_ttft_ms": [200, 221, 209], "agreement": [0.9, 0.92, 0.91]})


# -- numbers ----------------------------------------------------------------------------------------


def test_distribution_at_the_rate_in_focus_pools_replications() -> None:
    data = charts.study_cdf_data(STUDY)
    own = data[data["curve"] == "HELIOS"]
    assert own["value_ms"].tolist() == [1, 2, 2, 3, 3, 4]
    assert own["share"].iloc[-1] == 1.0
    assert set(own["requests"]) == {100}
    assert charts.cdf_alt(data, "ttft", 2.5).count("50 % within 2.5 ms") == 2


def test_ghost_is_drawn_behind_and_marked() -> None:
    data = charts.tried_cdf_data(NOW, BEFORE)
    assert list(data["curve"].unique()) == ["before", "now"]
    assert data.groupby("curve")["is_ghost"].all().to_dict() == {"before": True, "now": False}
    assert list(charts.tried_cdf_data(NOW, None)["curve"].unique()) == ["now"]


def test_rates_have_means_and_intervals_in_shown_units() -> None:
    data = charts.rates_data(STUDY, ("p99_ttft_ms", "slo_attainment"))
    one = data[(data["system"] == "vanilla m") & (data["metric"] == "p99_ttft_ms")]
    assert one["mean"].tolist()[:2] == [105, 210]
    assert one["mean"].isna().tolist() == [False, False, True]  # an overloaded system has no percentile
    assert (one["low"][:2] < one["mean"][:2]).all()
    assert data[data["metric"] == "slo_attainment"]["mean"].max() == 100


def test_knee_is_the_last_rate_before_overload() -> None:
    data = charts.rates_data(STUDY)
    assert data[data["is_knee"]].groupby("system")["rate_per_s"].unique().map(list).to_dict() == {"vanilla m": [2.0]}
    assert charts.knee_of([1, 2, 4, 8], [False, True, False, True]) == 1
    assert charts.knee_of([1, 2], [True, True]) is None
    assert charts.knee_of([1, 2], [False, False]) is None


def test_saturation_pairs_throughput_with_latency() -> None:
    data = charts.saturation_data(STUDY)
    own = data[data["system"] == "HELIOS"]
    assert own["throughput"].tolist() == [11, 22, 44]
    assert own["latency"].tolist() == [52.5, 105, 210]
    assert "overloaded at 4 requests/s with 44.0 tok/s, before it 210 ms at 2 requests/s" in charts.saturation_alt(data)


def test_dominated_points() -> None:
    assert dominated([(1, 1), (2, 2), (2, 1), (0, 3), (2, 2)]) == [True, False, True, False, False]


def test_pareto_minds_which_way_is_better() -> None:
    speed = charts.pareto_data(STUDY, "user", "gpu")
    assert speed[speed["system"] == "vanilla m"]["is_dominated"].all()
    assert not speed[speed["system"] == "HELIOS"]["is_dominated"].any()
    assert len(speed) == 5  # the overloaded point is left out
    cost = charts.pareto_data(STUDY, "user", "cost")
    cheapest = cost.loc[cost["y"].idxmin()]
    assert not cheapest["is_dominated"]
    assert charts.pareto_data(STUDY, "user", "energy").empty


def test_attainment_map() -> None:
    data = charts.attainment_data(STUDY)
    at = {(r.replicas, r.rate_per_s): r.attainment for r in data.itertuples()}
    assert at[2, 3.0] == pytest.approx(99.5)
    assert at[1, 3.0] == pytest.approx(55)
    assert at[1, 6.0] != at[1, 6.0]  # overloaded: no attainment
    words = charts.attainment_alt(data, "HELIOS")
    assert "3 requests/s: 2 replicas" in words
    assert "6 requests/s: none reaches it, at most 55.0 %" in words


def test_gain_is_paired_and_signed() -> None:
    data = charts.gain_data(STUDY, "vanilla m", ("p99_ttft_ms", "agreement", "slo_attainment"))
    assert set(data["series"]) == {"HELIOS"}
    rows = {r["metric"]: r for r in data.to_dict("records")}
    assert rows["p99_ttft_ms"]["difference"] == pytest.approx(-105)
    assert rows["p99_ttft_ms"]["verdict"] == "better"
    assert rows["agreement"]["difference"] == pytest.approx(-9)
    assert rows["slo_attainment"]["verdict"] == "no difference shown"


def test_differences_have_their_words() -> None:
    data = differences(NOW, BEFORE, ("p99_ttft_ms", "agreement", "perplexity"))
    texts = [charts.difference_text(row) for row in data.to_dict("records")]
    assert texts[0] == "TTFT, p99: −100 ms [−102, −97.5], better"
    assert "points" in texts[1]
    assert texts[1].endswith("no difference shown")
    assert texts[2] == "Perplexity: not known (no data)"
    assert "2 others are not told from zero" in charts.difference_alt(data)
    percent = relative(data).set_index("metric")["percent"]
    assert percent["p99_ttft_ms"] == pytest.approx(-47.6, abs=0.1)


def test_course_and_mix_of_a_setting() -> None:
    course = charts.course_data(NOW, BEFORE)
    assert course["waiting"].tolist() == [0, 2, 0, 2]
    assert "now: at most 4 in a step, 2 waiting" in charts.course_alt(course)
    mix = charts.mix_data(NOW, None)
    assert mix["share"].sum() == 1
    assert charts.mix_alt(mix) == "Where tokens leave. now: a layer 4 75 %, a layer 8 25 %."


# -- ink ----------------------------------------------------------------------------------------------


def drawn(style: Style) -> dict[str, go.Figure]:
    rates, saturation = charts.rates_data(STUDY), charts.saturation_data(STUDY)
    gap = differences(NOW, BEFORE, ("p99_ttft_ms", "agreement", "perplexity"))
    own = Style({"now": "#0072B2"}, style.caption, style.theme)
    ghost = charts.tried_cdf_data(NOW, BEFORE)
    return {
        "cdf": charts.cdf_figure(charts.study_cdf_data(STUDY), style, "ttft", 2.5),
        "rates": charts.rates_figure(rates, style, {"ttft": 150.0}),
        "saturation": charts.saturation_figure(saturation, style, 150.0),
        "pareto": charts.pareto_figure(charts.pareto_data(STUDY, "user", "cost"), style, "USD"),
        "attainment": charts.attainment_figure(charts.attainment_data(STUDY), style, "HELIOS"),
        "gain": charts.difference_figure(charts.gain_data(STUDY, "vanilla m"), style, "Gain", "vanilla m"),
        "differences": charts.difference_figure(gap, own),
        "ghost": charts.cdf_figure(ghost, own),
        "course": charts.course_figure(charts.course_data(NOW, BEFORE), own),
        "mix": charts.mix_figure(charts.mix_data(NOW, BEFORE), own),
    }


FIGURES = {theme.name: drawn(Style.named(STUDY.systems, STUDY.caption, theme)) for theme in (LIGHT, DARK)}
NAMES = sorted(FIGURES["light"])
COUNTS = ("replicas (servers)", "requests", "exit (model and layer)")


@pytest.mark.parametrize("name", NAMES)
def test_axes_name_their_units(name: str) -> None:
    fig = FIGURES["light"][name]
    titles = [a.title.text for a in (*fig.select_xaxes(), *fig.select_yaxes()) if a.title.text]
    assert titles
    for title in titles:
        assert title in COUNTS or re.search(r"\(.+\)$", title), title


@pytest.mark.parametrize("name", NAMES)
def test_caption_says_sample_replications_and_seed(name: str) -> None:
    caption = FIGURES["light"][name].layout.title.subtitle.text
    for word in ("50 requests per server and run", "2 replications", "seed 7", "profile derived, not measured"):
        assert word in caption


@pytest.mark.parametrize("name", NAMES)
def test_dark_paper_has_light_ink(name: str) -> None:
    light, dark = (FIGURES[theme][name].to_json().lower() for theme in ("light", "dark"))
    assert "#ffffff" in light
    assert "#ffffff" not in dark
    assert DARK.ink.lower() in dark


def test_systems_keep_their_colours() -> None:
    style = Style.named(STUDY.systems)
    for name in ("cdf", "rates", "saturation", "pareto", "gain"):
        used = {
            (t.name or t.legendgroup): (t.line.color or t.marker.color)
            for t in FIGURES["light"][name].data
            if (t.name or t.legendgroup) in style.colours and isinstance(t.line.color or t.marker.color, str)
        }
        assert used["HELIOS"] == style.colours["HELIOS"], name


def test_limit_is_a_trace_and_no_shape() -> None:
    for name in ("cdf", "rates", "saturation"):
        fig = FIGURES["light"][name]
        assert not fig.layout.shapes
        assert any(t.line.dash == "dot" and t.text and any("limit" in s for s in t.text) for t in fig.data), name


def test_only_fleets_that_reach_the_target_are_framed() -> None:
    fig = FIGURES["light"]["attainment"]
    assert [(s.x0, s.y0) for s in fig.layout.shapes] == [(0.53, -0.46)]
    assert [a.text for a in fig.layout.annotations if a.text == "overloaded"] == ["overloaded"]


def test_beaten_points_are_dimmed() -> None:
    colours = {str(t.marker.color) for t in FIGURES["light"]["pareto"].data if t.marker.color}
    assert any(c.startswith("rgba") and c.endswith("0.4)") for c in colours)


def test_far_differences_become_arrows() -> None:
    far = differences(tried({"p99_ttft_ms": [900, 910, 920]}), BEFORE, ("p99_ttft_ms",))
    fig = charts.difference_figure(far, Style({"now": "#0072B2"}))
    assert fig.data[0].marker.symbol == ("triangle-right",)
    assert fig.data[0].x[0] == pytest.approx(120)


def test_only_what_can_be_related_has_a_row() -> None:
    zero = tried({"transitions": [0, 0, 0], "p99_ttft_ms": [10, 11, 13]})
    table = differences(
        tried({"transitions": [1, 2, 3], "p99_ttft_ms": [9, 9, 9]}), zero, ("transitions", "p99_ttft_ms")
    )
    fig = charts.difference_figure(table, Style({"now": "#0072B2"}))
    assert fig.layout.yaxis.ticktext == ("TTFT, p99",)


def test_captions_wrap_between_their_parts() -> None:
    assert wrapped("a · b", 20) == "a · b"
    assert wrapped("some words · more words", 12) == "some words<br>more words"
    assert wrapped("", 9) == ""


@pytest.mark.parametrize(
    "build",
    [
        lambda s: charts.cdf_figure(charts.tried_cdf_data(NOW, None).iloc[:0], s),
        lambda s: charts.saturation_figure(charts.saturation_data(STUDY).iloc[:0], s),
        lambda s: charts.pareto_figure(charts.pareto_data(STUDY, "user", "energy"), s),
        lambda s: charts.difference_figure(differences(NOW, BEFORE, ()), s),
        lambda s: charts.course_figure(charts.course_data(NOW, None).iloc[:0], s),
        lambda s: charts.mix_figure(charts.mix_data(NOW, None).iloc[:0], s),
    ],
)
def test_empty_figures_can_be_drawn(build: Callable[[Style], go.Figure]) -> None:
    assert build(Style({}, "0 requests")).to_json()
