"""The common look of figures: paper, grid, title and caption, legends, logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.style import Style
from heliosim.charts.theme import FONT, LIGHT, Theme, rgba

SIMULATED, MEASURED = "simulated", "measured"


def log_axis(low: float, high: float, *, most: int = 4) -> dict[str, object]:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade; at decades if they are more than ``most``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= most else (1,)
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


LEGEND_PIXELS = 660


def legend_rows(names: Iterable[str]) -> int:
    """Rows that a legend of these names takes in a narrow figure; plotly gives every entry the width of the longest."""
    known = list(names)
    if not known:
        return 0
    wide = 58 + 6.9 * max(len(name) for name in known)
    return math.ceil(len(known) / max(1, int(LEGEND_PIXELS / wide)))


def wrapped(caption: str, signs: int) -> str:
    """A caption in lines of at most so many signs, broken between its parts."""
    lines: list[str] = []
    for part in caption.split(" · ") if caption else ():
        if lines and len(lines[-1]) + 3 + len(part) <= signs:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return "<br>".join(lines)


def finish(
    fig: go.Figure,
    title: str,
    caption: str,
    *,
    height: int,
    theme: Theme = LIGHT,
    rows: int | None = None,
    signs: int = 112,
) -> go.Figure:
    """The common look: a quiet grid, title and caption at the left, legend under them.

    ``height``: pixels with a caption of one line; each further line adds its own. ``rows``: rows of the legend, for
    which room is left; None: two. ``signs``: of the caption in one line.
    """
    caption = wrapped(caption, signs)
    more = 16 * caption.count("<br>")
    height += more
    top = (136 if rows is None else 92 + 22 * rows) + more
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
        margin={"l": 70, "r": 28, "t": top, "b": 60},
        legend=dict(
            {
                "orientation": "h",
                "xref": "container",
                "x": 0.006,
                "xanchor": "left",
                "yref": "container",
                "y": 1 - (72 + more) / height,
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


def limit_line(
    fig: go.Figure,
    style: Style,
    x: Sequence[float],
    y: Sequence[float],
    name: str,
    *,
    at_end: bool = False,
    **place: int,
) -> None:
    """A dotted line with its name, drawn as a trace: plotly's own line with a note squashes a logarithmic axis."""
    fig.add_scatter(
        x=list(x),
        y=list(y),
        mode="lines+text",
        text=["", f" {name} "] if x[0] == x[-1] else [f" {name} ", ""],
        textposition=("bottom left" if at_end else "bottom right") if x[0] == x[-1] else "top right",
        textfont={"color": style.theme.accent, "size": 12},
        line={"color": style.theme.accent, "width": 1.5, "dash": "dot"},
        cliponaxis=False,
        showlegend=False,
        hovertemplate=f"{name}<extra></extra>",
        **({"row": place["row"], "col": place["col"]} if place else {}),
    )


def error_bars(mean: pd.Series[float], low: pd.Series[float], high: pd.Series[float], colour: str) -> dict[str, object]:
    """Bars from low to high; none where an end is not known."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - mean).fillna(0),
        "arrayminus": (mean - low).fillna(0),
        "color": rgba(colour, 0.6),
        "thickness": 1.5,
        "width": 3,
    }
