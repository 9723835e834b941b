"""Steps on what is resident, one by one: the plain way, which works on every device and for every exit rule.

It takes a batch's KV blocks, runs the layers, takes tokens from the logits and appends them to their texts. It knows
nothing of loads or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from heliosim.engines.models.paged import PagedKV, Pass, Row
from heliosim.engines.models.walk import Left, Walk, read
from heliosim.engines.replayed import ReplayedExits, ReplayStep
from heliosim.engines.residency import Residency
from heliosim.engines.sampler import Sampler
from heliosim.engines.texts import Texts
from heliosim.types import Batch, RequestId, Run, Stride, Tokens


class Done(NamedTuple):
    """What a run did: as ``types.Outcome``, the time apart."""

    tokens: Tokens
    layers_run: int
    stride: Stride | None = None
    logprob_sums: Mapping[RequestId, float] | None = None
    agrees: Callable[[], npt.NDArray[np.bool_]] | None = None


class Runner:
    """Performs runs of one step. ``work``: tokens x layers run so far; ``replay``: exits on record that stand in for
    the engine's own.
    """

    def __init__(self, residency: Residency, texts: Texts, sampler: Sampler, *, record_ids: bool) -> None:
        self.residency, self.texts, self.sampler, self.record_ids = residency, texts, sampler, record_ids
        self.work = 0
        self.replay: ReplayedExits | None = None

    def run(self, action: Run) -> Done:
        """One step."""
        resident, kv = self.residency.held()
        self.residency.release(action.evicted)
        batch, gaps = action.batch, self.residency.gaps
        rows, ids = self._rows(batch, kv)
        rule = action.exits
        said = None
        if self.replay is not None:
            said = self.replay.step(action.placement, rule, batch.emitting, self.texts.going)
        draws = None if self.sampler.is_greedy else self._seeds(batch)
        if rule.kind == "threshold" or gaps.done or gaps.visible is not None:
            requests, emits = batch.requests, batch.emits
            walk = Walk(
                resident, kv, gaps, rule, requests, rows, ids, emits, is_decoding(batch), self.sampler, draws, said
            )
            left, layers_run = walk.go()
            self.work += walk.work
            return self._settle(batch, left, layers_run, said)
        run = Pass(rows, kv.shape, kv.device, kv.dtype, ids=ids, emits=batch.emits, block_rows=kv.block_rows)
        resident.family.begin(run)
        h = resident.family.embed(resident.base, run.ids, run.positions)
        depth = resident.depth
        self.work += run.tokens * depth
        for i in range(depth):
            h = resident.family.layer(resident.layers[i], h, run, kv.layers[i])
        if kv.hidden is not None:
            kv.hidden.keep(run.slots, h)
        if run.ends is not None:
            h = h.index_select(0, run.ends)
        left = Left.none_of(0)
        if len(h):
            left = self._taken(resident.logits(h, depth), batch, rows, draws)
        left.exit_layers = [depth] * len(left.ids)
        return self._settle(batch, left, depth, said)

    def _taken(self, logits: Tensor, batch: Batch, rows: list[Row], seeds: list[int] | None) -> Left:
        if seeds is None:
            logprobs, tokens = read(logits)
            return Left(tokens, logprobs, logprobs)
        places = [row.start + row.count - 1 for row, emits in zip(rows, batch.emits, strict=True) if emits]
        tops, logprobs, tokens = self.sampler.read(logits, seeds, places)
        return Left(tokens, logprobs, tops)

    def _seeds(self, batch: Batch) -> list[int]:
        """Of the rows that emit, in batch order."""
        return [self.texts.going[request].seed for request in batch.emitting]

    def _rows(self, batch: Batch, kv: PagedKV) -> tuple[list[Row], list[list[int]]]:
        """Take the blocks of a batch; its rows, and the ids of their new tokens."""
        rows, ids = [], []
        most = self.residency.held()[0].host.info.positions
        for request, start, count, is_emitting in zip(
            batch.requests, batch.starts, batch.counts, batch.emits, strict=True
        ):
            known = self.texts.going[request].known
            assert start + count <= len(known), f"request {request} has {len(known)} tokens, not {start + count}"
            assert start + count <= most, f"request {request} outgrows the context window"
            assert is_emitting == (start + count == len(known)), f"request {request} emits where its text ends"
            rows.append(Row(kv.take(request, start + count), start, count))
            ids.append(known[start : start + count])
        return rows, ids

    def _settle(self, batch: Batch, left: Left, layers_run: int, said: ReplayStep | None = None) -> Done:
        """Append the tokens to their requests, and forget the requests that end with them. ``said``: what is on record
        of them.
        """
        requests = batch.emitting
        eos_ids = self.residency.held()[0].host.info.eos_ids
        texts = [self.texts.going[request] for request in requests]
        replayed = None if said is None else said.said(left.exit_layers)
        logprobs = left.logprobs if replayed is None else replayed.logprobs
        lasts = tuple(map(self.texts.append, requests, left.ids, logprobs, repeat(eos_ids)))
        ended = [k for k, is_last in enumerate(lasts) if is_last]
        self.residency.release([requests[k] for k in ended])
        if self.replay is not None:
            for k in ended:
                self.replay.forget(requests[k])
        tokens = Tokens(
            requests=requests,
            exit_layers=tuple(left.exit_layers),
            confidences=tuple(math.exp(top) for top in left.tops) if replayed is None else replayed.confidences,
            logprobs=tuple(logprobs),
            lasts=lasts,
            ids=tuple(left.ids) if self.record_ids else None,
            agrees=None if replayed is None else replayed.agrees,
        )
        return Done(tokens, layers_run, None, {requests[k]: texts[k].logprob_sum for k in ended})


def is_decoding(batch: Batch) -> bool:
    """Whether every row only makes its next token: no row needs layers completed for tokens nobody reads."""
    return all(batch.emits) and all(start > 0 for start in batch.starts) and all(count == 1 for count in batch.counts)
