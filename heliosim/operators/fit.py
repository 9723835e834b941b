"""From operator tables to a step's costs: dense work and heads as curves, attention as terms fitted to its table.

One point in five of the attention table, chosen by hash, is held out of a first fit to score it; the coefficients that
are used rest on all. Errors are those of a whole layer (dense work and attention), of which a step is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from heliosim.costs import TERMS
from heliosim.curves import Curve
from heliosim.errors import InputError
from heliosim.formats.profile import CostFit, Curves, HoldOut
from heliosim.hardware.compose import relative_nnls
from heliosim.operators.tables import AttentionTime, OperatorTables, rising_at_the_end, thinned
from heliosim.types import Seconds

Array = npt.NDArray[np.float64]
ATTENTION_TERMS = (
    "layer_decode", "layer_decode_many", "layer_decode_row", "layer_decode_context", "layer_prefill_row",
    "layer_prefill_kv", "layer_mixed_context",
)  # fmt: skip
HOLD_OUT_SHARE = 5


def fit_operators(
    tables: OperatorTables,
    *,
    step_s: Seconds,
    row_s: Seconds,
    max_rows: int | None = None,
    max_context: int | None = None,
    kv_tokens: int | None = None,
) -> CostFit:
    """Step costs on the GPU the tables come from. ``step_s``, ``row_s``: the host's time per step and row, which no
    table of kernels holds. ``max_rows``, ``max_context``: the range to be fitted, default that of the tables;
    ``kv_tokens``: KV tokens that fit into memory beside the weights, more of which no step can read.
    """
    layers, heads = rising_at_the_end(tables.layer), rising_at_the_end(tables.head)
    layer, head = Curve.of(layers), Curve.of(heads)
    used = [a for a in tables.attention if _is_in_range(a, max_rows, max_context, kv_tokens, layer.last)]
    if len(used) < 2 * HOLD_OUT_SHARE:
        remedy = "Give a wider range, or a larger table."
        raise InputError(tables.source, len(used), "too few attention times lie in the range", remedy)
    x = np.array([_terms(a) for a in used])
    y = np.array([a.seconds for a in used])
    whole = y + np.array([layer.at(max(1.0, a.chunk + a.rows)) for a in used])
    held = np.array([_is_held_out(a) for a in used])
    trial = relative_nnls(x[~held], y[~held], whole[~held])
    errors = (x[held] @ trial - y[held]) / whole[held]
    found = relative_nnls(x, y, whole)
    counts, once = np.array(tables.once).T
    slope, level = np.polyfit(counts, once, 1)
    seconds = dict.fromkeys(TERMS, 0.0) | dict(zip(ATTENTION_TERMS, found.tolist(), strict=True))
    seconds |= {"step": step_s + max(0.0, float(level)), "row": row_s, "token": max(0.0, float(slope))}
    rows = min(int(head.last), int(max(a.rows for a in used)))
    return CostFit(
        seconds_per=seconds,
        curves=Curves(layer=thinned(layers), head=thinned(heads)),
        steps=len(used),
        cell_spread=0.0,
        max_rows=min(rows, max_rows or rows),
        max_context=int(max(max(a.before + a.chunk, a.context) for a in used)),
        max_tokens=int(layer.last),
        holdout=_score(errors, [a for a, h in zip(used, held, strict=True) if h]),
    )


def _is_in_range(
    a: AttentionTime, max_rows: int | None, max_context: int | None, kv_tokens: int | None, max_tokens: float
) -> bool:
    reaches = max(a.before + a.chunk, a.context)
    held = a.rows * a.context + a.before + a.chunk
    if a.chunk + a.rows > max_tokens or (max_rows is not None and a.rows > max_rows):
        return False
    return (max_context is None or reaches <= max_context) and (kv_tokens is None or held <= kv_tokens)


def _terms(a: AttentionTime) -> tuple[float, ...]:
    """Values of ``ATTENTION_TERMS`` for one layer."""
    has_chunk = float(a.chunk > 0)
    return (
        float(a.rows > 0), float(a.rows > 1), a.rows, a.rows * a.context, has_chunk, a.chunk * (a.before + a.chunk),
        has_chunk * a.rows * a.context,
    )  # fmt: skip


def _is_held_out(a: AttentionTime) -> bool:
    return hashlib.blake2b(repr(tuple(a[:4])).encode(), digest_size=4).digest()[0] % HOLD_OUT_SHARE == 0


def region_of(a: AttentionTime) -> str:
    if not a.chunk:
        return "decode"
    return "mixed" if a.rows else "prefill"


def _score(errors: Array, held: Sequence[AttentionTime]) -> HoldOut:
    by: dict[str, list[float]] = {}
    for a, error in zip(held, np.abs(errors).tolist(), strict=True):
        by.setdefault(region_of(a), []).append(error)
    return HoldOut(
        cells=len(errors),
        median_abs_error=float(np.median(np.abs(errors))),
        p90_abs_error=float(np.percentile(np.abs(errors), 90)),
        mean_signed_error=float(errors.mean()),
        by_region={name: float(np.median(found)) for name, found in sorted(by.items())},
    )
