"""SLO attainment of a fleet over load and replicas, as a map."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.look import finish
from heliosim.charts.style import Style
from heliosim.charts.theme import mix, text_on
from heliosim.comparing import Study, cell_interval, is_overloaded

TARGET = 99.0
"""Attainment, %, from which on a cell is framed."""


def attainment_data(study: Study) -> pd.DataFrame:
    """Columns replicas, rate_per_s (of the whole fleet), attainment, low, high (%; NaN: not known), is_overloaded."""
    rows = []
    for count in study.replicas:
        for rate in study.fleet_rates_per_s:
            cells = study.cells_of(study.fleet_of or "", rate, count)
            found = cell_interval(cells, "slo_attainment")
            values = [np.nan if v is None else 100 * v for v in (found.mean, found.low, found.high)]
            rows.append((count, rate, *values, is_overloaded(cells)))
    return pd.DataFrame(rows, columns=["replicas", "rate_per_s", "attainment", "low", "high", "is_overloaded"])


def attainment_figure(data: pd.DataFrame, style: Style, system: str, slo: str = "the SLO") -> go.Figure:
    """A cell per fleet: the share of its requests within the SLO. Cells that reach ``TARGET`` are framed."""
    theme = style.theme
    colour = style.colours[system]
    weak = mix(theme.paper, colour, 0.04)
    table = data.pivot(index="rate_per_s", columns="replicas", values="attainment")
    columns: list[object] = list(table.columns)
    rates: list[object] = list(table.index)
    xs, ys = [f"{c}" for c in table.columns], [f"{r:.3g}" for r in table.index]
    fig = go.Figure()
    fig.add_heatmap(
        x=list(range(len(xs))),
        y=list(range(len(ys))),
        z=table.to_numpy(dtype=np.float64),
        zmin=0,
        zmax=100,
        colorscale=[[0, weak], [1, colour]],
        xgap=3,
        ygap=3,
        hoverongaps=False,
        colorbar={
            "title": {"text": "within SLO (%)", "side": "right", "font": {"size": 12}},
            "thickness": 12,
            "outlinewidth": 0,
        },
        customdata=[[f"{c} replicas, {r} requests/s" for c in xs] for r in ys],
        hovertemplate="%{customdata}<br>%{z:.1f} % within the SLO<extra></extra>",
    )
    for cell in data.itertuples():
        if float(str(cell.attainment)) >= TARGET:
            x, y = columns.index(cell.replicas), rates.index(cell.rate_per_s)
            box = {"x0": x - 0.47, "x1": x + 0.47, "y0": y - 0.46, "y1": y + 0.46}
            fig.add_shape(type="rect", **box, line={"color": theme.ink, "width": 2})
    fig.update_xaxes(title_text="replicas (servers)", tickvals=list(range(len(xs))), ticktext=xs, showgrid=False)
    fig.update_yaxes(
        title_text="offered to the fleet (requests/s)", tickvals=list(range(len(ys))), ticktext=ys, showgrid=False
    )
    notes = f"share of requests within {slo} · framed: {TARGET:g} % or more · ± half of the 95 % interval"
    caption = style.noted(notes).caption
    height = max(330, 62 * len(ys) + 190)
    fig = finish(fig, f"SLO attainment of {system}", caption, height=height, theme=theme, rows=0, signs=style.signs)
    for cell in data.itertuples():  # behind the common look, which takes notes for titles of panels
        place = (columns.index(cell.replicas), rates.index(cell.rate_per_s))
        _label(fig, cell, place, style, weak, colour)
    return fig


def _label(fig: go.Figure, cell: object, place: tuple[int, int], style: Style, weak: str, colour: str) -> None:
    """The number in a cell with its half-width, or that the fleet is overloaded."""
    value, low, high = (float(getattr(cell, k)) for k in ("attainment", "low", "high"))
    if np.isnan(value):
        text, ink = "overloaded" if cell.is_overloaded else "–", style.theme.muted  # type: ignore[attr-defined]
    else:
        half = "" if np.isnan(low) else f"<br><span style='font-size:11px'>± {(high - low) / 2:.1f}</span>"
        text = f"{value:.1f}{half}"
        ink = text_on(mix(weak, colour, value / 100))
    fig.add_annotation(
        x=place[0],
        y=place[1],
        text=text,
        showarrow=False,
        font={"size": 13, "color": ink},
    )


def attainment_alt(data: pd.DataFrame, system: str) -> str:
    """The same in words: for each load the smallest fleet that reaches the target."""
    said = []
    for rate, part in data.groupby("rate_per_s", sort=True):
        enough = part[part["attainment"] >= TARGET]["replicas"]
        most = part["attainment"].max()
        best = "none is steady" if np.isnan(most) else f"none reaches it, at most {most:.1f} %"
        said.append(f"{float(str(rate)):g} requests/s: " + (f"{enough.min()} replicas" if len(enough) else best))
    return f"Smallest fleets of {system} with {TARGET:g} % of requests within the SLO. " + "; ".join(said) + "."
