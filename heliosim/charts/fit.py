"""Step times: predicted against measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import finish, log_axis
from heliosim.charts.style import Style
from heliosim.charts.theme import mix, rgba


@dataclass(frozen=True)
class FitData:
    """Predicted and measured step times.

    ``points``: group, measured_ms, predicted_ms, error (signed, relative to measured). ``median_abs_error``
    and ``p90_abs_error``: of the absolute relative errors; None without points.
    """

    points: pd.DataFrame
    median_abs_error: float | None
    p90_abs_error: float | None


def fit_data(measured_s: Sequence[float], predicted_s: Sequence[float], groups: Sequence[str] | None = None) -> FitData:
    """Pair predictions with measurements, seconds. ``groups`` names what each belongs to (a model, a region).

    Points whose measured time is not positive are left out: they have no relative error.
    """
    points = pd.DataFrame(
        {
            "group": list(groups) if groups is not None else ["steps"] * len(measured_s),
            "measured_ms": 1e3 * np.asarray(measured_s, dtype=np.float64),
            "predicted_ms": 1e3 * np.asarray(predicted_s, dtype=np.float64),
        }
    )
    points = points[points["measured_ms"] > 0].reset_index(drop=True)
    points["error"] = points["predicted_ms"] / points["measured_ms"] - 1
    size = points["error"].abs()
    if points.empty:
        return FitData(points, None, None)
    return FitData(points, float(size.median()), float(size.quantile(0.9)))


def fit_figure(data: FitData, style: Style, known: str = "measured") -> go.Figure:
    """Predicted against measured step time, and the relative errors over measured time. ``known``: what the times are
    where nobody measured them (composed).
    """
    fig = make_subplots(cols=2, rows=1, subplot_titles=["Step time", "Relative error"], horizontal_spacing=0.1)
    points = data.points
    ramps = {g: style.theme.ramp(i) for i, g in enumerate(sorted(points["group"].unique()))}
    for group, part in points.groupby("group", sort=True):
        colour = mix(*ramps[group], 0.75)
        marker = {"color": rgba(colour, 0.65), "size": 7, "line": {"color": style.theme.paper, "width": 0.5}}
        shown = (
            (part["predicted_ms"], "predicted %{y:.4g} ms"),
            (100 * part["error"], "error %{y:+.1f} %"),
        )
        for col, (y, text) in enumerate(shown, start=1):
            fig.add_scatter(
                x=part["measured_ms"],
                y=y,
                mode="markers",
                marker=marker,
                name=f"{group} ({len(part)} points)",
                legendgroup=str(group),
                showlegend=col == 1,
                hovertemplate=f"{group}<br>{known} %{{x:.4g}} ms<br>{text}<extra></extra>",
                row=1,
                col=col,
            )
    if not points.empty:
        low = float(min(points["measured_ms"].min(), points["predicted_ms"].min())) * 0.85
        high = float(max(points["measured_ms"].max(), points["predicted_ms"].max())) * 1.18
        ends = [float(points["measured_ms"].min()) * 0.85, float(points["measured_ms"].max()) * 1.18]
        for col, xs, ys in ((1, [low, high], [low, high]), (2, ends, [0.0, 0.0])):
            fig.add_scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={"color": style.theme.muted, "width": 1.2, "dash": "dot"},
                name="perfect prediction",
                showlegend=col == 1,
                hoverinfo="skip",
                row=1,
                col=col,
            )
        kind = log_axis(low, high) if high / low > 12 else {}
        fig.update_xaxes(**kind)
        fig.update_yaxes(**kind, row=1, col=1)
        bound = 115 * float(points["error"].abs().max()) or 1.0
        fig.update_yaxes(range=[-bound, bound], row=1, col=2)
    fig.update_xaxes(title_text=f"{known} step time (ms)")
    fig.update_yaxes(title_text="predicted step time (ms)", row=1, col=1)
    fig.update_yaxes(title_text=f"(predicted − {known}) / {known} (%)", row=1, col=2)
    found = f"{len(points)} cells"
    if data.median_abs_error is not None and data.p90_abs_error is not None:
        found += f" · error: median {100 * data.median_abs_error:.1f} %"
        found += f", 90th percentile {100 * data.p90_abs_error:.1f} %"
    caption = f"{found} · {style.caption}" if style.caption else found
    return finish(fig, f"Step times: predicted against {known}", caption, height=460, theme=style.theme)
