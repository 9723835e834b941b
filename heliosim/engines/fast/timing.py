"""Step times of a resident placement, and whether they are what layers and head alone would make them.

A decode step at a fixed depth should cost ``depth x layer + head``: if it does not, something other than layers takes
time. Steps are timed inside strides, on the clock the engine keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

import numpy as np

from heliosim.engines.torch import TorchEngine
from heliosim.types import Arrival, Batch, Chunk, Content, ExitRule, Load, Placement, Request, Run


class Linearity(NamedTuple):
    """``layer_s`` and ``rest_s`` (embedding, norm, head, sampling): of the line through step times; ``worst``: the
    largest deviation of a step time from it, relative to the line.
    """

    layer_s: float
    rest_s: float
    worst: float


def linearity(seconds: Mapping[int, float]) -> Linearity:
    """The line through step times by depth, at least three of them, each weighed by its own size."""
    depths, times = np.array(list(seconds), dtype=float), np.array(list(seconds.values()))
    assert len(depths) >= 3, "two depths always lie on a line"
    weighed = np.stack([depths, np.ones_like(depths)], 1) / times[:, None]
    layer_s, rest_s = np.linalg.lstsq(weighed, np.ones_like(times), rcond=None)[0]
    line = layer_s * depths + rest_s
    return Linearity(float(layer_s), float(rest_s), float(np.abs(times / line - 1).max()))


def step_seconds(
    engine: TorchEngine,
    placement: Placement,
    rows: int,
    context: int,
    *,
    blocks: int,
    steps: int = 32,
    repeats: int = 3,
) -> float:
    """Median seconds of a decode step of ``rows`` rows with ``context`` tokens each, over strides of ``steps`` steps.

    The first stride, in which kernels are chosen and graphs captured, does not count. Text does not matter here.
    """
    engine.reset()
    engine.perform(Load(placement, blocks, "timing"))
    rule = ExitRule("greedy")
    most = context + steps * (repeats + 1) + 1
    for k in range(rows):
        prompt = tuple((k + i) % engine.vocab for i in range(context))
        engine.accept(Arrival(Request(k, 0.0, context, most), Content("", prompt, most)))
        chunk = Chunk(k, 0, context, True)
        engine.perform(Run(placement, rule, Batch.of((), (), 0, (chunk,))))
    taken: list[float] = []
    for repeat in range(repeats + 1):
        start = context + repeat * steps
        batch = Batch.of(tuple(range(rows)), (0,) * rows, start)
        outcome = engine.perform(Run(placement, rule, batch, max_steps=steps, max_ends=None, in_stride=True))
        assert outcome.stride is not None, "the engine does no strides"
        assert len(outcome.stride) == steps
        if repeat:
            taken += [step.seconds for step in outcome.stride.steps[1:]]
    engine.reset()
    return median(taken)
