"""The simulated server in a hurry: one loop over steps, arrivals and ends, as long as nothing unusual happens.

While the controller is content with what is resident, and nobody is evicted or refused, what server, batcher, memory
pool and simulated engine do is simple. Doing it through their interfaces costs a hundred calls and a dozen small
objects for every arrival; here it is done to their books directly, over many arrivals, and then told to controller and
recorder as one stride. Everything else is left to ``Server.act`` and ``SimEngine.perform``.

This file knows the insides of those four on purpose and repeats their decisions. It never makes one of its own: runs
with and without it are identical to the last bit, which tests demand of random scenarios.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from heliosim.costs import StepShape
from heliosim.drive import feed
from heliosim.engines.sim import AT_ONCE, Asked, Going, SimEngine, sum_of_logprobs, within
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.batcher import Sequence as Queued
from heliosim.serving.server import Server
from heliosim.types import (
    BLOCK_TOKENS,
    TICK,
    Chunk,
    Directive,
    Outcome,
    Run,
    Seconds,
    Served,
    Stride,
    StrideStep,
    Tokens,
    Watch,
)
from heliosim.workload import OpenLoop

MOST_STEPS, MOST_STEPS_WITH_TOKENS = 4096, 256
"""Steps of one sprint: tokens of all of them are kept until it ends."""
_NO_TOKENS = Tokens()
_new = tuple.__new__


class Stretch(NamedTuple):
    """Steps that a sprint has planned, alike in who decodes; ``kv_blocks`` in use during each."""

    steps: list[StrideStep]
    kv_blocks: list[int]


class Watcher(Protocol):
    """Who drives a sprint step by step, because what happens elsewhere decides when requests come."""

    def take_in(self, now: Seconds, /) -> None:
        """Hand over to the server who has come by now."""
        ...

    def left(self, record: Served, /) -> None:
        """A request has ended."""
        ...


@dataclass
class Sprint:
    """``server`` with a ``ContinuousBatcher``, its simulated ``engine`` and an open ``source`` (None: a watcher tells
    who arrives).
    """

    server: Server
    engine: SimEngine
    source: OpenLoop | None

    @staticmethod
    def of(server: Server, engine: object, source: object | None) -> Sprint | None:
        """A sprint for these, or None where one of them has another way."""
        if not isinstance(engine, SimEngine) or not engine.strides or engine.noise is not None:
            return None
        if type(server.batcher) is not ContinuousBatcher or server.max_stride < MOST_STEPS:
            return None
        if source is not None and not isinstance(source, OpenLoop):
            return None
        return Sprint(server, engine, source)

    def run(self, directive: Directive, now: Seconds) -> Seconds | None:
        """Do what the controller wants, if that needs no load and it need not be asked soon. Returns up to when that
        went well; None if no step was done.
        """
        steps = self.steps(directive, now)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: Seconds | None = end.value
                return found

    def steps(
        self, directive: Directive, now: Seconds, watcher: Watcher | None = None
    ) -> Generator[Stretch | None, int | None, Seconds | None]:
        """The same bit by bit, for a watcher. Yields what is planned from now on; is sent, when that is over, how many
        of those steps were done; books them, yields None, and goes on when it is asked to.
        """
        if not directive.passes_arrivals or directive.max_steps is not None:
            return None
        if not self.engine.can_sprint(directive.exits):
            return None
        if directive.placement == self.server.placement:
            self.server.follow(directive)
            return (yield from self._go(directive, now, watcher))
        draining = self.server.drain(directive)
        return None if draining is None else (yield from self._go(draining, now, watcher, is_draining=True))

    def _go(
        self, directive: Directive, now: Seconds, watcher: Watcher | None, is_draining: bool = False
    ) -> Generator[Stretch | None, int | None, Seconds | None]:
        """Go on from ``now`` until nobody is left to serve, a decision is due or something unusual comes up; returns
        when that is, None if no step was done.
        """
        server, engine, source = self.server, self.engine, self.source
        batcher, pool, placement = server.batcher, server.pool, directive.placement
        assert isinstance(batcher, ContinuousBatcher)
        run = Run(placement, directive.exits, batcher.decoding_batch(), is_probe=directive.is_probe)
        engine.get_ready(placement, directive.exits, run.batch)
        cost, depth = engine.costs[placement.model], placement.depth
        max_rows, max_context, max_tokens = cost.max_rows, cost.max_context, cost.max_tokens
        # What engine and batcher keep of decoding requests: parallel lists, the same places in all of them.
        ids, goings, reaches = engine._ids, engine._decoding, engine._reaches
        its_ids, sequences, offsets = batcher._ids, batcher._decoding, batcher._offsets
        queue, reading, block_due = batcher._waiting, batcher._reading, batcher._block_due
        ends, ending, known = engine._ends, engine._ending, engine._going
        held, total, used, grown = pool._held, pool.total_blocks, pool.used_blocks, 0
        watermark, max_batch, token_budget = int(total * batcher.watermark), batcher.max_batch, batcher.token_budget
        tick, its_tick, is_booked = engine.ticks, batcher.ticks, batcher._is_due_booked
        first_tick, start_s = tick, now
        steps: list[StrideStep] = []
        blocks: list[int] = []
        running: list[int] = []
        waiting: list[int] = []
        served: list[Served] = []
        ended: list[tuple[int, int, float]] = []
        gone: list[Going] = []
        has_tokens = engine.behaviour is not None
        has_exits = has_tokens and directive.exits.kind == "threshold"
        admit, is_probe, begun = directive.admit, directive.is_probe, 0
        watch = directive.guard.watch() if directive.guard is not None and has_tokens else None
        most, max_ends = MOST_STEPS_WITH_TOKENS if has_tokens else MOST_STEPS, directive.max_ends
        is_over, shown = False, 0

        while not is_over and len(steps) < most:
            # 1. Who arrived meanwhile.
            next_s = None
            if watcher is not None:
                watcher.take_in(now)
            elif source is not None:
                next_s = source.next_s
                if next_s is not None and next_s <= now:
                    feed(source, engine, server, now)
                    next_s = source.next_s
            # 2. KV for the tokens that decoding requests compute next.
            if not is_booked:
                due = block_due[its_tick % BLOCK_TOKENS]
                if due > total - used:
                    break  # somebody must give way
                used += due
                grown += due
                is_booked = True
            # 3. Chunks: of those who read, then of those who may start.
            decoding = len(ids)
            budget = token_budget - decoding
            chunks: list[tuple[Queued, int, int, bool]] = []
            for seq in reading:
                if budget <= 0:
                    break
                left = seq.request.prompt_tokens + seq.generated - seq.computed
                count = left if left < budget else budget
                chunks.append((seq, seq.computed, count, count == left))
                budget -= count
            if queue and budget > 0:
                rows = decoding + len(reading)
                while queue and budget > 0 and rows < max_batch:
                    seq = queue[0]
                    request = seq.request
                    is_new = seq.admitted_s is None
                    if is_new and admit is not None and begun >= admit:
                        break
                    if -(-(request.prompt_tokens + request.max_tokens - 1) // BLOCK_TOKENS) > total:
                        is_over = True  # to be refused
                        break
                    left = request.prompt_tokens + seq.generated
                    need = -(-left // BLOCK_TOKENS)
                    if need + (watermark if rows else 0) > total - used:
                        break
                    held[request.id] = need
                    used += need
                    queue.popleft()
                    reading.append(seq)
                    rows += 1
                    if is_new:
                        seq.admitted_s, seq.is_probe = now, is_probe
                        begun += 1
                    count = left if left < budget else budget
                    chunks.append((seq, 0, count, count == left))
                    budget -= count
                if is_over:
                    break
            if not decoding and not chunks:
                break
            runs = decoding + len(reading)
            if chunks:
                # 4. One step that reads.
                decode_rows = emitted = tokens = decoding
                longest_decode = longest = tick + max(reaches) if decoding else 0
                prefill_rows = products = started = 0
                for _, start, count, emits in chunks:
                    end = start + count
                    tokens += count
                    if end > longest:
                        longest = end
                    if not start:
                        started += 1
                    emitted += emits
                    if count == 1 and emits and start:  # like a decode row
                        decode_rows += 1
                        if end > longest_decode:
                            longest_decode = end
                    else:
                        prefill_rows += 1
                        products += count * end
                rows = decoding + len(chunks)
                if rows > max_rows or longest > max_context or tokens > max_tokens:
                    if not engine.allow_extrapolation:
                        break
                    engine._extrapolated_before += 1
                for seq, start, count, emits in chunks:
                    if emits:
                        engine._join(known[seq.request.id], tick, start + count)
                ending_now = ending.get(tick + 1)
                ends_now = 0 if ending_now is None else len(ending_now)
                if has_exits:
                    asked = (
                        rows, tokens, decode_rows, longest_decode, prefill_rows, products, started, emitted, longest,
                    )  # fmt: skip
                    rows_read = tuple(Chunk(seq.request.id, start, count, emits) for seq, start, count, emits in chunks)
                    block = engine._table.read(tick, 1)
                    expected, layers = engine.priced(run, tick, rows_read, _new(Asked, asked), ends_now, block)
                else:
                    gathered = decode_rows * -(-longest_decode // BLOCK_TOKENS) * BLOCK_TOKENS
                    counts = (
                        rows, tokens, decode_rows, gathered, prefill_rows, products, depth, 1 if emitted else 0,
                        emitted, 0, started, ends_now, longest,
                    )  # fmt: skip
                    expected, layers = cost.seconds(_new(StepShape, counts)), depth
                one = round(expected / TICK) * TICK
                steps.append(_new(StrideStep, (one, layers, rows, decode_rows, tokens - decode_rows, emitted)))
                blocks.append(used)
                if watch is not None and emitted and not watch.is_safe(engine.low_tokens(tick, 1, watch.threshold)):
                    is_over = self._first_trip(watch, steps, shown, tick + 1) is not None
                    shown = len(steps)
                if watcher is not None:
                    pool.used_blocks = used
                    yield Stretch(steps[-1:], blocks[-1:])
                done = 1
                tick += 1
                its_tick += 1
                now += one
                read = 0
                for seq, _, count, emits in chunks:
                    seq.computed += count
                    if emits:
                        seq.generated += 1
                        if seq.first_token_s is None:
                            seq.first_token_s = now
                        seq.since = its_tick
                        offset = seq.computed - its_tick
                        sequences.append(seq)
                        its_ids.append(seq.request.id)
                        offsets.append(offset)
                        block_due[-offset % BLOCK_TOKENS] += 1
                        read += 1
                del reading[:read]
            else:
                # 4. Steps of decode rows alone: to the next end, arrival, decision, or to where KV runs out.
                if decoding > max_rows or decoding > max_tokens:
                    break
                reach, until_end, done = max(reaches), ends[0] - tick, 0
                left_s = -1.0 if next_s is None else next_s - now
                planned: list[StrideStep] = []
                while done < until_end and len(steps) + done < most:
                    longest = tick + done + reach
                    if longest > max_context:
                        break
                    if has_exits:
                        count = min(until_end - done, AT_ONCE, max_context - longest + 1)
                        found = engine._threshold_steps(run, tick + done, count, longest, until_end - done)
                        if next_s is not None:
                            count, spent = within(found, left_s, are_alike=False)
                            left_s -= spent
                        planned += found[:count]
                        done += count
                        if next_s is not None and left_s <= 0:
                            break
                        continue
                    in_blocks = -(-longest // BLOCK_TOKENS)
                    count = min(until_end - done, BLOCK_TOKENS * in_blocks - longest + 1, max_context - longest + 1)
                    ending_then = 0
                    if done + count == until_end:
                        if count > 1:
                            count -= 1
                        else:
                            ending_then = len(ending[tick + until_end])
                    step = engine._decode_step(cost, decoding, in_blocks, depth, 1, decoding, 0, ending_then)
                    one = step[0]
                    if next_s is not None and one * count >= left_s:
                        if one > 0:
                            count = max(1, -(-round(left_s / TICK) // round(one / TICK)))
                        planned += [step] * count
                        done += count
                        break
                    left_s -= one * count
                    planned += [step] * count
                    done += count
                if not done:
                    break  # outside what was calibrated
                in_use = [used]
                for k in range(1, done):
                    due = block_due[(its_tick + k) % BLOCK_TOKENS]
                    if in_use[-1] + due > total:
                        done = k
                        break
                    in_use.append(in_use[-1] + due)
                if watch is not None and not watch.is_safe(engine.low_tokens(tick, done, watch.threshold)):
                    if watcher is not None:
                        done = 1  # what is shown to the watch must not be taken back
                    trip = self._first_trip(watch, steps + planned[:done], shown, tick + done)
                    if trip is not None:
                        done, is_over = shown + trip + 1 - len(steps), True
                    shown = len(steps) + done
                if watcher is not None:
                    pool.used_blocks = used
                    del planned[done:], in_use[done:]
                    done = (yield Stretch(planned, in_use)) or done
                del planned[done:], in_use[done:]
                steps += planned
                blocks += in_use
                grown += in_use[-1] - used
                used = in_use[-1]
                tick += done
                its_tick += done
                for step in planned:
                    now += step[0]
                if done > 1:
                    running += [runs] * (done - 1)
            is_booked = False
            # 5. Who ends with it.
            if tick in ending:
                for going in engine._ending_at(tick):
                    request_id = going.request.id
                    place = ids.index(request_id)
                    del goings[place], ids[place], reaches[place], its_ids[place], ends[0]
                    seq = sequences.pop(place)
                    block_due[-offsets.pop(place) % BLOCK_TOKENS] -= 1
                    assert seq.since is not None
                    seq.generated += its_tick - seq.since
                    seq.computed += its_tick - seq.since
                    seq.since = None
                    seq.logprob_sum = sum_of_logprobs(going, tick)
                    holds = -(-seq.computed // BLOCK_TOKENS)
                    grown -= holds - held.pop(request_id)
                    used -= holds
                    record = server.finish(seq, now)
                    served.append(record)
                    if watcher is not None:
                        watcher.left(record)
                    ended.append((len(steps) - 1, request_id, seq.logprob_sum))
                    gone.append(going)
                    del known[request_id]
                    runs -= 1
                del ending[tick]
                if max_ends is not None and len(ended) >= max_ends:
                    is_over = True
            if is_draining and not runs:
                is_over = True  # nobody is left to wait for
            running.append(runs)
            waiting += [len(queue)] * done
            if watcher is not None:
                pool.used_blocks = used
                yield None

        # What was done to the books in passing.
        batcher.ticks, batcher._is_due_booked, batcher._as_batch = its_tick, is_booked, None
        pool.used_blocks = used
        pool._grown += grown
        server._started += begun
        if not steps:
            return None
        stride = Stride(steps, ended, engine.watts)
        agrees = None
        if has_tokens:
            block = stride.tokens = engine._table.read(first_tick, len(steps))
            agrees = block.agrees
        energy = None if engine.watts is None else sum(engine.watts * step[0] for step in steps)
        outcome = Outcome(now - start_s, _NO_TOKENS, steps[-1][1], energy, stride, None, agrees)
        server.tell(run, outcome, served, now, waiting, running, blocks)
        engine.ticks = tick
        for going in gone:
            engine._leave_table(going, going.end)
        return now

    def _first_trip(self, watch: Watch, steps: list[StrideStep], shown: int, tick: int) -> int | None:
        """Show the watch the steps behind ``shown`` others, up to ``tick``; which of them trips it."""
        new = steps[shown:]
        if not any(step[5] for step in new):
            return None
        ends = np.add.accumulate(np.array([step[5] for step in new]))
        return watch.first_trip(self.engine._table.read(tick - len(new), len(new)).confidences, ends)
