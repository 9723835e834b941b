"""Skipped KV: what becomes of the keys and values of the layers that a token skipped by leaving early.

A layer that runs later for another token of the request attends to the KV of all tokens before it. Those that skipped
it have none. A method says what stands there instead; it touches quality, because the layer sees it, and time. The
simulated engine asks for its price, the live engine has it done.

A method of your own is a class with these attributes, named by an entry point of the group ``heliosim.skipped_kv``.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

from heliosim.costs import TERMS, StepCost
from heliosim.registry import SKIPPED_KV
from heliosim.types import Seconds

_FILL_LAYER, _FILL_LAYER_TOKEN = TERMS.index("fill_layer"), TERMS.index("fill_layer_token")


class Gap(Protocol):
    """A layer that tokens of a step skipped, as the live engine offers it to a method."""

    def propagate(self) -> None:
        """Store the keys and values that the layer makes of the last hidden states there are of the tokens."""
        ...

    def copy(self) -> None:
        """Store the keys and values of the last layer that the tokens ran."""
        ...


class SkippedKV(Protocol):
    """``has_gaps``: nothing is stored, and a layer attends to tokens that ran it alone. ``is_recomputed``: the skipped
    layers run for a token as soon as they run for a later one of its request.
    """

    has_gaps: bool
    is_recomputed: bool

    def fill(self, gap: Gap) -> None: ...

    def seconds(self, cost: StepCost, layers: int, tokens: int) -> Seconds:
        """Of filling ``layers`` layers for ``tokens`` tokens each, in the step that skipped them."""
        ...


class Leave:
    """Nothing: cheapest, and later tokens that go deeper see less context there."""

    has_gaps, is_recomputed = True, False

    def fill(self, gap: Gap) -> None:
        """There is nothing to do."""

    def seconds(self, cost: StepCost, layers: int, tokens: int) -> Seconds:
        return 0.0


class Copy:
    """Keys and values of the last layer that ran stand for those of the layers above it."""

    has_gaps, is_recomputed = False, False

    def fill(self, gap: Gap) -> None:
        gap.copy()

    def seconds(self, cost: StepCost, layers: int, tokens: int) -> Seconds:
        if cost.exits is None:  # no more than what else is done there
            return Propagate().seconds(cost, layers, tokens)
        return layers * (cost.exits.copy_layer + cost.exits.copy_layer_token * tokens)


class Propagate:
    """Each skipped layer's norm and key and value projection of the last hidden state (state propagation)."""

    has_gaps, is_recomputed = False, False

    def fill(self, gap: Gap) -> None:
        gap.propagate()

    def seconds(self, cost: StepCost, layers: int, tokens: int) -> Seconds:
        return layers * (cost.coefficients[_FILL_LAYER] + cost.coefficients[_FILL_LAYER_TOKEN] * tokens)


class Recompute:
    """Exact: tokens wait with their hidden state, and run the layers with the next token that goes there."""

    has_gaps, is_recomputed = False, True

    def fill(self, gap: Gap) -> None:
        """It is done later."""

    def seconds(self, cost: StepCost, layers: int, tokens: int) -> Seconds:
        return 0.0


@cache
def skipped_kv(name: str) -> SkippedKV:
    """The method of that name. Raises UnknownNameError."""
    found: SkippedKV = SKIPPED_KV.get(name)()
    return found
