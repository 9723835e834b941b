"""From step shapes and their times to non-negative cost terms: the fit behind every profile, and behind its resampling.

Least squares with non-negative coefficients on relative errors (a 0.5 ms and a 20 ms step count alike), steps beyond
four times their cell's usual time left out, and one factor that makes the total predicted time of the fitted steps
equal the total measured. It knows neither models nor files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from heliosim.costs import HELD_TERMS, TERMS, StepShape

Array = npt.NDArray[np.float64]
Cell = tuple[object, ...]
ROW_BINS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
UNUSUAL = 4.0
"""Steps that take this many times their cell's median were interrupted by something else."""


def design_of(shapes: Sequence[StepShape], known: Collection[str] = TERMS) -> Array:
    """Terms of steps measured on an engine that pads the KV of decode rows to the longest: [n, terms]. What the rows
    really hold explains nothing there that ``layer_decode_kv`` does not, so its columns are left out (0), and so are
    terms that are not ``known``.
    """
    x = np.array([shape.terms() for shape in shapes], dtype=float).reshape(-1, len(TERMS))
    x[:, [k for k, name in enumerate(TERMS) if name in HELD_TERMS or name not in known]] = 0.0
    return x


def step_cell(mode: str, shape: StepShape) -> Cell:
    """Steps that should take the same time: mode, rows, padded context, layers and checks; prefill in coarse bins."""
    context = shape.gathered // max(1, shape.decode_rows) // 64
    chunks = (min(shape.prefill_rows, 3), (shape.tokens - shape.decode_rows).bit_length())
    prefill = chunks if shape.prefill_rows else (0, 0)
    return (mode, bisect_left(ROW_BINS, shape.decode_rows), context, shape.layers, shape.checks, *prefill)


def by_cell(cells: Sequence[Cell]) -> dict[Cell, list[int]]:
    """Which steps are in each cell."""
    found: dict[Cell, list[int]] = {}
    for i, cell in enumerate(cells):
        found.setdefault(cell, []).append(i)
    return found


def is_usual(seconds: Array, cells: Mapping[Cell, list[int]]) -> npt.NDArray[np.bool_]:
    """Which steps took less than ``UNUSUAL`` times their cell's median; [n]."""
    usual = np.empty_like(seconds)
    for members in cells.values():
        usual[members] = np.median(seconds[members])
    return np.asarray(seconds < UNUSUAL * usual)


def relative_nnls(x: Array, y: Array, rounds: int = 8, weights: Array | None = None) -> Array:
    """Non-negative coefficients whose predictions match mean times, small and large alike. x: [n, terms], y: [n] s.

    Least squares weighted with 1 / prediction**2, found by iteration (the quasi-likelihood of a constant coefficient of
    variation; Wedderburn 1974). Weighting with 1 / measurement**2 instead would favour the fast samples of a noisy
    step, and down-weighting large residuals would fit its median: both predict too little, most where it is noisiest.

    ``weights``: how often each step counts (default: once); [n].
    """
    from scipy.optimize import nnls

    scale = x.max(axis=0)
    scale[scale == 0] = 1.0
    design = x / scale
    often = np.ones(len(y)) if weights is None else np.sqrt(weights)
    predicted = y
    for _ in range(rounds):
        by = often / predicted
        triangle = _triangle(np.column_stack([design, y]) * by[:, None])
        coefficients, _ = nnls(triangle[:, :-1], triangle[:, -1], maxiter=30 * x.shape[1])
        predicted = np.maximum(design @ coefficients, 0.05 * y)
    return np.asarray(coefficients / scale)


def _triangle(rows: Array, block: int = 256) -> Array:
    """R of a QR decomposition: all that least squares need of many rows. Block by block, each small enough for one
    thread: where processors are busy, threads of a linear algebra library wait for each other longer than they work.
    """
    width = rows.shape[1]
    while len(rows) > 2 * max(block, width):
        count = -(-len(rows) // block)
        padded = np.zeros((count * block, width))
        padded[: len(rows)] = rows
        rows = np.asarray(np.linalg.qr(padded.reshape(count, block, width), mode="r")).reshape(-1, width)
    return np.asarray(np.linalg.qr(rows, mode="r"))


def unbiased(x: Array, y: Array, weights: Array | None = None) -> Array:
    """``relative_nnls``, scaled so that the total predicted time equals the total measured."""
    coefficients = relative_nnls(x, y, weights=weights)
    often = np.ones(len(y)) if weights is None else weights
    return np.asarray(coefficients * ((often @ y) / (often @ (x @ coefficients))))
