"""How weights come to a device: what runs meanwhile, and where weights that are not resident wait.

Pure bookkeeping. The server asks it when a placement is to change; engines do what the resulting ``Load`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heliosim.types import Bytes, ModelSpec, Placement, Seconds


@dataclass(slots=True)
class Fetch:
    """A transfer in the background. ``began_s``: when its issue was over; ``issue_s``: seconds that took; ``due_s``:
    when the weights are there, None as long as only the engine knows.
    """

    placement: Placement
    reason: str
    began_s: Seconds
    issue_s: Seconds = 0.0
    due_s: Seconds | None = None

    def is_done(self, now: Seconds) -> bool:
        return self.due_s is not None and self.due_s <= now

    def left_s(self, now: Seconds) -> Seconds | None:
        """Seconds until it is done; None: not known."""
        return None if self.due_s is None else max(0.0, self.due_s - now)

    def hidden_s(self, until_s: Seconds) -> Seconds:
        """Seconds of the transfer that passed while steps could run; ``until_s``: when they had to stop for it."""
        end_s = until_s if self.due_s is None else min(self.due_s, until_s)
        return max(0.0, end_s - self.began_s)


@dataclass
class Loading:
    """Whether loads ``overlap`` with steps, and whether steps may begin before all layers are there.

    ``host``: what host memory holds; None: everything, for ever. ``slows_steps``: whether the engine knows what a step
    beside a transfer takes.
    """

    overlaps: bool = False
    is_pipelined: bool = False
    host: HostTier | None = None
    slows_steps: bool = False


@dataclass
class HostTier:
    """``budget_bytes`` of host memory for weights: of each model the first layers, the latest used first to stay.

    At the start it holds the models in the order they are named, whole, as far as they fit. What a load moves and host
    memory does not hold comes from disk, and stays if there is room; for it the models used longest ago give way.
    """

    budget_bytes: Bytes
    models: Mapping[str, ModelSpec]
    _depths: dict[str, int] = field(default_factory=dict)  # least recently used first

    def __post_init__(self) -> None:
        fitting: list[str] = []
        left = self.budget_bytes
        for name, spec in self.models.items():
            if spec.weights_bytes(spec.layers) <= left:
                fitting.append(name)
                left -= spec.weights_bytes(spec.layers)
        self._depths = {name: self.models[name].layers for name in reversed(fitting)}

    @property
    def held_bytes(self) -> Bytes:
        return sum(self.models[name].weights_bytes(depth) for name, depth in self._depths.items())

    @property
    def held(self) -> tuple[tuple[str, int], ...]:
        """(model, layers) in host memory, the least recently used first."""
        return tuple(self._depths.items())

    def missing_bytes(self, placement: Placement, resident: int) -> Bytes:
        """Bytes that must come from disk to make a placement resident, ``resident`` layers of which are there."""
        spec = self.models[placement.model]
        known = max(resident, self._depths.get(placement.model, 0))
        if known >= placement.depth:
            return 0
        return spec.weights_bytes(placement.depth) - (spec.weights_bytes(known) if known else 0)

    def use(self, placement: Placement) -> None:
        """A placement becomes resident: keep its weights in host memory too if they fit there at all."""
        spec = self.models[placement.model]
        known = self._depths.pop(placement.model, 0)
        depth = max(placement.depth, known)
        need = spec.weights_bytes(depth)
        if need > self.budget_bytes:
            if known:
                self._depths[placement.model] = known
            return
        for name in list(self._depths):
            if self.held_bytes + need <= self.budget_bytes:
                break
            del self._depths[name]
        self._depths[placement.model] = depth


def nearest(*times: Seconds | None) -> Seconds | None:
    """The earliest of several times, of which any may be unknown."""
    known: Sequence[Seconds] = [t for t in times if t is not None]
    return min(known, default=None)
