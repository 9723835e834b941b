"""A load sweep of several systems: metrics against the offered rate, and throughput against latency with the knee."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.charts.look import error_bars, finish, legend_rows, limit_line, log_axis, system_legend
from heliosim.charts.style import Style
from heliosim.comparing import Study, cell_interval, is_overloaded
from heliosim.metrics import metric_spec, significant

SWEPT = ("p99_ttft_ms", "p99_tpot_ms", "output_throughput")
BARS = "bars: 95 % interval"


def rates_data(study: Study, metrics: Sequence[str] = SWEPT) -> pd.DataFrame:
    """Each metric of each system at each rate, in the units metrics are shown in.

    Columns system, metric, rate_per_s, mean, low, high (95 % interval over replications; NaN: not known),
    is_overloaded (waiting grows without end; latencies then have no mean), is_knee (the highest rate before the first
    overloaded one; at most one per system, none where no rate overloads it or every rate does).
    """
    rows = []
    for system in study.systems:
        over = [is_overloaded(study.cells_of(system, rate)) for rate in study.rates_per_s]
        knee = knee_of(study.rates_per_s, over)
        for metric in metrics:
            scale = metric_spec(metric).scale
            for rate, is_over in zip(study.rates_per_s, over, strict=True):
                found = cell_interval(study.cells_of(system, rate), metric)
                values = [np.nan if v is None else v * scale for v in (found.mean, found.low, found.high)]
                rows.append((system, metric, rate, *values, is_over, rate == knee))
    columns = ["system", "metric", "rate_per_s", "mean", "low", "high", "is_overloaded", "is_knee"]
    return pd.DataFrame(rows, columns=columns)


def knee_of(rates_per_s: Sequence[float], is_overloaded: Sequence[bool]) -> float | None:
    """The last rate before the first at which a system is overloaded; None if there is no such pair of rates."""
    first = next((k for k, over in enumerate(is_overloaded) if over), None)
    return None if not first else rates_per_s[first - 1]


def rates_figure(data: pd.DataFrame, style: Style, limits_ms: dict[str, float] | None = None) -> go.Figure:
    """A panel per metric against the offered rate. A dotted line leads to the rate at which a system is overloaded.

    ``limits_ms``: limit by short name of a latency (``ttft``, ``tpot``).
    """
    metrics = list(dict.fromkeys(data["metric"]))
    rows = len(metrics)
    titles = [metric_spec(m).label for m in metrics]
    spacing = 0.07 if rows > 1 else 0
    fig = make_subplots(rows=rows, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=spacing)
    for row, metric in enumerate(metrics, start=1):
        part = data[data["metric"] == metric]
        for system, line in part.groupby("system", sort=False):
            _rate_line(fig, row, str(system), line, style)
        is_latency = metric.endswith("_ms")
        limit = (limits_ms or {}).get(metric.split("_")[1]) if is_latency else None
        seen = pd.concat([part[c] for c in ("mean", "low", "high")]).dropna()
        shown = [*seen[seen > 0], *([limit] if limit else [])]
        if is_latency and shown and max(shown) > 12 * min(shown):
            fig.update_yaxes(**log_axis(min(shown), max(shown), most=2), row=row, col=1)
            ends = [float(np.log10(min(shown) / 1.3)), float(np.log10(max(shown) * 1.7))]
            fig.update_yaxes(range=ends, row=row, col=1)
        else:
            fig.update_yaxes(rangemode="tozero", row=row, col=1)
        if limit is not None and len(part):
            ends = [float(part["rate_per_s"].min()), float(part["rate_per_s"].max())]
            limit_line(fig, style, ends, [limit, limit], f"limit {limit:g} ms", row=row, col=1)
        fig.update_yaxes(title_text=metric_spec(metric).title, row=row, col=1)
    _walls(fig, data, metrics, style)
    fig.update_xaxes(title_text="offered rate (requests/s)", row=rows, col=1)
    system_legend(fig, data["system"].unique(), style, sources=set(), as_lines=True)
    caption = " · ".join(
        p for p in (f"{BARS} · dotted to ×: overloaded, waiting grows without end", style.caption) if p
    )
    return finish(
        fig,
        "Against the offered rate",
        caption,
        height=205 * rows + 220,
        theme=style.theme,
        rows=_rows(data),
        signs=style.signs,
    )


def _rate_line(fig: go.Figure, row: int, system: str, line: pd.DataFrame, style: Style) -> None:
    known = line.dropna(subset=["mean"])
    colour, unit = style.colours[system], metric_spec(str(line["metric"].iloc[0])).unit
    fig.add_scatter(
        x=known["rate_per_s"],
        y=known["mean"],
        error_y=error_bars(known["mean"], known["low"], known["high"], colour),
        mode="lines+markers",
        line={"color": colour, "width": 2.2},
        marker={"color": colour, "size": 7},
        legendgroup=system,
        showlegend=False,
        hovertemplate=f"{system}<br>%{{x:.3~g}} requests/s: %{{y:.4~g}} {unit}<extra></extra>",
        row=row,
        col=1,
    )


def _walls(fig: go.Figure, data: pd.DataFrame, metrics: Sequence[str], style: Style) -> None:
    """Where a latency has no mean because waiting grows: a dotted line up to the first rate at which it does."""
    for row, metric in enumerate(metrics, start=1):
        part = data[data["metric"] == metric]
        top = 1.3 * float(part[["mean", "high"]].max().max())
        for system, line in part.groupby("system", sort=False):
            lost = line[line["is_overloaded"] & line["mean"].isna()]
            if lost.empty or np.isnan(top):
                continue
            end, known = float(lost["rate_per_s"].iloc[0]), line.dropna(subset=["mean"])
            start = (known["rate_per_s"].iloc[-1], known["mean"].iloc[-1]) if len(known) else (end, top / 2)
            fig.add_scatter(
                x=[start[0], end],
                y=[start[1], top],
                mode="lines+markers",
                line={"color": style.colours[str(system)], "width": 1.5, "dash": "dot"},
                marker={
                    "symbol": ["circle", "x-thin"],
                    "size": [0, 9],
                    "line": {"width": [0, 2], "color": style.colours[str(system)]},
                },
                legendgroup=system,
                showlegend=False,
                cliponaxis=False,
                hovertemplate=f"{system}<br>overloaded at {end:g} requests/s<extra></extra>",
                row=row,
                col=1,
            )


def rates_alt(data: pd.DataFrame) -> str:
    """The same in words: per system and metric the ends of the line, and where it is overloaded."""
    said = []
    for system, part in data.groupby("system", sort=False):
        lines = []
        for metric, line in part.groupby("metric", sort=False):
            known, spec = line.dropna(subset=["mean"]), metric_spec(str(metric))
            if len(known):
                first, last = known.iloc[0], known.iloc[-1]
                lines.append(
                    f"{spec.label} from {significant(first['mean'])} at {first['rate_per_s']:g} to "
                    f"{significant(last['mean'])} {spec.unit} at {last['rate_per_s']:g} requests/s"
                )
        over = part[part["is_overloaded"]]["rate_per_s"]
        end = f"overloaded from {over.min():g} requests/s" if len(over) else "never overloaded here"
        said.append(f"{system}: {', '.join([*lines, end])}")
    return "Metrics against the offered rate. " + "; ".join(said) + "."


def _rows(data: pd.DataFrame) -> int:
    return legend_rows(data["system"].unique()) + 1  # and the first panel's title
