"""Predicted output lengths of stated accuracy: what a scheduler is told in place of the truth.

A workload knows how long its requests really are; a policy must not. A predictor makes, from the true length and one
random number of the request, the length that somebody with that accuracy would have named. Numbers come from a stream
of their own, one per request, so every scheduler that serves a workload is told the same.

``length``: off by a log-normal factor, as regressions of length are. ``rank``: right about the order to a stated
Kendall tau and about nothing else, as learning to rank is. ``bucket``: right about a class of lengths to a stated
share or confusion matrix, as classifiers are. ``none``: nobody predicts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from heliosim.formats.files import Strict
from heliosim.lengths import cumulative_shares
from heliosim.streams import stream
from heliosim.types import Prediction

_NORMAL = NormalDist()


class Predictor(Strict):
    """Predictions of a workload's requests, in their order."""

    @abstractmethod
    def predictions(self, lengths: Sequence[int], limits: Sequence[int], seed: int) -> list[Prediction] | None:
        """``lengths``: true output tokens; ``limits``: max_tokens. None: nobody predicts."""


class NoPredictor(Predictor):
    """Nobody predicts: an order that asks takes ``max_tokens``."""

    kind: Literal["none"] = "none"

    def predictions(self, lengths: Sequence[int], limits: Sequence[int], seed: int) -> None:
        return None


class LengthPredictor(Predictor):
    """The true length times ``bias`` * exp(``sigma`` * z), z standard normal.

    ``refine_every``: tokens behind which it looks again; what is left of the request is then predicted with an error
    of its own, whose sigma (and log bias) have shrunk to the share ``refine_shrink`` each time.
    """

    kind: Literal["length"] = "length"
    sigma: float = Field(ge=0, le=10, allow_inf_nan=False)
    bias: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    refine_every: int | None = Field(default=None, ge=1)
    refine_shrink: float = Field(default=0.8, ge=0, le=1)

    def predictions(self, lengths: Sequence[int], limits: Sequence[int], seed: int) -> list[Prediction]:
        errors = _normals(seed, len(lengths), "prediction")
        first = [self._said(n, z, 1.0) for n, z in zip(lengths, errors, strict=True)]
        if self.refine_every is None:
            return [Prediction(tokens) for tokens in first]
        return [
            Prediction(tokens, self.refine_every, self._later(n, limit, seed, k))
            for k, (tokens, n, limit) in enumerate(zip(first, lengths, limits, strict=True))
        ]

    def _later(self, length: int, limit: int, seed: int, number: int) -> tuple[float, ...]:
        every = self.refine_every or limit
        looks = limit // every
        said = []
        for look, z in enumerate(_normals(seed, looks, "prediction refined", number), 1):
            left = max(1, length - look * every)
            said.append(look * every + self._said(left, z, self.refine_shrink**look))
        return tuple(said)

    def _said(self, tokens: int, z: float, shrink: float) -> float:
        return max(1.0, tokens * math.exp(shrink * (math.log(self.bias) + self.sigma * z)))


class RankPredictor(Predictor):
    """Lengths of the workload in an order that agrees with the true one to Kendall's ``tau`` (0: at random, 1: the
    same, -1: reversed).

    True ranks become normal scores (equals in random order); a score of correlation sin(pi tau / 2) with them, which
    is what that tau means for normal pairs (Greiner's relation), gives the predicted rank, and the length that has this
    rank is predicted: its distribution is the true one.
    """

    kind: Literal["rank"] = "rank"
    tau: float = Field(ge=-1, le=1)

    def predictions(self, lengths: Sequence[int], limits: Sequence[int], seed: int) -> list[Prediction]:
        count = len(lengths)
        ties = stream(seed, "prediction ties").random(count)
        order = np.lexsort((ties, np.asarray(lengths)))
        scores = np.empty(count)
        scores[order] = [_NORMAL.inv_cdf((k + 0.5) / count) for k in range(count)]
        rho = math.sin(math.pi * self.tau / 2)
        noise = np.asarray(_normals(seed, count, "prediction"))
        predicted = rho * scores + math.sqrt(max(0.0, 1 - rho * rho)) * noise
        told = np.empty(count)
        told[np.argsort(predicted, kind="stable")] = np.sort(np.asarray(lengths, dtype=float))
        return [Prediction(tokens) for tokens in told.tolist()]


class BucketPredictor(Predictor):
    """The middle of a bucket of lengths, the right one with a stated probability.

    ``edges``: largest length of each bucket, rising; longer requests belong to the last. ``accuracy``: probability of
    the right bucket, the others being those beside it, evenly; or ``confusion``: for each true bucket the
    probabilities of the predicted ones.
    """

    kind: Literal["bucket"] = "bucket"
    edges: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    confusion: tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...] | None = None

    @field_validator("edges")
    @classmethod
    def _rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in pairwise(value)):
            raise ValueError("edges must rise")
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> BucketPredictor:
        if (self.accuracy is None) == (self.confusion is None):
            raise ValueError("give accuracy or confusion, one of them")
        size = len(self.edges)
        for row in self.confusion or ():
            if len(row) != size or abs(sum(row) - 1) > 1e-6:
                raise ValueError(f"confusion: {size} rows of {size} probabilities that sum to 1 are wanted")
        if self.confusion is not None and len(self.confusion) != size:
            raise ValueError(f"confusion: {size} rows of {size} probabilities that sum to 1 are wanted")
        return self

    def predictions(self, lengths: Sequence[int], limits: Sequence[int], seed: int) -> list[Prediction]:
        rows = [cumulative_shares(self._row(k)) for k in range(len(self.edges))]
        middles = [(low + 1 + high) / 2 for low, high in pairwise((0, *self.edges))]
        draws = stream(seed, "prediction").random(len(lengths)).tolist()
        last = len(self.edges) - 1
        true = [min(bisect_left(self.edges, n), last) for n in lengths]
        return [Prediction(middles[_bucket(rows[k], u)]) for k, u in zip(true, draws, strict=True)]

    def _row(self, true: int) -> list[float]:
        if self.confusion is not None:
            return list(self.confusion[true])
        assert self.accuracy is not None
        row = [0.0] * len(self.edges)
        beside = [k for k in (true - 1, true + 1) if 0 <= k < len(row)]
        row[true] = self.accuracy if beside else 1.0
        for k in beside:
            row[k] = (1 - self.accuracy) / len(beside)
        return row


def _bucket(cumulative: Sequence[float], u: float) -> int:
    return next(k for k, share in enumerate(cumulative) if u < share)


def _normals(seed: int, count: int, *names: str | int) -> list[float]:
    """Standard normal numbers, one per uniform one: the k-th does not depend on ``count``."""
    draws = stream(seed, *names).random(count).tolist()
    return [_NORMAL.inv_cdf(min(max(u, 1e-15), 1 - 1e-15)) for u in draws]


AnyPredictor = Annotated[NoPredictor | LengthPredictor | RankPredictor | BucketPredictor, Field(discriminator="kind")]
"""A predictor, as a workload names it by ``kind``."""


class Priorities(Strict):
    """``shares``: weight of each class of requests, the most urgent (0) first; a request's class is drawn."""

    shares: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(min_length=1)

    @field_validator("shares")
    @classmethod
    def _has_a_sum(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not 0 < sum(value) < math.inf:
            raise ValueError("the shares must have a sum > 0")
        return value

    def classes(self, count: int, seed: int) -> list[int]:
        """The class of each request; the k-th does not depend on ``count``."""
        cumulative = cumulative_shares(self.shares)
        return [_bucket(cumulative, u) for u in stream(seed, "priority").random(count).tolist()]
