"""Quality beside speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import MEASURED, SIMULATED, finish, system_legend
from heliosim.charts.style import Style
from heliosim.charts.systems import systems_data
from heliosim.charts.theme import rgba
from heliosim.metrics import SystemResult


def quality_data(systems: Sequence[SystemResult]) -> pd.DataFrame:
    """Columns system, source, output_throughput (tok/s), agreement (%), perplexity; measured is the mean of
    repeats.
    """
    wide = systems_data(systems, ("output_throughput", "agreement", "perplexity"))
    long = wide.melt(["system", "metric"], [SIMULATED, MEASURED], "source")
    table = long.pivot(index=["system", "source"], columns="metric", values="value").reset_index()
    table.columns.name = None
    order = {s.name: i for i, s in enumerate(systems)}
    table = table.sort_values(["system", "source"], key=lambda c: c.map(order) if c.name == "system" else -c.str.len())
    known = table.dropna(subset=["output_throughput"]).reset_index(drop=True)
    return known[["system", "source", "output_throughput", "agreement", "perplexity"]]


def quality_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """Throughput against agreement with the full model and against perplexity."""
    panels = (
        ("agreement", "agreement with full model (%)", "Agreement (higher is better)"),
        ("perplexity", "perplexity (no unit)", "Perplexity (lower is better)"),
    )
    fig = make_subplots(cols=2, rows=1, subplot_titles=[p[2] for p in panels], horizontal_spacing=0.1)
    for col, (column, title, _) in enumerate(panels, start=1):
        for system, part in data.dropna(subset=[column]).groupby("system", sort=False):
            colour = style.colours[str(system)]
            fig.add_scatter(
                x=part["output_throughput"],
                y=part[column],
                mode="markers+lines",
                line={"color": rgba(colour, 0.5), "width": 1.2},
                marker={
                    "symbol": ["circle" if s == SIMULATED else "diamond-open" for s in part["source"]],
                    "size": [9 if s == SIMULATED else 17 for s in part["source"]],
                    "color": colour,
                    "opacity": 1,
                    "line": {
                        "width": [0 if s == SIMULATED else 2.2 for s in part["source"]],
                        "color": colour,
                    },
                },
                customdata=part["source"],
                legendgroup=system,
                showlegend=False,
                cliponaxis=False,
                hovertemplate=f"{system}, %{{customdata}}<br>%{{x:.4g}} tok/s, %{{y:.4g}}<extra></extra>",
                row=1,
                col=col,
            )
        speeds, values = (data[c].dropna().to_numpy(dtype=np.float64) for c in ("output_throughput", column))
        fig.update_xaxes(title_text="output throughput (tok/s)", range=room(speeds), row=1, col=col)
        top = 100.0 if column == "agreement" else None
        fig.update_yaxes(title_text=title, range=room(values, top), row=1, col=col)
    system_legend(fig, data["system"].unique(), style, sources=set(data["source"]), as_lines=False)
    return finish(fig, "Throughput against agreement and perplexity", style.caption, height=460, theme=style.theme)


def room(values: npt.NDArray[np.float64], top: float | None = None) -> list[float] | None:
    """An axis range with air around the values, so that nearly equal ones do not look far apart."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    air = max(0.2 * (high - low), 0.06 * abs(high)) or 1.0
    roof = high + air if top is None else min(high + air, top + 0.25 * air)
    return [max(0.0, low - air), roof]
