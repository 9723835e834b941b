"""Who runs next: continuous batching with chunked prefill over paged KV.

Order is first come, first served. Each step gives one token of budget to every decoding request, then prefill chunks to
those still reading their prompt, then starts waiting requests while rows, budget and KV blocks last. KV for a prompt is
taken when it starts, KV for a generated token when it is needed; if none is left the request that started last gives
its KV up and is recomputed later (vLLM's recompute preemption).

Decoding requests move in step with each other, so what changes with every token is one counter (``ticks``) for all of
them: a request knows when it joined, and its own counts are brought up to date when somebody asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, SupportsIndex

from heliosim.serving.memory import MemoryPool
from heliosim.types import BLOCK_TOKENS, Batch, Chunk, Request, RequestId, Run, Seconds, Stride, Tokens

READ_AHEAD = 8
"""Steps of reading that are planned at once."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way through the server. ``computed``: tokens whose KV exists; ``known``: prompt + generated.

    ``since``: the batcher's tick up to which these counts are true, while it decodes; None otherwise. ``recomputed``:
    tokens whose KV it gave up.
    """

    request: Request
    generated: int = 0
    computed: int = 0
    admitted_s: Seconds | None = None
    first_token_s: Seconds | None = None
    preemptions: int = 0
    logprob_sum: float = 0.0
    is_probe: bool = False
    since: int | None = None
    recomputed: int = 0

    def catch_up(self, ticks: int) -> None:
        """Count the tokens generated since the counts were last true."""
        if self.since is not None:
            behind = ticks - self.since
            self.generated += behind
            self.computed += behind
            self.since = ticks

    @property
    def known(self) -> int:
        return self.request.prompt_tokens + self.generated


class Queue(Protocol):
    """Waiting requests, the next one first; ``appendleft``: one that had started and gave up its KV."""

    def append(self, seq: Sequence, /) -> None: ...
    def appendleft(self, seq: Sequence, /) -> None: ...
    def popleft(self) -> Sequence: ...
    def __getitem__(self, index: SupportsIndex, /) -> Sequence: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sequence]: ...


class Planned:
    """What a batcher wants to run next, with the requests it gave up on the way.

    ``max_steps``: how many steps may be done before somebody must be asked: memory, or who waits. ``program``: chunks
    of the steps behind the first one. ``may_pass_ends``: nobody's end lets another request start or read faster.
    """

    __slots__ = ("batch", "evicted", "max_steps", "may_pass_ends", "program", "refused", "started")

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.max_steps = 1
        self.evicted: tuple[RequestId, ...] = ()
        self.refused: tuple[tuple[Sequence, str], ...] = ()
        self.started = 0
        self.program: tuple[tuple[Chunk, ...], ...] = ()
        self.may_pass_ends = False


class Settled(NamedTuple):
    """What a stride did to the batcher's books: requests that ended, with their times, and for each step the blocks in
    use during it and the requests that run behind it.
    """

    ended: list[tuple[Sequence, Seconds]]
    blocks: list[int]
    running: list[int]


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
    def settle(
        self,
        batch: Batch,
        tokens: Tokens,
        pool: MemoryPool,
        now: Seconds,
        logprob_sums: Mapping[RequestId, float] | None = None,
    ) -> list[Sequence]: ...
    def settle_stride(self, run: Run, stride: Stride, pool: MemoryPool, start_s: Seconds) -> Settled: ...
    def preempt(self, pool: MemoryPool, keep: int = 0) -> list[RequestId]: ...
    def in_kv(self) -> list[tuple[RequestId, int]]: ...
    def limit(self, rows: int, tokens: int) -> None: ...


class ContinuousBatcher:
    """``max_batch`` rows and ``token_budget`` tokens per step; ``watermark``: share of blocks kept free.

    Running requests are those that decode, then those that still read: a request is read to its end before the next,
    so this is also the order in which they started.
    """

    def __init__(self, max_batch: int, token_budget: int, watermark: float = 0.01) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch}")
        if token_budget < max_batch:
            raise ValueError(f"token_budget ({token_budget}) must be at least max_batch ({max_batch})")
        self.max_batch, self.token_budget, self.watermark = max_batch, token_budget, watermark
        self.ticks = 0
        self._waiting: Queue = deque()
        self._reading: list[Sequence] = []
        # Decoding requests, in parallel lists: themselves, their ids, and tokens in KV less ticks.
        self._decoding: list[Sequence] = []
        self._ids: list[RequestId] = []
        self._offsets: list[int] = []
        self._as_batch: tuple[tuple[RequestId, ...], tuple[int, ...]] | None = None
        # How many of them take a new block at a tick, by that tick's remainder.
        self._block_due = [0] * BLOCK_TOKENS
        self._is_due_booked = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._reading)

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

    # -- planning -------------------------------------------------------------------------------------------------

    def next_batch(self, pool: MemoryPool, *, now: Seconds, admit: int | None, is_probe: bool = False) -> Planned:
        """The next step's rows. ``admit``: how many waiting requests may start (None: any number)."""
        plan = Planned()
        if not self._is_due_booked:
            self._take_due_blocks(pool, plan)
        chunks: list[Chunk] = []
        budget = self.token_budget - len(self._ids)
        if self._reading:
            budget = self._read_on(chunks, budget)
        is_blocked = True
        if self._waiting:
            if plan.evicted and (self._ids or chunks):
                is_blocked = False  # or the evicted would come back at once; they may, a step later
            else:
                is_blocked = self._start_waiting(pool, chunks, budget, plan, now=now, admit=admit, is_probe=is_probe)
        if self._ids or chunks:
            plan.batch = self.decoding_batch(tuple(chunks))
            if is_blocked:
                self._look_ahead(plan, chunks, pool.total_blocks - pool.used_blocks)
        return plan

    def decoding_batch(self, chunks: tuple[Chunk, ...] = ()) -> Batch:
        """Everybody who decodes, and these chunks."""
        known = self._as_batch
        if known is None:
            known = self._as_batch = (tuple(self._ids), tuple(self._offsets))
        return Batch.of(known[0], known[1], self.ticks, chunks)

    def _look_ahead(self, plan: Planned, chunks: list[Chunk], free_blocks: int) -> None:
        """How far the batch may run on while nobody who waits can start: as KV lasts and reading is planned."""
        rows = len(self._ids) + len(self._reading)
        if free_blocks >= rows:
            plan.max_steps = 1 + BLOCK_TOKENS * (free_blocks // rows)
        elif not self._reading:
            plan.max_steps = self._steps_that_fit(free_blocks)
        else:
            return
        if chunks:
            self._read_ahead(plan, chunks)
        plan.may_pass_ends = not self._waiting and (bool(chunks) or not self._reading)

    def _read_ahead(self, plan: Planned, chunks: list[Chunk]) -> None:
        """The chunks of the steps behind this one, as ``_read_on`` will form them if nobody ends meanwhile."""
        left = []
        decoding = len(self._ids)
        for seq, chunk in zip(self._reading, chunks, strict=False):
            if chunk.emits:
                decoding += 1
            else:
                left.append((seq, chunk.start + chunk.count))
        left += [(seq, seq.computed) for seq in self._reading[len(chunks) :]]
        if not left:
            return
        program: list[tuple[Chunk, ...]] = []
        while left and len(program) < READ_AHEAD and decoding < self.token_budget:
            budget = self.token_budget - decoding
            step: list[Chunk] = []
            for k, (seq, start) in enumerate(left):
                count = min(seq.known - start, budget)
                budget -= count
                is_read = start + count == seq.known
                step.append(Chunk(seq.request.id, start, count, is_read))
                decoding += is_read
                if not is_read:
                    left[k] = (seq, start + count)
                    left = left[k:]
                    break
                if budget == 0:
                    left = left[k + 1 :]
                    break
            else:
                left = []
            program.append(tuple(step))
        plan.program = tuple(program)
        if left:
            plan.max_steps = min(plan.max_steps, 1 + len(program))

    def _take_due_blocks(self, pool: MemoryPool, plan: Planned) -> None:
        """KV for the token each decoding request computes next; the youngest gives way when KV runs out."""
        if not pool.grow(self._block_due[self.ticks % BLOCK_TOKENS]):
            self._make_room(pool, plan)
        self._is_due_booked = True

    def _make_room(self, pool: MemoryPool, plan: Planned) -> None:
        for seq in self._decoding:
            seq.catch_up(self.ticks)
            pool.attribute(seq.request.id, pool.blocks_for(seq.computed))
        i = 0
        while i < len(self._decoding):
            seq = self._decoding[i]
            i += 1
            while not pool.take(seq.request.id, pool.blocks_for(seq.known)):
                victim = self._last_in_order()
                plan.evicted += (self._give_up(victim, pool, pool.holds(victim.request.id)),)
                if victim is seq:
                    break

    def _last_in_order(self) -> Sequence:
        """Who gives way when KV runs out: the request that started last."""
        return self._reading[-1] if self._reading else self._decoding[-1]

    def _steps_that_fit(self, free_blocks: int) -> int:
        """Steps of decode rows alone from this one on until fewer than a block for every row runs out."""
        steps = 1
        while steps <= BLOCK_TOKENS:
            free_blocks -= self._block_due[(self.ticks + steps) % BLOCK_TOKENS]
            if free_blocks < 0:
                break
            steps += 1
        return steps

    def _read_on(self, chunks: list[Chunk], budget: int) -> int:
        for seq in self._reading:
            if budget <= 0:
                break
            left = seq.known - seq.computed
            count = min(left, budget)
            chunks.append(Chunk(seq.request.id, seq.computed, count, count == left))
            budget -= count
        return budget

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
        """Start waiting requests in order until rows, budget, KV or permission end.

        True if nobody is left or the next one cannot start before a request ends, whatever budget later steps leave.
        """
        waiting, running, total = self._waiting, self.running, pool.total_blocks
        watermark = int(total * self.watermark)
        while waiting and budget > 0 and running < self.max_batch:
            seq = waiting[0]
            request = seq.request
            is_new = seq.admitted_s is None
            if is_new and admit is not None and plan.started >= admit:
                return True
            longest = pool.blocks_for(request.prompt_tokens + request.max_tokens - 1)  # the last token is never read
            if longest > total and longest > pool.most_blocks:
                waiting.popleft()
                plan.refused += ((seq, "larger than the memory pool"),)
                continue
            known = request.prompt_tokens + seq.generated
            need = pool.blocks_for(known)
            if need + (watermark if running else 0) > total - pool.used_blocks:
                return True
            pool.take(request.id, need)
            waiting.popleft()
            self._reading.append(seq)
            running += 1
            if is_new:
                seq.admitted_s = now
                seq.is_probe = is_probe
                plan.started += 1
            count = known if known < budget else budget
            chunks.append(Chunk(request.id, 0, count, count == known))
            budget -= count
        return not waiting or running >= self.max_batch

    # -- settling -------------------------------------------------------------------------------------------------

    def settle(
        self,
        batch: Batch,
        tokens: Tokens,
        pool: MemoryPool,
        now: Seconds,
        logprob_sums: Mapping[RequestId, float] | None = None,
    ) -> list[Sequence]:
        """Book what one run of a batch did; returns the requests that ended, their KV released.

        ``logprob_sums``: of the requests that ended, where the engine kept count.
        """
        if logprob_sums is None:
            self._add_logprobs(tokens)
        self.ticks += 1
        self._is_due_booked = False
        if batch.chunks:
            self._settle_chunks(batch.chunks, now)
        ended = [self._leave(r, pool) for r, is_last in zip(tokens.requests, tokens.lasts, strict=True) if is_last]
        if logprob_sums is not None:
            for seq in ended:
                seq.logprob_sum = logprob_sums[seq.request.id]
        return ended

    def settle_stride(self, run: Run, stride: Stride, pool: MemoryPool, start_s: Seconds) -> Settled:
        """Book the steps of a stride that began at ``start_s``, with whoever began to decode or ended on the way."""
        block_due, now, ticks = self._block_due, start_s, self.ticks
        ended: list[tuple[Sequence, Seconds]] = []
        blocks: list[int] = []
        running: list[int] = []
        ends, program = stride.ended, run.program
        next_end, end_step = 0, ends[0][0] if ends else -1
        chunks, used, runs = run.batch.chunks, pool.used_blocks, self.running
        grown = 0
        for k, step in enumerate(stride.steps):
            if k:
                grown += block_due[ticks % BLOCK_TOKENS]
                chunks = program[k - 1] if k <= len(program) else ()
            blocks.append(used + grown)
            ticks += 1
            now += step[0]
            if chunks or k == end_step:
                if grown:
                    fits = pool.grow(grown)
                    assert fits, "an engine ran more steps than there was memory for"
                    grown = 0
                self.ticks = ticks
                if chunks:
                    self._settle_chunks(chunks, now)
                while k == end_step:
                    _, request, logprob_sum = ends[next_end]
                    seq = self._leave(request, pool)
                    seq.logprob_sum = logprob_sum
                    ended.append((seq, now))
                    next_end += 1
                    end_step = ends[next_end][0] if next_end < len(ends) else -1
                used, runs = pool.used_blocks, len(self._ids) + len(self._reading)
            running.append(runs)
        if grown:
            fits = pool.grow(grown)
            assert fits, "an engine ran more steps than there was memory for"
        self.ticks = ticks
        self._is_due_booked = False
        return Settled(ended, blocks, running)

    def _add_logprobs(self, tokens: Tokens) -> None:
        by_id = {seq.request.id: seq for seq in (*self._decoding, *self._reading)}
        for request, logprob in zip(tokens.requests, tokens.logprobs, strict=True):
            by_id[request].logprob_sum += logprob

    def _settle_chunks(self, chunks: tuple[Chunk, ...], now: Seconds) -> None:
        """Chunks are those of the first reading requests, in order; who has read all begins to decode."""
        done = 0
        for seq, chunk in zip(self._reading, chunks, strict=False):
            assert seq.request.id == chunk.request, f"request {chunk.request} is not the one that reads"
            seq.computed += chunk.count
            if chunk.emits:
                assert seq.computed == seq.known, f"request {chunk.request} emitted a token before its prompt was read"
                seq.generated += 1
                if seq.first_token_s is None:
                    seq.first_token_s = now
                self._join(seq)
                done += 1
        del self._reading[:done]

    def _join(self, seq: Sequence) -> None:
        seq.since = self.ticks
        offset = seq.computed - self.ticks
        self._decoding.append(seq)
        self._ids.append(seq.request.id)
        self._offsets.append(offset)
        self._as_batch = None
        self._block_due[-offset % BLOCK_TOKENS] += 1

    def _leave(self, request: RequestId, pool: MemoryPool) -> Sequence:
        """Take a decoding request out, its counts brought up to date and its KV released."""
        k = self._ids.index(request)
        seq = self._drop(k)
        pool.release(request, pool.blocks_for(seq.computed))
        return seq

    def _drop(self, k: int) -> Sequence:
        seq = self._decoding.pop(k)
        del self._ids[k]
        self._as_batch = None
        self._block_due[-self._offsets.pop(k) % BLOCK_TOKENS] -= 1
        seq.catch_up(self.ticks)
        seq.since = None
        return seq

    # -- giving up ------------------------------------------------------------------------------------------------

    def preempt(self, pool: MemoryPool, keep: int = 0) -> list[RequestId]:
        """Let running requests but the first ``keep`` give up their KV; they wait at the head, in their old order."""
        given_up: list[RequestId] = []
        while self.running > keep:
            if self._reading:
                given_up.append(self._give_up(self._reading[-1], pool, None))
            else:
                seq = self._decoding[-1]
                seq.catch_up(self.ticks)
                due = self._is_due_booked  # the block of the token that was to come next is held already
                given_up.append(self._give_up(seq, pool, pool.blocks_for(seq.computed + due)))
        return given_up

    def in_kv(self) -> list[tuple[RequestId, int]]:
        """Running requests and their tokens in KV, in order of admission."""
        for seq in self._decoding:
            seq.catch_up(self.ticks)
        return [(seq.request.id, seq.computed) for seq in (*self._decoding, *self._reading)]

    def limit(self, rows: int, tokens: int) -> None:
        """Form batches of at most ``rows`` rows and ``tokens`` tokens from now on, if that is less than so far."""
        self.max_batch = max(1, min(self.max_batch, rows))
        self.token_budget = max(self.max_batch, min(self.token_budget, tokens))

    def _give_up(self, seq: Sequence, pool: MemoryPool, blocks: int | None) -> RequestId:
        if seq.since is not None:
            self._drop(self._decoding.index(seq))
        else:
            self._reading.remove(seq)
        pool.release(seq.request.id, blocks)
        seq.recomputed += seq.computed
        seq.computed = 0
        seq.preemptions += 1
        self._put_back(seq)
        return seq.request.id

    def _put_back(self, seq: Sequence) -> None:
        """Let a request that gave up its KV wait again."""
        self._waiting.appendleft(seq)
