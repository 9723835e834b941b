"""From a spec's figures to parameters: ``mu`` and ``sigma`` of each model, and the correlation between models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from heliosim.errors import InputError
from heliosim.synthetic.family import Array, ScoreFamily, family_of
from heliosim.synthetic.joint import conditional, solve_correlation
from heliosim.synthetic.spec import ExitSpec, Pair, ends_of

SIGMAS = (1.0, 12.0)
"""Between these sigma is looked for when a perplexity is given; there the perplexity grows with it."""


@dataclass(frozen=True)
class Solved:
    """A spec with its parameters. ``correlation``: of the models' eases, [models, models], by name."""

    spec: ExitSpec
    families: dict[str, ScoreFamily]
    correlation: Array

    @property
    def threshold(self) -> float:
        return self.spec.threshold.value

    def correlation_of(self, one: str, other: str) -> float:
        names = list(self.families)
        return float(self.correlation[names.index(one), names.index(other)])

    def conditional(self, one: str, beyond: int, other: str, by: int, threshold: float | None = None) -> float:
        """P(``other`` has left by ``by`` | ``one`` has not by ``beyond``)."""
        at = self.threshold if threshold is None else threshold
        families = self.families[one], self.families[other]
        return conditional(*families, at, (beyond, by), self.correlation_of(one, other))


def solve(spec: ExitSpec) -> Solved:
    """Parameters of every model and pair. Raises InputError where figures contradict each other."""
    families = {name: _family(spec, name) for name in sorted(spec.models)}
    names = list(families)
    correlation = np.eye(len(names))
    for number, pair in enumerate(spec.pairs):
        one, other = (name for name, _ in ends_of(pair))
        value = _pair(spec, families, pair, number) if isinstance(pair, Pair) else pair.correlation.value
        where = f"{spec.name}, field pairs.{number}"
        if not -1 < value < 1:
            raise InputError(where, value, "a correlation lies between -1 and 1", "Correct the value.")
        i, k = names.index(one), names.index(other)
        correlation[i, k] = correlation[k, i] = value
    if np.linalg.eigvalsh(correlation).min() <= 1e-9:
        remedy = "Bring the correlations nearer to each other."
        raise InputError(f"{spec.name}, field pairs", correlation.round(3).tolist(), "cannot all hold at once", remedy)
    return Solved(spec, families, correlation)


def _family(spec: ExitSpec, name: str) -> ScoreFamily:
    model = spec.models[name]

    def of(sigma: float) -> ScoreFamily:
        return family_of(
            model.exits,
            model.shares,
            spec.threshold.value,
            sigma,
            confident_of_rest=model.confident_of_rest.value,
            shifts=spec.eases(name),
            weights=spec.weights,
            depth_correlation=spec.tokens.depth_correlation.value,
            floor=spec.tokens.floor.value,
        )

    if model.sigma is not None:
        return of(model.sigma.value)
    assert model.perplexity is not None
    wanted = model.perplexity.value
    reach = [of(sigma).perplexity(spec.threshold.value) for sigma in SIGMAS]
    if not min(reach) <= wanted <= max(reach):
        raise InputError(
            f"{spec.name}, field models.{name}.perplexity", wanted,
            f"these shares allow {min(reach):.3f} to {max(reach):.3f}", "Give sigma instead, or other shares.",
        )  # fmt: skip
    return of(float(brentq(lambda s: of(s).perplexity(spec.threshold.value) - wanted, *SIGMAS, xtol=1e-4)))


def _pair(spec: ExitSpec, families: dict[str, ScoreFamily], pair: Pair, number: int) -> float:
    one, other = families[pair.given.model], families[pair.then.model]
    depths = pair.given.beyond, pair.then.by
    where = f"{spec.name}, field pairs.{number}.share"
    return solve_correlation(one, other, spec.threshold.value, depths, pair.share.value, where)
