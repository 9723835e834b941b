"""The family: how the score that decides about an exit is distributed at each depth, and where tokens leave then.

A token has one latent ease ``f`` (standard normal, plus the shift of its task) and at every exit ``d`` a noise of its
own. With ``z = sqrt(r) f + sqrt(1 - r) e + shift`` the score at exit d is

    score_d = floor + (cap - floor) * logistic(mu_d + sigma_d * z)

a scaled logit-normal: mass piles up near ``cap`` and near ``floor`` when sigma is large, as softmax confidences do.
``cap`` is 1 for a softmax; for a learnt exit policy it is the score above which nothing is ever seen. A token leaves at
the first exit whose score reaches the threshold, so shares by exit follow for any threshold. All integrals over ``f``
are Gauss-Hermite sums: nothing here is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtr, ndtri

Array = npt.NDArray[np.float64]
Threshold = float | Array
"""One threshold, or one per exit, [exits] (the last decides nothing)."""

NODES = 96
"""Points of the integral over a token's ease; enough for shares to 1e-6 at the correlations used."""
_X, _W = np.polynomial.hermite_e.hermegauss(NODES)
EASE: Array = np.asarray(_X, np.float64)
"""Ease at the integration points, [NODES]."""
WEIGHT: Array = np.asarray(_W / _W.sum(), np.float64)
"""Their weights, adding up to 1."""
_QUANTILES: Array = np.asarray(ndtri((np.arange(201) + 0.5) / 201), np.float64)
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class ScoreFamily:
    """Scores of one model at its exits. ``mu``, ``sigma``: [exits], logit units; ``shifts``, ``weights``: [tasks].

    ``depth_correlation`` r in (0, 1]: correlation of the latent score between two exits of one token.
    """

    exits: tuple[int, ...]
    mu: Array
    sigma: Array
    shifts: Array
    weights: Array
    depth_correlation: float = 1.0
    floor: float = 0.0
    cap: float = 1.0

    def latent(self, threshold: Threshold) -> Array:
        """The threshold at each exit, [exits], on the logit scale; infinite where no score can reach it."""
        inside = (np.asarray(threshold, np.float64) - self.floor) / (self.cap - self.floor)
        return np.asarray(np.broadcast_to(logit(np.clip(inside, 0.0, 1.0)), (len(self.exits),)))

    def score(self, at: int, z: Array) -> Array:
        """Scores at exit number ``at`` for latent values, any shape."""
        return self.floor + (self.cap - self.floor) * np.asarray(expit(self.mu[at] + self.sigma[at] * z))

    def _parts(self) -> tuple[Array, float]:
        """Known part of z, [tasks, NODES], and the standard deviation of the rest."""
        r = self.depth_correlation
        known = np.sqrt(r) * EASE[None, :] + self.shifts[:, None]
        return known, float(np.sqrt(max(0.0, 1 - r)))

    def confident(self, at: int, threshold: Threshold) -> Array:
        """P(score at exit number ``at`` >= threshold) given task and ease, [tasks, NODES]."""
        known, rest = self._parts()
        edge = (self.latent(threshold)[at] - self.mu[at]) / self.sigma[at]
        if rest == 0.0:
            return np.asarray(known >= edge, np.float64)
        return np.asarray(ndtr((known - edge) / rest))

    def left_given(self, threshold: Threshold) -> Array:
        """P(first confident exit is exit number k) given task and ease, [exits, tasks, NODES]; the rest at the last."""
        staying = np.ones((len(self.shifts), NODES))
        left = []
        for at in range(len(self.exits) - 1):
            going = self.confident(at, threshold)
            left.append(staying * going)
            staying = staying * (1 - going)
        return np.stack([*left, staying])

    def mean(self, values: Array) -> float:
        """Average of a quantity given task and ease, [tasks, NODES], over both."""
        return float(self.weights @ (values @ WEIGHT))

    def left_by_task(self, threshold: Threshold) -> Array:
        """Share of each task's tokens that leave at each exit, [exits, tasks]."""
        if self.depth_correlation == 1.0:
            return self._left_alike(threshold)
        return np.asarray(self.left_given(threshold) @ WEIGHT)

    def _left_alike(self, threshold: Threshold) -> Array:
        """The same without noise of the exits: a token has left by the exit that asks least of it so far."""
        edges = (self.latent(threshold) - self.mu) / self.sigma
        by = ndtr(self.shifts[None, :] - np.minimum.accumulate(edges[:-1])[:, None])
        ends = np.zeros((1, len(self.shifts)))
        return np.diff(np.concatenate([ends, by, ends + 1]), axis=0)

    def left(self, threshold: Threshold) -> Array:
        """Share of tokens that leave at each exit, [exits]."""
        return np.asarray(self.left_by_task(threshold) @ self.weights)

    def mean_depth(self, threshold: Threshold) -> float:
        """Mean layers of a token."""
        return float(self.left(threshold) @ np.asarray(self.exits, np.float64))

    def perplexity(self, threshold: float | None) -> float:
        """exp of the mean of -ln(score) where tokens leave; ``threshold`` None: all at the last exit."""
        known, rest = self._parts()
        staying = np.ones((len(self.shifts), NODES, 1))
        total = np.zeros((len(self.shifts), NODES))
        last = len(self.exits) - 1
        for at in range(last + 1) if threshold is not None else (last,):
            scores = self.score(at, known[..., None] + rest * _QUANTILES)
            leaves = np.ones_like(scores) if at == last or threshold is None else (scores >= threshold)
            total += (staying * leaves * -np.log(np.maximum(scores, LEAST_PROBABILITY))).mean(axis=-1)
            staying = staying * (1 - leaves.mean(axis=-1, keepdims=True))
        return float(np.exp(self.mean(total)))


