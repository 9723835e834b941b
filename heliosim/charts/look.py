"""The common look of figures: paper, grid, title and caption, legends, logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.style import Style
from heliosim.charts.theme import FONT, LIGHT, Theme

SIMULATED, MEASURED = "simulated", "measured"


def log_axis(low: float, high: float) -> dict[str, object]:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade; at decades if there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def latency_axis(values: pd.Series[float]) -> dict[str, object]:
    """A logarithmic axis where the values span more than a factor of 30."""
    positive = values[values > 0]
    if len(positive) and positive.max() / positive.min() > 30:
        return log_axis(float(positive.min()), float(positive.max()))
    return {"rangemode": "tozero"}


def system_legend(fig: go.Figure, systems: Iterable[str], style: Style, *, sources: set[str], as_lines: bool) -> None:
    """One entry per system in its colour, then what solid and dashed (or filled and hollow) mean."""
    for system in systems:
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="lines" if as_lines else "markers",
            line={"color": style.colours[system], "width": 4},
            marker={"color": style.colours[system], "size": 11, "symbol": "square"},
            name=system,
            legendgroup=system,
        )
    for source in (s for s in (SIMULATED, MEASURED) if s in sources):
        dash, symbol = ("solid", "circle") if source == SIMULATED else ("5px,3px", "diamond-open")
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="lines" if as_lines else "markers",
            line={"color": style.theme.muted, "width": 2, "dash": dash},
            marker={"color": style.theme.muted, "size": 11, "symbol": symbol},
            name=source,
            legendgroup=source,
        )


def titles_left(fig: go.Figure) -> None:
    """Move subplot titles to the left edge of their plots."""
    titles = list(fig.layout.annotations)
    axes = [a for a in fig.select_xaxes()]
    for title, axis in zip(titles, axes, strict=False):
        title.update(x=axis.domain[0], xanchor="left")


def finish(fig: go.Figure, title: str, caption: str, *, height: int, theme: Theme = LIGHT) -> go.Figure:
    """The common look: a quiet grid, title and caption at the left, legend in a row under them."""
    titles_left(fig)
    fig.update_annotations(font={"size": 13.5, "color": theme.ink})
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.line,
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": theme.line,
        "title_font": {"size": 12.5, "color": theme.muted},
        "tickfont": {"size": 12},
        "title_standoff": 8,
        "automargin": True,
    }
    fig.update_xaxes(**axis)
    fig.update_yaxes(**axis)
    return fig.update_layout(
        title={
            "text": f"<b>{title}</b>",
            "subtitle": {"text": caption, "font": {"size": 12.5, "color": theme.muted}},
            "x": 0.0,
            "xref": "container",
            "xanchor": "left",
            "pad": {"l": 14},
            "y": 1 - 26 / height,
            "yanchor": "top",
            "font": {"size": 17, "color": theme.ink},
        },
        font={"family": FONT, "size": 13, "color": theme.ink},
        paper_bgcolor=theme.paper,
        plot_bgcolor=theme.paper,
        height=height,
        margin={"l": 70, "r": 28, "t": 136, "b": 60},
        legend=dict(
            {
                "orientation": "h",
                "xref": "container",
                "x": 0.006,
                "xanchor": "left",
                "yref": "container",
                "y": 1 - 72 / height,
                "yanchor": "top",
                "font": {"size": 12.5},
                "itemsizing": "trace",
            }
            if fig.layout.legend.x is None
            else {}
        ),
        hoverlabel={"font": {"family": FONT, "size": 12.5}, "bgcolor": theme.paper, "bordercolor": theme.line},
    )


finish = finish
"""The common look, for figures drawn elsewhere."""
