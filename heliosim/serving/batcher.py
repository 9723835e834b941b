"""Who runs next: continuous batching with chunked prefill over paged KV.

Order is first come, first served. Each step gives one token of budget to every decoding request, then prefill chunks to
those still reading their prompt, then starts waiting requests while rows, budget and KV blocks last. KV for a prompt is
taken when it starts, KV for a generated token when it is needed; if none is left the request that started last gives
its KV up and is recomputed later (vLLM's recompute preemption).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from heliosim.serving.memory import MemoryPool
from heliosim.types import Batch, Request, RequestId, Seconds, Tokens, blocks_for


@dataclass(slots=True)
class Sequence:
    """A request on its way through the server. ``computed``: tokens whose KV exists; ``known``: prompt + generated."""

    request: Request
    generated: int = 0
    computed: int = 0
    admitted_s: Seconds | None = None
    first_token_s: Seconds | None = None
    preemptions: int = 0
    logprob_sum: float = 0.0
    is_probe: bool = False

    @property
    def known(self) -> int:
        return self.request.prompt_tokens + self.generated

    @property
    def longest(self) -> int:
        """Tokens whose KV this request may come to need: the last generated token is never read."""
        return self.request.prompt_tokens + self.request.max_tokens - 1


@dataclass(slots=True)
class Planned:
    """What a batcher wants to run next, with the requests it gave up on the way."""

    batch: Batch | None
    evicted: list[RequestId] = field(default_factory=list)
    refused: list[tuple[Sequence, str]] = field(default_factory=list)
    started: int = 0


class Batcher(Protocol):
    """Holds the waiting and the running, and forms batches. ``now`` is an argument, as everywhere in serving."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def interrupted(self) -> int: ...
    def add(self, request: Request) -> None: ...
    def next_batch(self, pool: MemoryPool, *, now: Seconds, admit: int | None, is_probe: bool = False) -> Planned: ...
    def settle(self, batch: Batch, tokens: Tokens, pool: MemoryPool, now: Seconds) -> list[Sequence]: ...
    def preempt(self, pool: MemoryPool, keep: int = 0) -> list[RequestId]: ...
    def in_kv(self) -> list[tuple[RequestId, int]]: ...


