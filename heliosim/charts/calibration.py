"""A calibration: cells of one layer beside their fit, held-out errors by region, drift, spread of repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import finish
from heliosim.charts.style import Style
from heliosim.charts.theme import Theme, mix, rgba


@dataclass(frozen=True)
class Point:
    """A measured cell beside the fit: ``count`` on the axis, seconds, relative spread; ``series`` tells lines apart.

    ``panel``: ``decode`` (count: context of each row) or ``prefill`` (count: tokens of the chunk).
    """

    panel: str
    series: int
    count: float
    seconds: float
    spread: float
    fitted_s: float


PANELS = {"decode": "Decode, by rows", "prefill": "Prefill, by cached tokens"}
COUNTS = {"decode": "context of each row (tokens)", "prefill": "tokens of the chunk"}
SERIES = {"decode": "{:,} rows", "prefill": "{:,} tokens cached"}


def layer_data(points: Sequence[Point]) -> pd.DataFrame:
    """Columns panel, series, count, measured_us, low_us, high_us (half the spread to either side), fitted_us."""
    columns = ["panel", "series", "count", "measured_us", "low_us", "high_us", "fitted_us"]
    rows = []
    for p in points:
        ends = (1e6 * p.seconds * (1 - p.spread / 2), 1e6 * p.seconds * (1 + p.spread / 2))
        rows.append((p.panel, p.series, p.count, 1e6 * p.seconds, *ends, 1e6 * p.fitted_s))
    return pd.DataFrame(rows, columns=columns).sort_values(["panel", "series", "count"], ignore_index=True)


def layer_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """Measured cells of one layer with their spread, and the fit as lines; a panel for decoding and one for reading."""
    panels = [p for p in PANELS if (data["panel"] == p).any()]
    titles = [PANELS[p] for p in panels]
    fig = make_subplots(cols=max(1, len(panels)), rows=1, subplot_titles=titles, horizontal_spacing=0.1)
    for col, panel in enumerate(panels, start=1):
        part = data[data["panel"] == panel]
        lines = list(part.groupby("series"))
        for k, (series, line) in enumerate(lines):
            colour = _shade(style.theme, col - 1, k, len(lines))
            _draw_line(fig, col, SERIES[panel].format(series), line, colour)
        fig.update_xaxes(title_text=COUNTS[panel], row=1, col=col)
    fig.update_yaxes(title_text="time of one layer (µs)", rangemode="tozero")
    return finish(fig, "One layer: measured cells and the fit", style.caption, height=480, theme=style.theme)


def _draw_line(fig: go.Figure, col: int, name: str, line: pd.DataFrame, colour: str) -> None:
    error: dict[str, Any] = {
        "type": "data", "symmetric": False, "array": line["high_us"] - line["measured_us"],
        "arrayminus": line["measured_us"] - line["low_us"], "thickness": 1.2, "width": 3,
    }  # fmt: skip
    fig.add_scatter(
        x=line["count"], y=line["measured_us"], mode="markers", error_y=error, name=name, legendgroup=name,
        marker={"color": colour, "size": 7}, row=1, col=col,
        hovertemplate=f"{name}<br>%{{x}} tokens: measured %{{y:.4g}} µs<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=line["count"], y=line["fitted_us"], mode="lines", line={"color": colour, "width": 1.6}, legendgroup=name,
        showlegend=False, row=1, col=col, name=f"fit, {name}",
        hovertemplate=f"{name}<br>%{{x}} tokens: fit %{{y:.4g}} µs<extra></extra>",
    )  # fmt: skip


def layer_alt(data: pd.DataFrame) -> str:
    """What the figure shows, in words."""
    if data.empty:
        return "No cell of a layer was measured."
    error = (data["fitted_us"] / data["measured_us"] - 1).abs().median()
    low, high = data["measured_us"].min(), data["measured_us"].max()
    return (
        f"{len(data)} cells of one layer from {low:.3g} to {high:.3g} µs; the fit is off by {error:.1%} in the median."
    )


@dataclass(frozen=True)
class Residual:
    """A held-out cell: its region, and predicted over measured less 1."""

    region: str
    error: float


def residual_data(residuals: Sequence[Residual]) -> pd.DataFrame:
    """Columns region, error_percent."""
    return pd.DataFrame([(r.region, 100 * r.error) for r in residuals], columns=["region", "error_percent"])


def residual_figure(
    data: pd.DataFrame, style: Style, cells: str = "Held-out cells", known: str = "measured"
) -> go.Figure:
    """Signed errors of cells by region: every cell a point, the quartiles a box. ``cells`` says which they are,
    ``known`` what their times are.
    """
    fig = go.Figure()
    regions = sorted(data["region"].unique())
    for region in regions:
        part = data[data["region"] == region]
        fig.add_box(y=part["error_percent"], name=f"{region} ({len(part)})", **_box(style.theme))
    fig.add_hline(y=0, line={"color": style.theme.muted, "width": 1, "dash": "dot"})
    fig.update_xaxes(title_text="region (cells)")
    fig.update_yaxes(title_text=f"(predicted − {known}) / {known} (%)")
    return finish(fig, f"{cells}: error by region", style.caption, height=430, theme=style.theme)


def residual_alt(data: pd.DataFrame) -> str:
    """Median absolute error of every region, in words."""
    if data.empty:
        return "No cell was held out."
    said = data.assign(size=data["error_percent"].abs()).groupby("region")["size"].median()
    return "Median absolute error: " + ", ".join(f"{region} {size:.1f} %" for region, size in said.items()) + "."


def drift_data(readings: Sequence[float], tolerance: float) -> pd.DataFrame:
    """Columns cell, ratio (of the reference to its usual time when the cell was kept), is_usual."""
    ratios = np.asarray(readings, dtype=float)
    usual = np.abs(ratios - 1) <= tolerance
    return pd.DataFrame({"cell": np.arange(1, len(ratios) + 1), "ratio": ratios, "is_usual": usual})


def drift_figure(data: pd.DataFrame, tolerance: float, style: Style) -> go.Figure:
    """The reference over its usual time beside every cell that was kept, and the band outside which cells are measured
    again.
    """
    fig, theme = go.Figure(), style.theme
    colour = theme.ramp(0)[1]
    fig.add_hrect(y0=1 - tolerance, y1=1 + tolerance, fillcolor=colour, opacity=0.1, line_width=0)
    for is_usual, name, ink in ((True, "as usual", colour), (False, "unsteady to the last", theme.accent)):
        part = data[data["is_usual"] == is_usual]
        if len(part):
            fig.add_scatter(x=part["cell"], y=part["ratio"], mode="markers", name=name, marker={"color": ink})
    fig.update_xaxes(title_text="cell, in the order they were kept")
    fig.update_yaxes(title_text="reference over its usual time (ratio)")
    return finish(fig, "Drift of the machine while cells were measured", style.caption, height=390, theme=theme)


def drift_alt(data: pd.DataFrame) -> str:
    """The extremes, in words."""
    if data.empty:
        return "No reference was read."
    outside = int((~data["is_usual"]).sum())
    return (
        f"The reference lay between {data['ratio'].min():.2f} and {data['ratio'].max():.2f}; {outside} cells outside."
    )


def spread_data(kinds: Sequence[str], spreads: Sequence[float]) -> pd.DataFrame:
    """Columns kind, spread_percent: each cell's relative interquartile range."""
    return pd.DataFrame({"kind": list(kinds), "spread_percent": 100 * np.asarray(spreads, dtype=float)})


