"""One latency distribution in one panel: several systems, or a setting over the ghost of the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.latency import LATENCIES
from heliosim.charts.look import finish, latency_axis, legend_rows, limit_line
from heliosim.charts.style import Style
from heliosim.charts.theme import rgba
from heliosim.comparing import Study
from heliosim.metrics import significant
from heliosim.what_if import Tried, quantiles_of

COLUMNS = ["curve", "metric", "value_ms", "share", "requests", "is_ghost"]
GHOST = "before"
NOW = "now"


def study_cdf_data(study: Study) -> pd.DataFrame:
    """Distributions at the rate in focus, replications pooled.

    Columns curve (the system), metric (``ttft``, ``tpot``, ``e2el``), value_ms, share (of requests at most so slow),
    requests (behind the curve), is_ghost (false).
    """
    frames = []
    for system in study.systems:
        cells = study.cells_of(system, study.focus_per_s)
        for metric in LATENCIES:
            parts = [np.asarray(cell.latencies.get(metric, ())) for cell in cells]
            values = np.concatenate(parts) if parts else np.empty(0)
            finished = sum(int(cell.values.get("completed") or 0) for cell in cells)
            frames.append(_curve(system, metric, quantiles_of(values), finished, is_ghost=False))
    return _joined(frames)


def tried_cdf_data(now: Tried, before: Tried | None) -> pd.DataFrame:
    """Distributions of a setting and of the one before it; columns as ``study_cdf_data`` has them."""
    frames = []
    for name, tried in ((GHOST, before), (NOW, now)):
        for metric in LATENCIES if tried is not None else ():
            assert tried is not None
            counted = tried.counts.get(metric, 0)
            frames.append(_curve(name, metric, tried.latencies.get(metric, ()), counted, is_ghost=name == GHOST))
    return _joined(frames)


def _curve(name: str, metric: str, values: Sequence[float], requests: int, *, is_ghost: bool) -> pd.DataFrame:
    share = np.arange(1, len(values) + 1) / max(1, len(values))
    columns = {"value_ms": np.asarray(values, dtype=np.float64), "share": share, "requests": requests}
    return pd.DataFrame({"curve": name, "metric": metric, **columns, "is_ghost": is_ghost})


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    known = [frame for frame in frames if len(frame)]
    return pd.concat(known, ignore_index=True)[COLUMNS] if known else pd.DataFrame(columns=COLUMNS)


def cdf_figure(data: pd.DataFrame, style: Style, metric: str = "ttft", limit_ms: float | None = None) -> go.Figure:
    """Shares of requests served within a time; a ghost is faded and dashed, a dotted line marks the limit."""
    part = data[data["metric"] == metric]
    fig = go.Figure()
    for name, curve in part.groupby("curve", sort=False):
        is_ghost = bool(curve["is_ghost"].iloc[0])
        colour = style.theme.muted if is_ghost else style.colours[str(name)]
        fig.add_scatter(
            x=curve["value_ms"],
            y=100 * curve["share"],
            mode="lines",
            name=str(name),
            line={
                "shape": "hv",
                "color": rgba(colour, 0.75) if is_ghost else colour,
                "width": 1.8 if is_ghost else 2.4,
                "dash": "5px,3px" if is_ghost else "solid",
            },
            hovertemplate=f"{name}<br>%{{y:.0f}} % within %{{x:.3~g}} ms<extra></extra>",
        )
    shown = [*part["value_ms"], *([limit_ms] if limit_ms is not None else [])]
    axis = latency_axis(pd.Series(shown, dtype=float))
    if limit_ms is not None:
        top = float(part["value_ms"].max()) if len(part) else limit_ms
        limit_line(fig, style, [limit_ms, limit_ms], [0, 100], f"limit {limit_ms:g} ms", at_end=limit_ms > top)
    short = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "end-to-end latency"}[metric]
    fig.update_xaxes(title_text=f"{short} (ms)", **axis)
    fig.update_yaxes(title_text="share of requests (%)", range=[0, 103], dtick=25)
    title = f"{LATENCIES[metric]}: share of requests served within it"
    return finish(
        fig,
        title,
        style.caption,
        height=430,
        theme=style.theme,
        rows=legend_rows(str(c) for c in part["curve"].unique()),
    )


def cdf_alt(data: pd.DataFrame, metric: str = "ttft", limit_ms: float | None = None) -> str:
    """The same in words: median and 99th percentile of each curve, and what is within the limit."""
    part = data[data["metric"] == metric]
    said = []
    for name, curve in part.groupby("curve", sort=False):
        values = curve["value_ms"].to_numpy(dtype=np.float64)
        text = f"{name}: median {significant(float(np.quantile(values, 0.5)))} ms, "
        text += f"99th percentile {significant(float(np.quantile(values, 0.99)))} ms"
        if limit_ms is not None:
            text += f", {100 * float(np.mean(values <= limit_ms)):.0f} % within {limit_ms:g} ms"
        said.append(text)
    return f"Distribution of {LATENCIES[metric].lower()}. " + ("; ".join(said) or "No request was finished") + "."


def limits_of(slo: Mapping[str, float]) -> dict[str, float]:
    """Limits by short name of the latency, from those of an SLO (``ttft_ms`` and so on)."""
    return {name.removesuffix("_ms"): limit for name, limit in slo.items()}
