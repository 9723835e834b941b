"""Paired differences with their intervals: what a setting changes, or what systems gain over one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.look import finish, legend_rows, system_legend
from heliosim.charts.style import Style, span
from heliosim.comparing import EXTRA, Study, is_overloaded
from heliosim.metrics import metric_spec, significant
from heliosim.replicated import SATURATED, is_refused
from heliosim.stats import Interval, paired_difference
from heliosim.what_if import reason_of, verdict_of

GAINED = ("p99_ttft_ms", "p99_tpot_ms", "p99_e2el_ms", "output_throughput", "slo_attainment", "layers_per_token",
          "agreement", "perplexity", "joules_per_token")  # fmt: skip
FURTHEST = 120.0
"""Relative differences beyond this are drawn as arrows at the edge, %."""


def gain_data(study: Study, baseline: str, metrics: Sequence[str] = GAINED) -> pd.DataFrame:
    """What each other system changes against ``baseline`` at the rate in focus, replication by replication.

    Columns series (the system), metric, label, unit, before (the baseline's mean), now, difference, low, high (95 %
    interval), pairs, verdict, reason.
    """
    base = study.cells_of(baseline, study.focus_per_s)
    rows = []
    for system in study.systems:
        if system == baseline:
            continue
        cells = study.cells_of(system, study.focus_per_s)
        is_lost = is_overloaded(cells) or is_overloaded(base)
        for name in metrics:
            spec = metric_spec(name)
            mine, theirs = ([c.values.get(name) for c in own] for own in (cells, base))
            gap = paired_difference(mine, theirs).interval
            if is_lost and name not in EXTRA and is_refused(name):
                gap = Interval(None, None, len(cells), reason=SATURATED)
            means = [_mean(theirs), _mean(mine), gap.mean, gap.low, gap.high]
            shown = [np.nan if v is None else v * spec.scale for v in means]
            verdict = verdict_of(gap, spec.better)
            rows.append((system, name, spec.label, spec.unit, *shown, gap.count, verdict, reason_of(gap)))
    columns = [
        "series",
        "metric",
        "label",
        "unit",
        "before",
        "now",
        "difference",
        "low",
        "high",
        "pairs",
        "verdict",
        "reason",
    ]
    return pd.DataFrame(rows, columns=columns)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def difference_figure(
    data: pd.DataFrame, style: Style, title: str = "What changes", against: str = "before"
) -> go.Figure:
    """Relative differences with intervals, a row per metric; filled where an interval leaves zero out.

    Metrics without a known difference, or with nothing to relate it to (0 before), have no row.
    """
    several = "series" in data
    fig = go.Figure()
    metrics = list(dict.fromkeys(relative(data)["label"]))[::-1]
    groups = list(data.groupby("series", sort=False)) if "series" in data else [("now", data)]
    for k, (name, part) in enumerate(groups):
        shift = 0.0 if len(groups) == 1 else 0.56 * ((len(groups) - 1) / 2 - k) / max(1, len(groups) - 1)
        _points(fig, str(name), part, metrics, shift, style, several=several)
    fig.add_scatter(
        x=[0, 0], y=[-0.6, len(metrics) - 0.4], mode="lines", showlegend=False, hoverinfo="skip",
        line={"color": style.theme.muted, "width": 1.2},
    )  # fmt: skip
    reach = _reach(data)
    fig.update_xaxes(title_text=f"difference (% of {against})", range=[-reach, reach], ticksuffix="")
    fig.update_yaxes(
        tickvals=list(range(len(metrics))), ticktext=metrics, range=[-0.6, len(metrics) - 0.4], showgrid=True
    )
    pairs = span(int(count) for count in data["pairs"])
    notes = f"common random numbers, {pairs} pairs · bars: 95 % interval · hollow: no difference shown"
    notes += "" if several else " · teal: better, ochre: worse"
    caption = style.noted(notes).caption
    row = 34 if len(groups) == 1 else 18 * len(groups) + 16
    height = row * len(metrics) + 150
    rows = legend_rows(str(name) for name, _ in groups) if several else 0
    if several:
        system_legend(fig, [str(name) for name, _ in groups], style, sources=set(), as_lines=False)
    return finish(fig, title, caption, height=height + 22 * rows, theme=style.theme, rows=rows, signs=style.signs)


def _points(
    fig: go.Figure, name: str, part: pd.DataFrame, metrics: Sequence[str], shift: float, style: Style, *, several: bool
) -> None:
    table = relative(part)
    colours = [style.colours[name] if several else verdict_colour(v, style) for v in table["verdict"]]
    clipped = table["percent"].clip(-FURTHEST, FURTHEST)
    is_far = table["percent"].abs() > FURTHEST
    symbols = [
        ("triangle-right" if p > 0 else "triangle-left")
        if far
        else "circle-open"
        if v == "no difference shown"
        else "circle"
        for p, far, v in zip(table["percent"], is_far, table["verdict"], strict=True)
    ]
    low, high = (table[c].clip(-FURTHEST, FURTHEST) for c in ("percent_low", "percent_high"))
    texts = [difference_text(row) for row in table.to_dict("records")]
    fig.add_scatter(
        x=clipped,
        y=[metrics.index(label) + shift for label in table["label"]],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (high - clipped).clip(0).fillna(0),
            "arrayminus": (clipped - low).clip(0).fillna(0),
            "thickness": 1.8,
            "width": 4,
            "color": style.colours[name] if several else style.theme.muted,
        },
        mode="markers",
        marker={"symbol": symbols, "size": 10, "color": colours, "line": {"width": 2, "color": colours}},
        name=name,
        showlegend=False,
        legendgroup=name,
        cliponaxis=False,
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def relative(part: pd.DataFrame) -> pd.DataFrame:
    """Rows that can be drawn, with percent, percent_low and percent_high of the size before."""
    size = part["before"].abs()
    scaled = part.assign(
        **{
            f"percent{end}": 100 * part[column] / size
            for end, column in (("", "difference"), ("_low", "low"), ("_high", "high"))
        }
    )
    found: pd.DataFrame = scaled[(size > 0) & scaled["percent"].notna()]
    return found


def verdict_colour(verdict: str, style: Style) -> str:
    """Teal for better, ochre for worse, grey else: hues of the ramps, so that no verdict looks like a system."""
    place = {"better": 2, "worse": 1}.get(verdict)
    return style.theme.muted if place is None else style.theme.ramp(place)[1]


def _reach(data: pd.DataFrame) -> float:
    table = relative(data)
    ends = pd.concat([table[c].abs() for c in ("percent", "percent_low", "percent_high")]).dropna()
    return float(min(FURTHEST * 1.04, max(5.0, 1.12 * ends.max()))) if len(ends) else 5.0


def difference_text(row: Mapping[Any, Any]) -> str:
    """One difference in words: its size, its interval, and what it says."""
    difference, low, high = (float(str(row[k])) for k in ("difference", "low", "high"))
    unit = " points" if row["unit"] == "%" else f" {row['unit']}" if row["unit"] else ""
    if np.isnan(difference):
        return f"{row['label']}: not known ({row['reason'] or 'no data'})"
    ends = (
        f" [{_signed(low)}, {_signed(high)}]" if not np.isnan(low) else f" ({row['reason']})" if row["reason"] else ""
    )
    return f"{row['label']}: {_signed(difference)}{unit}{ends}, {row['verdict']}"


def _signed(value: float) -> str:
    text = significant(abs(value))
    return text if float(text.replace(",", "")) == 0 else ("+" if value > 0 else "−") + text


def difference_alt(data: pd.DataFrame, against: str = "the setting before") -> str:
    """The same in words: every difference an interval shows, then how many it does not."""
    told = [r for r in data.to_dict("records") if r["verdict"] in ("better", "worse", "different")]
    names = [f"{r['series']}, {difference_text(r)}" if "series" in r else difference_text(r) for r in told]
    rest = len(data) - len(told)
    told_text = "; ".join(names) or "None is shown"
    return f"Paired differences against {against}. {told_text}. {rest} others are not told from zero."
