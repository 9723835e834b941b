"""Figures: numbers first, then ink.

Each figure has a ``*_data`` function that computes a small table or dataclass, which tests and other front
ends can use, and a ``*_figure`` function that draws it with plotly and computes nothing. Every axis names its
unit; every subtitle says how many requests, runs and which seed stand behind the picture.

Colours. Systems take ``SYSTEM_PALETTE`` (after Okabe and Ito, told apart by colour-blind readers) in the
order they are given and keep their colour in every figure: make one ``Style`` for a report. Models take other
hues (``MODEL_RAMPS``), light for shallow placements and dark for deep ones, so a placement never looks like a
system. Simulated is solid and filled, measured dashed and hollow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from heliosim.formats.profile import ORIGINS, least_sure
from heliosim.formats.results import RunResults
from heliosim.metrics import Slo, SystemResult, metric_spec, request_latencies

SYSTEM_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#8C564B")
"""Blue, vermilion, green, pink, amber, sky, grey, brown; systems beyond the eighth begin again."""
MODEL_RAMPS = (("#D5D9F2", "#3D3F91"), ("#F6E0B5", "#8A4B08"), ("#BFE3DC", "#0F5E56"), ("#F3CFDA", "#8E2447"))
"""From shallow to deep: indigo, ochre, teal, rose; one ramp per model, in order of name."""
INK, MUTED, GRID, ACCENT = "#1F2933", "#5F6B76", "#E6EAEE", "#B3261E"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
SIMULATED, MEASURED = "simulated", "measured"
COMPARED = (
    "output_throughput",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "p99_e2el_ms",
    "mean_batch_size",
    "layers_per_token",
)
_MAX_POINTS = 1200


@dataclass(frozen=True)
class Style:
    """What figures of one report share: a colour per system, and the line that says what they rest on."""

    colours: Mapping[str, str]
    caption: str = ""

    @classmethod
    def of(cls, systems: Sequence[SystemResult]) -> Style:
        return cls(system_colours([s.name for s in systems]), caption_of(systems))


def system_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour per system, by order of first mention."""
    unique = list(dict.fromkeys(names))
    return {name: SYSTEM_PALETTE[i % len(SYSTEM_PALETTE)] for i, name in enumerate(unique)}


def caption_of(systems: Sequence[SystemResult]) -> str:
    """Sample sizes and seeds of all runs, in one line."""
    runs = [run for s in systems for run in s.runs]
    simulated = [s.simulated for s in systems if s.simulated is not None]
    live = [run for s in systems for run in s.live]
    parts = [f"{_span(run.requests.num_rows for run in runs)} requests per run"]
    parts += [f"seed {_span(run.info.seed for run in runs)}"]
    parts += ["1 simulated run per system"] if simulated else []
    if live:
        clocks = "/".join(sorted({run.info.clock for run in live}))
        parts.append(f"{_span(len(s.live) for s in systems if s.live)} measured runs each ({clocks} clock)")
    kind = least_sure(run.info.profile_kind for run in runs)
    if kind != "measured":
        parts.append(f"profile {ORIGINS[kind]}")
    return " · ".join(parts)


def run_caption(run: RunResults) -> str:
    """Sample size, seed and origin of one run."""
    origin = "simulated" if run.info.mode == "simulated" else f"measured, {run.info.clock} clock"
    origin += "" if run.info.profile_kind == "measured" else f", {run.info.profile_kind} profile"
    return f"{run.requests.num_rows} requests · {run.tokens.num_rows:,} tokens · seed {run.info.seed} · {origin}"


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    if not found:
        return "0"
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def placement_colours(placements: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """A colour per (model, layer): a ramp per model, from its shallowest layer here to its deepest."""
    unique = sorted(set(placements))
    colours: dict[tuple[str, int], str] = {}
    for i, model in enumerate(sorted({m for m, _ in unique})):
        light, dark = MODEL_RAMPS[i % len(MODEL_RAMPS)]
        layers = [layer for m, layer in unique if m == model]
        for k, layer in enumerate(layers):
            share = 0.75 if len(layers) == 1 else 0.3 + 0.7 * k / (len(layers) - 1)
            colours[model, layer] = _mix(light, dark, share)
    return colours


def _mix(light: str, dark: str, share: float) -> str:
    ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (light, dark)]
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(*ends, strict=True))


