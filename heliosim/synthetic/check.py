"""Is the family right? Fitted to measured exits at some thresholds, it must say where tokens leave at those between.

Measured runs give shares by exit, so what is fitted per exit is the highest score a token has had so far: its chance to
be at or above a threshold is that to have left, a probit line in the logit of the threshold over ``cap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logit, ndtri

from heliosim.errors import InputError
from heliosim.synthetic.exits import EE_LLAMA_LAYERS, MeasuredExits, ThresholdRow
from heliosim.synthetic.family import Array, ScoreFamily

LEAST_SHARE = 1e-4
"""Shares are kept off 0 and 1 by this before the probit: about one token of a run."""


def cap_between(runs: Sequence[MeasuredExits]) -> tuple[float, float]:
    """Between which thresholds the highest score of a policy lies: the highest at which tokens still leave, and the
    lowest above it at which none does (1 if there is none).
    """
    leaving = max((run.threshold for run in runs if not run.never_exits), default=0.0)
    return leaving, min((run.threshold for run in runs if run.never_exits and run.threshold > leaving), default=1.0)


def fit_scores(runs: Sequence[MeasuredExits], cap: float) -> ScoreFamily:
    """The family of one model and task from runs at two or more thresholds below ``cap``. InputError if fewer."""
    used = [run for run in runs if run.threshold < cap and not run.never_exits]
    thresholds = sorted({run.threshold for run in used})
    if len(thresholds) < 2:
        raise InputError("fit", thresholds, "two thresholds at which tokens leave are needed", "Add runs.")
    first = used[0]
    at = np.array([logit(run.threshold / cap) for run in used])
    by = np.array([np.cumsum(run.left())[:-1] for run in used])
    heights = ndtri(np.clip(by, LEAST_SHARE, 1 - LEAST_SHARE))
    design = np.stack([np.ones_like(at), -at], axis=1)
    intercept, slope = np.linalg.lstsq(design, heights, rcond=None)[0]
    slope = np.maximum(slope, 1e-3)
    last = np.array([1.0])
    return ScoreFamily(
        exits=first.exits,
        mu=np.concatenate([intercept / slope, last]),
        sigma=np.concatenate([1 / slope, last]),
        shifts=np.zeros(1),
        weights=np.ones(1),
        cap=cap,
    )


@dataclass(frozen=True)
class Prediction:
    """One held-out run: depth and shares as measured, and as predicted from ``fitted_at``, the thresholds around it.

    ``range``: predicted mean depth over all caps the fitted rows allow.
    """

    run: MeasuredExits
    fitted_at: tuple[float, ...]
    cap: tuple[float, float]
    mean_depth: float
    range: tuple[float, float]
    left: Array

    @property
    def measured_depth(self) -> float:
        return float(self.run.depths.mean())

    @property
    def error_layers(self) -> float:
        return self.mean_depth - self.measured_depth

    @property
    def misplaced(self) -> float:
        """Share of tokens at another exit than predicted: half the absolute differences of the shares."""
        return float(np.abs(self.left - self.run.left()).sum() / 2)


def predict_between(runs: Sequence[MeasuredExits]) -> list[Prediction]:
    """Leave one out: each run whose threshold lies between others of its series, from all other runs.

    The series gives the lines; all runs of the policy kind, the held-out one left out, give the cap (middle of its
    interval).
    """
    found = []
    for held in runs:
        series = [run for run in runs if (run.key, run.task) == (held.key, held.task) and run is not held]
        known = sorted(run.threshold for run in series)
        if held.never_exits or not known or not known[0] < held.threshold < known[-1]:
            continue
        low, high = cap_between([run for run in runs if run is not held])
        if not low < high or high <= held.threshold or len([r for r in series if not r.never_exits]) < 2:
            continue
        means = []
        for cap in np.linspace(low, high, 11)[1:]:
            means.append(fit_scores(series, float(cap)).mean_depth(held.threshold) if cap > held.threshold else np.nan)
        family = fit_scores(series, (low + high) / 2)
        left = family.left(held.threshold)
        mean = family.mean_depth(held.threshold)
        spread = float(np.nanmin(means)), float(np.nanmax(means))
        found.append(Prediction(held, tuple(known), (low, high), mean, spread, left))
    return found


# --- the softmax sweep ----------------------------------------------------------------------------------------

SWEEP_CORRELATION = 0.9
"""Correlation of one token's score between exits, as in the shipped specs."""


def thresholds_of(row: ThresholdRow) -> Array:
    """Softmax thresholds of the 16 exits of a row, geometric from the first to the 15th; the last decides nothing."""
    steps = np.arange(EE_LLAMA_LAYERS - 1) / (EE_LLAMA_LAYERS - 2)
    return np.append(row.first * (row.last / row.first) ** steps, 1.0)


def fit_sweep(rows: Sequence[ThresholdRow]) -> ScoreFamily:
    """One sigma, and mu that rises and levels off with depth: four parameters for mean and spread of exit depth at all
    thresholds. Where single exits lie is not in the data.
    """
    exits = np.arange(1, EE_LLAMA_LAYERS + 1)

    def family(p: Array) -> ScoreFamily:
        mu = p[0] - np.exp(p[1] - (exits - 1) / np.exp(p[2]))
        return ScoreFamily(
            exits=tuple(exits.tolist()), mu=mu, sigma=np.full(len(exits), np.exp(p[3])), shifts=np.zeros(1),
            weights=np.ones(1), depth_correlation=SWEEP_CORRELATION,
        )  # fmt: skip

    def errors(p: Array) -> Array:
        found = np.array([depth_of(family(p), row) for row in rows])
        wanted = np.array([(row.mean_depth, row.std_depth) for row in rows])
        return np.asarray(found - wanted, np.float64).ravel()

    start = np.array([2.0, 2.0, 0.5, 1.0])
    return family(np.asarray(least_squares(errors, start).x, np.float64))


def depth_of(family: ScoreFamily, row: ThresholdRow) -> tuple[float, float]:
    """Mean and standard deviation of exit depth at a row's thresholds."""
    left, exits = family.left(thresholds_of(row)), np.asarray(family.exits, np.float64)
    mean = float(left @ exits)
    return mean, float(np.sqrt(max(0.0, float(left @ exits**2) - mean**2)))
