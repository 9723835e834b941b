"""What tokens by exit say about the states a HELIOS run was in: derived from published shares, with nothing assumed
but that a model leaves the same way whenever it is fully loaded.

While a model is full its tokens leave as when it serves alone; while it is partial all leave at its first exit. So the
share of tokens behind the first exit is (share of tokens under the full model) x (share behind it alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heliosim.errors import InputError

Layers = int


@dataclass(frozen=True)
class States:
    """Shares of all tokens by state. ``full``, ``partial``: by model; ``by_exit``: how far each later exit, taken by
    itself, would put the share under the full model from ``full``.
    """

    full: dict[str, float]
    partial: dict[str, float]
    by_exit: dict[str, dict[Layers, float]]

    @property
    def total(self) -> float:
        return sum(self.full.values()) + sum(self.partial.values())


def implied_states(alone: Mapping[str, Mapping[Layers, float]], served: Mapping[str, Mapping[Layers, float]]) -> States:
    """From shares of tokens by exit: of each model ``alone`` (adding up to 1 per model), and ``served`` by several
    (adding up to 1 over all). Raises InputError where no such states exist.
    """
    full, partial, apart = {}, {}, {}
    for model, shares in served.items():
        if model not in alone or set(alone[model]) != set(shares):
            raise InputError(f"shares of {model}", sorted(shares), "exits differ from those alone", "Give both alike.")
        first, *later = sorted(shares)
        behind = sum(alone[model][e] for e in later)
        if behind <= 0:
            raise InputError(f"shares of {model}", dict(alone[model]), "no token goes on alone", "Correct the shares.")
        full[model] = sum(shares[e] for e in later) / behind
        partial[model] = shares[first] - full[model] * alone[model][first]
        if partial[model] < -1e-3:
            raise InputError(
                f"shares of {model}", round(partial[model], 4), "a negative share is left for the partial model",
                "Correct the shares.",
            )  # fmt: skip
        apart[model] = {e: shares[e] / alone[model][e] - full[model] for e in later if alone[model][e] > 0}
    return States(full, partial, apart)
