"""Controllers as a scenario names them: a dataclass of parameters that builds the controller.

A kind of your own is such a dataclass in your package, named by an entry point of the group ``heliosim.controllers``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from heliosim.errors import InputError, UnknownNameError
from heliosim.serving.controller import Controller, FixedPlacement, vanilla
from heliosim.serving.repository import Repository
from heliosim.types import ExitBatching, ExitRule, ModelSpec


@dataclass(frozen=True)
class Context:
    """What a controller may be built from: sizes of the models, and the repository's offline facts (made when asked
    for).

    ``repository(threshold, batching)`` gives offline performance with early exit at that threshold and batch rule;
    ``break_even(model, rule)`` the rows x layers that a regrouping must save to pay for itself.
    """

    models: Mapping[str, ModelSpec]
    repository: Callable[[float, ExitBatching], Repository]
    break_even: Callable[[str, ExitRule], float] = lambda _model, _rule: 0.0

    def model(self, name: str) -> ModelSpec:
        if name not in self.models:
            raise UnknownNameError("controller.model", name, self.models)
        return self.models[name]


class ControllerKind(Protocol):
    """Parameters that know how to build their controller."""

    def build(self, context: Context) -> Controller: ...


@dataclass(frozen=True)
class Vanilla:
    """One full model, no exits."""

    model: str

    def build(self, context: Context) -> Controller:
        return vanilla(context.model(self.model))


@dataclass(frozen=True)
class EarlyExit:
    """One full model, tokens leave at the first exit with confidence >= ``threshold``.

    ``batching``, ``skipped_kv``, ``quorum``, ``break_even``: see ``ExitRule``. ``break_even`` None: from the profile.
    """

    model: str
    threshold: float = 0.8
    batching: ExitBatching = "wait-for-deepest"
    skipped_kv: str = "propagate"
    quorum: int = 1
    break_even: float | None = None

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        check_exit_numbers(self.batching, self.quorum, self.break_even)

    def build(self, context: Context) -> Controller:
        spec = context.model(self.model)
        rule = ExitRule(
            "threshold", self.threshold, self.batching, self.skipped_kv, self.quorum, self.break_even or 0.0
        )
        if self.break_even is None and self.batching == "rebatch":
            rule = replace(rule, break_even=context.break_even(spec.name, rule))
        return FixedPlacement(spec, rule)


@dataclass(frozen=True)
class Fixed:
    """One model at a fixed depth, every token leaves there (HELIOS' M' without the controller)."""

    model: str
    depth: int
    threshold: float = 0.8

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def build(self, context: Context) -> Controller:
        spec = context.model(self.model)
        if self.depth not in spec.exits:
            raise InputError(
                "controller.depth",
                self.depth,
                f"{spec.name} has no exit there",
                f"Exits: {', '.join(map(str, spec.exits))}.",
            )
        return FixedPlacement(spec, ExitRule("greedy", self.threshold), self.depth)


_COUNTS_ROWS, _WEIGHS = "eager", "rebatch"
"""The built-in batching that has a use for ``quorum``, and the one for ``break_even``."""
_BUILT_IN = ("full", "wait-for-deepest", _COUNTS_ROWS, _WEIGHS)


def check_exit_numbers(batching: str, quorum: int, break_even: float | None) -> None:
    """Raise InputError unless exit batching can have these numbers, and has a use for them."""
    for name, is_given, user in (
        ("quorum", quorum != 1, _COUNTS_ROWS),
        ("break_even", break_even is not None, _WEIGHS),
    ):
        if is_given and batching != user and batching in _BUILT_IN:
            problem = f"{batching} has no use for it"
            remedy = f"Leave it out, or set batching to {user}."
            raise InputError(f"controller.{name}", quorum if name == "quorum" else break_even, problem, remedy)
    if quorum < 1:
        raise InputError("controller.quorum", quorum, "must be at least 1 row", "Correct the value.")
    if break_even is not None and not break_even >= 0:
        raise InputError("controller.break_even", break_even, "must be 0 or more rows x layers", "Correct the value.")


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:  # NaN fails too
        raise InputError("controller.threshold", threshold, "must lie between 0 and 1", "Confidence is a probability.")
