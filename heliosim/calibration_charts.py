"""Figures of a calibration: numbers first (tables), then ink. Pure: rows and facts in, tables and figures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from heliosim.charts import ACCENT, MODEL_RAMPS, MUTED, finish

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = tuple(ramp[1] for ramp in MODEL_RAMPS)


@dataclass(frozen=True)
class Point:
    """A measured cell beside the fit: ``count`` on the axis, seconds, relative spread; ``series`` tells lines apart."""

    panel: str
    series: str
    count: float
    seconds: float
    spread: float
    fitted_s: float


def layer_data(points: Sequence[Point]) -> pd.DataFrame:
    """Columns panel, series, count, measured_us, low_us, high_us (half the spread to either side), fitted_us."""
    columns = ["panel", "series", "count", "measured_us", "low_us", "high_us", "fitted_us"]
    rows = [
        (
            p.panel, p.series, p.count, 1e6 * p.seconds, 1e6 * p.seconds * (1 - p.spread / 2),
            1e6 * p.seconds * (1 + p.spread / 2), 1e6 * p.fitted_s,
        )
        for p in points
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).sort_values(["panel", "series", "count"], ignore_index=True)


def layer_figure(data: pd.DataFrame, caption: str) -> go.Figure:
    """Measured cells of one layer with their spread, and the fit as lines; a panel for decoding and one for reading."""
    from plotly.subplots import make_subplots

    panels = list(dict.fromkeys(data["panel"]))
    fig = make_subplots(cols=max(1, len(panels)), rows=1, subplot_titles=panels, horizontal_spacing=0.1)
    for col, panel in enumerate(panels, start=1):
        part = data[data["panel"] == panel]
        for k, (series, line) in enumerate(part.groupby("series", sort=False)):
            colour = _shade(k, part["series"].nunique())
            error: dict[str, Any] = {
                "type": "data", "symmetric": False, "array": line["high_us"] - line["measured_us"],
                "arrayminus": line["measured_us"] - line["low_us"], "thickness": 1.2, "width": 3,
            }  # fmt: skip
            fig.add_scatter(
                x=line["count"], y=line["measured_us"], mode="markers", error_y=error, name=str(series),
                marker={"color": colour, "size": 7}, legendgroup=str(series), row=1, col=col,
                hovertemplate=f"{series}<br>%{{x}}: measured %{{y:.4g}} µs<extra></extra>",
            )  # fmt: skip
            fig.add_scatter(
                x=line["count"], y=line["fitted_us"], mode="lines", line={"color": colour, "width": 1.6},
                legendgroup=str(series), showlegend=False, row=1, col=col, name=f"fit, {series}",
                hovertemplate=f"{series}<br>%{{x}}: fit %{{y:.4g}} µs<extra></extra>",
            )  # fmt: skip
        what = "context of each row (tokens)" if panel.startswith("Decode") else "tokens of the chunk"
        fig.update_xaxes(title_text=what, row=1, col=col)
    fig.update_yaxes(title_text="time of one layer (µs)", row=1, col=1, rangemode="tozero")
    return finish(fig, "One layer: measured cells and the fit", caption, height=470)


@dataclass(frozen=True)
class Residual:
    """A held-out cell: its region, and predicted over measured less 1."""

    region: str
    error: float


def residual_data(residuals: Sequence[Residual]) -> pd.DataFrame:
    """Columns region, error_percent."""
    return pd.DataFrame([(r.region, 100 * r.error) for r in residuals], columns=["region", "error_percent"])


def residual_figure(data: pd.DataFrame, caption: str) -> go.Figure:
    """Signed errors of held-out cells by region: every cell a point, the quartiles a box."""
    import plotly.graph_objects as go

    fig = go.Figure()
    regions = sorted(data["region"].unique())
    for k, region in enumerate(regions):
        part = data[data["region"] == region]
        fig.add_box(
            y=part["error_percent"], name=f"{region} ({len(part)})", boxpoints="all", jitter=0.4, pointpos=0,
            marker={"color": _shade(k, len(regions)), "size": 5}, line={"width": 1.2}, showlegend=False,
            fillcolor="rgba(0,0,0,0.03)",
        )  # fmt: skip
    fig.add_hline(y=0, line={"color": MUTED, "width": 1, "dash": "dot"})
    fig.update_xaxes(title_text="region (cells)")
    fig.update_yaxes(title_text="(predicted − measured) / measured (%)")
    return finish(fig, "Held-out cells: error by region", caption, height=430)


def drift_data(readings: Sequence[float], tolerance: float) -> pd.DataFrame:
    """Columns reading, ratio (to the usual time), is_usual."""
    ratios = np.asarray(readings, dtype=float)
    return pd.DataFrame(
        {"reading": np.arange(1, len(ratios) + 1), "ratio": ratios, "is_usual": np.abs(ratios - 1) <= tolerance}
    )


def drift_figure(data: pd.DataFrame, tolerance: float, caption: str) -> go.Figure:
    """Readings of the reference cell over its usual time, and the band outside which cells are measured again."""
    import plotly.graph_objects as go

    fig = go.Figure()
    fig.add_hrect(y0=1 - tolerance, y1=1 + tolerance, fillcolor=COLOURS[0], opacity=0.08, line_width=0)
    for is_usual, name, colour in ((True, "as usual", COLOURS[0]), (False, "cells measured again", ACCENT)):
        part = data[data["is_usual"] == is_usual]
        if len(part):
            fig.add_scatter(x=part["reading"], y=part["ratio"], mode="markers", name=name, marker={"color": colour})
    fig.update_xaxes(title_text="reading, in the order they were taken")
    fig.update_yaxes(title_text="reference cell over its usual time (ratio)")
    return finish(fig, "Drift of the machine while cells were measured", caption, height=380)


def spread_data(kinds: Sequence[str], spreads: Sequence[float]) -> pd.DataFrame:
    """Columns kind, spread_percent: each cell's relative interquartile range."""
    return pd.DataFrame({"kind": list(kinds), "spread_percent": 100 * np.asarray(spreads, dtype=float)})


def spread_figure(data: pd.DataFrame, caption: str) -> go.Figure:
    """How much the same cell varied, by kind of cell."""
    import plotly.graph_objects as go

    fig = go.Figure()
    order = data.groupby("kind")["spread_percent"].median().sort_values().index
    for kind in order:
        part = data[data["kind"] == kind]
        fig.add_box(
            x=part["spread_percent"], name=f"{str(kind).replace('_', ' ')} ({len(part)})", boxpoints="all", jitter=0.3,
            pointpos=0, marker={"color": COLOURS[0], "size": 4}, line={"width": 1}, showlegend=False,
            fillcolor="rgba(0,0,0,0.03)",
        )  # fmt: skip
    fig.update_xaxes(title_text="interquartile range over median (%)", rangemode="tozero")
    return finish(fig, "Spread of repeats inside a cell", caption, height=200 + 26 * max(1, len(order)))


def _shade(k: int, count: int) -> str:
    """The k-th of ``count`` colours: models' dark tones first, repeated where there are more."""
    return COLOURS[k % len(COLOURS)] if count <= len(COLOURS) else _ramp(k / max(1, count - 1))


def _ramp(share: float) -> str:
    """From ochre to indigo, for ordered series of any number."""
    ends = ((0xC9, 0x8A, 0x2B), (0x3D, 0x3F, 0x91))
    mixed = [round(a + (b - a) * share) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{c:02X}" for c in mixed)
