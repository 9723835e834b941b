"""Figures in words, for those who cannot see them: what a reader would take away, with numbers and units."""

from __future__ import annotations

import numpy as np
import pandas as pd

from heliosim.charts.fit import FitData
from heliosim.charts.latency import LATENCIES
from heliosim.charts.timeline import TimelineData
from heliosim.metrics import metric_spec, significant


def latency_alt(data: pd.DataFrame) -> str:
    """Medians of every curve of ``latency_data``."""
    said = []
    for (system, source), part in data.groupby(["system", "source"], sort=False):
        medians = []
        for metric, curve in part.groupby("metric", sort=False):
            place = int(np.searchsorted(curve["share"].to_numpy(), 0.5))
            value = float(curve["value_ms"].to_numpy()[min(place, len(curve) - 1)])
            medians.append(f"{LATENCIES[str(metric)].lower()} {significant(value)} ms")
        said.append(f"{system}, {source}: {', '.join(medians)}")
    return "Latency distributions, medians. " + ("; ".join(said) or "No request was finished") + "."


def exit_alt(data: pd.DataFrame) -> str:
    """The commonest exit of every system and task of ``exit_data``."""
    said = []
    for (system, task), part in data.groupby(["system", "task"], sort=False):
        top = part.sort_values("share", kind="stable").iloc[-1]
        said.append(f"{system}, {task}: {top['model']} layer {top['exit_layer']} {100 * top['share']:.0f} %")
    return "Where tokens leave, the commonest exit of each. " + ("; ".join(said) or "No token was served") + "."


def timeline_alt(data: TimelineData) -> str:
    """What was resident for how long, how often weights were loaded, and the longest queue."""
    if data.bands.empty:
        return "A run over time. No step was run."
    spans = data.bands.assign(seconds=data.bands["end_s"] - data.bands["start_s"])
    held = spans.groupby(["model", "depth"])["seconds"].sum().reset_index()
    placements = [
        f"{m}@{d} {significant(float(s))} s"
        for m, d, s in zip(held["model"], held["depth"], held["seconds"], strict=True)
    ]
    series = data.series
    text = f"A run over {significant(data.end_s)} s. Served with {', '.join(placements)}; {len(data.loads)} loads"
    rows, waiting = int(series["rows"].max()), int(series["waiting"].max())
    return f"{text}; at most {rows} rows in a step and {waiting} requests waiting."


def fit_alt(data: FitData, known: str = "measured") -> str:
    """How many cells, and how far off."""
    if data.median_abs_error is None or data.p90_abs_error is None:
        return f"Predicted against {known} step times. There are no points."
    return (
        f"Predicted against {known} step times, {len(data.points)} cells. Error: median "
        f"{100 * data.median_abs_error:.1f} %, 90th percentile {100 * data.p90_abs_error:.1f} %."
    )


def systems_alt(data: pd.DataFrame) -> str:
    """Every value of ``systems_data``."""
    said = []
    for metric, part in data.groupby("metric", sort=False):
        spec = metric_spec(str(metric))
        values = [f"{r.system} {_pair(r.simulated, r.measured)}" for r in part.itertuples()]
        said.append(f"{spec.title}: {', '.join(values)}")
    return "Systems side by side. " + "; ".join(said) + "."


def _pair(simulated: object, measured: object) -> str:
    found = [
        f"{significant(float(str(value)))} {kind}"
        for value, kind in ((simulated, "simulated"), (measured, "measured"))
        if not np.isnan(float(str(value)))
    ]
    return " and ".join(found) or "unknown"


def quality_alt(data: pd.DataFrame) -> str:
    """Throughput, agreement and perplexity of every system of ``quality_data``."""
    said = []
    for row in data.to_dict("records"):
        parts = [f"{significant(row['output_throughput'])} tok/s"]
        parts += [] if np.isnan(row["agreement"]) else [f"{significant(row['agreement'])} % agreement"]
        parts += [] if np.isnan(row["perplexity"]) else [f"perplexity {significant(row['perplexity'])}"]
        said.append(f"{row['system']}, {row['source']}: {', '.join(parts)}")
    return "Quality beside speed. " + ("; ".join(said) or "Nothing is known") + "."


def agreement_alt(data: pd.DataFrame) -> str:
    """The least and the greatest agreement of every exit of ``agreement_data``."""
    said = []
    for (model, layer), part in data.groupby(["model", "exit_layer"], sort=True):
        low, high = part["agreement"].min(), part["agreement"].max()
        said.append(f"{model} layer {layer} from {100 * low:.0f} to {100 * high:.0f} %")
    return "Agreement with the full model by confidence. " + ("; ".join(said) or "No tokens are known") + "."
