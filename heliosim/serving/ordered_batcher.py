"""Continuous batching in an order other than first come, first served (``ordering.py``).

As ``ContinuousBatcher``, but for three things. Waiting requests start by rank. When KV runs out, the running request
that ranks last gives way. And if the order preempts, a waiting request that cannot start for want of a row or of KV
takes the place of running ones that rank behind it, the last of them first, if that is enough to let it start. They
give their KV up, wait by their rank, and are read again from the beginning, prompt and generated tokens: that is what
preemption costs. Prompts that are being read keep their turn in the token budget.

If the order keeps KV, who is interrupted while decoding holds its blocks while it waits and goes on from there.
It loses them, the last in order first, when running requests grow, when somebody who ranks before it starts, and with a
load.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import SupportsIndex

from heliosim.serving.batcher import ContinuousBatcher, Planned, Sequence
from heliosim.serving.memory import MemoryPool
from heliosim.serving.ordering import Order
from heliosim.types import BLOCK_TOKENS, Chunk, RequestId, Seconds

_Place = tuple[float, Seconds, RequestId]


class Ranked:
    """Waiting requests by rank; ``started`` of them had run before. Where it is put does not depend on which end."""

    def __init__(self, order: Order) -> None:
        self.order, self.started = order, 0
        self._entries: list[tuple[_Place, Sequence]] = []

    def append(self, seq: Sequence) -> None:
        insort(self._entries, (place_of(self.order, seq), seq), key=lambda entry: entry[0])
        self.started += seq.admitted_s is not None

    appendleft = append

    def pop(self, index: int) -> Sequence:
        seq = self._entries.pop(index)[1]
        self.started -= seq.admitted_s is not None
        return seq

    def popleft(self) -> Sequence:
        return self.pop(0)

    def __getitem__(self, index: SupportsIndex) -> Sequence:
        return self._entries[index][1]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for _, seq in self._entries)


def place_of(order: Order, seq: Sequence) -> _Place:
    """What puts requests in order: rank, then arrival. Its counts must be up to date."""
    request = seq.request
    return order.rank(request, seq.generated), request.arrival_s, request.id


@dataclass(slots=True)
class _Room:
    """What a step offers to those who start: rows, KV blocks, tokens of budget."""

    rows: int
    blocks: int
    tokens: int


class OrderedBatcher(ContinuousBatcher):
    """Serves in ``order``; otherwise as ``ContinuousBatcher``."""

    def __init__(self, order: Order, max_batch: int, token_budget: int, watermark: float = 0.01) -> None:
        super().__init__(max_batch, token_budget, watermark)
        self.order = order
        self._queue = Ranked(order)
        self._waiting = self._queue
        self._set_aside: list[Sequence] | None = None
        self._keepers: list[Sequence] = []  # interrupted with their KV

    @property
    def interrupted(self) -> int:
        """Waiting requests that had started and gave up their KV."""
        return self._queue.started

    # -- planning -------------------------------------------------------------------------------------------------

    def next_batch(self, pool: MemoryPool, *, now: Seconds, admit: int | None, is_probe: bool = False) -> Planned:
        plan = Planned()
        if not self._is_due_booked:
            self._take_due_blocks(pool, plan)
        is_short = bool(plan.evicted)  # of KV: who gave way must not come back at once
        self._set_aside = []
        if self._queue and self.order.preempts and not is_short:
            self._make_way(pool, plan, admit)
        chunks: list[Chunk] = []
        budget = self.token_budget - len(self._ids)
        if self._reading:
            budget = self._read_on(chunks, budget)
        is_blocked = not plan.evicted and not self._set_aside
        if self._queue and not (is_short and (self._ids or chunks)):
            is_blocked &= self._start_waiting(pool, chunks, budget, plan, now=now, admit=admit, is_probe=is_probe)
        set_aside, self._set_aside = self._set_aside, None
        for seq in set_aside:
            self._put_back(seq)
        if self._ids or chunks:
            plan.batch = self.decoding_batch(tuple(chunks))
            if is_blocked and not self._may_make_way_later():
                self._look_ahead(plan, chunks, pool.total_blocks - pool.used_blocks)
                if self._queue and self.order.preempts:
                    plan.max_steps = min(plan.max_steps, self._sure_for())
        return plan

    def _start_waiting(
        self,
        pool: MemoryPool,
        chunks: list[Chunk],
        budget: int,
        plan: Planned,
        *,
        now: Seconds,
        admit: int | None,
        is_probe: bool,
    ) -> bool:
        """Start waiting requests by rank until rows, budget or KV end; of those who never ran as many as permitted.

        Returns what the method it replaces does.
        """
        queue, running, total = self._queue, self.running, pool.total_blocks
        watermark = int(total * self.watermark)
        at = 0
        while at < len(queue) and budget > 0 and running < self.max_batch:
            seq = queue[at]
            request, is_new = seq.request, seq.admitted_s is None
            if is_new and admit is not None and plan.started >= admit:
                if not queue.started:
                    return True
                at += 1  # who had started may go on
                continue
            if is_too_large(seq, pool):
                plan.refused += ((queue.pop(at), "larger than the memory pool"),)
                continue
            is_kept = seq.computed > 0
            need = pool.blocks_for(seq.known)
            if not is_kept and not self._clear(pool, plan, need + (watermark if running else 0), seq):
                return True
            queue.pop(at)
            running += 1
            if is_kept:
                self._keepers.remove(seq)
                self._join(seq)
                budget -= 1
                continue
            pool.take(request.id, need)
            self._reading.append(seq)
            if is_new:
                seq.admitted_s, seq.is_probe = now, is_probe
                plan.started += 1
            count = min(seq.known, budget)
            chunks.append(Chunk(request.id, 0, count, count == seq.known))
            budget -= count
        return at >= len(queue) or running >= self.max_batch

    # -- who gives way --------------------------------------------------------------------------------------------

    def _running_by_place(self) -> list[Sequence]:
        """Running requests, first to last, their counts up to date."""
        for seq in self._decoding:
            seq.catch_up(self.ticks)
        return sorted((*self._decoding, *self._reading), key=lambda seq: place_of(self.order, seq))

    def _last_in_order(self) -> Sequence:
        return self._running_by_place()[-1]

    def _make_room(self, pool: MemoryPool, plan: Planned) -> None:
        for seq in self._decoding:
            seq.catch_up(self.ticks)
            pool.attribute(seq.request.id, pool.blocks_for(seq.computed))
        for seq in sorted(self._decoding, key=lambda seq: place_of(self.order, seq)):
            while seq.since is not None and not pool.take(seq.request.id, pool.blocks_for(seq.known)):
                victim = self._last_in_order()
                plan.evicted += (self._give_up(victim, pool, pool.holds(victim.request.id)),)

    def _make_way(self, pool: MemoryPool, plan: Planned, admit: int | None) -> None:
        """Interrupt running requests for those waiting ones that will start in this step if they do."""
        candidates = self._candidates()
        if not candidates:
            return
        watermark = int(pool.total_blocks * self.watermark)
        unread = sum(seq.known - seq.computed for seq in self._reading)
        room = _Room(self.running, pool.free_blocks, self.token_budget - len(self._ids) - unread)
        started = promised = 0
        for seq in self._queue:
            is_new = seq.admitted_s is None
            if is_new and admit is not None and started >= admit:
                continue
            if is_too_large(seq, pool):
                continue
            place, gone = place_of(self.order, seq), 0
            need = 0 if seq.computed else pool.blocks_for(seq.known)
            room.blocks = pool.free_blocks - promised + self._kept_behind(pool, seq)
            while not self._fits(room, need if need else -watermark, watermark):  # who kept its KV asks for no room
                victim = candidates[-1 - gone] if gone < len(candidates) else None
                if victim is None or place_of(self.order, victim) <= place:
                    return
                room.rows -= 1
                room.blocks += self._held_blocks(victim, pool)
                room.tokens += 1 if victim.since is not None else victim.known - victim.computed
                gone += 1
            for _ in range(gone):
                victim = candidates.pop()
                if self.order.keep_kv and victim.since is not None:
                    self._interrupt(victim, pool)
                    continue
                blocks = self._held_blocks(victim, pool) if victim.since is not None else None
                plan.evicted += (self._give_up(victim, pool, blocks),)
            room.rows += 1
            promised += need
            room.tokens -= 1 if seq.computed else min(seq.known, room.tokens)
            started += is_new

    def _fits(self, room: _Room, need: int, watermark: int) -> bool:
        return room.rows < self.max_batch and room.tokens > 0 and need + (watermark if room.rows else 0) <= room.blocks

    # -- who keeps KV ---------------------------------------------------------------------------------------------

    def _interrupt(self, seq: Sequence, pool: MemoryPool) -> None:
        """A decoding request waits with its KV, the block of the token to come included."""
        self._drop(self._decoding.index(seq))
        pool.attribute(seq.request.id, pool.blocks_for(seq.computed + 1))
        seq.preemptions += 1
        self._keepers.append(seq)
        self._put_back(seq)

    def _forget(self, seq: Sequence, pool: MemoryPool) -> RequestId:
        """A waiting request gives up the KV it kept."""
        self._keepers.remove(seq)
        pool.release(seq.request.id)
        seq.recomputed += seq.computed
        seq.computed = 0
        return seq.request.id

    def _keepers_by_place(self) -> list[Sequence]:
        return sorted(self._keepers, key=lambda seq: place_of(self.order, seq))

    def _kept_behind(self, pool: MemoryPool, seq: Sequence) -> int:
        """Blocks kept by requests that rank behind this one."""
        if not self._keepers:
            return 0
        place = place_of(self.order, seq)
        return sum(pool.holds(k.request.id) for k in self._keepers if place_of(self.order, k) > place)

    def _clear(self, pool: MemoryPool, plan: Planned, blocks: int, seq: Sequence) -> bool:
        """Have so many blocks free for a request, if those kept behind it suffice."""
        if blocks > pool.free_blocks + self._kept_behind(pool, seq):
            return False
        while blocks > pool.free_blocks:
            plan.evicted += (self._forget(self._keepers_by_place()[-1], pool),)
        return True

    def _take_due_blocks(self, pool: MemoryPool, plan: Planned) -> None:
        due = self._block_due[self.ticks % BLOCK_TOKENS]
        while self._keepers and due > pool.free_blocks:
            plan.evicted += (self._forget(self._keepers_by_place()[-1], pool),)
        super()._take_due_blocks(pool, plan)

    def preempt(self, pool: MemoryPool, keep: int = 0) -> list[RequestId]:
        forgotten = [self._forget(seq, pool) for seq in self._keepers_by_place()]
        return forgotten + super().preempt(pool, keep)

    def _held_blocks(self, seq: Sequence, pool: MemoryPool) -> int:
        """KV blocks of a running request; who decodes holds that of the token to come."""
        return pool.blocks_for(seq.computed + 1) if seq.since is not None else pool.holds(seq.request.id)

    def _candidates(self) -> list[Sequence]:
        """Running requests that may be interrupted for the first in the queue, first to last."""
        first = place_of(self.order, self._queue[0])
        return [
            seq
            for seq in self._running_by_place()
            if self.order.gives_way(seq.request, seq.generated) and place_of(self.order, seq) > first
        ]

    def _may_make_way_later(self) -> bool:
        """Whether somebody who waits might take a running request's place a step later, as room is now."""
        return bool(self._queue) and self.order.preempts and bool(self._candidates())

    def _sure_for(self) -> int:
        """Steps during which no running request's rank rises, the first included."""
        found = [self.order.sure_for(seq.request, seq.generated) for seq in self._running_by_place()]
        return min((sure for sure in found if sure is not None), default=1 << 30)

    def _put_back(self, seq: Sequence) -> None:
        if self._set_aside is None:
            self._queue.append(seq)
        else:
            self._set_aside.append(seq)


def is_too_large(seq: Sequence, pool: MemoryPool) -> bool:
    """Whether the whole pool cannot hold what a request may come to, nor could it without weights under way; the last
    token is never read.
    """
    longest = pool.blocks_for(seq.request.prompt_tokens + seq.request.max_tokens - 1)
    return longest > pool.total_blocks and longest > pool.most_blocks
