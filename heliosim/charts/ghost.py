"""A setting over the ghost of the one before it: its course over time, and where its tokens leave."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.cdf import GHOST, NOW
from heliosim.charts.look import finish
from heliosim.charts.style import Style, placement_colours
from heliosim.charts.theme import rgba
from heliosim.what_if import Tried


def course_data(now: Tried, before: Tried | None) -> pd.DataFrame:
    """The first replication of each over time: columns curve (``before``, ``now``), time_s, rows, waiting (the greatest
    of each slice of time).
    """
    frames = [
        pd.DataFrame({"curve": name, **{k: list(v) for k, v in tried.course.items()}})
        for name, tried in ((GHOST, before), (NOW, now))
        if tried is not None
    ]
    return pd.concat(frames, ignore_index=True)[["curve", "time_s", "rows", "waiting"]]


def course_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """Requests in a step and requests waiting; the setting before is faded."""
    titles = ["In the step", "Waiting"]
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.14)
    for curve, part in data.groupby("curve", sort=False):
        is_ghost = curve == GHOST
        for row, (column, place) in enumerate((("rows", 0), ("waiting", 1)), start=1):
            colour = style.theme.muted if is_ghost else style.theme.ramp(place)[1]
            fig.add_scatter(
                x=part["time_s"],
                y=part[column],
                mode="lines",
                line={
                    "color": rgba(colour, 0.7) if is_ghost else colour,
                    "width": 1.3 if is_ghost else 2,
                    "dash": "5px,3px" if is_ghost else "solid",
                    "shape": "hvh",
                },
                fill=None if is_ghost else "tozeroy",
                fillcolor=rgba(colour, 0.12),
                name=str(curve),
                showlegend=False,
                hovertemplate=f"{curve}: %{{y}} requests at %{{x:.2f}} s<extra></extra>",
                row=row,
                col=1,
            )
            fig.update_yaxes(title_text="requests", rangemode="tozero", row=row, col=1)
    fig.update_xaxes(title_text="time since start (s)", row=2, col=1)
    caption = style.noted("first replication · dashed: before").caption
    return finish(fig, "Batch and queue over time", caption, height=430, theme=style.theme, rows=0, signs=style.signs)


def course_alt(data: pd.DataFrame) -> str:
    """The same in words: the most rows and the longest queue of each."""
    parts = [
        f"{curve}: at most {int(part['rows'].max())} in a step, {int(part['waiting'].max())} waiting"
        for curve, part in data.groupby("curve", sort=False)
        if len(part)
    ]
    return "Batch and queue over time. " + ("; ".join(parts) or "No step was run") + "."


def mix_data(now: Tried, before: Tried | None) -> pd.DataFrame:
    """Shares of tokens by where they left: columns curve, model, exit_layer, share."""
    rows = [
        (name, model, layer, share)
        for name, tried in ((GHOST, before), (NOW, now))
        if tried is not None
        for model, layer, share in tried.exits
    ]
    return pd.DataFrame(rows, columns=["curve", "model", "exit_layer", "share"])


def mix_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """Bars of the setting; the one before stands as hollow bars behind them."""
    fig = go.Figure()
    keys = sorted({(str(m), int(e)) for m, e in zip(data["model"], data["exit_layer"], strict=True)})
    colours = placement_colours(keys, style.theme)
    labels = {key: f"{key[0]}<br>layer {key[1]}" for key in keys}
    for curve in (GHOST, NOW):
        part = data[data["curve"] == curve]
        if part.empty:
            continue
        own = [(str(m), int(e)) for m, e in zip(part["model"], part["exit_layer"], strict=True)]
        is_ghost = curve == GHOST
        fig.add_bar(
            x=[labels[key] for key in own],
            y=100 * part["share"],
            name=curve,
            marker={
                "color": "rgba(0,0,0,0)" if is_ghost else [colours[key] for key in own],
                "line": {"color": style.theme.muted, "width": 1.6 if is_ghost else 0},
            },
            width=0.8 if is_ghost else 0.56,
            text=None if is_ghost else [f"{100 * s:.0f} %" for s in part["share"]],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            hovertemplate=f"{curve}: %{{y:.1f}} % of tokens<extra></extra>",
        )
    fig.update_xaxes(
        title_text="exit (model and layer)",
        categoryorder="array",
        categoryarray=[labels[k] for k in keys],
        showgrid=False,
    )
    fig.update_yaxes(title_text="share of tokens (%)", rangemode="tozero")
    fig.update_layout(barmode="overlay")
    caption = style.noted("hollow: before").caption
    return finish(fig, "Where tokens leave", caption, height=430, theme=style.theme, rows=0, signs=style.signs)


def mix_alt(data: pd.DataFrame) -> str:
    """The same in words."""
    parts = []
    for curve, part in data.groupby("curve", sort=False):
        shares = [
            f"{m} layer {e} {100 * s:.0f} %"
            for m, e, s in zip(part["model"], part["exit_layer"], part["share"], strict=True)
        ]
        parts.append(f"{curve}: {', '.join(shares)}")
    return "Where tokens leave. " + ("; ".join(parts) or "No token was served") + "."
