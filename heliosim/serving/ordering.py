"""Who goes first: the orders in which a batcher starts requests, and whom it may interrupt for them.

An order ranks requests by what a server knows of them: when they came, their class, how many tokens somebody predicted
and how many they have. It sees no true length. A kind is a dataclass of parameters that is the order itself, named in a
scenario by ``batcher.order``; one of your own is such a class in your package, named by an entry point of the group
``heliosim.orders``.

Sources of the ideas: shortest predicted job and remaining time with learned predictors (learning-to-rank scheduling;
TRAIL, which lets requests be preempted early in their lives only), multi-level feedback with a speculative first level
(ALISE), ageing as in every priority scheduler. The rules below are our own, simple readings of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from heliosim.errors import InputError
from heliosim.types import Request, Seconds

Preempt = Literal["never", "limited", "always"]
_CLASS_APART_S: Seconds = 2.0**23
"""Seconds that no class makes up for without ageing: more than a clock can show."""


class Order(ABC):
    """What a batcher asks. Answers depend on the request and on how many tokens it has, on nothing else.

    ``needs_prediction``: it makes no sense unless the workload says how lengths are predicted.
    """

    needs_prediction: ClassVar[bool] = False
    keep_kv: bool = False
    """Whether who is interrupted while decoding keeps its KV as long as nobody before it needs the room."""

    @property
    def preempts(self) -> bool:
        """Whether a waiting request may take the place of a running one that ranks behind it."""
        return False

    @abstractmethod
    def rank(self, request: Request, generated: int) -> float:
        """Less goes first; equals in order of arrival."""

    def gives_way(self, request: Request, generated: int) -> bool:
        """Whether a running request may be interrupted for one that ranks before it."""
        return True

    def sure_for(self, request: Request, generated: int) -> int | None:
        """For how many more tokens its rank will not rise, nor ``gives_way`` become true; None: for ever.

        A batcher looks again then. 1, the default, is always right and makes simulations slow.
        """
        return 1


@dataclass(frozen=True)
class Fcfs(Order):
    """First come, first served; who was interrupted goes first."""

    def rank(self, request: Request, generated: int) -> float:
        return request.arrival_s


@dataclass(frozen=True)
class ShortestJob(Order):
    """``sjf``: the shortest predicted output first; nobody is interrupted for it."""

    needs_prediction: ClassVar[bool] = True

    def rank(self, request: Request, generated: int) -> float:
        return expected_tokens(request, 0)

    def sure_for(self, request: Request, generated: int) -> int | None:
        return None


@dataclass(frozen=True)
class ShortestRemaining(Order):
    """``srpt``: the fewest predicted tokens left first.

    ``preempt``: ``always`` interrupts whoever has more left than one who waits; ``limited`` only those who have less
    than the share ``c`` of their predicted tokens; ``never`` only orders the queue. ``keep_kv``: as in ``Order``.
    """

    needs_prediction: ClassVar[bool] = True
    preempt: Preempt = "limited"
    c: float = 0.8
    keep_kv: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.c <= 1:  # NaN fails too
            raise InputError("batcher.order.c", self.c, "must lie between 0 and 1", "It is a share of the prediction.")

    @property
    def preempts(self) -> bool:
        return self.preempt != "never"

    def rank(self, request: Request, generated: int) -> float:
        return max(1.0, expected_tokens(request, generated) - generated)

    def gives_way(self, request: Request, generated: int) -> bool:
        return self.preempt == "always" or generated < self.c * expected_tokens(request, 0)

    def sure_for(self, request: Request, generated: int) -> int | None:
        prediction = request.prediction
        if prediction is None or prediction.every is None:
            return None
        return prediction.every - generated % prediction.every


@dataclass(frozen=True)
class PriorityClasses(Order):
    """``priority``: the most urgent class first (0), within a class first come, first served.

    ``ageing_s``: a request gains one class in so many seconds, evenly, so a request of class k waits for nobody who
    came more than k ageing times after it; None: it never does. ``preempt``: whether it interrupts those behind it.
    """

    ageing_s: Seconds | None = None
    preempt: Literal["never", "always"] = "never"
    keep_kv: bool = False

    def __post_init__(self) -> None:
        _check_ageing(self.ageing_s)

    @property
    def preempts(self) -> bool:
        return self.preempt == "always"

    def rank(self, request: Request, generated: int) -> float:
        return request.arrival_s + request.priority * (_CLASS_APART_S if self.ageing_s is None else self.ageing_s)

    def sure_for(self, request: Request, generated: int) -> int | None:
        return None


@dataclass(frozen=True)
class Feedback(Order):
    """``feedback``: levels of more and more tokens; a request sinks a level when it has used a level's tokens up.

    Level k ends at ``quantum_tokens`` * 2^k tokens; the last of ``levels`` never ends. A request enters at the first
    level or, ``speculative``, at the one its predicted length belongs to. ``ageing_s``: as with priority classes, with
    levels for classes. Whoever waits at a higher level interrupts those who sank below it.
    """

    quantum_tokens: int = 32
    levels: int = 5
    speculative: bool = False
    ageing_s: Seconds | None = None
    preempt: Literal["never", "always"] = "always"
    keep_kv: bool = False

    def __post_init__(self) -> None:
        for name, value in (("quantum_tokens", self.quantum_tokens), ("levels", self.levels)):
            if value < 1:
                raise InputError(f"batcher.order.{name}", value, "must be at least 1", "Correct the value.")
        _check_ageing(self.ageing_s)

    @property
    def preempts(self) -> bool:
        return self.preempt == "always"

    def level(self, request: Request, generated: int) -> int:
        """The level a request is at, 0 the highest."""
        used = float(generated)
        if self.speculative and request.prediction is not None:
            used = max(used, expected_tokens(request, generated) - 1)
        level = 0
        while level < self.levels - 1 and used >= self.quantum_tokens << level:
            level += 1
        return level

    def rank(self, request: Request, generated: int) -> float:
        apart_s = _CLASS_APART_S if self.ageing_s is None else self.ageing_s
        return request.arrival_s + self.level(request, generated) * apart_s

    def sure_for(self, request: Request, generated: int) -> int | None:
        level, prediction = self.level(request, generated), request.prediction
        sure = None if level == self.levels - 1 else max(1, (self.quantum_tokens << level) - generated)
        if self.speculative and prediction is not None and prediction.every is not None:
            renewed = prediction.every - generated % prediction.every
            sure = renewed if sure is None else min(sure, renewed)
        return sure


def expected_tokens(request: Request, generated: int) -> float:
    """Predicted output tokens; without a prediction all that the request may generate."""
    return float(request.max_tokens) if request.prediction is None else request.prediction.total(generated)


def _check_ageing(ageing_s: Seconds | None) -> None:
    if ageing_s is not None and not 0 < ageing_s < _CLASS_APART_S:
        remedy = "Give seconds, or leave it out for no ageing."
        raise InputError("batcher.order.ageing_s", ageing_s, "must be more than 0 and no longer than a run", remedy)