def spread_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """How much the same cell varied, by kind of cell; the widest at the top."""
    fig = go.Figure()
    order = data.groupby("kind")["spread_percent"].median().sort_values().index
    for kind in order:
        part = data[data["kind"] == kind]
        name = f"{str(kind).replace('_', ' ')} ({len(part)})"
        fig.add_box(x=part["spread_percent"].clip(upper=100), name=name, **_box(style.theme))
    fig.update_xaxes(title_text="interquartile range over median (%); beyond 100 drawn at 100", rangemode="tozero")
    fig.update_yaxes(title_text="kind of cell (cells)")
    height = 240 + 26 * max(1, len(order))
    return finish(fig, "Spread of repeats inside a cell", style.caption, height=height, theme=style.theme)


def spread_alt(data: pd.DataFrame) -> str:
    """Median spread over all cells, in words."""
    if data.empty:
        return "No cell has repeats."
    return (
        f"{len(data)} cells; the median interquartile range is {data['spread_percent'].median():.1f} % of the median."
    )


def _box(theme: Theme) -> dict[str, Any]:
    """The common look of boxes with their points."""
    colour = theme.ramp(0)[1]
    return {
        "boxpoints": "all", "jitter": 0.35, "pointpos": 0, "marker": {"color": rgba(colour, 0.7), "size": 5},
        "line": {"width": 1.2, "color": theme.muted}, "showlegend": False, "fillcolor": rgba(theme.muted, 0.06),
    }  # fmt: skip


def _shade(theme: Theme, ramp: int, k: int, count: int) -> str:
    """The k-th of ``count`` ordered series on a ramp from weak to strong."""
    weak, strong = theme.ramp(ramp)
    return mix(weak, strong, 0.35 + 0.65 * (k / max(1, count - 1)))
