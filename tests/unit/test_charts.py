"""Figures: the numbers behind them on small runs, and what every figure must have."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest

from heliosim import charts
from heliosim.charts import Style
from heliosim.formats.results import RunResults
from heliosim.metrics import Slo, SystemResult
from heliosim.recorder import TableRecorder
from heliosim.types import Tokens
from tests.synthetic_runs import BUDGET, synthetic_run, synthetic_systems
from tests.unit.test_metrics import INFO, M4, emit, hand_run, served, step


@pytest.fixture(name="systems", scope="module")
def _systems() -> list[SystemResult]:
    return synthetic_systems(requests=30, repeats=2)


@pytest.fixture(name="style", scope="module")
def _style(systems: list[SystemResult]) -> Style:
    return Style.of(systems)


def hand_system(**changes: object) -> SystemResult:
    return replace(SystemResult("hand", hand_run()), **changes)  # type: ignore[arg-type]


# -- numbers ----------------------------------------------------------------------------------------


def test_latency_curve_is_the_distribution() -> None:
    data = charts.latency_data([hand_system()])
    ttft = data[data["metric"] == "ttft"]
    assert ttft["value_ms"].tolist() == [1500, 2000]
    assert ttft["share"].tolist() == [0.5, 1.0]
    assert set(data["source"]) == {"simulated"}


def test_latency_pools_repeats() -> None:
    data = charts.latency_data([SystemResult("x", None, [hand_run(), hand_run()])])
    assert set(data["requests"]) == {4}
    assert set(data["source"]) == {"measured"}


def test_latency_of_nothing() -> None:
    empty = RunResults.of(TableRecorder(), INFO, "")
    assert charts.latency_data([SystemResult("x", empty)]).empty


def test_exit_shares_by_task() -> None:
    data = charts.exit_data([hand_system()])
    assert data["share"].sum() == pytest.approx(1.0)
    found = {(m, e): n for m, e, n in zip(data["model"], data["exit_layer"], data["tokens"], strict=True)}
    assert found == {("m", 2): 1, ("m", 4): 2, ("n", 2): 2}


def test_exit_of_one_layer_is_one_bar(systems: list[SystemResult]) -> None:
    data = charts.exit_data(systems)
    vanilla = data[data["system"] == "vanilla tiny-opt-s"]
    assert vanilla["task"].tolist() == ["all tasks"]
    assert data.groupby(["system", "task"])["share"].sum().to_numpy() == pytest.approx(1.0)


def test_timeline_bands_and_loads() -> None:
    data = charts.timeline_data(hand_run())
    assert data.bands[["start_s", "end_s"]].to_numpy().tolist() == [[1, 2], [2, 3], [4, 5]]
    assert data.bands["is_probe"].tolist() == [True, False, False]
    assert data.loads[["start_s", "end_s", "model", "depth"]].to_numpy().tolist() == [
        [0, 1, "m", 4],
        [3, 3.5, "n", 2],
    ]
    assert data.end_s == 5
    at = dict(zip(data.series["time_s"], data.series["rows"], strict=True))
    assert at == {0: 0, 1: 1, 2: 2, 3: 0, 3.5: 0, 4: 2, 5: 0}


def test_timeline_knows_the_limits_of_the_scenario() -> None:
    data = charts.timeline_data(synthetic_run("helios", "tiny-opt-s", requests=12))
    assert (data.budget_bytes, data.max_breaches) == (BUDGET, 50)


def test_timeline_of_nothing_can_be_drawn() -> None:
    data = charts.timeline_data(RunResults.of(TableRecorder(), INFO, ""))
    assert data.bands.empty


def test_long_series_are_thinned_by_maxima() -> None:
    recorder = TableRecorder()
    for i in range(5000):
        recorder.step(step(float(i), 1.0, rows=9 if i == 1234 else 1))
    data = charts.timeline_data(RunResults.of(recorder, INFO, ""))
    assert len(data.series) <= 1200
    assert data.series["rows"].max() == 9
    assert len(data.bands) == 1


def test_fit_errors() -> None:
    data = charts.fit_data([1.0, 2.0, 0.0], [1.1, 1.8, 5.0], ["a", "b", "a"])
    assert data.points["error"].tolist() == pytest.approx([0.1, -0.1])
    assert data.median_abs_error == pytest.approx(0.1)
    assert charts.fit_data([], []).median_abs_error is None


def test_systems_are_in_shown_units() -> None:
    measured = [hand_run(), hand_run()]
    data = charts.systems_data([hand_system(live=measured)], ("agreement", "mean_ttft_ms"))
    assert data["simulated"].tolist() == pytest.approx([200 / 3, 1750])
    assert data["low"].tolist() == data["high"].tolist() == pytest.approx(data["measured"].tolist())
    assert data["repeats"].tolist() == [2, 2]


def test_quality_has_a_row_per_source(systems: list[SystemResult]) -> None:
    data = charts.quality_data(systems)
    assert list(zip(data["system"], data["source"], strict=True)) == [
        (s.name, source) for s in systems for source in ("simulated", "measured")
    ]
    alone = charts.quality_data([hand_system()])
    assert alone["source"].tolist() == ["simulated"]
    assert alone["output_throughput"].tolist() == [1.0]


def test_agreement_by_confidence() -> None:
    r = TableRecorder()
    confidences, agrees = (0.11, 0.19, 0.95, 0.99), (True, False, True, True)
    emit(r, 1.0, M4, Tokens((0,) * 4, (2,) * 4, confidences, (-0.1,) * 4, (False,) * 4, None, agrees))
    r.step(step(0.0, 1.0))
    emit(r, 2.0, M4, Tokens((0,), (4,), (0.5,), (-0.1,), (True,), None, (True,)))
    r.step(step(1.0, 1.0))
    r.served(served(0, 0.0, 2.0, 5, admitted_s=0.0, first_token_s=1.0))
    data = charts.agreement_data([RunResults.of(r, INFO, "")])
    assert data["exit_layer"].tolist() == [2, 2]
    assert data["confidence"].tolist() == pytest.approx([0.15, 0.97])
    assert data["agreement"].tolist() == [0.5, 1.0]
    assert data["tokens"].tolist() == [2, 2]
    assert (data["low"] < data["agreement"]).all()
    assert data["high"].max() <= 1


def test_agreement_unknown_everywhere() -> None:
    assert charts.agreement_data([]).empty
    assert charts.agreement_data([RunResults.of(TableRecorder(), INFO, "")]).empty


# -- ink ----------------------------------------------------------------------------------------------


def figures(systems: list[SystemResult], style: Style) -> dict[str, go.Figure]:
    runs = [s.live[0] for s in systems]
    times = np.linspace(0.001, 0.2, 30).tolist()
    helios = charts.timeline_data(runs[-1])
    vanilla = charts.timeline_data(runs[0])
    return {
        "latency": charts.latency_figure(charts.latency_data(systems), style, Slo(ttft_ms=60)),
        "exits": charts.exit_figure(charts.exit_data(systems), style),
        "timeline": charts.timeline_figure(helios, style, "HELIOS"),
        "plain timeline": charts.timeline_figure(replace(vanilla, max_breaches=None, budget_bytes=None), style, "v"),
        "fit": charts.fit_figure(charts.fit_data(times, times), style),
        "systems": charts.systems_figure(charts.systems_data(systems), style),
        "quality": charts.quality_figure(charts.quality_data(systems), style),
        "agreement": charts.agreement_figure(charts.agreement_data(runs), style),
    }


NAMES = ("latency", "exits", "timeline", "plain timeline", "fit", "systems", "quality", "agreement")


@pytest.fixture(name="drawn", scope="module")
def _drawn(systems: list[SystemResult], style: Style) -> dict[str, go.Figure]:
    return figures(systems, style)


@pytest.mark.parametrize("name", NAMES)
def test_axes_name_their_units(drawn: dict[str, go.Figure], name: str) -> None:
    fig = drawn[name]
    titles = [a.title.text for a in (*fig.select_xaxes(), *fig.select_yaxes()) if a.title.text]
    assert titles
    names = ("model@layers", "requests")  # axes that are categories or plain counts say what they count
    for title in titles:
        assert title in names or re.search(r"\(.+\)$", title), title
    assert any(a.title.text for a in fig.select_xaxes())


@pytest.mark.parametrize("name", NAMES)
def test_caption_says_sample_and_seed(drawn: dict[str, go.Figure], name: str) -> None:
    caption = drawn[name].layout.title.subtitle.text
    assert "30 requests per run" in caption
    assert "seed 7" in caption


def test_every_system_keeps_its_colour(drawn: dict[str, go.Figure], style: Style) -> None:
    for name in ("latency", "quality"):
        legend = {t.name: t.line.color for t in drawn[name].data if t.name in style.colours}
        assert legend == style.colours
    assert len(set(style.colours.values())) == len(style.colours)


def test_a_system_has_one_colour_whatever_stands_beside_it() -> None:
    alone = [charts.system_colours([name])[name] for name in ("vanilla a", "early exit a", "HELIOS")]
    together = charts.system_colours(
        ["HELIOS, no breaches", "other", "HELIOS", "early exit a", "vanilla a", "vanilla b"]
    )
    assert [
        charts.system_colours(["HELIOS", "early exit a", "vanilla a"])[n]
        for n in ("vanilla a", "early exit a", "HELIOS")
    ] == alone
    assert len(set(together.values())) == 6
    assert together["HELIOS"] == alone[2]
    many = charts.system_colours(f"system {i}" for i in range(20))
    assert len(many) == 20


@pytest.mark.parametrize("theme", [charts.LIGHT, charts.DARK])
def test_colours_are_told_from_the_paper_and_from_each_other(theme: charts.Theme) -> None:
    shown = [theme.shown(colour) for colour in charts.SYSTEM_PALETTE]
    assert len(set(shown)) == len(shown)
    for colour in (*shown, theme.ink, theme.muted, theme.accent):
        assert contrast(colour, theme.paper) >= (2.1 if colour in shown else 4.5), colour


def contrast(a: str, b: str) -> float:
    """The ratio of the Web Content Accessibility Guidelines."""
    light = sorted(luminance(colour) for colour in (a, b))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_dark_figures_have_no_light_paper(systems: list[SystemResult]) -> None:
    for name, fig in figures(systems, Style.of(systems, charts.DARK)).items():
        text = fig.to_json().lower()
        assert charts.DARK.paper.lower() in text, name
        assert charts.LIGHT.ink.lower() not in text or name == "exits", name  # ink on bright segments stays dark
        assert "#ffffff" not in text, name


def test_simulated_is_solid_and_measured_dashed(drawn: dict[str, go.Figure]) -> None:
    dashes = {t.line.dash for t in drawn["latency"].data if t.x is not None and len(t.x) > 2}
    assert dashes == {"solid", "5px,3px"}


def test_palette_does_not_meet_the_ramps() -> None:
    ramps = {colour for ramp in charts.MODEL_RAMPS for colour in ramp}
    assert len(set(charts.SYSTEM_PALETTE)) == len(charts.SYSTEM_PALETTE) == 8
    assert not ramps & set(charts.SYSTEM_PALETTE)


def test_deeper_is_darker() -> None:
    colours = charts.placement_colours([("a", 2), ("a", 4), ("a", 8), ("b", 3)])
    light = [sum(int(colours["a", d][i : i + 2], 16) for i in (1, 3, 5)) for d in (2, 4, 8)]
    assert all(a > b for a, b in pairwise(light))


@pytest.mark.parametrize(
    "build",
    [
        lambda s: charts.latency_figure(charts.latency_data([]), s),
        lambda s: charts.fit_figure(charts.fit_data([], []), s),
        lambda s: charts.agreement_figure(charts.agreement_data([]), s),
        lambda s: charts.timeline_figure(charts.timeline_data(RunResults.of(TableRecorder(), INFO, "")), s, "nothing"),
    ],
)
def test_empty_figures_can_be_drawn(build: Callable[[Style], go.Figure]) -> None:
    assert build(Style({}, "0 requests")).to_json()
