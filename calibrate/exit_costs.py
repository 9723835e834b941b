"""What regrouping a batch in the middle of a step costs, and what copying KV up does: measured in the serving loop.

Steps whose rows part ways and steps that copy KV are predicted, without those two things, by costs fitted before. By
non-negative least squares on relative errors, their time is that prediction times one factor, which takes up its error
on steps of this size, plus so much for each regrouping, each layer copied to, and each token copied there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heliosim.costs import TERMS, StepCost
from heliosim.exits.pricing import StepParts, parts_of_run
from heliosim.exits.skipped import skipped_kv
from heliosim.fitting import UNUSUAL
from heliosim.formats.profile import ExitMethodFit
from heliosim.types import ExitRule, ModelSpec, Run

from .measure import run_point
from .plan import Mode, Point

ROWS = (2, 4, 8, 16, 32)
PAIRS = (("wait-for-deepest", "propagate"), ("rebatch", "propagate"), ("wait-for-deepest", "copy"))
_OUTPUT, _PROMPT = 24, 32


@dataclass(frozen=True, slots=True)
class MethodSample:
    """A decode step of exit methods. ``clocks``: seconds by clock name."""

    model: str
    rule: ExitRule
    parts: StepParts
    clocks: Mapping[str, float]


def measure_methods(
    engine: object, spec: ModelSpec, threshold: float, max_rows: int, text: Sequence[int], pool_bytes: int, visits: int
) -> list[MethodSample]:
    """Serve small batches with ``rebatch`` and with ``copy``; their steps of decode rows alone."""
    samples = []
    for visit in range(visits):
        for rows in sorted({min(rows, max_rows) for rows in ROWS}):
            for batching, method in PAIRS:
                rule = ExitRule("threshold", threshold, batching, method)
                count = 2 * rows
                mode = Mode(f"{batching}+{method}", spec.layers, rule)
                lengths = ((_PROMPT,) * count, (_OUTPUT,) * count)
                for action, outcome, clocks in run_point(
                    engine, spec, Point(mode, rows, max(rows, 256), *lengths, True), text[visit:], pool_bytes
                ):
                    if isinstance(action, Run) and not action.batch.chunks:
                        parts, _ = parts_of_run(action, outcome, spec)
                        samples.append(MethodSample(spec.name, rule, parts, clocks))
    return samples


def fit_methods(samples: Sequence[MethodSample], cost: StepCost, clock: str) -> ExitMethodFit | None:
    """Seconds of a regrouping and of copying; None where no step parted or none copied."""
    from scipy.optimize import nnls

    step = cost.coefficients[TERMS.index("step")]
    rows: list[tuple[float, float, float, float]] = []
    for sample in samples:
        parts, method = sample.parts, skipped_kv(sample.rule.skipped_kv)
        known = cost.seconds(parts.first) + sum(cost.seconds(shape) - step for shape in parts.deeper)
        copied = parts.fills if sample.rule.skipped_kv == "copy" else ()
        if not copied:
            known += sum(method.seconds(cost, layers, tokens) for layers, tokens in parts.fills)
        layers, products = sum(n for n, _ in copied), sum(n * tokens for n, tokens in copied)
        rows.append((known, len(parts.deeper), layers, products))
    x, y = np.array(rows).reshape(-1, 4), np.array([s.clocks[clock] for s in samples])
    if not x[:, 1].any() or not x[:, 2].any():
        return None
    usual = y < UNUSUAL * np.median(y / x[:, 0]) * x[:, 0]
    x, y = x[usual] / x[usual, :1], y[usual] / x[usual, 0]
    scale = x.max(axis=0)
    (_, regroup, per_layer, per_token), _ = nnls(x / scale, y)
    return ExitMethodFit(
        regroup=float(regroup / scale[1]),
        copy_layer=float(per_layer / scale[2]),
        copy_layer_token=float(per_token / scale[3]),
        steps=len(y),
    )
