"""Names to classes: built-ins through a small table, other packages' through entry points; nothing is imported until
asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from heliosim.errors import UnknownNameError


@dataclass(frozen=True)
class Registry:
    """``what`` names the kind of thing in messages; ``group`` is the entry-point group; ``builtin``: name ->
    ``module:attribute``.
    """

    what: str
    group: str
    builtin: Mapping[str, str]

    def names(self) -> list[str]:
        return sorted({*self.builtin, *(e.name for e in metadata.entry_points(group=self.group))})

    def get(self, name: str) -> Any:
        """The registered object. Raises UnknownNameError with the known names and the nearest."""
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            return getattr(import_module(module), attribute)
        for entry in metadata.entry_points(group=self.group):
            if entry.name == name:
                return entry.load()
        raise UnknownNameError(self.what, name, self.names())


CONTROLLERS = Registry(
    "controller.kind",
    "heliosim.controllers",
    {
        "vanilla": "heliosim.serving.kinds:Vanilla",
        "early-exit": "heliosim.serving.kinds:EarlyExit",
        "fixed": "heliosim.serving.kinds:Fixed",
        "helios": "heliosim.serving.helios:HeliosParameters",
    },
)

ROUTERS = Registry(
    "fleet.router",
    "heliosim.routers",
    {
        "round-robin": "heliosim.serving.routing:RoundRobin",
        "least-outstanding": "heliosim.serving.routing:LeastOutstanding",
        "least-kv": "heliosim.serving.routing:LeastKv",
        "power-of-two": "heliosim.serving.routing:PowerOfTwo",
    },
)

EXIT_BATCHING = Registry(
    "controller.batching",
    "heliosim.exit_batching",
    {
        "full": "heliosim.exits.batching:Full",
        "wait-for-deepest": "heliosim.exits.batching:WaitForDeepest",
        "eager": "heliosim.exits.batching:Eager",
        "rebatch": "heliosim.exits.batching:Rebatch",
    },
)

SKIPPED_KV = Registry(
    "controller.skipped_kv",
    "heliosim.skipped_kv",
    {
        "none": "heliosim.exits.skipped:Leave",
        "copy": "heliosim.exits.skipped:Copy",
        "propagate": "heliosim.exits.skipped:Propagate",
        "recompute": "heliosim.exits.skipped:Recompute",
    },
)

ORDERS = Registry(
    "batcher.order.kind",
    "heliosim.orders",
    {
        "fcfs": "heliosim.serving.ordering:Fcfs",
        "sjf": "heliosim.serving.ordering:ShortestJob",
        "srpt": "heliosim.serving.ordering:ShortestRemaining",
        "priority": "heliosim.serving.ordering:PriorityClasses",
        "feedback": "heliosim.serving.ordering:Feedback",
    },
)
