"""Step times by depth."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from heliosim.engines.fast.timing import linearity, step_seconds  # noqa: E402
from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.types import Placement  # noqa: E402


def test_a_line_is_found_and_what_leaves_it() -> None:
    found = linearity({2: 0.5 + 2 * 0.25, 4: 0.5 + 4 * 0.25, 12: 0.5 + 12 * 0.25})
    assert found == pytest.approx((0.25, 0.5, 0.0), abs=1e-9)
    assert linearity({2: 1.0, 4: 1.5, 12: 4.5}).worst > 0.05
    with pytest.raises(AssertionError, match="two depths"):
        linearity({1: 1.0, 2: 2.0})


def test_steps_are_timed_on_the_engine_s_clock() -> None:
    engine = TorchEngine({"m": "tiny-opt-s"}, mode="fast")
    now = iter(range(10**6))
    engine.keep_time(lambda: float(next(now)))
    assert step_seconds(engine, Placement("m", 2), 2, 20, blocks=12, steps=4, repeats=2) == 1.0
    assert engine.placement is None
