"""Piecewise-linear curves by hand, and lines that stay below them."""

from __future__ import annotations

import numpy as np
import pytest

from heliosim.curves import Curve


def test_straight_between_points_level_before_and_steep_behind() -> None:
    curve = Curve.of([(1, 2.0), (3, 4.0), (7, 4.0), (8, 6.0)])
    counts = (0, 1, 2, 3, 5, 7, 7.5, 8, 10)
    assert [curve.at(c) for c in counts] == [2.0, 2.0, 3.0, 4.0, 4.0, 4.0, 5.0, 6.0, 10.0]
    assert curve.last == 8


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ([(1, 1.0)], "two points"),
        ([(2, 1.0), (2, 2.0)], "ascend"),
        ([(-1, 1.0), (2, 2.0)], "ascend"),
        ([(1, -1.0), (2, 2.0)], "negative"),
        ([(1, 2.0), (2, 1.0)], "not fall"),
    ],
)
def test_what_is_no_curve(points: list[tuple[float, float]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Curve.of(points)


@pytest.mark.parametrize("seed", range(12))
def test_lines_stay_below_and_touch(seed: int) -> None:
    """At every count up to the most, also where the curve falls or starts level; and none could be raised."""
    rng = np.random.default_rng(seed)
    counts = np.cumsum(rng.integers(1, 40, size=8))
    seconds = rng.random(8).tolist()
    curve = Curve.of(list(zip(counts.tolist(), [*seconds[:-1], 2.0], strict=True)))
    for most in (counts[3] + 0.5, counts[-1], 2.0 * counts[-1]):
        for count in (1.0, float(most) / 2, float(most)):
            a, b = curve.line_below(float(most), count)
            assert a >= 0
            assert b >= 0
            gaps = [curve.at(x) - (a + b * x) for x in [*np.linspace(0, most, 400).tolist(), *counts[counts <= most]]]
            assert min(gaps) >= -1e-12
            assert min(gaps) < 1e-3