class ContinuousBatcher:
    """``max_batch`` rows and ``token_budget`` tokens per step; ``watermark``: share of blocks kept free."""

    def __init__(self, max_batch: int, token_budget: int, watermark: float = 0.01) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch}")
        if token_budget < max_batch:
            raise ValueError(f"token_budget ({token_budget}) must be at least max_batch ({max_batch})")
        self.max_batch, self.token_budget, self.watermark = max_batch, token_budget, watermark
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def interrupted(self) -> int:
        """Waiting requests that had started and gave up their KV; they stand at the head of the queue."""
        count = 0
        for seq in self._waiting:
            if seq.admitted_s is None:
                break
            count += 1
        return count

    def add(self, request: Request) -> None:
        self._waiting.append(Sequence(request))

    def next_batch(self, pool: MemoryPool, *, now: Seconds, admit: int | None, is_probe: bool = False) -> Planned:
        """The next step's rows. ``admit``: how many waiting requests may start (None: any number)."""
        plan = Planned(batch=None)
        chosen: list[tuple[Sequence, int]] = []
        budget = self._decode_rows(pool, chosen, plan)
        budget = self._prefill_rows(chosen, budget)
        self._start_waiting(pool, chosen, budget, plan, now=now, admit=admit, is_probe=is_probe)
        if chosen:
            plan.batch = Batch(
                requests=tuple(s.request.id for s, _ in chosen),
                starts=tuple(s.computed for s, _ in chosen),
                counts=tuple(n for _, n in chosen),
                emits=tuple(s.computed + n == s.known for s, n in chosen),
            )
        return plan

    def _decode_rows(self, pool: MemoryPool, chosen: list[tuple[Sequence, int]], plan: Planned) -> int:
        """One token for each request that only needs its next one; the youngest gives way when KV runs out."""
        budget = self.token_budget
        i = 0
        while i < len(self._running):
            seq = self._running[i]
            i += 1
            if seq.known - seq.computed != 1:
                continue
            while not pool.take(seq.request.id, blocks_for(seq.known)):
                victim = self._running[-1]
                plan.evicted.append(self._give_up(victim, pool))
                if victim is seq:
                    break
            else:
                chosen.append((seq, 1))
                budget -= 1
        return budget

    def _prefill_rows(self, chosen: list[tuple[Sequence, int]], budget: int) -> int:
        for seq in self._running:
            left = seq.known - seq.computed
            if left > 1 and budget > 0:
                count = min(left, budget)
                chosen.append((seq, count))
                budget -= count
        return budget

    def _start_waiting(
        self,
        pool: MemoryPool,
        chosen: list[tuple[Sequence, int]],
        budget: int,
        plan: Planned,
        *,
        now: Seconds,
        admit: int | None,
        is_probe: bool,
    ) -> None:
        """Start waiting requests in order until rows, budget, KV or permission end."""
        if plan.evicted and chosen:
            return  # what was just given up would be taken again
        reserve = int(pool.total_blocks * self.watermark) if self._running else 0
        while self._waiting and budget > 0 and len(self._running) < self.max_batch:
            seq = self._waiting[0]
            is_new = seq.admitted_s is None
            if is_new and admit is not None and plan.started >= admit:
                return
            if blocks_for(seq.longest) > pool.total_blocks:
                self._waiting.popleft()
                plan.refused.append((seq, "larger than the memory pool"))
                continue
            need = blocks_for(seq.known)
            if need + reserve > pool.free_blocks:
                return
            pool.take(seq.request.id, need)
            self._waiting.popleft()
            self._running.append(seq)
            if is_new:
                seq.admitted_s = now
                seq.is_probe = is_probe
                plan.started += 1
            count = min(seq.known, budget)
            chosen.append((seq, count))
            budget -= count
            reserve = int(pool.total_blocks * self.watermark)

    def settle(self, batch: Batch, tokens: Tokens, pool: MemoryPool, now: Seconds) -> list[Sequence]:
        """Book what a step did; returns the requests that ended, their KV released."""
        by_id = {seq.request.id: seq for seq in self._running}
        for request_id, count in zip(batch.requests, batch.counts, strict=True):
            by_id[request_id].computed += count
        ended: list[Sequence] = []
        for request_id, logprob, is_last in zip(tokens.requests, tokens.logprobs, tokens.lasts, strict=True):
            seq = by_id[request_id]
            assert seq.computed == seq.known, f"request {request_id} emitted a token before its prompt was read"
            seq.generated += 1
            seq.logprob_sum += logprob
            if seq.first_token_s is None:
                seq.first_token_s = now
            if is_last:
                ended.append(seq)
        if ended:
            gone = {seq.request.id for seq in ended}
            self._running = [seq for seq in self._running if seq.request.id not in gone]
            for seq in ended:
                pool.release(seq.request.id)
        return ended

    def preempt(self, pool: MemoryPool, keep: int = 0) -> list[RequestId]:
        """Let running requests but the first ``keep`` give up their KV; they wait at the head, in their old order."""
        given_up: list[RequestId] = []
        while len(self._running) > keep:
            given_up.append(self._give_up(self._running[-1], pool))
        return given_up

    def in_kv(self) -> list[tuple[RequestId, int]]:
        """Running requests and their tokens in KV, in order of admission."""
        return [(seq.request.id, seq.computed) for seq in self._running]

    def _give_up(self, seq: Sequence, pool: MemoryPool) -> RequestId:
        self._running.remove(seq)
        pool.release(seq.request.id)
        seq.computed = 0
        seq.preemptions += 1
        self._waiting.appendleft(seq)
        return seq.request.id
