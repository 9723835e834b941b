"""Figures of how exits follow each other, and of fitted models beside the record; see ``charts.behaviour``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.behaviour_order import WINDOW_TOKENS, in_random_order, windows
from heliosim.behaviour_tokens import Tokens, breaches_at
from heliosim.charts.behaviour import deepest_colours, exits_in, interval_bars, model_colours
from heliosim.charts.look import finish
from heliosim.charts.style import Style


def correlation_figure(
    correlations: Mapping[str, pd.DataFrame], exits: Mapping[str, Sequence[int]], style: Style
) -> go.Figure:
    """Autocorrelation of exit depth by distance, one line per model; dotted: around each text's own mean.
    ``correlations``: ``correlation_table`` by model.
    """
    fig = go.Figure()
    for model, colour in deepest_colours(exits, style.theme).items():
        table = correlations[model]
        fig.add_scatter(
            x=table["lag"],
            y=table["value"],
            error_y=interval_bars(table["high"], table["value"], table["low"]),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            name=model,
            hovertemplate=f"{model}, %{{x}} tokens apart: %{{y:.2f}}<extra></extra>",
        )
        fig.add_scatter(
            x=table["lag"],
            y=table["within"],
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": "dot"},
            name=f"{model}, within texts",
            hovertemplate=f"{model} within texts, %{{x}} apart: %{{y:.2f}}<extra></extra>",
        )
    fig.add_hline(y=0, line={"color": style.theme.muted, "width": 1})
    fig.update_xaxes(title_text="tokens apart", dtick=1)
    fig.update_yaxes(title_text="correlation of exit depth")
    return finish(fig, "How exit depth goes on along a text", style.caption, height=430, theme=style.theme)


def run_figure(tables: Mapping[str, pd.DataFrame], style: Style) -> go.Figure:
    """Mean runs of tokens that leave at the same exit, beside what independent tokens would give. ``run_table`` by
    model.
    """
    exits = exits_in(tables)
    fig = make_subplots(rows=1, cols=len(tables), subplot_titles=list(tables), horizontal_spacing=0.08)
    colours = model_colours(exits, style.theme)
    for col, (model, table) in enumerate(tables.items(), 1):
        names = [f"layer {e}" for e in table["exit_layer"]]
        fig.add_bar(
            x=names,
            y=table["mean"],
            error_y=interval_bars(table["high"], table["mean"], table["low"]),
            marker={"color": [colours[model, int(e)] for e in table["exit_layer"]]},
            showlegend=False,
            hovertemplate=f"{model}, %{{x}}: %{{y:.2f}} tokens<extra></extra>",
            row=1,
            col=col,
        )
        fig.add_scatter(
            x=names,
            y=table["independent"],
            mode="markers",
            marker={"color": style.theme.muted, "size": 11, "symbol": "line-ew-open", "line": {"width": 3}},
            name="independent tokens",
            showlegend=col == 1,
            hovertemplate="independent: %{y:.2f} tokens<extra></extra>",
            row=1,
            col=col,
        )
    fig.update_yaxes(title_text="mean run (tokens)", rangemode="tozero", row=1, col=1)
    return finish(fig, "Runs of tokens that leave at the same exit", style.caption, height=400, theme=style.theme)


def breach_data(
    tokens: Tokens, models: Sequence[str], threshold: float, window: int = WINDOW_TOKENS, seed: int = 0
) -> pd.DataFrame:
    """Breaches in each window, by model and depth loaded, as in ``breach_table``: columns model, depth, breaches."""
    tokens = in_random_order(tokens, seed)
    parts = []
    for model in models:
        for depth in tokens.exits_of(model):
            below = breaches_at(tokens, model, threshold, depth)
            parts.append(pd.DataFrame({"model": model, "depth": depth, "breaches": windows(tokens, below, window)}))
    return pd.concat(parts, ignore_index=True)


def breach_figure(data: pd.DataFrame, style: Style, window: int = WINDOW_TOKENS) -> go.Figure:
    """Breaches per window of tokens, a box per depth loaded."""
    exits = {str(m): sorted({int(d) for d in part["depth"]}) for m, part in data.groupby("model", sort=False)}
    fig, colours = go.Figure(), model_colours(exits, style.theme)
    for model, depths in exits.items():
        for depth in depths:
            part = data[(data["model"] == model) & (data["depth"] == depth)]
            fig.add_box(
                y=part["breaches"],
                name=f"{model}@{depth}",
                marker={"color": colours[model, depth]},
                boxpoints="all" if len(part) <= 60 else "outliers",
                jitter=0.4,
                pointpos=0,
                showlegend=False,
            )
    fig.update_yaxes(title_text=f"breaches per {window} tokens", range=[-2, window + 2])
    return finish(fig, f"Breaches per {window} tokens, by depth loaded", style.caption, height=430, theme=style.theme)


def fit_check_figure(fits: pd.DataFrame, style: Style) -> go.Figure:
    """Fitted models beside the record, one row per statistic, as distance in half-widths of what draws allow."""
    fig = go.Figure()
    kinds = list(dict.fromkeys(fits["model"]))
    for kind, symbol in zip(kinds, ("circle-open", "square-open", "diamond"), strict=False):
        part = fits[fits["model"] == kind]
        half = ((part["high"] - part["low"]) / 2).clip(lower=1e-9)
        fig.add_scatter(
            x=((part["fitted"] - part["recorded"]) / half).clip(-4, 4),
            y=part["statistic"],
            mode="markers",
            marker={"size": 10, "symbol": symbol, "line": {"width": 1.6}},
            name=str(kind),
            customdata=np.stack([part["recorded"], part["fitted"]], axis=-1),
            hovertemplate=f"{kind}, %{{y}}<br>recorded %{{customdata[0]:.3g}}, "
            "fitted %{customdata[1]:.3g}<extra></extra>",
        )
    fig.add_vrect(x0=-1, x1=1, fillcolor=style.theme.muted, opacity=0.1, line_width=0)
    fig.update_xaxes(title_text="fitted less recorded, over what chance allows (grey); cut at 4", range=[-4.2, 4.2])
    fig.update_yaxes(autorange="reversed")
    count = fits["statistic"].nunique()
    return finish(
        fig, "Fitted models of exits beside the record", style.caption, height=250 + 26 * count, theme=style.theme
    )
