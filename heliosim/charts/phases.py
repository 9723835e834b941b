"""Requests of a stretch of time, each a row of its phases; and the timeline of a stretch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.look import finish
from heliosim.charts.style import Style
from heliosim.charts.theme import rgba
from heliosim.charts.timeline import TimelineData, timeline_data
from heliosim.charts.timeline_ink import timeline_figure
from heliosim.course import PHASE_NAMES, loads_of, phases_of
from heliosim.formats.results import RunResults

MOST = 60
"""Requests that are drawn at most: more cannot be told apart."""
COLOURS = {"waiting": "#E0A03C", "prefill": "#2F8F83", "decode": "#7C86C6", "preempted": "#C2557A"}


@dataclass(frozen=True)
class PhasesData:
    """``phases``: columns of ``course.PHASES`` and ``row`` (0 is the first that arrived); ``requests`` drawn of
    ``present``; the stretch in seconds.
    """

    phases: pd.DataFrame
    requests: int
    present: int
    start_s: float
    end_s: float


def phases_data(run: RunResults, start_s: float, end_s: float, most: int = MOST) -> PhasesData:
    """Phases of requests that were there between two times (seconds); of more than ``most``, every so many-th."""
    found = phases_of(run, start_s, end_s)
    ids = found["request_id"].drop_duplicates().to_numpy()
    chosen = ids if len(ids) <= most else ids[np.linspace(0, len(ids) - 1, most).round().astype(int)]
    rows = {request: k for k, request in enumerate(chosen)}
    shown = found[found["request_id"].isin(rows)]
    shown = shown.assign(row=shown["request_id"].map(rows)).reset_index(drop=True)
    return PhasesData(shown, len(chosen), len(ids), start_s, end_s)


def phases_figure(data: PhasesData, style: Style) -> go.Figure:
    """A bar per request, coloured by phase."""
    fig = go.Figure()
    for phase in PHASE_NAMES:
        part = data.phases[data.phases["phase"] == phase]
        if part.empty and phase == "preempted":
            continue
        fig.add_bar(
            base=part["start_s"],
            x=part["end_s"] - part["start_s"],
            y=part["row"],
            orientation="h",
            width=0.82,
            marker={"color": COLOURS[phase], "line": {"width": 0}},
            name=phase,
            customdata=np.stack([part["request_id"], part["end_s"], part["task"]], axis=-1) if len(part) else None,
            hovertemplate=f"request %{{customdata[0]}} (%{{customdata[2]}}), {phase}<br>%{{base:.3f}} to "
            "%{customdata[1]:.3f} s<extra></extra>",
        )
    ids = data.phases.drop_duplicates("row").set_index("row")["request_id"]
    every = max(1, len(ids) // 12)
    ticks = [int(row) for row in ids.index if row % every == 0]
    fig.update_layout(barmode="overlay")
    fig.update_xaxes(title_text="time since start (s)", range=[data.start_s, data.end_s])
    fig.update_yaxes(
        title_text="request (number, by arrival)",
        tickvals=ticks,
        ticktext=[str(ids[row]) for row in ticks],
        range=[max(data.requests, 1) - 0.4, -0.6],
        showgrid=False,
    )
    said = f"{data.requests} of {data.present} requests there from {data.start_s:g} to {data.end_s:g} s"
    height = 250 + 9 * max(data.requests, 8)
    return finish(
        fig,
        "What requests went through",
        style.noted(said).caption,
        height=height,
        theme=style.theme,
        rows=1,
        signs=style.signs,
    )


def phases_alt(data: PhasesData) -> str:
    """Mean seconds of every phase."""
    if data.phases.empty:
        return "No request was there in this stretch of time."
    spans = data.phases.assign(seconds=data.phases["end_s"] - data.phases["start_s"])
    total = spans.groupby("phase")["seconds"].sum() / data.requests
    said = ", ".join(f"{name} {total[name]:.3g} s" for name in PHASE_NAMES if name in total)
    return f"Phases of {data.requests} requests, means: {said}."


def stretch_data(run: RunResults, start_s: float, end_s: float) -> TimelineData:
    """The timeline of a stretch (seconds), as finely as the whole run; loads in the background span their transfer."""
    import pyarrow.compute as pc

    starts = run.steps["start_s"]
    ends = pc.add(starts, run.steps["seconds"])
    keep = pc.and_(pc.greater_equal(ends, start_s), pc.less_equal(starts, end_s))
    data = timeline_data(replace(run, steps=run.steps.filter(keep)))
    loads = loads_of(run)
    near = loads[(loads["end_s"] >= start_s) & (loads["start_s"] <= end_s)]
    parts = near["placement"].str.rsplit("@", n=1)
    shown = pd.DataFrame(
        {
            "start_s": near["start_s"],
            "end_s": near["end_s"],
            "model": [p[0] for p in parts],
            "depth": [int(p[1]) for p in parts],
            "reason": [_said(load) for load in near.to_dict("records")],
        }
    ).reset_index(drop=True)
    return replace(data, loads=shown, end_s=end_s)


def _said(load: dict[Any, Any]) -> str:
    """Why a load was, and how much of it ran beside steps."""
    return (
        f"{load['reason']}, {1e3 * load['hidden_s']:.0f} ms beside steps" if load["is_background"] else load["reason"]
    )


def stretch_figure(data: TimelineData, style: Style, name: str, start_s: float) -> go.Figure:
    """The timeline from ``start_s`` to the data's end."""
    fig = timeline_figure(data, style, name)
    return fig.update_xaxes(range=[start_s, data.end_s])