def _rgba(colour: str, alpha: float) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def _is_dark(colour: str) -> bool:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * r + 0.587 * g + 0.114 * b < 140


# -- latency ---------------------------------------------------------------------------------------

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
                textfont={"color": ACCENT, "size": 12},
                line={"color": ACCENT, "width": 1.5, "dash": "dot"},
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
            **_latency_axis(part["value_ms"]),
        )
        fig.update_yaxes(range=[0, 101], dtick=25, row=1, col=col)
    fig.update_yaxes(title_text="share of requests (%)", row=1, col=1)
    _system_legend(fig, data["system"].unique(), style, sources=set(data["source"]), as_lines=True)
    return _finish(fig, "Latency: share of requests served within a time", style.caption, height=430)


def _latency_axis(values: pd.Series[float]) -> dict[str, object]:
    """A logarithmic axis where the values span more than a factor of 30."""
    positive = values[values > 0]
    if len(positive) and positive.max() / positive.min() > 30:
        return _log_axis(float(positive.min()), float(positive.max()))
    return {"rangemode": "tozero"}


def _log_axis(low: float, high: float) -> dict[str, object]:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade; at decades if there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


# -- exits -----------------------------------------------------------------------------------------


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
        return _finish(go.Figure(), "Exit depth: no token was served", style.caption, height=150)
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
    colours = placement_colours((str(m), int(e)) for m, e in keys)
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
                marker={"color": colour, "line": {"color": "white", "width": 1}},
                text=[f"{100 * s:.0f} %" if s >= 0.05 else "" for s in part["share"]],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "white" if _is_dark(colour) else INK, "size": 11},
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
    return _finish(fig, "Exit depth: the layer at which tokens leave", style.caption, height=height)


# -- timeline --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimelineData:
    """One run over time (seconds).

    ``bands``: start_s, end_s, model, depth, is_probe (what was resident, split where evaluation began or
    ended). ``loads``: start_s, end_s, model, depth, reason. ``series``: time_s, rows, waiting, weights_bytes,
    kv_bytes, breaches: values hold from their time to the next; of a fleet the sums over replicas (of breaches the
    greatest). ``budget_bytes``, ``max_breaches``: None if
    not known.
    """

    bands: pd.DataFrame
    loads: pd.DataFrame
    series: pd.DataFrame
    budget_bytes: int | None
    max_breaches: int | None
    end_s: float


def timeline_data(run: RunResults) -> TimelineData:
    """What was resident, in use and on the breach counter over one run; series are thinned by maxima."""
    steps = run.steps.to_pandas()
    if steps.empty:
        empty = pd.DataFrame({"start_s": [], "end_s": [], "model": [], "depth": []})
        series = pd.DataFrame({k: [] for k in ("time_s", *_SERIES)})
        return TimelineData(
            empty.assign(is_probe=False),
            empty.assign(reason=""),
            series,
            run.budget_bytes,
            run.max_breaches,
            0.0,
        )
    steps["end_s"] = steps["start_s"] + steps["seconds"]
    loads = steps[steps["kind"] == "load"][["start_s", "end_s", "model", "depth", "reason"]].reset_index(drop=True)
    own = [part for _, part in steps.groupby("replica", sort=False)]
    bands = pd.concat([_bands(part) for part in own], ignore_index=True)
    return TimelineData(
        bands=bands,
        loads=loads,
        series=_thinned(_together([_series(part) for part in own])),
        budget_bytes=run.budget_bytes,
        max_breaches=run.max_breaches,
        end_s=float(steps["end_s"].max()),
    )


_SERIES = ("rows", "waiting", "weights_bytes", "kv_bytes", "breaches")


