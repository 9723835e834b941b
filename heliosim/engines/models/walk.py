"""One step through the layers under a threshold: exits checked on the way, rows regrouped, skipped KV seen to.

Layers between two exits are a segment. Rows walk it together in one pass; a pass is kept from segment to segment as
long as the same tokens walk. What a batch does behind an exit is the exit batcher's to say, what is stored of skipped
layers the skipped-KV method's (``exits/``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heliosim.engines.models.host import Resident
from heliosim.engines.models.paged import PagedKV, Pass, Row, slots_of
from heliosim.engines.replayed import ReplayStep
from heliosim.engines.sampler import Sampler
from heliosim.errors import InputError
from heliosim.exits.batching import AtExit, exit_batcher
from heliosim.exits.skipped import skipped_kv
from heliosim.types import BLOCK_TOKENS, ExitRule, RequestId


@dataclass(slots=True)
class Left:
    """Where the emitting rows of a step left, in batch order; exit layer 0: not yet.

    ``ids``: tokens they said; ``logprobs``: natural-log probabilities of those; ``tops``: of the likeliest there.
    """

    ids: list[int]
    logprobs: list[float]
    tops: list[float]
    exit_layers: list[int] = field(default_factory=list)

    @classmethod
    def none_of(cls, rows: int) -> Left:
        return cls([0] * rows, [0.0] * rows, [0.0] * rows, [0] * rows)


@dataclass(slots=True)
class Gaps:
    """Which tokens of a placement's KV lack that of which segments.

    ``done``: by request, the tokens from its first on that have KV in each segment; who is not named has no gaps.
    ``visible``: [segments, 16 * blocks], whether a token of a block has KV there; None as long as all of them do.
    """

    done: dict[RequestId, list[int]] = field(default_factory=dict)
    visible: Tensor | None = None

    def forget(self, request: RequestId) -> None:
        self.done.pop(request, None)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Follow KV blocks to other places of the storage."""
        if self.visible is None or not moves:
            return
        blocks = self.visible.view(len(self.visible), -1, BLOCK_TOKENS)
        for source, target in moves:
            blocks[:, target] = blocks[:, source]

    def shift(self, blocks: int) -> None:
        """Follow KV blocks whose numbers have become higher by ``blocks``."""
        if self.visible is not None and blocks:
            self.visible = torch.nn.functional.pad(self.visible, (blocks * BLOCK_TOKENS, 0), value=True)


@dataclass(slots=True)
class Stopped:
    """Tokens that ran no layer behind ``layer``: their hidden states [n, d] there, their slots, their rotations."""

    layer: int
    h: Tensor
    slots: Tensor
    turns: Tensor | None
    kv: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.h)

    def store(self, layer: Any, kv: Tensor) -> None:
        layer.tokens.index_copy_(0, self.slots, kv)


@dataclass(slots=True)
class _Gap:
    """``exits.skipped.Gap``: one layer that some tokens skipped."""

    walk: Walk
    layer: int
    who: Stopped

    def propagate(self) -> None:
        resident, kv = self.walk.resident, self.walk.kv
        resident.family.fill(resident.layers[self.layer], self.who.h, self.who, kv.layers[self.layer])

    def copy(self) -> None:
        assert self.who.kv is not None
        self.who.store(self.walk.kv.layers[self.layer], self.who.kv)


