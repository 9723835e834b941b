"""Latency distributions of systems against their SLO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import MEASURED, SIMULATED, finish, latency_axis, system_legend
from heliosim.charts.style import Style
from heliosim.metrics import Slo, SystemResult, request_latencies

LATENCIES = {"ttft": "Time to first token", "tpot": "Time per output token", "e2el": "End-to-end latency"}


def latency_data(systems: Sequence[SystemResult]) -> pd.DataFrame:
    """Empirical distribution functions.

    Columns: system, source, metric (``ttft``, ``tpot``, ``e2el``), value_ms, share (of requests at most so
    slow), requests (in the curve; measured repeats are pooled).
    """
    frames = []
    for system in systems:
        sources = (
            (SIMULATED, [r for r in (system.simulated,) if r is not None]),
            (MEASURED, list(system.live)),
        )
        for source, runs in sources:
            pooled = [request_latencies(run, system.after_s) for run in runs]
            for metric in LATENCIES:
                values = np.sort(np.concatenate([p[metric] for p in pooled])) if pooled else np.empty(0)
                if not len(values):
                    continue
                at = np.unique(np.linspace(0, len(values) - 1, min(len(values), 400)).round().astype(int))
                columns = {"value_ms": values[at], "share": (at + 1) / len(values), "requests": len(values)}
                frames.append(pd.DataFrame({"system": system.name, "source": source, "metric": metric, **columns}))
    names = ["system", "source", "metric", "value_ms", "share", "requests"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=names)


def latency_figure(data: pd.DataFrame, style: Style, slo: Slo | None = None) -> go.Figure:
    """Latency distributions of all systems; a dotted line marks the SLO."""
    fig = make_subplots(cols=3, rows=1, subplot_titles=list(LATENCIES.values()), horizontal_spacing=0.07)
    for col, metric in enumerate(LATENCIES, start=1):
        part = data[data["metric"] == metric]
        for key, curve in part.groupby(["system", "source"], sort=False):
            system, source = (str(k) for k in key)
            is_simulated = source == SIMULATED
            fig.add_scatter(
                x=curve["value_ms"],
                y=100 * curve["share"],
                mode="lines",
                line={
                    "shape": "hv",
                    "color": style.colours[system],
                    "width": 2.4 if is_simulated else 1.8,
                    "dash": "solid" if is_simulated else "5px,3px",
                },
                legendgroup=system,
                showlegend=False,
                hovertemplate=f"{system}, {source}<br>%{{y:.0f}} % within %{{x:.3~g}} ms<extra></extra>",
                row=1,
                col=col,
            )
        limit = None if slo is None else getattr(slo, f"{metric}_ms")
        if limit is not None:
            is_far_right = not part.empty and limit > 0.7 * part["value_ms"].max()
            fig.add_scatter(
                x=[limit, limit],
                y=[1, 100],
                mode="lines+text",
                text=[" SLO ", ""],
                textposition="top left" if is_far_right else "top right",
                textfont={"color": style.theme.accent, "size": 12},
                line={"color": style.theme.accent, "width": 1.5, "dash": "dot"},
                cliponaxis=False,
                showlegend=False,
                hovertemplate=f"SLO {limit:g} ms<extra></extra>",
                row=1,
                col=col,
            )
        fig.update_xaxes(
            title_text=f"{'TTFT' if metric == 'ttft' else 'TPOT' if metric == 'tpot' else 'E2E'} (ms)",
            row=1,
            col=col,
            **latency_axis(part["value_ms"]),
        )
        fig.update_yaxes(range=[0, 101], dtick=25, row=1, col=col)
    fig.update_yaxes(title_text="share of requests (%)", row=1, col=1)
    system_legend(fig, data["system"].unique(), style, sources=set(data["source"]), as_lines=True)
    return finish(fig, "Latency: share of requests served within a time", style.caption, height=430, theme=style.theme)
