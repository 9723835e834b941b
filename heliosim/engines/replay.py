"""An engine that repeats recorded outcomes: for parity checks, audits and tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from heliosim.types import Arrival, Load, Outcome, Run


class ReplayDiverged(AssertionError):
    """The server asked for something other than what was recorded."""


class ReplayEngine:
    """Gives back ``log`` outcome by outcome; raises ReplayDiverged at the first action that differs.

    ``max_stride``: the largest stride that was asked for when it was recorded.
    """

    def __init__(self, log: Iterable[tuple[Run | Load, Outcome]], max_stride: int = 1) -> None:
        self._log, self.max_stride = list(log), max_stride
        self.position = 0

    def accept(self, arrival: Arrival) -> None:
        """Contents are in the log already."""

    def forget(self, request_id: int) -> None:
        """Nothing to drop."""

    def perform(self, action: Run | Load) -> Outcome:
        if self.position >= len(self._log):
            raise ReplayDiverged(f"action {self.position} was never recorded: {action}")
        expected, outcome = self._log[self.position]
        if _named(action) != _named(expected):
            raise ReplayDiverged(f"action {self.position} differs:\n recorded {expected}\n asked    {action}")
        self.position += 1
        return outcome


def _named(action: Run | Load) -> Run | Load:
    """An action without its guard, which belongs to the controller that gave it and equals no other's."""
    return replace(action, guard=None) if isinstance(action, Run) and action.guard is not None else action