def _bands(steps: pd.DataFrame) -> pd.DataFrame:
    """What was resident at one replica while it ran steps, split where evaluation began or ended."""
    key = steps["model"] + "@" + steps["depth"].astype(str) + steps["is_probe"].map({True: "?", False: ""})
    ran = steps[steps["kind"] == "run"]
    group = (key != key.shift()).cumsum()[ran.index]
    bands = ran.groupby(group).agg(
        start_s=("start_s", "min"),
        end_s=("end_s", "max"),
        model=("model", "first"),
        depth=("depth", "first"),
        is_probe=("is_probe", "first"),
    )
    return bands.reset_index(drop=True)


def _series(steps: pd.DataFrame) -> pd.DataFrame:
    """Step-wise values of one replica, with a row of rest wherever it was idle, and of nothing where it failed."""
    values = steps.rename(columns={"start_s": "time_s", "kv_used_bytes": "kv_bytes"})[["time_s", *_SERIES]]
    following = steps["start_s"].shift(-1)
    is_lost = steps["kind"] == "lost"
    idle = steps[(following > steps["end_s"]) | following.isna() | is_lost]
    rest = values.loc[idle.index].assign(time_s=idle["end_s"], rows=0, kv_bytes=0)
    rest.loc[is_lost[idle.index], list(_SERIES)] = 0
    return pd.concat([values, rest]).sort_values("time_s", kind="stable").reset_index(drop=True)


