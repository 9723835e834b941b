"""Systems side by side, metric by metric, simulated beside measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import SIMULATED, finish
from heliosim.charts.style import Style
from heliosim.metrics import SystemResult, metric_spec

COMPARED = (
    "output_throughput",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "p99_e2el_ms",
    "mean_batch_size",
    "layers_per_token",
)


def systems_data(systems: Sequence[SystemResult], metrics: Sequence[str] = COMPARED) -> pd.DataFrame:
    """Columns system, metric, simulated, measured, low, high, repeats; in the units metrics are shown in.

    ``low`` and ``high`` are the least and the greatest repeat.
    """
    rows = []
    for system in systems:
        for row in system.comparison(metrics):
            scale = metric_spec(row.metric).scale
            values = (row.simulated, row.measured_mean, row.measured_min, row.measured_max)
            shown = [math.nan if v is None else v * scale for v in values]
            rows.append((system.name, row.metric, *shown, row.repeats))
    return pd.DataFrame(rows, columns=["system", "metric", "simulated", "measured", "low", "high", "repeats"])


def systems_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """One panel per metric: a filled dot is the simulation, a hollow diamond the measured mean with its
    range.
    """
    metrics, systems = list(data["metric"].unique()), list(data["system"].unique())
    columns = min(3, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    hints = {"higher": "higher is better", "lower": "lower is better", "neither": ""}
    specs = [metric_spec(m) for m in metrics]
    muted = style.theme.muted
    titles = [
        s.label + (f" <span style='color:{muted}'>({hints[s.better]})</span>" if hints[s.better] else "") for s in specs
    ]
    panel = 34 * len(systems) + 26
    fig = make_subplots(
        rows=lines,
        cols=columns,
        shared_yaxes=True,
        subplot_titles=titles,
        horizontal_spacing=0.045,
        vertical_spacing=96 / (panel * lines + 96 * (lines - 1)) if lines > 1 else 0,
    )
    place = {name: len(systems) - 1 - i for i, name in enumerate(systems)}
    for i, spec in enumerate(specs):
        row, col = i // columns + 1, i % columns + 1
        for values in data[data["metric"] == spec.name].itertuples():
            _draw_pair(fig, row, col, place[str(values.system)], values, spec.unit, style.colours[str(values.system)])
        unit = f" ({spec.unit})" if spec.unit else " (no unit)"
        fig.update_xaxes(title_text=f"{spec.label}{unit}", rangemode="tozero", row=row, col=col)
        fig.update_yaxes(
            tickvals=list(place.values()),
            ticktext=list(place),
            range=[-0.6, len(systems) - 0.4],
            showgrid=True,
            zeroline=False,
            row=row,
            col=col,
        )
    for mark, name in (
        ("circle", SIMULATED),
        ("diamond-open", "measured: mean, line from least to greatest repeat"),
    ):
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"symbol": mark, "size": 10, "color": muted},
            name=name,
        )
    height = panel * lines + 96 * (lines - 1) + 210
    return finish(fig, "Simulated and measured, metric by metric", style.caption, height=height, theme=style.theme)


def _draw_pair(fig: go.Figure, row: int, col: int, y: float, values: object, unit: str, colour: str) -> None:
    """Simulated a little above, measured a little below the system's line: neither hides the other."""
    simulated, measured, low, high, system = (
        getattr(values, k) for k in ("simulated", "measured", "low", "high", "system")
    )
    if not math.isnan(measured):
        fig.add_scatter(
            x=[measured],
            y=[y - 0.14],
            mode="markers",
            marker={"symbol": "diamond-open", "size": 10, "color": colour, "line": {"width": 2}},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - measured],
                "arrayminus": [measured - low],
                "color": colour,
                "thickness": 2,
                "width": 4,
            },
            showlegend=False,
            hovertemplate=f"{system}, measured<br>%{{x:.4g}} {unit} ({low:.4g} to {high:.4g})<extra></extra>",
            row=row,
            col=col,
        )
    if not math.isnan(simulated):
        fig.add_scatter(
            x=[simulated],
            y=[y + 0.14],
            mode="markers",
            marker={"symbol": "circle", "size": 11, "color": colour},
            showlegend=False,
            hovertemplate=f"{system}, simulated<br>%{{x:.4g}} {unit}<extra></extra>",
            row=row,
            col=col,
        )
