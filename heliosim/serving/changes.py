"""What changes during a run: the memory of the device, what users ask for, what a controller is to aim at.

Known to the drivers' scenario alone: a controller hears of a change when it is there, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from heliosim.serving.repository import Objective, Repository
from heliosim.types import Bytes, ExitBatching, Seconds


@dataclass(frozen=True)
class Change:
    """From ``at_s`` on, a tick, ``budget_bytes`` of device memory (None: as before), and what ``repository`` knows:
    offline figures of every model in that memory, and the limits then asked for.

    ``objective``, ``max_perplexity``: of controllers that have them; None: as before. ``detail``: what the record says.
    ``set_aside_bytes``: of the budget, what engines need beside weights and KV.
    """

    at_s: Seconds
    budget_bytes: Bytes | None
    repository: Callable[[float, ExitBatching], Repository]
    objective: Objective | None = None
    max_perplexity: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    set_aside_bytes: Bytes = 0