def _together(series: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Values of several replicas at each time: sums, of breach counters the greatest."""
    if len(series) == 1:
        return series[0]
    held = [s.drop_duplicates("time_s", keep="last").set_index("time_s") for s in series]
    times = sorted(set().union(*(h.index for h in held)))
    held = [h.reindex(times).ffill().fillna(0) for h in held]
    together = sum(held[1:], start=held[0])
    together["breaches"] = np.max([h["breaches"].to_numpy() for h in held], axis=0)
    return together.rename_axis("time_s").reset_index()[["time_s", *_SERIES]]


def _thinned(series: pd.DataFrame) -> pd.DataFrame:
    """At most ``_MAX_POINTS`` rows: the greatest value of each column in each of as many slices of time."""
    if len(series) <= _MAX_POINTS:
        return series
    first, last = series["time_s"].iloc[0], series["time_s"].iloc[-1]
    slot = ((series["time_s"] - first) / (last - first) * (_MAX_POINTS - 1)).astype(int)
    return series.groupby(slot).agg({"time_s": "min"} | dict.fromkeys(_SERIES, "max")).reset_index(drop=True)


def timeline_figure(data: TimelineData, style: Style, name: str) -> go.Figure:
    """Placement, batch, memory and breach counter of one run on one time axis."""
    has_counter = data.max_breaches is not None
    titles = ["Resident placement", "Batch and queue", "Device memory"]
    titles += ["Breach counter (CBC)"] if has_counter else []
    bands = max(2, len(set(zip(data.loads["model"], data.loads["depth"], strict=True))))
    pixels = [30 * bands + 10, 120, 150, 120][: len(titles)]
    fig = make_subplots(
        rows=len(titles),
        cols=1,
        shared_xaxes=True,
        row_heights=pixels,
        vertical_spacing=44 / (sum(pixels) + 44 * (len(titles) - 1)),
        subplot_titles=titles,
    )
    _draw_placements(fig, data)
    _draw_batch(fig, data)
    _draw_memory(fig, data)
    if has_counter:
        _draw_breaches(fig, data)
    for row in range(1, len(titles) + 1):
        fig.update_xaxes(range=[0, data.end_s], row=row, col=1)
        legend = "legend" if row == 1 else f"legend{row}"
        top = fig.get_subplot(row, 1).yaxis.domain[1]
        fig.update_layout({legend: _side_legend(top)})
    fig.update_xaxes(title_text="time since start (s)", row=len(titles), col=1)
    height = sum(pixels) + 44 * (len(titles) - 1) + 164
    fig = _finish(fig, f"One run over time: {name}", style.caption, height=height)
    return fig.update_layout(margin={"r": 190, "t": 104})


def _draw_placements(fig: go.Figure, data: TimelineData) -> None:
    """Bands of residency; evaluation is hatched, a load is a dark bar under a triangle."""
    keys = sorted(set(zip(data.loads["model"], data.loads["depth"], strict=True)))
    keys = sorted({*keys, *zip(data.bands["model"], data.bands["depth"], strict=True)})
    colours = placement_colours((str(m), int(d)) for m, d in keys)
    for is_probe, name in ((False, "serving"), (True, "evaluation (probe)")):
        part = data.bands[data.bands["is_probe"].astype(bool) == is_probe]
        if part.empty:
            continue
        pattern = {"shape": "/", "size": 5, "solidity": 0.35, "fgcolor": "white"} if is_probe else None
        fig.add_bar(
            base=part["start_s"],
            x=part["end_s"] - part["start_s"],
            y=[f"{m}@{d}" for m, d in zip(part["model"], part["depth"], strict=True)],
            orientation="h",
            marker={
                "color": [colours[m, d] for m, d in zip(part["model"], part["depth"], strict=True)],
                "line": {"width": 0},
                "pattern": pattern,
            },
            name=name,
            showlegend=False,
            customdata=part["end_s"],
            hovertemplate=f"%{{y}}, {name}<br>%{{base:.3f}} to %{{customdata:.3f}} s<extra></extra>",
            width=0.62,
            row=1,
            col=1,
        )
        swatch: dict[str, object] = {"symbol": "square", "size": 11, "color": "#6E7BC0"}
        if is_probe:
            swatch = {
                "symbol": "square",
                "size": 11,
                "color": "white",
                "line": {"color": "#6E7BC0", "width": 1.5},
            }
            name = "evaluation (hatched)"
        fig.add_scatter(
            x=[None], y=[f"{keys[0][0]}@{keys[0][1]}"], mode="markers", marker=swatch, name=name, row=1, col=1
        )
    if not data.loads.empty:
        labels = [f"{m}@{d}" for m, d in zip(data.loads["model"], data.loads["depth"], strict=True)]
        fig.add_bar(
            base=data.loads["start_s"],
            x=data.loads["end_s"] - data.loads["start_s"],
            y=labels,
            orientation="h",
            marker={"color": "#9AA5B1", "line": {"width": 0}},
            width=0.2,
            showlegend=False,
            hoverinfo="skip",
            row=1,
            col=1,
        )
        fig.add_scatter(
            x=data.loads["start_s"],
            y=labels,
            mode="markers",
            marker={
                "symbol": "triangle-right",
                "size": 11,
                "color": INK,
                "line": {"color": "white", "width": 1},
            },
            name="load (bar: its time)",
            customdata=np.stack([1e3 * (data.loads["end_s"] - data.loads["start_s"]), data.loads["reason"]], axis=1),
            hovertemplate="%{y}: %{customdata[1]}<br>%{x:.3f} s, took %{customdata[0]:.3g} ms<extra></extra>",
            row=1,
            col=1,
        )
    order = [f"{m}@{d}" for m, d in keys]
    fig.update_yaxes(
        title_text="model@layers", categoryorder="array", categoryarray=order, showgrid=False, row=1, col=1
    )
    fig.update_layout(barmode="overlay")


def _draw_batch(fig: go.Figure, data: TimelineData) -> None:
    series = data.series
    _line(fig, 2, series["time_s"], series["rows"], "rows in the step", "#3D3F91", fill=True)
    _line(fig, 2, series["time_s"], series["waiting"], "requests waiting", "#8A4B08")
    fig.update_yaxes(title_text="requests", rangemode="tozero", row=2, col=1)


def _draw_memory(fig: go.Figure, data: TimelineData) -> None:
    series = data.series
    unit, scale = ("GB", 1e-9) if (data.budget_bytes or series["weights_bytes"].max()) >= 1e9 else ("MB", 1e-6)
    for column, name, colour in (
        ("weights_bytes", "weights", "#7C86C6"),
        ("kv_bytes", "KV cache in use", "#E0A03C"),
    ):
        fig.add_scatter(
            x=series["time_s"],
            y=scale * series[column],
            mode="lines",
            stackgroup="memory",
            line={"shape": "hv", "width": 0.8, "color": colour},
            fillcolor=_rgba(colour, 0.75),
            name=name,
            legend="legend3",
            hovertemplate=f"{name} %{{y:.3f}} {unit}<extra></extra>",
            row=3,
            col=1,
        )
    if data.budget_bytes is not None:
        _limit(fig, 3, data.end_s, scale * data.budget_bytes, f"budget {scale * data.budget_bytes:.3g} {unit}")
    fig.update_yaxes(title_text=f"memory ({unit})", rangemode="tozero", row=3, col=1)


def _draw_breaches(fig: go.Figure, data: TimelineData) -> None:
    assert data.max_breaches is not None
    _line(fig, 4, data.series["time_s"], data.series["breaches"], "breaches in window", "#0F5E56", fill=True)
    _limit(fig, 4, data.end_s, data.max_breaches, f"CBCmax {data.max_breaches}")
    fig.update_yaxes(title_text="breaches (tokens)", rangemode="tozero", row=4, col=1)


def _line(
    fig: go.Figure,
    row: int,
    x: pd.Series[float],
    y: pd.Series[float],
    name: str,
    colour: str,
    *,
    fill: bool = False,
) -> None:
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"shape": "hv", "color": colour, "width": 1.4},
        fill="tozeroy" if fill else None,
        fillcolor=_rgba(colour, 0.14),
        name=name,
        legend=f"legend{row}",
        hovertemplate=f"{name}: %{{y}}<extra></extra>",
        row=row,
        col=1,
    )


def _limit(fig: go.Figure, row: int, end: float, value: float, name: str) -> None:
    fig.add_scatter(
        x=[0, end],
        y=[value, value],
        mode="lines",
        line={"color": ACCENT, "width": 1.5, "dash": "dot"},
        name=name,
        legend=f"legend{row}",
        hovertemplate=f"{name}<extra></extra>",
        row=row,
        col=1,
    )


def _side_legend(top: float) -> dict[str, object]:
    return {
        "x": 1.01,
        "xanchor": "left",
        "y": top,
        "yanchor": "top",
        "font": {"size": 12},
        "tracegroupgap": 0,
    }


# -- predicted against measured step times ---------------------------------------------------------


@dataclass(frozen=True)
class FitData:
    """Predicted and measured step times.

    ``points``: group, measured_ms, predicted_ms, error (signed, relative to measured). ``median_abs_error``
    and ``p90_abs_error``: of the absolute relative errors; None without points.
    """

    points: pd.DataFrame
    median_abs_error: float | None
    p90_abs_error: float | None


def fit_data(measured_s: Sequence[float], predicted_s: Sequence[float], groups: Sequence[str] | None = None) -> FitData:
    """Pair predictions with measurements, seconds. ``groups`` names what each belongs to (a model, a region).

    Points whose measured time is not positive are left out: they have no relative error.
    """
    points = pd.DataFrame(
        {
            "group": list(groups) if groups is not None else ["steps"] * len(measured_s),
            "measured_ms": 1e3 * np.asarray(measured_s, dtype=np.float64),
            "predicted_ms": 1e3 * np.asarray(predicted_s, dtype=np.float64),
        }
    )
    points = points[points["measured_ms"] > 0].reset_index(drop=True)
    points["error"] = points["predicted_ms"] / points["measured_ms"] - 1
    size = points["error"].abs()
    if points.empty:
        return FitData(points, None, None)
    return FitData(points, float(size.median()), float(size.quantile(0.9)))


def fit_figure(data: FitData, style: Style) -> go.Figure:
    """Predicted against measured step time, and the relative errors over measured time."""
    fig = make_subplots(cols=2, rows=1, subplot_titles=["Step time", "Relative error"], horizontal_spacing=0.1)
    points = data.points
    ramps = {g: MODEL_RAMPS[i % len(MODEL_RAMPS)] for i, g in enumerate(sorted(points["group"].unique()))}
    for group, part in points.groupby("group", sort=True):
        colour = _mix(*ramps[group], 0.75)
        marker = {"color": _rgba(colour, 0.65), "size": 7, "line": {"color": "white", "width": 0.5}}
        shown = (
            (part["predicted_ms"], "predicted %{y:.4g} ms"),
            (100 * part["error"], "error %{y:+.1f} %"),
        )
        for col, (y, text) in enumerate(shown, start=1):
            fig.add_scatter(
                x=part["measured_ms"],
                y=y,
                mode="markers",
                marker=marker,
                name=f"{group} ({len(part)} points)",
                legendgroup=str(group),
                showlegend=col == 1,
                hovertemplate=f"{group}<br>measured %{{x:.4g}} ms<br>{text}<extra></extra>",
                row=1,
                col=col,
            )
    if not points.empty:
        low = float(min(points["measured_ms"].min(), points["predicted_ms"].min())) * 0.85
        high = float(max(points["measured_ms"].max(), points["predicted_ms"].max())) * 1.18
        ends = [float(points["measured_ms"].min()) * 0.85, float(points["measured_ms"].max()) * 1.18]
        for col, xs, ys in ((1, [low, high], [low, high]), (2, ends, [0.0, 0.0])):
            fig.add_scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={"color": MUTED, "width": 1.2, "dash": "dot"},
                name="perfect prediction",
                showlegend=col == 1,
                hoverinfo="skip",
                row=1,
                col=col,
            )
        kind = _log_axis(low, high) if high / low > 12 else {}
        fig.update_xaxes(**kind)
        fig.update_yaxes(**kind, row=1, col=1)
        bound = 115 * float(points["error"].abs().max()) or 1.0
        fig.update_yaxes(range=[-bound, bound], row=1, col=2)
    fig.update_xaxes(title_text="measured step time (ms)")
    fig.update_yaxes(title_text="predicted step time (ms)", row=1, col=1)
    fig.update_yaxes(title_text="(predicted − measured) / measured (%)", row=1, col=2)
    found = f"{len(points)} cells"
    if data.median_abs_error is not None and data.p90_abs_error is not None:
        found += f" · error: median {100 * data.median_abs_error:.1f} %"
        found += f", 90th percentile {100 * data.p90_abs_error:.1f} %"
    caption = f"{found} · {style.caption}" if style.caption else found
    return _finish(fig, "Step times: predicted against measured", caption, height=460)


# -- systems side by side --------------------------------------------------------------------------


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
    titles = [
        s.label + (f" <span style='color:{MUTED}'>({hints[s.better]})</span>" if hints[s.better] else "") for s in specs
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
            x=[None], y=[None], mode="markers", marker={"symbol": mark, "size": 10, "color": MUTED}, name=name
        )
    height = panel * lines + 96 * (lines - 1) + 210
    return _finish(fig, "Simulated and measured, metric by metric", style.caption, height=height)


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


# -- quality beside speed --------------------------------------------------------------------------


def quality_data(systems: Sequence[SystemResult]) -> pd.DataFrame:
    """Columns system, source, output_throughput (tok/s), agreement (%), perplexity; measured is the mean of
    repeats.
    """
    wide = systems_data(systems, ("output_throughput", "agreement", "perplexity"))
    long = wide.melt(["system", "metric"], [SIMULATED, MEASURED], "source")
    table = long.pivot(index=["system", "source"], columns="metric", values="value").reset_index()
    table.columns.name = None
    order = {s.name: i for i, s in enumerate(systems)}
    table = table.sort_values(["system", "source"], key=lambda c: c.map(order) if c.name == "system" else -c.str.len())
    known = table.dropna(subset=["output_throughput"]).reset_index(drop=True)
    return known[["system", "source", "output_throughput", "agreement", "perplexity"]]


def quality_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """Throughput against agreement with the full model and against perplexity."""
    panels = (
        ("agreement", "agreement with full model (%)", "Agreement (higher is better)"),
        ("perplexity", "perplexity (no unit)", "Perplexity (lower is better)"),
    )
    fig = make_subplots(cols=2, rows=1, subplot_titles=[p[2] for p in panels], horizontal_spacing=0.1)
    for col, (column, title, _) in enumerate(panels, start=1):
        for system, part in data.dropna(subset=[column]).groupby("system", sort=False):
            colour = style.colours[str(system)]
            fig.add_scatter(
                x=part["output_throughput"],
                y=part[column],
                mode="markers+lines",
                line={"color": _rgba(colour, 0.5), "width": 1.2},
                marker={
                    "symbol": ["circle" if s == SIMULATED else "diamond-open" for s in part["source"]],
                    "size": [9 if s == SIMULATED else 17 for s in part["source"]],
                    "color": colour,
                    "opacity": 1,
                    "line": {
                        "width": [0 if s == SIMULATED else 2.2 for s in part["source"]],
                        "color": colour,
                    },
                },
                customdata=part["source"],
                legendgroup=system,
                showlegend=False,
                cliponaxis=False,
                hovertemplate=f"{system}, %{{customdata}}<br>%{{x:.4g}} tok/s, %{{y:.4g}}<extra></extra>",
                row=1,
                col=col,
            )
        speeds, values = (data[c].dropna().to_numpy(dtype=np.float64) for c in ("output_throughput", column))
        fig.update_xaxes(title_text="output throughput (tok/s)", range=_room(speeds), row=1, col=col)
        top = 100.0 if column == "agreement" else None
        fig.update_yaxes(title_text=title, range=_room(values, top), row=1, col=col)
    _system_legend(fig, data["system"].unique(), style, sources=set(data["source"]), as_lines=False)
    return _finish(fig, "Throughput against agreement and perplexity", style.caption, height=460)


def _room(values: npt.NDArray[np.float64], top: float | None = None) -> list[float] | None:
    """An axis range with air around the values, so that nearly equal ones do not look far apart."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    air = max(0.2 * (high - low), 0.06 * abs(high)) or 1.0
    roof = high + air if top is None else min(high + air, top + 0.25 * air)
    return [max(0.0, low - air), roof]


# -- agreement against confidence ------------------------------------------------------------------


def agreement_data(runs: Iterable[RunResults], bins: int = 10) -> pd.DataFrame:
    """Share of tokens that equal the full model's choice, by confidence at their exit.

    Columns model, exit_layer, confidence (mean in the bin), agreement, low, high (95 % Wilson interval),
    tokens. Tokens of a model's deepest exit are left out where all agree: there the comparison is with
    itself.
    """
    columns = ["model", "exit_layer", "confidence", "agrees"]
    frames = [run.tokens.select(columns).to_pandas() for run in runs]
    tokens = pd.concat(frames, ignore_index=True).dropna(subset=["agrees"]) if frames else pd.DataFrame()
    out = ["model", "exit_layer", "confidence", "agreement", "low", "high", "tokens"]
    if tokens.empty:
        return pd.DataFrame(columns=out)
    tokens["agrees"] = tokens["agrees"].astype(float)
    deepest = tokens.groupby("model")["exit_layer"].transform("max") == tokens["exit_layer"]
    perfect = tokens.groupby(["model", "exit_layer"])["agrees"].transform("min") == 1
    tokens = tokens[~(deepest & perfect)]
    slot = (tokens["confidence"] * bins).astype(int).clip(upper=bins - 1).rename("slot")
    found = (
        tokens.groupby(["model", "exit_layer", slot])
        .agg(confidence=("confidence", "mean"), agreement=("agrees", "mean"), tokens=("agrees", "size"))
        .reset_index()
    )
    found["low"], found["high"] = _wilson(found["agreement"].to_numpy(), found["tokens"].to_numpy())
    return found[out]


def _wilson(
    share: npt.NDArray[np.float64], count: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """95 % score interval of a share."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def agreement_figure(data: pd.DataFrame, style: Style) -> go.Figure:
    """How often a token is the full model's, against how sure its exit was; one panel per model, one line per
    exit.
    """
    models = sorted(data["model"].unique()) or ["no tokens with known agreement"]
    fig = make_subplots(cols=len(models), rows=1, subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.05)
    colours = placement_colours((str(m), int(e)) for m, e in zip(data["model"], data["exit_layer"], strict=True))
    for col, model in enumerate(models, start=1):
        fig.add_scatter(
            x=[0, 100],
            y=[0, 100],
            mode="lines",
            line={"color": MUTED, "width": 1.2, "dash": "dot"},
            name="agreement = confidence",
            showlegend=col == 1,
            hoverinfo="skip",
            row=1,
            col=col,
        )
        part = data[data["model"] == model]
        for exit_layer, curve in part.groupby("exit_layer", sort=True):
            colour = colours[model, int(str(exit_layer))]
            fig.add_scatter(
                x=100 * curve["confidence"],
                y=100 * curve["agreement"],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": 100 * (curve["high"] - curve["agreement"]),
                    "arrayminus": 100 * (curve["agreement"] - curve["low"]),
                    "color": _rgba(colour, 0.55),
                    "thickness": 1.4,
                    "width": 3,
                },
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"color": colour, "size": 7},
                name=f"{model}, layer {exit_layer} ({int(curve['tokens'].sum()):,} tokens)",
                customdata=curve["tokens"],
                hovertemplate="confidence %{x:.0f} %, agreement %{y:.1f} %<br>%{customdata:,} tokens<extra></extra>",
                row=1,
                col=col,
            )
    fig.update_xaxes(title_text="confidence at the exit (%)", range=[0, 102])
    fig.update_yaxes(range=[0, 104])
    fig.update_yaxes(title_text="tokens equal to the full model's (%)", row=1, col=1)
    caption = "bars: 95 % interval" + (f" · {style.caption}" if style.caption else "")
    return _finish(fig, "Agreement against confidence, by exit", caption, height=470)


# -- the look --------------------------------------------------------------------------------------


def _system_legend(fig: go.Figure, systems: Iterable[str], style: Style, *, sources: set[str], as_lines: bool) -> None:
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
            line={"color": MUTED, "width": 2, "dash": dash},
            marker={"color": MUTED, "size": 11, "symbol": symbol},
            name=source,
            legendgroup=source,
        )


def _titles_left(fig: go.Figure) -> None:
    """Move subplot titles to the left edge of their plots."""
    titles = list(fig.layout.annotations)
    axes = [a for a in fig.select_xaxes()]
    for title, axis in zip(titles, axes, strict=False):
        title.update(x=axis.domain[0], xanchor="left")


def _finish(fig: go.Figure, title: str, caption: str, *, height: int) -> go.Figure:
    """The common look: white, a light grid, title and caption at the left, legend in a row under them."""
    _titles_left(fig)
    fig.update_annotations(font={"size": 13.5, "color": INK})
    axis = {
        "gridcolor": GRID,
        "linecolor": "#C5CDD5",
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#C5CDD5",
        "title_font": {"size": 12.5, "color": MUTED},
        "tickfont": {"size": 12},
        "title_standoff": 8,
        "automargin": True,
    }
    fig.update_xaxes(**axis)
    fig.update_yaxes(**axis)
    return fig.update_layout(
        title={
            "text": f"<b>{title}</b>",
            "subtitle": {"text": caption, "font": {"size": 12.5, "color": MUTED}},
            "x": 0.0,
            "xref": "container",
            "xanchor": "left",
            "pad": {"l": 14},
            "y": 1 - 26 / height,
            "yanchor": "top",
            "font": {"size": 17, "color": INK},
        },
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=height,
        margin={"l": 70, "r": 28, "t": 136, "b": 60},
        legend=dict(
            {
                "orientation": "h",
                "xref": "container",
                "x": 0.006,
                "xanchor": "left",
                "yref": "container",
                "y": 1 - 72 / height,
                "yanchor": "top",
                "font": {"size": 12.5},
                "itemsizing": "trace",
            }
            if fig.layout.legend.x is None
            else {}
        ),
        hoverlabel={"font": {"family": FONT, "size": 12.5}, "bgcolor": "white", "bordercolor": "#C5CDD5"},
    )