class Walk:
    """A step of ``rows``, whose new tokens are ``ids``, over the resident layers. ``requests`` names the rows;
    ``may_stop``: it is of decode rows alone.
    """

    def __init__(
        self,
        resident: Resident,
        kv: PagedKV,
        gaps: Gaps,
        rule: ExitRule,
        requests: Sequence[RequestId],
        rows: Sequence[Row],
        ids: Sequence[Sequence[int]],
        emits: Sequence[bool],
        may_stop: bool,
        sampler: Sampler | None = None,
        seeds: Sequence[int] | None = None,
        replayed: ReplayStep | None = None,
    ) -> None:
        """``sampler``, ``seeds``: of the emitting rows, where tokens are drawn; None: the likeliest are taken.
        ``replayed``: says who is confident, in place of the model.
        """
        self.sampler, self.seeds, self.replayed = sampler, seeds, replayed
        self.resident, self.kv, self.gaps, self.rule = resident, kv, gaps, rule
        self.requests, self.rows, self.ids, self.emits, self.may_stop = requests, rows, ids, emits, may_stop
        self.batcher, self.method = exit_batcher(rule.batching), skipped_kv(rule.skipped_kv)
        depth = resident.depth
        self.ends = [*(e for e in resident.host.info.spec.exits if e < depth), depth]  # of segments
        self.checks = frozenset(self.ends[:-1]) if rule.kind == "threshold" else frozenset()
        self.left = Left.none_of(sum(emits))
        self._place = {row: k for k, row in enumerate(i for i, is_emitting in enumerate(emits) if is_emitting)}
        self._stopped: list[Stopped] = []
        self.work = 0  # tokens x layers
        self._asked_at = 0
        self._answers: dict[int, tuple[float, float, int]] = {}
        """Of rows that were asked last and did not leave: highest log-probability there, log-probability and id of the
        token they would have said.
        """
        if self.method.has_gaps and gaps.visible is None:
            gaps.visible = torch.ones(len(self.ends), kv.grid_blocks * BLOCK_TOKENS, dtype=torch.bool, device=kv.device)
        self._dones = [
            list(gaps.done.get(request, [row.start] * len(self.ends)))
            for request, row in zip(requests, rows, strict=True)
        ]
        self._was_done = [list(done) for done in self._dones]

    def go(self) -> tuple[Left, int]:
        """Walk; returns where the emitting rows left, and the deepest layer that ran."""
        walking = list(range(len(self.rows)))
        run, h = self._begin()
        layers_run = 0
        for segment, end in enumerate(self.ends):
            if segment and self._needs_pass(segment, walking, run):
                run, h = self._next_pass(segment, walking, run, h)
            run, h = self._through(layers_run, end, h, run)
            self.work += self._tokens(run) * (end - layers_run)
            layers_run = end
            for row in walking:
                self._dones[row][segment] = self.rows[row].start + self.rows[row].count
            if end not in self.checks:
                continue
            undecided = self._check(h, end, run, walking, self.rule.threshold)
            if not self.may_stop:
                continue
            at = AtExit(len(self.rows), len(walking), len(undecided), self.ends[segment + 1] - end)
            verdict = self.batcher.verdict(at, self.rule)
            if verdict == "stop":
                break
            if verdict == "regroup" and undecided and len(undecided) < len(walking):
                self._stop([row for row in walking if row not in set(undecided)], h, run, walking, end)
                walking = undecided
        self._check(h, layers_run, run, walking, None)
        self._stop(walking, h, run, walking, layers_run)
        self._see_to_skipped()
        for request, done, whole in zip(self.requests, self._dones, self.rows, strict=True):
            if min(done) < whole.start + whole.count and self.method.is_recomputed:
                self.gaps.done[request] = done
            elif request in self.gaps.done:
                assert min(done) >= whole.start, f"request {request} has tokens that wait for layers, and skips them"
                self.gaps.forget(request)
        return self.left, layers_run

    def _through(self, first: int, last: int, h: Tensor, run: Pass) -> tuple[Pass, Tensor]:
        """Run layers ``first`` up to ``last``."""
        for i in range(first, last):
            h = self.resident.family.layer(self.resident.layers[i], h, run, self.kv.layers[i])
        return run, h

    def _tokens(self, run: Pass) -> int:
        """Tokens that walk."""
        tokens: int = run.tokens
        return tokens

    # --- passes -----------------------------------------------------------------------------------------------------

    def _begin(self) -> tuple[Pass, Tensor]:
        """The pass of all rows over the first layers, from the embedding."""
        kv, visible = self.kv, self.gaps.visible
        if visible is not None:
            new = torch.tensor([s for row in self.rows for s in slots_of(row)], device=kv.device)
            visible[:, new] = False
            visible[0, new] = True
        run = Pass(self.rows, kv.shape, kv.device, kv.dtype, ids=self.ids, emits=self.emits, block_rows=kv.block_rows)
        self.resident.family.begin(run)
        self._walkers = list(range(len(self.rows)))
        self._given = list(self.rows)
        return run, self.resident.family.embed(self.resident.base, run.ids, run.positions)

    def _needs_pass(self, segment: int, walking: list[int], run: Pass) -> bool:
        """Whether other tokens walk this segment than the one before, or see other tokens."""
        if walking != self._walkers or self.gaps.visible is not None:
            return True
        return any(self._was_done[row][segment] != self._given[k].start for k, row in enumerate(walking))

    def _next_pass(self, segment: int, walking: list[int], run: Pass, h: Tensor) -> tuple[Pass, Tensor]:
        """A pass of the walking rows, each with its tokens that have no KV here yet, and their hidden states."""
        kv, visible = self.kv, self.gaps.visible
        rows = []
        for row in walking:
            whole = self.rows[row]
            start = self._was_done[row][segment]
            rows.append(Row(whole.table, start, whole.start + whole.count - start))
        mine = None
        if visible is not None:
            mine = visible[segment]
            mine[torch.tensor([s for row in rows for s in slots_of(row)], device=kv.device)] = True
        old_first, first = {}, 0
        for k in run.order:
            old_first[self._walkers[k]] = first
            first += self._given[k].count
        old_count = {row: self._given[k].count for k, row in enumerate(self._walkers)}
        emits = [self.emits[row] for row in walking]
        new = Pass(rows, kv.shape, kv.device, kv.dtype, emits=emits, visible=mine, block_rows=kv.block_rows)
        self.resident.family.begin(new)
        picked: list[int] = []
        waiting: list[int] = []
        for k in new.order:
            row, fresh = walking[k], old_count[walking[k]]
            missing = rows[k].count - fresh
            if missing:  # tokens that came this far in an earlier step
                slots = list(slots_of(Row(rows[k].table, rows[k].start, missing), kv.block_rows))
                picked += range(h.shape[0] + len(waiting), h.shape[0] + len(waiting) + missing)
                waiting += slots
            picked += range(old_first[row], old_first[row] + fresh)
        if waiting:
            h = torch.cat((h, self._waiting_states(self.ends[segment - 1], waiting)))
        self._walkers, self._given = list(walking), rows
        return new, h.index_select(0, torch.tensor(picked, device=kv.device))

    # --- who leaves -------------------------------------------------------------------------------------------------

    def _check(self, h: Tensor, layer: int, run: Pass, walking: list[int], threshold: float | None) -> list[int]:
        """Let rows that have not left leave behind ``layer``, if confident enough (None: whatever they are); returns
        those who still have not.
        """
        left = self.left
        emitting = [row for row in walking if self.emits[row]]
        asked = [k for k, row in enumerate(emitting) if not left.exit_layers[self._place[row]]]
        if not asked:
            return []
        if threshold is None and layer == self._asked_at:  # a batch that stops here was asked already
            for row, answer in self._answers.items():
                self._leave(row, layer, answer)
            return []
        self._asked_at, self._answers = layer, {}
        for k, answer in zip(asked, self._said(h, layer, run, [emitting[k] for k in asked]), strict=True):
            if threshold is None or self._is_confident(emitting[k], layer, answer[0], threshold):
                self._leave(emitting[k], layer, answer)
            else:
                self._answers[emitting[k]] = answer
        return list(self._answers)

    def _is_confident(self, row: int, layer: int, top: float, threshold: float) -> bool:
        if self.replayed is not None:
            return self.replayed.is_confident(self._place[row], layer)
        return math.exp(top) >= threshold

    def _said(self, h: Tensor, layer: int, run: Pass, rows: Sequence[int]) -> Iterable[tuple[float, float, int]]:
        """What ``rows`` of those that walk and emit say behind ``layer``: highest log-probability, log-probability and
        id of their tokens.
        """
        if run.ends is not None:
            h = h.index_select(0, run.ends)
        emitting = [row for row in self._walkers if self.emits[row]]
        if len(rows) < len(emitting):
            place = {row: k for k, row in enumerate(emitting)}
            h = h.index_select(0, torch.tensor([place[row] for row in rows], device=h.device))
        logits = self.resident.logits(h, layer)
        if self.seeds is None or self.sampler is None:
            logprobs, ids = read(logits)
            return zip(logprobs, logprobs, ids, strict=True)
        seeds = [self.seeds[self._place[row]] for row in rows]
        places = [self.rows[row].start + self.rows[row].count - 1 for row in rows]
        return zip(*self.sampler.read(logits, seeds, places), strict=True)

    def _leave(self, row: int, layer: int, answer: tuple[float, float, int]) -> None:
        left, i = self.left, self._place[row]
        left.exit_layers[i] = layer
        left.tops[i], left.logprobs[i], left.ids[i] = answer

    def _stop(self, rows: list[int], h: Tensor, run: Pass, walking: list[int], layer: int) -> None:
        """Note the tokens of rows that go no deeper than ``layer``."""
        slots, turns = run.slots, getattr(run, "turns", None)
        if len(rows) < len(walking):
            leaving, first = set(rows), 0
            picked: list[int] = []
            for k in run.order:
                if walking[k] in leaving:
                    picked += range(first, first + self._given[k].count)
                first += self._given[k].count
            index = torch.tensor(picked, device=h.device)
            h, slots = h.index_select(0, index), slots.index_select(0, index)
            turns = None if turns is None else turns.index_select(0, index)
        self._stopped.append(Stopped(layer, h, slots, turns))

    def _see_to_skipped(self) -> None:
        """Store what the method wants stored of the layers that were skipped, and the hidden states that wait."""
        kv, depth = self.kv, self.resident.depth
        for who in self._stopped:
            if kv.hidden is not None:
                kv.hidden.keep(who.slots, who.h)
            if who.layer < depth and self.method.is_recomputed:
                self._keep_waiting(who)
        if self.method.is_recomputed or self.method.has_gaps:
            return
        now: Stopped | None = None
        for i in range(self._stopped[0].layer, depth):
            for who in self._stopped:
                if who.layer == i:
                    who.kv = kv.layers[i - 1].tokens.index_select(0, who.slots)
                    now = who if now is None else _together(now, who)
            assert now is not None
            self.method.fill(_Gap(self, i, now))

    # --- hidden states that wait for deeper layers, in the KV slots of those layers ---------------------------------

    def _keep_waiting(self, who: Stopped) -> None:
        width = self.kv.shape.kv_width
        parts = -(-who.h.shape[1] // width)
        if who.layer + parts > self.resident.depth:
            problem = f"a hidden state does not fit into the KV of the layers behind layer {who.layer}"
            raise InputError(
                "controller.skipped_kv", self.rule.skipped_kv, problem, "Use propagate, or an earlier exit."
            )
        for k in range(parts):
            part = who.h[:, k * width : (k + 1) * width]
            tokens = self.kv.layers[who.layer + k].tokens
            if part.shape[1] < width:
                part = torch.nn.functional.pad(part, (0, width - part.shape[1]))
            tokens.index_copy_(0, who.slots, part)

    def _waiting_states(self, layer: int, slots: list[int]) -> Tensor:
        """Hidden states behind ``layer`` of tokens that wait there, [n, d]."""
        hidden, width = self.resident.host.info.hidden, self.kv.shape.kv_width
        index = torch.tensor(slots, device=self.kv.device)
        parts = [self.kv.layers[layer + k].tokens.index_select(0, index) for k in range(-(-hidden // width))]
        return torch.cat(parts, 1)[:, :hidden]


def _together(a: Stopped, b: Stopped) -> Stopped:
    turns = None if a.turns is None or b.turns is None else torch.cat((a.turns, b.turns))
    kv = None if a.kv is None or b.kv is None else torch.cat((a.kv, b.kv))
    return Stopped(b.layer, torch.cat((a.h, b.h)), torch.cat((a.slots, b.slots)), turns, kv)


def read(logits: Tensor) -> tuple[list[float], list[int]]:
    """Log-probability and id of the likeliest token of each row, with one transfer to the host."""
    best = torch.log_softmax(logits, -1, dtype=torch.float32).max(-1)
    if logits.device.type == "cpu":
        return best.values.tolist(), best.indices.tolist()
    # ids stay exact in float32: vocabularies are smaller than 2**24
    values, ids = torch.stack((best.values, best.indices.float())).tolist()
    return values, [int(i) for i in ids]
