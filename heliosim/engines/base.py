"""The one seam between a simulated and a live server."""

from __future__ import annotations

from typing import Protocol

from heliosim.types import Arrival, Load, Outcome, Run


class Engine(Protocol):
    """Predicts (simulated) or performs (live) what an action does and how long it takes.

    An engine keeps, per request, everything the server must not know: text, true length, exits. It forgets a request
    once it has reported its last token, and frees the KV of those an action names as ``evicted``.
    """

    def accept(self, arrival: Arrival) -> None:
        """Take the content of a request, before the server is told of it."""
        ...

    def perform(self, action: Run | Load) -> Outcome:
        """Do the action. ``Outcome.seconds`` is a multiple of ``TICK``."""
        ...

    def forget(self, request_id: int) -> None:
        """Drop a request the server refused."""
        ...
