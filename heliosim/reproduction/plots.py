"""Line plots as small SVG files, written by hand: they need no browser, and the same data give the same bytes.

Lines are named where they end; where ends lie close the names are spread and tied to their lines by a leader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any
from xml.sax.saxutils import escape

from heliosim.metrics import significant

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 64, 190, 64, 52
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6100", "#4B5563")
INK, SOFT, GRID = "#1F2933", "#5B6672", "#E3E8ED"
LABEL_STEP = 17


def svg(plot: Mapping[str, Any]) -> str:
    """One plot: a line per series with a band from its low to its high."""
    xs = [x for s in plot["series"] for x in s["x"]]
    ys = [y for s in plot["series"] for y in (*s["low"], *s["high"])]
    if plot.get("is_log"):
        means = [y for s in plot["series"] for y in s["y"]]
        y_axis = decades(min(means), max(*means, *ys))
    else:
        y_axis = ticks(min(0.0, *ys) if _is_near_zero(ys) else min(ys), max(ys))
    place = _Place(ticks(min(xs), max(xs)), y_axis, bool(plot.get("is_log")))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#FFFFFF"/>',
        f'<text x="16" y="24" font-size="15" font-weight="bold">{escape(plot["title"])}</text>',
        f'<text x="16" y="46" fill="{SOFT}">{escape(plot["y_title"])}</text>',
        *_axes(plot, place),
    ]
    labels = spread([place.y(s["y"][-1]) for s in plot["series"]], TOP + 4, HEIGHT - BOTTOM)
    for number, series in enumerate(plot["series"]):
        parts += _series(series, place, COLOURS[number % len(COLOURS)], labels[number])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _is_near_zero(ys: Sequence[float]) -> bool:
    return min(ys) < 0.5 * max(ys)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, some ``about`` steps apart."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    unit = 10.0 ** len(f"{int(raw)}") if raw >= 1 else 1.0
    while unit > raw:
        unit /= 10
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw)
    first = int(low // step)
    last = -int(-high // step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from at most ``low`` to at least ``high``, both above zero."""
    first, last = floor(log10(low)), ceil(log10(high))
    return [10.0**k for k in range(first, max(last, first + 1) + 1)]


def spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights of labels near the wanted ones, in their order, ``LABEL_STEP`` apart and inside."""
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    found = list(wanted)
    at = top - LABEL_STEP
    for k in order:
        at = found[k] = max(wanted[k], at + LABEL_STEP)
    at = bottom + LABEL_STEP
    for k in reversed(order):
        at = found[k] = min(found[k], at - LABEL_STEP)
    return found


class _Place:
    """From values to places on the page."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], is_log: bool = False) -> None:
        self.xs, self.ys, self.is_log = xs, ys, is_log

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ys[0], self.ys[-1]
        if self.is_log:
            value, low, high = (log10(max(v, low)) for v in (value, low, high))
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _axes(plot: Mapping[str, Any], place: _Place) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    found = []
    for y in place.ys:
        at = place.y(y)
        found.append(f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        found.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="{SOFT}">{significant(y)}</text>')
    for x in place.xs:
        at = place.x(x)
        found.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle" fill="{SOFT}">{significant(x)}</text>')
    found.append(f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="{SOFT}"/>')
    middle = (LEFT + right) / 2
    found.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(plot["x_title"])}</text>')
    return found


def _series(series: Mapping[str, Any], place: _Place, colour: str, label: float) -> list[str]:
    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in points)

    xs = series["x"]
    band = [*zip(xs, series["high"], strict=True), *reversed(list(zip(xs, series["low"], strict=True)))]
    middle = list(zip(xs, series["y"], strict=True))
    dots = [f'<circle cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="3" fill="{colour}"/>' for x, y in middle]
    end, right = middle[-1], WIDTH - RIGHT + 22
    x0, y0 = place.x(end[0]) + 5, place.y(end[1])
    leader = (
        f'<path d="M{x0:.1f} {y0:.1f} L{right - 4} {label:.1f}" stroke="{colour}" stroke-opacity="0.5" fill="none"/>'
    )
    return [
        f'<polygon points="{path(band)}" fill="{colour}" fill-opacity="0.13"/>',
        f'<polyline points="{path(middle)}" fill="none" stroke="{colour}" stroke-width="2.2" stroke-linejoin="round"/>',
        *dots,
        leader,
        f'<text x="{right}" y="{label + 4:.1f}" fill="{colour}" font-weight="bold">{escape(series["name"])}</text>',
    ]
