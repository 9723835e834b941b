"""One run over time, drawn: placements, batch, memory and breaches on one time axis."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import finish
from heliosim.charts.style import Style, placement_colours
from heliosim.charts.theme import Theme, rgba
from heliosim.charts.timeline import TimelineData


def timeline_figure(data: TimelineData, style: Style, name: str) -> go.Figure:
    """Placement, batch, memory and breach counter of one run on one time axis."""
    has_counter = data.max_breaches is not None
    titles = ["Resident placement", "Batch and queue", "Device memory"]
    titles += ["Breach counter (CBC)"] if has_counter else []
    bands = max(2, len(set(zip(data.loads["model"], data.loads["depth"], strict=True))))
    pixels = [30 * bands + 10, 120, 150, 120][: len(titles)]
    fig = make_subplots(
        rows=len(titles),
        cols=1,
        shared_xaxes=True,
        row_heights=pixels,
        vertical_spacing=44 / (sum(pixels) + 44 * (len(titles) - 1)),
        subplot_titles=titles,
    )
    _draw_placements(fig, data, style)
    _draw_batch(fig, data, style)
    _draw_memory(fig, data, style)
    if has_counter:
        _draw_breaches(fig, data, style)
    for row in range(1, len(titles) + 1):
        fig.update_xaxes(range=[0, data.end_s], row=row, col=1)
        legend = "legend" if row == 1 else f"legend{row}"
        top = fig.get_subplot(row, 1).yaxis.domain[1]
        fig.update_layout({legend: _side_legend(top)})
    fig.update_xaxes(title_text="time since start (s)", row=len(titles), col=1)
    height = sum(pixels) + 44 * (len(titles) - 1) + 164
    fig = finish(fig, f"One run over time: {name}", style.caption, height=height, theme=style.theme)
    return fig.update_layout(margin={"r": 190, "t": fig.layout.margin.t - 32})


def _draw_placements(fig: go.Figure, data: TimelineData, style: Style) -> None:
    """Bands of residency; evaluation is hatched, a load is a dark bar under a triangle."""
    keys = sorted(set(zip(data.loads["model"], data.loads["depth"], strict=True)))
    keys = sorted({*keys, *zip(data.bands["model"], data.bands["depth"], strict=True)})
    colours = placement_colours(((str(m), int(d)) for m, d in keys), style.theme)
    for is_probe, name in ((False, "serving"), (True, "evaluation (probe)")):
        part = data.bands[data.bands["is_probe"].astype(bool) == is_probe]
        if part.empty:
            continue
        pattern = {"shape": "/", "size": 5, "solidity": 0.35, "fgcolor": style.theme.paper} if is_probe else None
        fig.add_bar(
            base=part["start_s"],
            x=part["end_s"] - part["start_s"],
            y=[f"{m}@{d}" for m, d in zip(part["model"], part["depth"], strict=True)],
            orientation="h",
            marker={
                "color": [colours[m, d] for m, d in zip(part["model"], part["depth"], strict=True)],
                "line": {"width": 0},
                "pattern": pattern,
            },
            name=name,
            showlegend=False,
            customdata=part["end_s"],
            hovertemplate=f"%{{y}}, {name}<br>%{{base:.3f}} to %{{customdata:.3f}} s<extra></extra>",
            width=0.62,
            row=1,
            col=1,
        )
        swatch: dict[str, object] = {"symbol": "square", "size": 11, "color": "#6E7BC0"}
        if is_probe:
            swatch = {
                "symbol": "square",
                "size": 11,
                "color": style.theme.paper,
                "line": {"color": "#6E7BC0", "width": 1.5},
            }
            name = "evaluation (hatched)"
        fig.add_scatter(
            x=[None], y=[f"{keys[0][0]}@{keys[0][1]}"], mode="markers", marker=swatch, name=name, row=1, col=1
        )
    if not data.loads.empty:
        labels = [f"{m}@{d}" for m, d in zip(data.loads["model"], data.loads["depth"], strict=True)]
        fig.add_bar(
            base=data.loads["start_s"],
            x=data.loads["end_s"] - data.loads["start_s"],
            y=labels,
            orientation="h",
            marker={"color": style.theme.idle, "line": {"width": 0}},
            width=0.2,
            showlegend=False,
            hoverinfo="skip",
            row=1,
            col=1,
        )
        fig.add_scatter(
            x=data.loads["start_s"],
            y=labels,
            mode="markers",
            marker={
                "symbol": "triangle-right",
                "size": 11,
                "color": style.theme.ink,
                "line": {"color": style.theme.paper, "width": 1},
            },
            name="load (bar: its time)",
            customdata=np.stack([1e3 * (data.loads["end_s"] - data.loads["start_s"]), data.loads["reason"]], axis=1),
            hovertemplate="%{y}: %{customdata[1]}<br>%{x:.3f} s, took %{customdata[0]:.3g} ms<extra></extra>",
            row=1,
            col=1,
        )
    order = [f"{m}@{d}" for m, d in keys]
    fig.update_yaxes(
        title_text="model@layers", categoryorder="array", categoryarray=order, showgrid=False, row=1, col=1
    )
    fig.update_layout(barmode="overlay")


def _draw_batch(fig: go.Figure, data: TimelineData, style: Style) -> None:
    series = data.series
    _line(fig, 2, series["time_s"], series["rows"], "rows in the step", _strong(style.theme, 0), fill=True)
    _line(fig, 2, series["time_s"], series["waiting"], "requests waiting", _strong(style.theme, 1))
    fig.update_yaxes(title_text="requests", rangemode="tozero", row=2, col=1)


def _draw_memory(fig: go.Figure, data: TimelineData, style: Style) -> None:
    series = data.series
    unit, scale = ("GB", 1e-9) if (data.budget_bytes or series["weights_bytes"].max()) >= 1e9 else ("MB", 1e-6)
    for column, name, colour in (
        ("weights_bytes", "weights", "#7C86C6"),
        ("kv_bytes", "KV cache in use", "#E0A03C"),
    ):
        fig.add_scatter(
            x=series["time_s"],
            y=scale * series[column],
            mode="lines",
            stackgroup="memory",
            line={"shape": "hv", "width": 0.8, "color": colour},
            fillcolor=rgba(colour, 0.75),
            name=name,
            legend="legend3",
            hovertemplate=f"{name} %{{y:.3f}} {unit}<extra></extra>",
            row=3,
            col=1,
        )
    if data.budget_bytes is not None:
        _limit(fig, style, 3, data.end_s, scale * data.budget_bytes, f"budget {scale * data.budget_bytes:.3g} {unit}")
    fig.update_yaxes(title_text=f"memory ({unit})", rangemode="tozero", row=3, col=1)


def _draw_breaches(fig: go.Figure, data: TimelineData, style: Style) -> None:
    assert data.max_breaches is not None
    _line(
        fig, 4, data.series["time_s"], data.series["breaches"], "breaches in window", _strong(style.theme, 2), fill=True
    )
    _limit(fig, style, 4, data.end_s, data.max_breaches, f"CBCmax {data.max_breaches}")
    fig.update_yaxes(title_text="breaches (tokens)", rangemode="tozero", row=4, col=1)


def _line(
    fig: go.Figure,
    row: int,
    x: pd.Series[float],
    y: pd.Series[float],
    name: str,
    colour: str,
    *,
    fill: bool = False,
) -> None:
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"shape": "hv", "color": colour, "width": 1.4},
        fill="tozeroy" if fill else None,
        fillcolor=rgba(colour, 0.14),
        name=name,
        legend=f"legend{row}",
        hovertemplate=f"{name}: %{{y}}<extra></extra>",
        row=row,
        col=1,
    )


def _limit(fig: go.Figure, style: Style, row: int, end: float, value: float, name: str) -> None:
    fig.add_scatter(
        x=[0, end],
        y=[value, value],
        mode="lines",
        line={"color": style.theme.accent, "width": 1.5, "dash": "dot"},
        name=name,
        legend=f"legend{row}",
        hovertemplate=f"{name}<extra></extra>",
        row=row,
        col=1,
    )


def _side_legend(top: float) -> dict[str, object]:
    return {
        "x": 1.01,
        "xanchor": "left",
        "y": top,
        "yanchor": "top",
        "font": {"size": 12},
        "tracegroupgap": 0,
    }


def _strong(theme: Theme, number: int) -> str:
    """The strong end of a ramp, for lines that are no placement."""
    return theme.ramp(number)[1]
