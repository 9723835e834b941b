"""Several models on the same tokens: a Gaussian copula between their latent eases, solved for published conditionals.

The eases of a token under models A and B are standard normal with correlation rho. Given both, what A and B do is
independent. Averages over the pair are a product of two Gauss-Hermite sums.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from heliosim.errors import InputError
from heliosim.synthetic.family import EASE, WEIGHT, Array, ScoreFamily

MOST = 0.9999


def stays_given(family: ScoreFamily, threshold: float, depth: int) -> Array:
    """P(not left by ``depth``) given task and ease, [tasks, NODES]."""
    count = family.exits.index(depth) + 1
    return 1 - np.asarray(family.left_given(threshold)[:count].sum(axis=0))


def conditional(
    one: ScoreFamily, other: ScoreFamily, threshold: float, depths: tuple[int, int], correlation: float
) -> float:
    """P(the other has left by ``depths[1]`` | the one has not by ``depths[0]``) at a correlation of their eases.

    Both families share tasks and their weights.
    """
    stays = stays_given(one, threshold, depths[0])
    total = np.zeros(len(one.shifts))
    for task in range(len(one.shifts)):
        leaves = _leaves_at(other, threshold, depths[1], task, correlation)
        total[task] = WEIGHT @ (stays[task] * leaves)
    return float(one.weights @ total) / one.mean(stays)


def _leaves_at(other: ScoreFamily, threshold: float, depth: int, task: int, correlation: float) -> Array:
    """P(the other has left by ``depth`` | ease of the one) at the integration points, [NODES]."""
    spread = np.sqrt(1 - correlation**2)
    ease = correlation * EASE[:, None] + spread * EASE[None, :]
    r = other.depth_correlation
    rest = np.sqrt(max(1 - r, 1e-12))
    staying = np.ones_like(ease)
    for at in range(other.exits.index(depth) + 1):
        if other.exits[at] == other.exits[-1]:
            return np.ones(len(EASE))
        edge = (other.latent(threshold)[at] - other.mu[at]) / other.sigma[at]
        staying = staying * (1 - ndtr((np.sqrt(r) * ease + other.shifts[task] - edge) / rest))
    return np.asarray((1 - staying) @ WEIGHT)


def solve_correlation(
    one: ScoreFamily, other: ScoreFamily, threshold: float, depths: tuple[int, int], share: float, where: str
) -> float:
    """The correlation of eases at which the conditional is ``share``. Raises InputError where none is."""

    def excess(correlation: float) -> float:
        return conditional(one, other, threshold, depths, correlation) - share

    low, high = excess(MOST), excess(-MOST)  # the more alike, the less the other helps
    if not low <= 0 <= high:
        raise InputError(
            where,
            share,
            f"out of reach: {low + share:.3f} to {high + share:.3f}",
            "Correct the share or the marginals.",
        )
    return float(brentq(excess, -MOST, MOST, xtol=1e-8))
