"""Throughput against latency along a load sweep: how much a system gives before waiting takes over."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.look import error_bars, finish, legend_rows, limit_line, log_axis, system_legend
from heliosim.charts.rates import BARS, rates_data
from heliosim.charts.style import Style
from heliosim.comparing import Study
from heliosim.metrics import metric_spec, significant

THROUGHPUT = "output_throughput"


def saturation_data(study: Study, latency: str = "p99_ttft_ms") -> pd.DataFrame:
    """One row per system and rate: throughput (tok/s) and a latency (ms), each with its interval.

    Columns system, metric (the latency's name), rate_per_s, throughput, throughput_low, throughput_high, latency,
    latency_low, latency_high, is_overloaded, is_knee.
    """
    long = rates_data(study, (THROUGHPUT, latency))
    keys = ["system", "rate_per_s", "is_overloaded", "is_knee"]
    parts = []
    for metric, name in ((THROUGHPUT, "throughput"), (latency, "latency")):
        part = long[long["metric"] == metric].drop(columns="metric").reset_index(drop=True)
        parts.append(part.rename(columns={"mean": name, "low": f"{name}_low", "high": f"{name}_high"}))
    wide = parts[0].merge(parts[1].drop(columns=["is_overloaded", "is_knee"]), on=["system", "rate_per_s"], sort=False)
    values = [f"{name}{end}" for name in ("throughput", "latency") for end in ("", "_low", "_high")]
    return wide.assign(metric=latency)[["system", "metric", *keys[1:], *values]]


def saturation_figure(data: pd.DataFrame, style: Style, limit_ms: float | None = None) -> go.Figure:
    """A line per system from its lowest to its highest rate; a ring marks the knee, a dotted line goes up where the
    system is overloaded and gives no more.
    """
    fig = go.Figure()
    metric = str(data["metric"].iloc[0]) if len(data) else "p99_ttft_ms"
    spec = metric_spec(metric)
    seen = pd.concat([data[c] for c in ("latency", "latency_low", "latency_high")]).dropna() if len(data) else []
    shown = [v for v in [*seen, *([limit_ms] if limit_ms else [])] if v > 0]
    top = 2.5 * max(shown) if shown else 1.0
    for system, part in data.groupby("system", sort=False):
        colour = style.colours[str(system)]
        known = part.dropna(subset=["latency", "throughput"])
        fig.add_scatter(
            x=known["throughput"],
            y=known["latency"],
            error_x=error_bars(known["throughput"], known["throughput_low"], known["throughput_high"], colour),
            error_y=error_bars(known["latency"], known["latency_low"], known["latency_high"], colour),
            mode="lines+markers",
            line={"color": colour, "width": 2.2},
            marker={"color": colour, "size": 7},
            customdata=known["rate_per_s"],
            legendgroup=str(system),
            showlegend=False,
            hovertemplate=f"{system} at %{{customdata:.3~g}} requests/s<br>"
            "%{x:.4~g} tok/s, %{y:.4~g} ms<extra></extra>",
        )
        _wall(fig, str(system), part, colour, top)
        knee = known[known["is_knee"]]
        fig.add_scatter(
            x=knee["throughput"],
            y=knee["latency"],
            mode="markers",
            marker={"symbol": "circle-open", "size": 17, "color": colour, "line": {"width": 2.5}},
            showlegend=False,
            legendgroup=str(system),
            hoverinfo="skip",
        )
    if limit_ms is not None and len(data):
        ends = [0.0, float(data["throughput"].max())]
        limit_line(fig, style, ends, [limit_ms, limit_ms], f"limit {limit_ms:g} ms")
    if shown:
        is_wide = max(shown) > 12 * min(shown)
        fig.update_yaxes(**(log_axis(min(shown), max(shown)) if is_wide else {"rangemode": "tozero"}))
        if is_wide:
            fig.update_yaxes(range=[float(np.log10(min(shown) / 1.4)), float(np.log10(top))])
    fig.update_xaxes(title_text="output throughput (tok/s)", rangemode="tozero")
    fig.update_yaxes(title_text=spec.title)
    system_legend(fig, data["system"].unique(), style, sources=set(), as_lines=True)
    notes = f"ring: the last rate before overload · dotted: overloaded · {BARS}"
    caption = style.noted(notes).caption
    title = f"Throughput against {spec.label}, from low to high load"
    rows = legend_rows(data["system"].unique())
    return finish(fig, title, caption, height=500, theme=style.theme, rows=rows, signs=style.signs)


def _wall(fig: go.Figure, system: str, part: pd.DataFrame, colour: str, top: float) -> None:
    """From the last point that has a latency up to what the overloaded system gives."""
    over = part[part["is_overloaded"]].dropna(subset=["throughput"])
    known = part[~part["is_overloaded"]].dropna(subset=["latency", "throughput"])
    if over.empty:
        return
    first = over.iloc[0]
    start = known.iloc[-1] if len(known) else None
    x = [first["throughput"], first["throughput"]] if start is None else [start["throughput"], first["throughput"]]
    y = [top / 2, top] if start is None else [start["latency"], top]
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": colour, "width": 1.6, "dash": "dot"},
        showlegend=False,
        legendgroup=system,
        hovertemplate=f"{system}: overloaded at {first['rate_per_s']:g} requests/s<extra></extra>",
    )


def saturation_alt(data: pd.DataFrame) -> str:
    """The same in words: per system the knee and what it gives when overloaded."""
    said = []
    for system, part in data.groupby("system", sort=False):
        over, knee = part[part["is_overloaded"]], part[part["is_knee"]]
        if over.empty:
            text = f"keeps up to {part['rate_per_s'].max():g} requests/s, the highest rate here"
        else:
            gives = significant(over["throughput"].iloc[0])
            text = f"overloaded at {over['rate_per_s'].min():g} requests/s with {gives} tok/s"
        if len(knee) and knee["latency"].notna().any():
            latency = significant(knee["latency"].iloc[0])
            text += f", before it {latency} ms at {knee['rate_per_s'].iloc[0]:g} requests/s"
        said.append(f"{system}: {text}")
    return "Throughput against latency along a load sweep. " + "; ".join(said) + "."