@dataclass(frozen=True)
class WaitsData:
    """``points``: arrival_s, ttft_ms of requests that got a first token; ``p99_ms``: of those that count."""

    points: pd.DataFrame
    p99_ms: float | None
    limit_ms: float | None


def waits_data(run: RunResults, limit_ms: float | None, warm_up: float = 0.1) -> WaitsData:
    """TTFT of each request by arrival; the 99th percentile is that of requests behind the warm-up."""
    from heliosim.diagnosis import counted

    all_of, behind = counted(run, 0.0), counted(run, warm_up)
    points = pd.DataFrame({"arrival_s": all_of["arrival_s"], "ttft_ms": 1e3 * all_of["ttft_s"]})
    p99 = None if behind.empty else float(1e3 * behind["ttft_s"].quantile(0.99))
    return WaitsData(points.reset_index(drop=True), p99, limit_ms)


def waits_figure(data: WaitsData, style: Style, window: tuple[float, float]) -> go.Figure:
    """TTFT against arrival over the whole run, the stretch shaded: the map to zoom by."""
    fig = go.Figure()
    colour = style.theme.ramp(0)[1]
    fig.add_scattergl(
        x=data.points["arrival_s"],
        y=data.points["ttft_ms"],
        mode="markers",
        marker={"size": 4.5, "color": rgba(colour, 0.6)},
        name="a request",
        hovertemplate="arrived %{x:.2f} s, TTFT %{y:.0f} ms<extra></extra>",
    )
    ends = [0.0, float(data.points["arrival_s"].max())] if len(data.points) else [0.0, 1.0]
    for value, name, shade in (
        (data.p99_ms, "p99", style.theme.muted),
        (data.limit_ms, "limit on p99", style.theme.accent),
    ):
        if value is not None:
            line = {"color": shade, "width": 1.5, "dash": "dot"}
            fig.add_scatter(x=ends, y=[value, value], mode="lines", line=line, name=f"{name} {value:,.0f} ms")
    fig.add_vrect(x0=window[0], x1=window[1], fillcolor=style.theme.muted, opacity=0.13, line_width=0, layer="below")
    fig.update_xaxes(title_text="arrival (s since start)")
    fig.update_yaxes(title_text="TTFT (ms)", rangemode="tozero")
    said = f"shaded: {window[0]:g} to {window[1]:g} s, shown below"
    return finish(
        fig, "When requests waited", style.noted(said).caption, height=330, theme=style.theme, rows=1, signs=style.signs
    )


def waits_alt(data: WaitsData) -> str:
    if data.points.empty or data.p99_ms is None:
        return "Time to the first token by arrival. No request got one."
    worst = data.points.sort_values("ttft_ms").iloc[-1]
    return (
        f"Time to the first token by arrival, {len(data.points)} requests: p99 {data.p99_ms:,.0f} ms, longest "
        f"{worst['ttft_ms']:,.0f} ms for the one that arrived at {worst['arrival_s']:.1f} s."
    )
