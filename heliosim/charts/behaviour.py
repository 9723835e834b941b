"""Figures of behaviour tables: numbers first (``*_data``, or the tables of ``behaviour_stats`` and its neighbours),
then ink (``*_figure``). Models keep their hues: light for shallow exits, dark for deep ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import finish
from heliosim.charts.style import Style, placement_colours
from heliosim.charts.theme import Theme


def model_colours(exits: Mapping[str, Sequence[int]], theme: Theme) -> dict[tuple[str, int], str]:
    return placement_colours(((model, e) for model, layers in exits.items() for e in layers), theme)


def deepest_colours(exits: Mapping[str, Sequence[int]], theme: Theme) -> dict[str, str]:
    """One colour per model: that of its last exit."""
    colours = model_colours(exits, theme)
    return {model: colours[model, max(layers)] for model, layers in exits.items()}


def interval_bars(
    high: pd.Series[float], value: pd.Series[float], low: pd.Series[float], scale: float = 1
) -> dict[str, object]:
    """Error bars of an interval."""
    return {
        "type": "data",
        "symmetric": False,
        "array": scale * (high - value),
        "arrayminus": scale * (value - low),
        "thickness": 1.3,
        "width": 3,
    }


def exits_in(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[int]]:
    return {model: sorted({int(e) for e in table["exit_layer"]}) for model, table in tables.items()}


def exit_share_figure(by_task: Mapping[str, pd.DataFrame], style: Style) -> go.Figure:
    """Where tokens leave, by task: one panel per model, a bar per task. ``by_task``: ``shares_by_task`` by model."""
    models, exits = list(by_task), exits_in(by_task)
    fig = make_subplots(rows=1, cols=len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.06)
    colours = model_colours(exits, style.theme)
    for col, model in enumerate(models, 1):
        table = by_task[model]
        for e in exits[model]:
            part = table[table["exit_layer"] == e]
            fig.add_bar(
                y=part["task"],
                x=100 * part["share"],
                orientation="h",
                marker={"color": colours[model, e]},
                name=f"{model}, layer {e}",
                customdata=np.stack([100 * part["low"], 100 * part["high"], part["tokens"]], axis=-1),
                hovertemplate=f"layer {e}, %{{y}}: %{{x:.1f}} % (%{{customdata[0]:.1f}} to %{{customdata[1]:.1f}})"
                "<br>%{customdata[2]:,} tokens<extra></extra>",
                row=1,
                col=col,
            )
    fig.update_layout(barmode="stack", legend={"traceorder": "normal"})
    fig.update_xaxes(title_text="tokens (%)", range=[0, 100])
    fig.update_yaxes(autorange="reversed", row=1, col=1)
    tasks = max(len(set(table["task"])) for table in by_task.values())
    return finish(fig, "Where tokens leave, by task", style.caption, height=300 + 30 * tasks, theme=style.theme)


def threshold_figure(curves: Mapping[str, pd.DataFrame], threshold: float, style: Style) -> go.Figure:
    """Depth and agreement at every threshold, one line per model. ``curves``: ``threshold_curve`` by model."""
    titles = ("mean exit depth", "tokens equal to the last layer's")
    fig = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.1)
    exits = {m: [int(c.removeprefix("exit ")) for c in t.columns if c.startswith("exit ")] for m, t in curves.items()}
    for model, colour in deepest_colours(exits, style.theme).items():
        table = curves[model]
        for col, y in ((1, 100 * table["mean_depth"] / max(exits[model])), (2, 100 * table["agreement"])):
            fig.add_scatter(
                x=table["threshold"],
                y=y,
                mode="lines",
                line={"color": colour, "width": 2.2},
                name=model,
                legendgroup=model,
                showlegend=col == 1,
                hovertemplate=f"{model}, threshold %{{x:.2f}}: %{{y:.1f}} %<extra></extra>",
                row=1,
                col=col,
            )
    fig.add_vline(x=threshold, line={"color": style.theme.muted, "width": 1, "dash": "dot"})
    fig.update_xaxes(title_text="confidence threshold", range=[0, 1])
    fig.update_yaxes(title_text="layers (% of all)", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="tokens (%)", row=1, col=2)
    return finish(
        fig, "Every threshold, open loop", f"dotted: {threshold:g} · {style.caption}", height=430, theme=style.theme
    )


def depth_quality_figure(
    depths: Mapping[str, pd.DataFrame], policies: Mapping[str, pd.DataFrame], style: Style
) -> go.Figure:
    """Quality against depth: lines, all tokens leaving at a layer (``depth_table``); marks, what policies really wrote
    (``quality_table``). Left agreement, right perplexity where the tables know it.
    """
    exits = exits_in(depths)
    shown = [("agreement", 100.0), ("perplexity", 1.0)][: 2 if _knows_perplexity(depths, policies) else 1]
    titles = ("equal to the full model's", "perplexity")[: len(shown)]
    fig = make_subplots(rows=1, cols=len(shown), horizontal_spacing=0.1, subplot_titles=titles)
    for model, colour in deepest_colours(exits, style.theme).items():
        table, wrote = depths[model], policies.get(model, pd.DataFrame())
        deepest = max(exits[model])
        for col, (name, scale) in enumerate(shown, start=1):
            if name not in table:
                continue
            fig.add_scatter(
                x=100 * table["exit_layer"] / deepest,
                y=scale * table[name],
                error_y=interval_bars(table[f"{name}_high"], table[name], table[f"{name}_low"], scale),
                mode="lines+markers",
                line={"color": colour, "width": 2},
                name=f"{model}, open loop",
                legendgroup=model,
                showlegend=col == 1,
                customdata=table["exit_layer"],
                hovertemplate=f"{model}, layer %{{customdata}}: %{{y:.3g}}<extra></extra>",
                row=1,
                col=col,
            )
            if len(wrote) and wrote[name].notna().any():
                fig.add_scatter(
                    x=100 * wrote["layers"] / deepest,
                    y=scale * wrote[name],
                    mode="markers",
                    marker={"color": colour, "size": 9, "symbol": "diamond-open", "line": {"width": 2}},
                    name=f"{model}, closed loop",
                    legendgroup=f"{model} closed",
                    showlegend=col == 1,
                    customdata=wrote["policy"],
                    hovertemplate=f"{model}, %{{customdata}}: %{{y:.3g}} at %{{x:.0f}} % of its layers<extra></extra>",
                    row=1,
                    col=col,
                )
    fig.update_xaxes(title_text="mean exit depth (% of layers)", rangemode="tozero")
    fig.update_yaxes(title_text="tokens (%)", row=1, col=1)
    said = style
    if len(shown) == 2:
        fig.update_yaxes(title_text="perplexity", row=1, col=2)
        said = style.noted("perplexity: lines, an exit's own; marks, the full model's")
    return finish(
        fig,
        "Quality against depth",
        said.caption,
        height=460,
        theme=style.theme,
    )


def _knows_perplexity(depths: Mapping[str, pd.DataFrame], policies: Mapping[str, pd.DataFrame]) -> bool:
    tables = [*depths.values(), *policies.values()]
    return any(bool(t["perplexity"].notna().any()) for t in tables if "perplexity" in t)


def joint_figure(joint: pd.DataFrame, style: Style) -> go.Figure:
    """Where two models leave the same tokens: shares of all tokens. ``joint``: a ``joint_table``."""
    one, other = list(joint.columns[:2])
    grid = joint.pivot(index=one, columns=other, values="share")
    given = joint.pivot(index=one, columns=other, values="given_one")
    fig = go.Figure()
    fig.add_heatmap(
        z=100 * grid.to_numpy(),
        x=[f"layer {e}" for e in grid.columns],
        y=[f"layer {e}" for e in grid.index],
        customdata=100 * given.to_numpy(),
        texttemplate="%{z:.1f} %",
        colorscale=[[0, style.theme.grid], [1, style.theme.ramp(0)[1]]],
        showscale=False,
        hovertemplate=f"{one} %{{y}}, {other} %{{x}}: %{{z:.1f}} % of all tokens,<br>"
        f"%{{customdata:.1f}} % of those that leave {one} there<extra></extra>",
    )
    fig.update_xaxes(title_text=f"exit of {other}")
    fig.update_yaxes(title_text=f"exit of {one}", autorange="reversed")
    return finish(fig, "Two models on the same tokens", style.caption, height=430, theme=style.theme)
