"""Arrival processes: when requests come. A new open one is a small class that draws gaps.

Registered by name (``ARRIVALS``); a workload names one by ``kind`` with its parameters beside it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.fields import FieldInfo

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import Strict, validate
from heliosim.formats.trace import MAX_ARRIVAL_S, TraceRow
from heliosim.streams import stream
from heliosim.types import TICK, Seconds, tick


class ArrivalProcess(Strict):
    """How requests come; ``kind`` names it. Its fields are its parameters; unknown ones are refused."""

    kind: str


ARRIVALS: dict[str, type[ArrivalProcess]] = {}
"""Arrival processes by name. A new open one extends ``Gaps`` and is registered with ``register_arrivals``."""

P = TypeVar("P", bound=ArrivalProcess)


def register_arrivals(cls: type[P]) -> type[P]:
    """Make an arrival process known under the default of its ``kind``."""
    fields: dict[str, FieldInfo] = cls.model_fields
    ARRIVALS[fields["kind"].default] = cls
    return cls


class Gaps(ArrivalProcess):
    """An open process of independent gaps between arrivals. The first gap lies before the first arrival."""

    rate_per_s: float = Field(gt=0, le=1e6, allow_inf_nan=False)

    @abstractmethod
    def gaps(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """The first ``count`` gaps in seconds; with a larger ``count`` the first ones are the same."""

    def times(self, count: int, seed: int) -> list[Seconds]:
        """Arrival times of the first ``count`` requests, sorted, on ticks."""
        gaps = self.gaps(count, stream(seed, "arrivals"))
        if not float(gaps.sum()) <= MAX_ARRIVAL_S:  # not a number is refused too
            remedy = f"Times are exact up to {MAX_ARRIVAL_S:.0f} s: raise rate_per_s or ask for fewer requests."
            raise InputError("arrivals.rate_per_s", self.rate_per_s, f"too slow for {count} requests", remedy)
        ticks: NDArray[np.int64] = np.cumsum(np.rint(gaps / TICK).astype(np.int64))
        return [int(t) * TICK for t in ticks]


@register_arrivals
class Poisson(Gaps):
    """Independent users: exponential gaps."""

    kind: Literal["poisson"] = "poisson"

    def gaps(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        return rng.exponential(1 / self.rate_per_s, count)


@register_arrivals
class Gamma(Gaps):
    """Bursty (``cv`` > 1) or even (``cv`` < 1) arrivals; ``cv`` is the coefficient of variation of the gaps."""

    kind: Literal["gamma"] = "gamma"
    cv: float = Field(gt=0, le=100, allow_inf_nan=False)

    def gaps(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        return rng.gamma(1 / self.cv**2, self.cv**2 / self.rate_per_s, count)


@register_arrivals
class Constant(Gaps):
    """A metronome."""

    kind: Literal["constant"] = "constant"

    def gaps(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        # differences of the exact times, so that rounding to ticks does not add up
        times = np.rint(np.arange(count + 1) / self.rate_per_s / TICK) * TICK
        return np.diff(times)


@register_arrivals
class Closed(ArrivalProcess):
    """``users`` who think for ``think_s`` seconds between an answer and their next request (see ``ClosedLoop``)."""

    kind: Literal["closed"] = "closed"
    users: int = Field(ge=1)
    think_s: float = Field(default=0.0, ge=0, le=MAX_ARRIVAL_S, allow_inf_nan=False)


@register_arrivals
class Replay(ArrivalProcess):
    """The trace's own times, ``speed`` times as fast."""

    kind: Literal["replay"] = "replay"
    speed: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def times(self, rows: Sequence[TraceRow], source: str) -> list[Seconds]:
        """Arrival times of the rows, on ticks."""
        times = []
        for row in rows:
            if row.arrival_s is None:
                remedy = "Choose another arrival process, such as poisson."
                raise InputError(f"{source}, arrivals.kind", self.kind, "the trace has no arrival times", remedy)
            times.append(tick(row.arrival_s / self.speed))
        if times and times[-1] > MAX_ARRIVAL_S:
            remedy = f"Times are exact up to {MAX_ARRIVAL_S:.0f} s: raise speed or ask for fewer requests."
            raise InputError("arrivals.speed", self.speed, "too slow for the trace", remedy)
        return times


def parse_arrivals(value: Any) -> Any:
    """A process from a mapping with ``kind``. Raises InputError naming an unknown kind, field or value."""
    if isinstance(value, ArrivalProcess) or not isinstance(value, Mapping):
        return value
    known = ", ".join(sorted(ARRIVALS))
    if "kind" not in value:
        raise InputError("arrivals, field kind", None, "missing field", f"Add it; known: {known}.")
    cls = ARRIVALS.get(value["kind"]) if isinstance(value["kind"], str) else None
    if cls is None:
        raise UnknownNameError("arrivals, field kind", value["kind"], ARRIVALS)
    return validate(cls, value, f"arrivals {value['kind']}")