def family_of(
    exits: Sequence[int],
    left: Sequence[float],
    threshold: float,
    sigma: float,
    *,
    confident_of_rest: float,
    shifts: Sequence[float] = (0.0,),
    weights: Sequence[float] = (1.0,),
    depth_correlation: float = 1.0,
    floor: float = 0.0,
    cap: float = 1.0,
) -> ScoreFamily:
    """The family whose tokens leave with these shares at this threshold: ``mu`` exit by exit, first to last.

    ``left``: [exits], adding up to 1. ``confident_of_rest``: of the tokens that reach the last exit, the share that is
    confident there (it decides nothing, but the perplexity).
    """
    count = len(exits)
    family = ScoreFamily(
        exits=tuple(exits),
        mu=np.full(count, -np.inf),
        sigma=np.full(count, float(sigma)),
        shifts=np.asarray(shifts, np.float64),
        weights=np.asarray(weights, np.float64) / np.sum(weights),
        depth_correlation=depth_correlation,
        floor=floor,
        cap=cap,
    )
    if depth_correlation == 1.0:
        return _alike(family, np.asarray(left, np.float64), float(family.latent(threshold)[0]), confident_of_rest)
    staying = np.ones((len(family.shifts), NODES))
    for at, share in enumerate([*left[:-1], left[-1] * confident_of_rest]):
        family = _with_share(family, at, staying, threshold, share)
        staying = staying * (1 - family.confident(at, threshold))
    return family


def _with_share(family: ScoreFamily, at: int, staying: Array, threshold: float, share: float) -> ScoreFamily:
    """``mu`` at one exit such that this share of all tokens gets there (``staying``) and is confident."""
    edge = float(family.latent(threshold)[at])

    def at_height(height: float) -> ScoreFamily:
        return family_at(family, at, edge + float(family.sigma[at]) * height)

    def excess(height: float) -> float:
        return family.mean(staying * at_height(height).confident(at, threshold)) - share

    return at_height(-_FAR if share <= 0 else float(brentq(excess, -_FAR, _FAR, xtol=1e-10)))


_FAR = 12.0


def family_at(family: ScoreFamily, at: int, mu: float) -> ScoreFamily:
    """The family with another ``mu`` at one exit."""
    changed = family.mu.copy()
    changed[at] = mu
    return replace(family, mu=changed)


def _alike(family: ScoreFamily, left: Array, edge: float, confident_of_rest: float) -> ScoreFamily:
    """Without noise of the exits the cumulative shares alone say ``mu``."""
    by = np.cumsum(left)
    by[-1] = by[-2] + left[-1] * confident_of_rest if len(left) > 1 else confident_of_rest

    def excess(height: float, share: float) -> float:
        return float(ndtr(family.shifts + height) @ family.weights) - share

    heights = [float(brentq(excess, -_FAR, _FAR, args=(s,))) if 0 < s < 1 else (_FAR if s >= 1 else -_FAR) for s in by]
    return replace(family, mu=edge + family.sigma * np.asarray(heights))
