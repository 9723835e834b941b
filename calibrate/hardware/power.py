"""Measures energy: joules of long windows by a cumulative counter, with what the device draws idle taken off."""

from __future__ import annotations

import time

from ..energy import Meter
from .bench import Bench, Call, Shape
from .cell import AT_LEAST, Cell, Row, absent
from .links import mover

WINDOW_S = 5.0
"""Shortest window: counters are read out many times a second at best, and the first second is not steady."""


def measure_energy(bench: Bench, cell: Cell, meter: Meter | None, reason: str, idle_w: float | None) -> Row:
    """``idle``: watts while nothing runs. Other phases: joules of one call above idle."""
    phase = str(cell.where["phase"])
    unit = "W" if phase == "idle" else "J"
    if meter is None:
        return absent(cell, unit, reason)
    if phase == "idle":
        return Row(cell, "W", tuple(_watts(meter) for _ in range(AT_LEAST)), facts={"window_s": WINDOW_S})
    if idle_w is None:
        return absent(cell, unit, "idle power is not known")
    call = _work(bench, phase)
    if isinstance(call, str):
        return absent(cell, unit, call)
    call()
    bench.timer.settle()
    windows = [_window(bench, meter, call) for _ in range(AT_LEAST)]
    values = tuple(max(0.0, joules - idle_w * seconds) / calls for joules, seconds, calls in windows)
    total_j, total_s, calls = (sum(part) for part in zip(*windows, strict=True))
    facts = {"window_s": total_s / AT_LEAST, "calls": calls, "mean_w": total_j / total_s, "call_s": total_s / calls}
    return Row(cell, "J", values, facts=facts)


def _window(bench: Bench, meter: Meter, call: Call) -> tuple[float, float, int]:
    """Joules, seconds and calls of a window."""
    before, began, calls = meter.read_j(), time.perf_counter(), 0
    while time.perf_counter() - began < WINDOW_S:
        call()
        calls += 1
        if calls % 16 == 0:
            bench.timer.settle()
    bench.timer.settle()
    seconds = time.perf_counter() - began
    return meter.read_j() - before, seconds, calls


def _watts(meter: Meter) -> float:
    before, began = meter.read_j(), time.perf_counter()
    time.sleep(WINDOW_S)
    return (meter.read_j() - before) / (time.perf_counter() - began)


def _work(bench: Bench, phase: str) -> Call | str:
    if phase == "load":
        found = mover(bench, "pinned" if bench.timer.is_cuda else "pageable", 1 << 28)
        return found if isinstance(found, str) else found[0]
    shape = Shape(decode=8, context=128) if phase == "decode" else Shape(count=256)
    if not bench.fits(shape):
        return "memory has no room for the pass"
    return bench.best(bench.through(shape, 0, bench.layers))
