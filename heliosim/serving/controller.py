"""Which model, how deep, how tokens leave: the protocol, and the controllers that never change their mind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from heliosim.errors import MemoryBudgetError
from heliosim.serving.changes import Change
from heliosim.types import (
    Directive,
    ExitRule,
    ModelSpec,
    Outcome,
    Placement,
    Run,
    Seconds,
    Served,
    Status,
)


@dataclass(frozen=True, slots=True)
class Note:
    """Something a controller did that a reader of the run will want to see (choice, breach, evaluation)."""

    kind: str
    detail: Mapping[str, Any]


_NO_NOTES: list[Note] = []


class Controller(Protocol):
    """Sees what a live server sees: the status, and each outcome after it happened.

    Optional: ``changed(now, change)``, told of a ``changes.Change`` behind the last outcome and before the next
    decision; ``check_changes(changes)``, which raises InputError before a run with changes it could not serve behind.
    """

    @property
    def breaches(self) -> int:
        """Confidence breaches now on the counter (0 for controllers that keep none)."""
        ...

    def breaches_over(self, steps: int) -> Sequence[int]:
        """The counter behind each of the last ``steps`` steps observed."""
        ...

    def decide(self, now: Seconds, status: Status) -> Directive: ...
    def observe(self, now: Seconds, run: Run, outcome: Outcome, served: Sequence[Served], started: int) -> None: ...
    def take_notes(self) -> list[Note]: ...


@dataclass
class FixedPlacement:
    """One model at one depth for ever: vanilla decoding, early exit on a full model, or a fixed partial model."""

    model: ModelSpec
    exits: ExitRule
    depth: int | None = None
    breaches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.depth = self.model.layers if self.depth is None else self.depth
        self._directive = Directive(
            Placement(self.model.name, self.depth), self.exits, max_steps=None, max_ends=None, passes_arrivals=True
        )

    def breaches_over(self, steps: int) -> Sequence[int]:
        return [0] * steps

    def check_changes(self, changes: Sequence[Change]) -> None:
        """Raise MemoryBudgetError if the placement will not fit at some time."""
        assert self.depth is not None
        for change in changes:
            if change.budget_bytes is not None:
                where = f"changes at {change.at_s:g} s: "
                require_placeable(self.model, self.depth, change.budget_bytes, change.set_aside_bytes, where)

    def decide(self, now: Seconds, status: Status) -> Directive:
        return self._directive

    def observe(self, now: Seconds, run: Run, outcome: Outcome, served: Sequence[Served], started: int) -> None:
        """Nothing to learn."""

    def take_notes(self) -> list[Note]:
        return _NO_NOTES


def vanilla(model: ModelSpec) -> FixedPlacement:
    """Full model, every token walks every layer, no exit is checked."""
    return FixedPlacement(model, ExitRule("none"))


def require_placeable(spec: ModelSpec, depth: int, budget_bytes: int, set_aside: int = 0, where: str = "") -> None:
    """Raise MemoryBudgetError unless ``depth`` layers of a model and one KV block fit the budget, beside ``set_aside``
    bytes that an engine needs otherwise.
    """
    need = spec.weights_bytes(depth) + spec.block_bytes(depth) * (1 + spec.request_blocks(depth)) + set_aside
    if need > budget_bytes:
        raise MemoryBudgetError(
            f"{where}memory.budget_bytes",
            budget_bytes,
            f"too small for {spec.name} at {depth} of {spec.layers} layers with one KV block"
            + (f", beside {set_aside:,} B of activations and workspace" if set_aside else ""),
            f"Give at least {need:,} B, or choose a smaller model.",
        )
