"""Line plots as small SVG files, written by hand: they need no browser, and the same data give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from heliosim.metrics import significant

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 72, 150, 40, 48
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRID = "#1F2933", "#E6EAEE"


def svg(plot: Mapping[str, Any]) -> str:
    """One plot: a line per series with a band from its low to its high."""
    xs = [x for s in plot["series"] for x in s["x"]]
    ys = [y for s in plot["series"] for y in (*s["low"], *s["high"])]
    x_axis, y_axis = ticks(min(xs), max(xs)), ticks(min(0.0, *ys) if _is_near_zero(ys) else min(ys), max(ys))
    place = _Place(x_axis, y_axis)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#FFFFFF"/>',
        f'<text x="{LEFT}" y="22" font-size="14" font-weight="bold">{escape(plot["title"])}</text>',
        *_axes(plot, place),
    ]
    for number, series in enumerate(plot["series"]):
        parts += _series(series, place, COLOURS[number % len(COLOURS)], number)
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


class _Place:
    """From values to places on the page."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.xs, self.ys = xs, ys

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)


def _axes(plot: Mapping[str, Any], place: _Place) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    found = []
    for y in place.ys:
        at = place.y(y)
        found.append(f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        found.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{significant(y)}</text>')
    for x in place.xs:
        at = place.x(x)
        found.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{significant(x)}</text>')
    middle = (LEFT + right) / 2
    found.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(plot["x_title"])}</text>')
    turned = f'transform="rotate(-90 16 {(TOP + bottom) / 2})"'
    found.append(
        f'<text x="16" y="{(TOP + bottom) / 2}" text-anchor="middle" {turned}>{escape(plot["y_title"])}</text>'
    )
    return found


def _series(series: Mapping[str, Any], place: _Place, colour: str, number: int) -> list[str]:
    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in points)

    xs = series["x"]
    band = [*zip(xs, series["high"], strict=True), *reversed(list(zip(xs, series["low"], strict=True)))]
    middle = list(zip(xs, series["y"], strict=True))
    dots = [f'<circle cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="3" fill="{colour}"/>' for x, y in middle]
    at = TOP + 16 * number + 8
    return [
        f'<polygon points="{path(band)}" fill="{colour}" fill-opacity="0.15"/>',
        f'<polyline points="{path(middle)}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *dots,
        f'<rect x="{WIDTH - RIGHT + 12}" y="{at - 9}" width="10" height="10" fill="{colour}"/>',
        f'<text x="{WIDTH - RIGHT + 28}" y="{at}">{escape(series["name"])}</text>',
    ]
