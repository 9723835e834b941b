"""Decode steps of a chosen batch, context and depth, timed on the engine itself: what a driver would be told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from heliosim.streams import stream
from heliosim.types import Arrival, Batch, Content, ExitRule, Load, Outcome, Placement, Request, Run, blocks_for

NO_EXITS = ExitRule("none")
PROMPT_CHUNK = 2048
MOST_STEPS = 512


@dataclass(frozen=True)
class Timed:
    """Seconds of a step: median, least and most over repeats."""

    median_s: float
    least_s: float
    most_s: float


class Bench:
    """Rows of one model on an engine, decoded together."""

    def __init__(self, engine: Any, model: str, seed: int) -> None:
        self.engine, self.model = engine, model
        self.spec = engine.specs[model]
        self._ids = stream(seed, "gpu check", "ids").integers(engine.vocab, size=8192).tolist()
        self._numbers: Iterator[int] = itertools.count()
        self.known: dict[int, int] = {}
        """Tokens of each request, its newest included."""

    def place(self, depth: int, rows: int, tokens: int) -> Outcome:
        """Load ``depth`` layers with KV for so many rows of so many tokens."""
        self.drop()
        blocks = rows * blocks_for(tokens + 1) + 1
        outcome: Outcome = self.engine.perform(Load(Placement(self.model, depth), blocks, "gpu check"))
        return outcome

    def fill(self, rows: int, context: int) -> float:
        """Have ``rows`` requests read prompts of ``context`` tokens; returns the seconds it took."""
        assert context <= PROMPT_CHUNK, "a prompt is read in one step"
        numbers = list(itertools.islice(self._numbers, rows))
        for number in numbers:
            ids = tuple(self._ids[(number + k) % len(self._ids)] for k in range(context))
            request = Request(number, 0.0, context, MOST_STEPS)
            self.engine.accept(Arrival(request, Content("", ids, MOST_STEPS)))
            self.known[number] = context + 1
        seconds, together = 0.0, max(1, PROMPT_CHUNK // context)
        for first in range(0, rows, together):
            some = tuple(numbers[first : first + together])
            n = len(some)
            batch = Batch(some, (0,) * n, (context,) * n, (True,) * n)
            seconds += self.engine.perform(Run(self._placement, NO_EXITS, batch)).seconds
        return seconds

    def decode(self, steps: int) -> float:
        """Seconds of ``steps`` steps of all rows, in strides where the engine makes them."""
        seconds, done = 0.0, 0
        while done < steps:
            requests = tuple(self.known)
            starts = tuple(known - 1 for known in self.known.values())
            batch = Batch(requests, starts, (1,) * len(requests), (True,) * len(requests))
            run = Run(self._placement, NO_EXITS, batch, max_steps=steps - done, max_ends=None, in_stride=True)
            outcome = self.engine.perform(run)
            made = len(outcome.stride.steps) if outcome.stride is not None else 1
            seconds, done = seconds + outcome.seconds, done + made
            for request in requests:
                self.known[request] += made
        return seconds

    def step(self, repeats: int, steps: int) -> Timed:
        """Time of a step: ``repeats`` runs of ``steps`` steps, behind one that warms up."""
        self.decode(steps)
        each = [self.decode(steps) / steps for _ in range(repeats)]
        return Timed(median(each), min(each), max(each))

    def drop(self) -> None:
        """Forget all rows."""
        for request in self.known:
            self.engine.forget(request)
        self.known.clear()

    @property
    def _placement(self) -> Placement:
        placement: Placement = self.engine.placement
        return placement
