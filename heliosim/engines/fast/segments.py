"""Mode S: rows part ways at exits. One ready step per segment and number of rows; the host regroups in between.

The walk is that of ``models/walk.py``, which decides who leaves, who goes on and what is stored of skipped layers. Here
only what it computes is made ready beforehand: a segment's layers and what rows say behind them, on the rows of the
batch state that stand in front. Reading what they say is a round trip, one at each exit, which is the price of parting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heliosim.engines.fast.passes import DecodePass
from heliosim.engines.fast.steps import Home, begun, run_layers, taken
from heliosim.engines.models.paged import Row
from heliosim.engines.models.walk import Gaps, Stopped, Walk
from heliosim.types import Batch, ExitRule

if TYPE_CHECKING:
    from heliosim.engines.fast.runner import FastRunner


class SegmentStep:
    """Layers ``first`` up to ``last`` for the first ``rows`` rows of the state, and what they say behind them.

    ``hidden`` [most, d]: hidden states of the rows, read (but by the first segment) and written; ``said`` [3, most]
    float64: highest log-probabilities, log-probabilities and ids of tokens.
    """

    def __init__(
        self, home: Home, run: DecodePass, rows: int, first: int, last: int, hidden: Tensor, said: Tensor
    ) -> None:
        self.home, self.run, self.rows, self.first, self.last = home, run, rows, first, last
        self.hidden, self.said = hidden, said
        self.overwrites = (hidden,)  # read and written, so running it twice is not running it once

    def __call__(self) -> None:
        home, run = self.home, self.run
        h = begun(home, run)
        if self.first:  # rows that fill the step up repeat the first
            h = self.hidden.index_select(0, run.sources)
        h = run_layers(home, run, h, self.first, self.last)
        self.hidden[: self.rows].copy_(h)
        for place, value in zip(self.said, taken(home, h, self.last, self.rows), strict=True):
            place[: self.rows].copy_(value)


class CapturedWalk(Walk):
    """A walk of decode rows, the rows of the batch state in order."""

    def __init__(
        self,
        runner: FastRunner,
        home: Home,
        gaps: Gaps,
        rule: ExitRule,
        batch: Batch,
        rows: Sequence[Row],
        ids: Sequence[Sequence[int]],
        seeds: Sequence[int] | None,
    ) -> None:
        super().__init__(
            home.resident, home.kv, gaps, rule, batch.requests, rows, ids, batch.emits, True, home.sampler, seeds
        )
        self.runner, self.home = runner, home
        self.hidden, self.said = runner.segment_buffers(home)

    def _begin(self) -> tuple[Any, Tensor]:
        self._walkers = list(range(len(self.rows)))
        return None, self.hidden[: len(self.rows)]

    def _through(self, first: int, last: int, h: Tensor, run: Any) -> tuple[Any, Tensor]:
        rows = len(self._walkers)
        tokens = max(self.rows[row].start + 1 for row in self._walkers)
        ready = self.runner.segment(self.home, rows, tokens, first, last)
        if ready.run.is_planned:
            mine = [self.rows[row] for row in self._walkers]
            ready.run.plan([row.table for row in mine], [row.start + 1 for row in mine])
        self.runner.graphs.capture(ready, self.home.state)
        ready.go()
        return ready.run, self.hidden[:rows]

    def _tokens(self, run: Any) -> int:
        return len(self._walkers)

    def _needs_pass(self, segment: int, walking: list[int], run: Any) -> bool:
        return walking != self._walkers

    def _next_pass(self, segment: int, walking: list[int], run: Any, h: Tensor) -> tuple[Any, Tensor]:
        """Bring the rows that go on to the front."""
        state, device = self.home.state, self.home.state.device
        places = {row: k for k, row in enumerate(self._walkers)}
        index = _on_device([places[row] for row in walking], device)
        n = len(walking)
        state.fields[:, :n] = state.fields.index_select(1, index)
        state.tables[:n] = state.tables.index_select(0, index)
        self.hidden[:n] = self.hidden.index_select(0, index)
        state.use(n)
        self._walkers = list(walking)
        return run, self.hidden[:n]

    def _said(self, h: Tensor, layer: int, run: Any, rows: Sequence[int]) -> Iterable[tuple[float, float, int]]:
        places = {row: k for k, row in enumerate(self._walkers)}
        tops, logprobs, ids = self.said[:, : len(self._walkers)].tolist()
        return [(tops[places[row]], logprobs[places[row]], int(ids[places[row]])) for row in rows]

    def _stop(self, rows: list[int], h: Tensor, run: Any, walking: list[int], layer: int) -> None:
        places = {row: k for k, row in enumerate(self._walkers)}
        index = _on_device([places[row] for row in rows], h.device)
        positions = run.positions.index_select(0, index)
        turns = self.resident.family.turns(positions)
        self._stopped.append(Stopped(layer, h.index_select(0, index), run.slots.index_select(0, index), turns))


def _on_device(values: Sequence[int], device: torch.device) -> Tensor:
    made = torch.tensor(values, dtype=torch.int64)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)
