"""How limits and intervals of a plan are said in one line."""

from __future__ import annotations

from heliosim.planfile import latency_of
from heliosim.planner import Limit, Margin
from heliosim.stats import Interval

WORDS = {
    "attainment": ("requests within all limits", 100, "%"),
    "refused_share": ("refused requests", 100, "%"),
    "agreement": ("agreement", 100, "%"),
    "low_confidence_share": ("low-confidence tokens", 100, "%"),
    "perplexity": ("perplexity", 1, ""),
}


def words_of(metric: str) -> tuple[str, float, str]:
    """How a metric is said: its name, the factor on its value, the unit."""
    if metric in WORDS:
        return WORDS[metric]
    percentile, family = latency_of(metric)
    name = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}[family]
    return (f"mean {name}" if percentile is None else f"p{percentile:g} {name}"), 1, "ms"


def describe(margin: Margin) -> str:
    """``p99 TTFT 812 ± 60 ms, at most 600 ms``."""
    name, scale, unit = words_of(margin.limit.metric)
    unit = f" {unit}" if unit else ""
    bound = f"{'at most' if margin.limit.sense == 'most' else 'at least'} {number(scale * margin.limit.bound)}{unit}"
    return f"{name} {spread(margin.interval, scale)}{unit}, {bound}"


def bound_text(limit: Limit) -> str:
    """``p99 TTFT ≤ 600 ms``."""
    name, scale, unit = words_of(limit.metric)
    sign = "≤" if limit.sense == "most" else "≥"
    return f"{name} {sign} {number(scale * limit.bound)}{f' {unit}' if unit else ''}"


def spread(interval: Interval, scale: float = 1.0) -> str:
    """``812 ± 60``; says so where there is no interval."""
    if interval.mean is None:
        return "unavailable"
    if interval.half_width == 0 or interval.is_constant:  # the same in every replication
        return number(scale * interval.mean)
    if interval.half_width is None:
        return f"{number(scale * interval.mean)} (interval unavailable)"
    return f"{number(scale * interval.mean)} ± {number(scale * interval.half_width)}"


def number(value: float) -> str:
    """Three significant digits, with a comma in thousands."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
