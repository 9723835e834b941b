"""Distributions of prompt and output lengths, in tokens, drawn by inverting the distribution function.

One uniform number makes one length, so a length depends on its place in the stream and not on the lengths before it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from statistics import NormalDist
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from heliosim.formats.files import Strict


class LengthDistribution(Strict):
    """Lengths by quantile: one number in [0, 1) makes one length."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """The largest length that can be drawn."""

    @abstractmethod
    def draw(self, u: float) -> int:
        """The length at quantile ``u`` in [0, 1), in tokens."""


class Fixed(LengthDistribution):
    """Always ``tokens``. In a file, a plain number means this."""

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(ge=1, le=2**31 - 1)

    @property
    def largest(self) -> int:
        return self.tokens

    def draw(self, u: float) -> int:
        return self.tokens


class Uniform(LengthDistribution):
    """Every whole number from ``low`` to ``high``, both included."""

    kind: Literal["uniform"] = "uniform"
    low: int = Field(ge=1)
    high: int = Field(ge=1, le=2**31 - 1)

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self

    @property
    def largest(self) -> int:
        return self.high

    def draw(self, u: float) -> int:
        return self.low + int(u * (self.high - self.low + 1))


class Lognormal(LengthDistribution):
    """A long-tailed length, cut off at ``low`` and ``high``.

    ``mean`` and ``cv`` (standard deviation over mean) are those of the distribution before the cut, which lowers both
    when ``high`` is near. The cut leaves out, so nothing piles up at the ends.
    """

    kind: Literal["lognormal"] = "lognormal"
    mean: float = Field(gt=0, allow_inf_nan=False)
    cv: float = Field(gt=0, le=100, allow_inf_nan=False)
    low: int = Field(default=1, ge=1)
    high: int = Field(ge=1, le=2**31 - 1)

    @model_validator(mode="after")
    def _something_left(self) -> Lognormal:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        first, last = self._range
        if last - first < 1e-6:
            raise ValueError(f"low ({self.low}) to high ({self.high}) cuts off all of the distribution")
        return self

    @cached_property
    def _logarithm(self) -> NormalDist:
        variance = math.log1p(self.cv**2)
        return NormalDist(math.log(self.mean) - variance / 2, math.sqrt(variance))

    @cached_property
    def _range(self) -> tuple[float, float]:
        """Quantiles of the ends; a length stands for the half token on either side."""
        cdf = self._logarithm.cdf
        return cdf(math.log(self.low - 0.5)), cdf(math.log(self.high + 0.5))

    @property
    def largest(self) -> int:
        return self.high

    def draw(self, u: float) -> int:
        first, last = self._range
        quantile = min(max(first + u * (last - first), 1e-15), 1 - 1e-15)
        return min(max(round(math.exp(self._logarithm.inv_cdf(quantile))), self.low), self.high)


class Empirical(LengthDistribution):
    """Measured lengths, drawn with equal or given ``weights``."""

    kind: Literal["empirical"] = "empirical"
    values: tuple[Annotated[int, Field(ge=1, le=2**31 - 1)], ...] = Field(min_length=1)
    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Empirical:
        if self.weights is not None and len(self.weights) != len(self.values):
            raise ValueError(f"{len(self.weights)} weights for {len(self.values)} values")
        if self.weights is not None and not 0 < sum(self.weights) < math.inf:
            raise ValueError("the weights must have a sum > 0")
        return self

    @cached_property
    def _cumulative(self) -> list[float]:
        return cumulative_shares(self.weights or [1.0] * len(self.values))

    @property
    def largest(self) -> int:
        weights = self.weights or (1.0,) * len(self.values)
        return max(value for value, weight in zip(self.values, weights, strict=True) if weight > 0)

    def draw(self, u: float) -> int:
        return self.values[bisect_right(self._cumulative, u)]


def cumulative_shares(weights: Sequence[float]) -> list[float]:
    """Cumulative shares; from the last positive weight on they are 1, so that every u in [0, 1) finds a place."""
    sums = list(accumulate(weights))
    return [1.0 if part == sums[-1] else part / sums[-1] for part in sums]


def _plain_number(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"kind": "fixed", "tokens": value}
    return value


Lengths = Annotated[
    Annotated[Fixed | Uniform | Lognormal | Empirical, Field(discriminator="kind")], BeforeValidator(_plain_number)
]
"""A distribution of lengths in tokens."""
