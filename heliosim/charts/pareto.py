"""What one gives up for what: points of a load sweep, those that another point beats in both dimmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from heliosim.charts.look import finish, legend_rows, system_legend
from heliosim.charts.style import Style
from heliosim.charts.theme import rgba
from heliosim.comparing import Study, cell_interval, is_overloaded
from heliosim.metrics import significant


@dataclass(frozen=True)
class Goal:
    """A quantity to trade. ``scale`` from the metric's own unit to the one shown."""

    metric: str
    title: str
    is_higher_better: bool
    scale: float = 1.0


GOALS: Mapping[str, Goal] = MappingProxyType(
    {
        "user": Goal("tokens_per_s_per_user", "speed of one user's answer (tok/s per user)", True),
        "gpu": Goal("tokens_per_s_per_gpu", "output throughput (tok/s per GPU)", True),
        "cost": Goal("cost_per_million_tokens", "cost ({currency} per million output tokens)", False),
        "quality": Goal("agreement", "agreement with the model's own last layer (%)", True, 100.0),
        "perplexity": Goal("perplexity", "perplexity (no unit)", False),
        "ttft": Goal("p99_ttft_ms", "TTFT, p99 (ms)", False),
        "energy": Goal("joules_per_token", "energy (J per output token)", False),
    }
)


def pareto_data(study: Study, x: str = "user", y: str = "gpu") -> pd.DataFrame:
    """Every system at every rate it keeps up with, by two of ``GOALS``.

    Columns system, rate_per_s, x, x_low, x_high, y, y_low, y_high (95 % intervals), is_dominated (another point is at
    least as good in both and better in one, going by the means), x_goal, y_goal. Points that lack either are left out.
    """
    rows = []
    for system in study.systems:
        for rate in study.rates_per_s:
            cells = study.cells_of(system, rate)
            if is_overloaded(cells):
                continue
            values = []
            for goal in (GOALS[x], GOALS[y]):
                found = cell_interval(cells, goal.metric)
                values += [np.nan if v is None else v * goal.scale for v in (found.mean, found.low, found.high)]
            rows.append((system, rate, *values))
    columns = ["system", "rate_per_s", "x", "x_low", "x_high", "y", "y_low", "y_high"]
    table = pd.DataFrame(rows, columns=columns).dropna(subset=["x", "y"]).reset_index(drop=True)
    signs = [1 if GOALS[g].is_higher_better else -1 for g in (x, y)]
    points = list(zip(signs[0] * table["x"], signs[1] * table["y"], strict=True))
    return table.assign(is_dominated=pd.Series(dominated(points), dtype=bool), x_goal=x, y_goal=y)


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points another one beats: at least as high in both, higher in one."""
    return [any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


def pareto_figure(data: pd.DataFrame, style: Style, currency: str = "") -> go.Figure:
    """Points by system, dominated ones dimmed, the front joined by a line and its rates named."""
    fig = go.Figure()
    front = data[~data["is_dominated"]].sort_values("x")
    fig.add_scatter(
        x=front["x"],
        y=front["y"],
        mode="lines",
        line={"color": style.theme.muted, "width": 1.4, "dash": "dot"},
        name="not beaten in both",
        showlegend=False,
        hoverinfo="skip",
    )
    texts = _labels(front)
    for system, part in data.groupby("system", sort=False):
        colour = style.colours[str(system)]
        for is_dominated in (True, False):
            own = part[part["is_dominated"] == is_dominated]
            if own.empty:
                continue
            fig.add_scatter(
                x=own["x"],
                y=own["y"],
                mode="markers" if is_dominated else "markers+text",
                text=None if is_dominated else [texts.get(int(str(k)), "") for k in own.index],
                textposition="top center",
                textfont={"size": 11, "color": style.theme.muted},
                marker={
                    "color": rgba(colour, 0.4) if is_dominated else colour,
                    "size": 7 if is_dominated else 11,
                    "line": {"width": 0 if is_dominated else 1, "color": style.theme.paper},
                },
                customdata=own["rate_per_s"],
                legendgroup=str(system),
                showlegend=False,
                cliponaxis=False,
                hovertemplate=f"{system} at %{{customdata:.3~g}} requests/s<br>%{{x:.4~g}}, %{{y:.4~g}}<extra></extra>",
            )
    x, y = _goals(data)
    fig.update_xaxes(
        title_text=x.title.format(currency=currency or "money"),
        rangemode="tozero" if _is_near_zero(data["x"]) else "normal",
    )
    fig.update_yaxes(
        title_text=y.title.format(currency=currency or "money"),
        rangemode="tozero" if _is_near_zero(data["y"]) else "normal",
    )
    system_legend(fig, data["system"].unique(), style, sources=set(), as_lines=False)
    best = f"best: {'right' if x.is_higher_better else 'left'} and {'up' if y.is_higher_better else 'down'}"
    notes = f"{best} · dim: beaten in both by another point · labels: requests/s per server"
    caption = style.noted(notes).caption
    title = f"{_short(y)} against {_short(x)[0].lower()}{_short(x)[1:]}"
    return finish(
        fig, title, caption, height=500, theme=style.theme, rows=legend_rows(data["system"].unique()), signs=style.signs
    )


def _labels(front: pd.DataFrame) -> dict[int, str]:
    """Rates of the points of the front, by row; of points that lie close together only the first has one."""
    spans = [max(float(front[c].max() - front[c].min()), 1e-12) if len(front) else 1.0 for c in ("x", "y")]
    taken: list[tuple[float, float]] = []
    texts = {}
    for k, x, y, rate in zip(front.index, front["x"], front["y"], front["rate_per_s"], strict=True):
        if all(abs(x - a) > 0.1 * spans[0] or abs(y - b) > 0.1 * spans[1] for a, b in taken):
            taken.append((x, y))
            texts[int(k)] = f"{rate:.3g}/s"
    return texts


def _goals(data: pd.DataFrame) -> tuple[Goal, Goal]:
    if data.empty:
        return GOALS["user"], GOALS["gpu"]
    return GOALS[str(data["x_goal"].iloc[0])], GOALS[str(data["y_goal"].iloc[0])]


def _short(goal: Goal) -> str:
    text = goal.title.partition(" (")[0]
    return text[0].upper() + text[1:] if goal.title else ""


def _is_near_zero(values: pd.Series[float]) -> bool:
    return len(values) > 0 and float(values.min()) < 0.5 * float(values.max())


def pareto_alt(data: pd.DataFrame) -> str:
    """The same in words: the points that nothing beats."""
    x, y = _goals(data)
    front = data[~data["is_dominated"]].sort_values("x")
    points = [
        f"{p.system} at {p.rate_per_s:g} requests/s ({significant(float(str(p.x)))}, {significant(float(str(p.y)))})"
        for p in front.itertuples()
    ]
    beaten = int(data["is_dominated"].sum()) if len(data) else 0
    said = "; ".join(points) or "none"
    return f"{_short(y)} against {_short(x).lower()}. Not beaten in both: {said}. {beaten} other points are."
