"""From measured steps and loads to non-negative cost terms, with the error on cells the fit never saw.

Least squares with non-negative coefficients on relative errors (a 0.5 ms and a 20 ms step count alike), steps beyond
four times their cell's usual time left out, and one factor that makes the total predicted time of the fitted steps
equal the total measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from heliosim.costs import LOAD_TERMS, TERMS, StepShape
from heliosim.fitting import Cell, by_cell, design_of, is_usual, relative_nnls, step_cell, unbiased
from heliosim.formats.profile import ClockName, CostFit, HoldOut, LoadFit, Profile, shape_columns
from heliosim.streams import stream

from .measure import LoadSample, StepSample

Array = npt.NDArray[np.float64]
HOLD_OUT_SHARE = 5  # one cell in five
FLOOR_CELLS = 5
"""Cells that a noise floor's interval needs."""
CELL_STEPS = 20  # steps a cell needs to be scored: single steps of shared machines say little


def region_of(shape: StepShape) -> str:
    """Coarse kind of a step, for error tables."""
    if shape.prefill_rows and shape.decode_rows:
        return "mixed"
    if shape.prefill_rows:
        return "prefill"
    rows = shape.decode_rows
    return "decode 1" if rows == 1 else "decode 2-4" if rows <= 4 else "decode 5-16" if rows <= 16 else "decode 17+"


def cell_of(sample: StepSample) -> Cell:
    return step_cell(sample.mode, sample.shape)


def is_held_out(cell: Cell) -> bool:
    return int.from_bytes(hashlib.blake2b(repr(cell).encode(), digest_size=4).digest(), "big") % HOLD_OUT_SHARE == 0


def fit_steps(samples: Sequence[StepSample], clock: str) -> CostFit:
    """Fit one model's step cost on one clock. Cells chosen by hash are kept out of a first fit to score it; the
    published coefficients then use all.
    """
    x = design_of([s.shape for s in samples])
    y = np.array([s.clocks[clock] for s in samples])
    cells = by_cell([cell_of(s) for s in samples])
    sane = is_usual(y, cells)
    held = np.zeros(len(y), dtype=bool)
    for cell, members in cells.items():
        if is_held_out(cell) and len(members) >= CELL_STEPS:
            held[members] = True
    train = sane & ~held
    holdout = _score(unbiased(x[train], y[train]), x, y, samples, {c: m for c, m in cells.items() if held[m[0]]})
    coefficients = unbiased(x[sane], y[sane])
    spreads = [np.subtract(*np.percentile(y[m], [75, 25])) / np.median(y[m]) for m in cells.values() if len(m) >= 3]
    return CostFit(
        seconds_per={t: float(c) for t, c in zip(TERMS, coefficients, strict=True)},
        steps=len(y),
        cell_spread=float(np.median(spreads)) if spreads else 0.0,
        max_rows=max(s.shape.rows for s in samples),
        max_context=max(s.shape.longest for s in samples),
        max_tokens=max(s.shape.tokens for s in samples),
        holdout=holdout,
    )


def fitted_cells(profile: Profile, clock: ClockName, least: int = CELL_STEPS) -> dict[str, list[Any]]:
    """Mean measured and mean predicted seconds of every cell of ``least`` steps or more, with its region, from a
    profile's own table.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(profile.folder / "steps.parquet")
    shapes = zip(*shape_columns(table), strict=True)
    cells: dict[Cell, list[tuple[float, float, str]]] = {}
    for row, values in zip(table.to_pylist(), shapes, strict=True):
        shape = StepShape(*values)
        sample = StepSample(row["model"], row["mode"], shape, {clock: row[f"{clock}_s"]})
        predicted = profile.step_cost(row["model"], clock).seconds(shape)
        cells.setdefault((row["model"], *cell_of(sample)), []).append(
            (sample.clocks[clock], predicted, region_of(shape))
        )
    known = {key: c for key, c in cells.items() if len(c) >= least}
    kept = list(known.values())
    return {
        "model": [str(key[0]) for key in known],
        "measured_s": [float(np.mean([m for m, _, _ in c])) for c in kept],
        "predicted_s": [float(np.mean([p for _, p, _ in c])) for c in kept],
        "groups": [c[0][2] for c in kept],
    }


def _score(
    coefficients: Array, x: Array, y: Array, samples: Sequence[StepSample], cells: dict[Cell, list[int]]
) -> HoldOut:
    errors: list[float] = []
    repeats: list[float] = []
    visit = np.array([s.visit for s in samples])
    regions: dict[str, list[float]] = {}
    for members in cells.values():
        error = float((x[members] @ coefficients).sum() / y[members].sum()) - 1.0
        errors.append(error)
        even = visit[members] % 2 == 0
        if min(even.sum(), (~even).sum()) >= CELL_STEPS // 2:
            times = y[members]
            # two half-means differ by twice the standard error of the whole mean
            repeats.append(abs(float(times[even].mean() / times[~even].mean()) - 1.0) / 2)
        regions.setdefault(region_of(samples[members[0]].shape), []).append(abs(error))
    absolute = np.abs(errors) if errors else np.array([0.0])
    return HoldOut(
        cells=len(errors),
        median_abs_error=float(np.median(absolute)),
        p90_abs_error=float(np.percentile(absolute, 90)),
        mean_signed_error=float(np.mean(errors)) if errors else 0.0,
        repeat_error=float(np.median(repeats)) if repeats else None,
        repeat_error_high=_upper(repeats) if len(repeats) >= FLOOR_CELLS else None,
        by_region={r: float(np.median(e)) for r, e in sorted(regions.items())},
    )


def _upper(repeats: Sequence[float], draws: int = 400) -> float:
    """Upper end of the 95 % interval of a median, its cells drawn again."""
    rng = stream(0, "calibrate", "noise floor")
    drawn = np.median(rng.choice(np.asarray(repeats), (draws, len(repeats))), axis=1)
    return float(np.percentile(drawn, 97.5))


def fit_loads(samples: Sequence[LoadSample], clock: str) -> LoadFit:
    """Fit load times of one model on one clock."""
    x = np.array([s.terms for s in samples], dtype=float)
    y = np.array([s.clocks[clock] for s in samples])
    first = x @ relative_nnls(x, y)
    sane = y < 4 * np.median(y / first) * first  # a load the machine interrupted
    coefficients = relative_nnls(x[sane], y[sane])
    errors = np.abs(x @ coefficients / y - 1.0)
    return LoadFit(
        seconds_per={t: float(c) for t, c in zip(LOAD_TERMS, coefficients, strict=True)},
        loads=len(y),
        median_abs_error=float(np.median(errors)),
    )
