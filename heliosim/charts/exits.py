"""Where tokens leave, by system and task."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import MEASURED, SIMULATED, finish
from heliosim.charts.style import Style, placement_colours
from heliosim.charts.theme import text_on
from heliosim.formats.results import RunResults
from heliosim.metrics import SystemResult


def exit_data(systems: Sequence[SystemResult]) -> pd.DataFrame:
    """Where tokens left, per system and task: columns system, source, task, model, exit_layer, tokens, share.

    Measured runs are used where there are any (repeats pooled), simulated ones else. Task ``all tasks``
    pools; it stands alone where every token of the system leaves at one and the same exit.
    """
    frames = []
    for system in systems:
        runs = list(system.live) or list(system.runs)
        tokens = pd.concat([_tokens_with_task(run, system.after_s) for run in runs], ignore_index=True)
        pooled = tokens.assign(task="all tasks")
        is_one_exit = len(tokens[["model", "exit_layer"]].drop_duplicates()) == 1
        parts = [tokens, pooled] if tokens["task"].nunique() > 1 else [tokens]
        for part in [pooled] if is_one_exit else parts:
            counts = part.groupby(["task", "model", "exit_layer"], sort=True).size().rename("tokens").reset_index()
            counts["share"] = counts["tokens"] / counts.groupby("task")["tokens"].transform("sum")
            counts.insert(0, "source", MEASURED if system.live else SIMULATED)
            counts.insert(0, "system", system.name)
            frames.append(counts)
    return pd.concat(frames, ignore_index=True)


def _tokens_with_task(run: RunResults, after_s: float) -> pd.DataFrame:
    requests = run.requests.select(["request_id", "task", "arrival_s"]).to_pandas()
    requests = requests[requests["arrival_s"] >= after_s].drop(columns="arrival_s")
    requests["task"] = requests["task"].replace("", "untitled")
    tokens = run.tokens.select(["request_id", "model", "exit_layer"]).to_pandas()
    return pd.merge(tokens, requests, on="request_id")


def exit_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """One group of bars per system, one bar per task; segments are exits, darker is deeper. Without any token: a title
    that says so.
    """
    systems = list(data["system"].unique())
    if not systems:
        return finish(go.Figure(), "Exit depth: no token was served", style.caption, height=150, theme=style.theme)
    tasks = {s: list(data[data["system"] == s]["task"].unique())[::-1] for s in systems}
    total = sum(len(t) for t in tasks.values())
    height = 150 + 25 * total + 46 * len(systems)
    fig = make_subplots(
        rows=len(systems),
        cols=1,
        shared_xaxes=True,
        row_heights=[len(tasks[s]) for s in systems],
        vertical_spacing=min(0.12, 40 / (height - 130)),
        subplot_titles=[f"{s} ({data[data['system'] == s]['source'].iloc[0]})" for s in systems],
    )
    keys = sorted(set(zip(data["model"], data["exit_layer"], strict=True)))
    colours = placement_colours(((str(m), int(e)) for m, e in keys), style.theme)
    for model, exit_layer in keys:
        colour = colours[model, exit_layer]
        label, is_first = f"{model}, layer {exit_layer}", True
        for row, system in enumerate(systems, start=1):
            part = data[(data["system"] == system) & (data["model"] == model) & (data["exit_layer"] == exit_layer)]
            if part.empty:
                continue
            fig.add_bar(
                x=100 * part["share"],
                y=part["task"],
                orientation="h",
                name=label,
                legendgroup=label,
                showlegend=is_first,
                marker={"color": colour, "line": {"color": style.theme.paper, "width": 1}},
                text=[f"{100 * s:.0f} %" if s >= 0.05 else "" for s in part["share"]],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": text_on(colour), "size": 11},
                customdata=part["tokens"],
                hovertemplate=f"{label}<br>%{{y}}: %{{x:.1f}} % (%{{customdata:,}} tokens)<extra></extra>",
                row=row,
                col=1,
            )
            is_first = False
    for row, system in enumerate(systems, start=1):
        fig.update_yaxes(categoryorder="array", categoryarray=tasks[system], row=row, col=1, showgrid=False)
        fig.update_xaxes(range=[0, 100], row=row, col=1)
    fig.update_xaxes(title_text="share of tokens (%)", row=len(systems), col=1)
    fig.update_layout(barmode="stack", bargap=0.22)
    return finish(fig, "Exit depth: the layer at which tokens leave", style.caption, height=height, theme=style.theme)
