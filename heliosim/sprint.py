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
from dataclasses import dataclass, field

import numpy as np

from heliosim.costs import StepShape
from heliosim.drive import settle_refused
from heliosim.engines.base import Engine
from heliosim.engines.sim import AT_ONCE, Asked, Going, SimEngine, over_context, sum_of_logprobs, within
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.batcher import Sequence as Queued
from heliosim.serving.server import Server
from heliosim.types import (
    BLOCK_TOKENS,
    TICK,
    Arrival,
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


@dataclass(slots=True, eq=False)
class Lead:
    """How far a sprint may go where what happens elsewhere decides who comes, and what it shows meanwhile.

    Nobody comes before ``until_s``. ``inbox``: who has come; ``outstanding[place]``: how many requests are here. A
    sprint that rests is in a step up to ``end_s``, beyond ``until_s``, or has come to that time exactly. If there are
    several, these are ``steps``, from ``start_s`` on, with ``kv_blocks`` in use during each; requests end with the last
    of them alone. ``end`` takes the later ones back.
    """

    outstanding: list[int]
    place: int
    until_s: Seconds = 0.0
    inbox: list[Arrival] = field(default_factory=list)
    end_s: Seconds = 0.0
    steps: list[StrideStep] | None = None
    kv_blocks: list[int] = field(default_factory=list)
    start_s: Seconds = 0.0

    def end(self, now: Seconds) -> Seconds:
        """Have what is under way end with the step that lasts to ``now`` or beyond; returns when that is."""
        steps = self.steps
        if steps is not None and self.end_s - steps[-1][0] >= now:
            at = self.start_s
            for count, step in enumerate(steps, 1):
                at += step[0]
                if at >= now:
                    del steps[count:], self.kv_blocks[count:]
                    self.end_s = at
                    break
        return self.end_s

    def used_blocks(self, now: Seconds) -> int:
        """KV blocks in use by that one of several steps that lasts to ``now`` or beyond."""
        at = self.start_s
        for step, blocks in zip(self.steps or (), self.kv_blocks, strict=True):
            at += step[0]
            if at >= now:
                return blocks
        raise AssertionError(f"nothing is under way at {now}")


def take_in(lead: Lead, engine: Engine, server: Server, now: Seconds) -> None:
    """Hand over to the server who has come, but for those it refuses."""
    for arrival in lead.inbox:
        engine.accept(arrival)
        server.submit(arrival.request, now)
    lead.inbox.clear()
    if server.has_refused:
        let_go(lead, engine, server)


def let_go(lead: Lead, engine: Engine, server: Server) -> None:
    """Forget requests that were refused."""
    for refused in server.take_refused():
        engine.forget(refused.id)
        lead.outstanding[lead.place] -= 1


@dataclass
class Sprint:
    """``server`` with a ``ContinuousBatcher``, its simulated ``engine`` and an open ``source`` (None: a lead says who
    comes).
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
        self, directive: Directive, now: Seconds, lead: Lead | None = None
    ) -> Generator[None, None, Seconds | None]:
        """The same for a lead. Yields where it must know of a later ``until_s``; not to be resumed before it does."""
        if not directive.passes_arrivals or directive.max_steps is not None or not self.server.may_sprint(directive):
            return None
        if not self.engine.can_sprint(directive.exits):
            return None
        if directive.placement == self.server.placement:
            self.server.follow(directive)
            return (yield from self._go(directive, now, lead))
        draining = self.server.drain(directive)
        return None if draining is None else (yield from self._go(draining, now, lead, is_draining=True))

    def _go(
        self, directive: Directive, now: Seconds, lead: Lead | None, is_draining: bool = False
    ) -> Generator[None, None, Seconds | None]:
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
        counts_context = cost.needs_context
        # What engine and batcher keep of decoding requests: parallel lists, the same places in all of them.
        ids, goings, reaches = engine._ids, engine._decoding, engine._reaches
        its_ids, sequences, offsets = batcher._ids, batcher._decoding, batcher._offsets
        queue, reading, block_due = batcher._waiting, batcher._reading, batcher._block_due
        ends, ending, known = engine._ends, engine._ending, engine._going
        held, total, used, grown = pool._held, pool.total_blocks, pool.used_blocks, 0
        beside = pool.request_blocks  # what each request holds beside its KV
        watermark, max_batch, token_budget = int(total * batcher.watermark), batcher.max_batch, batcher.token_budget
        tick, its_tick, is_booked = engine.ticks, batcher.ticks, batcher._is_due_booked
        reach: int | None = None  # the largest of reaches; None: look for it
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
            if lead is not None:
                if now >= lead.until_s:
                    pool.used_blocks = used
                    lead.end_s, lead.steps = now, None
                    yield
                if lead.inbox:
                    take_in(lead, engine, server, now)
            elif source is not None:
                next_s = source.next_s
                if next_s is not None and next_s <= now:
                    for arrival in source.take(now):
                        engine.accept(arrival)
                        server.submit(arrival.request, now)
                    if server.has_refused:
                        settle_refused(source, engine, server, now)
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
                start = seq.computed
                left = seq.request.prompt_tokens + seq.generated - start
                count = left if left < budget else budget
                chunks.append((seq, start, count, count == left))
                budget -= count
            if queue and budget > 0:
                rows = decoding + len(reading)
                while queue and budget > 0 and rows < max_batch:
                    seq = queue[0]
                    request = seq.request
                    is_new = seq.admitted_s is None
                    if is_new and admit is not None and begun >= admit:
                        break
                    if -(-(request.prompt_tokens + request.max_tokens - 1) // BLOCK_TOKENS) + beside > total:
                        is_over = True  # to be refused
                        break
                    left = request.prompt_tokens + seq.generated
                    need = -(-left // BLOCK_TOKENS) + beside
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
                decode_rows = emitted = decoding
                rows, tokens = decoding + len(chunks), token_budget - budget
                if reach is None and decoding:
                    reach = max(reaches)
                longest_decode = longest = tick + reach if reach is not None else 0
                context = decoding * tick + sum(reaches) if counts_context else 0
                prefill_rows = products = started = 0
                for _, start, count, emits in chunks:
                    end = start + count
                    if end > longest:
                        longest = end
                    if not start:
                        started += 1
                    elif count == 1 and emits:  # like a decode row
                        emitted += 1
                        decode_rows += 1
                        context += end
                        if end > longest_decode:
                            longest_decode = end
                        continue
                    if emits:
                        emitted += 1
                    prefill_rows += 1
                    products += count * end
                if rows > max_rows or longest > max_context or tokens > max_tokens:
                    if not engine.allow_extrapolation:
                        break
                    engine._extrapolated_before += 1
                if emitted > decoding:
                    for seq, start, count, emits in chunks:
                        if emits:
                            engine._join(known[seq.request.id], tick, start + count)
                            if reach is not None and reaches[-1] > reach:
                                reach = reaches[-1]
                ending_now = ending.get(tick + 1)
                ends_now = 0 if ending_now is None else len(ending_now)
                if has_exits:
                    asked = (
                        rows, tokens, decode_rows, longest_decode, prefill_rows, products, started, emitted, longest,
                        context,
                    )  # fmt: skip
                    rows_read = tuple(Chunk(seq.request.id, start, count, emits) for seq, start, count, emits in chunks)
                    block = engine._table.read(tick, 1)
                    expected, layers = engine.priced(run, tick, rows_read, _new(Asked, asked), ends_now, block)
                else:
                    gathered = decode_rows * -(-longest_decode // BLOCK_TOKENS) * BLOCK_TOKENS
                    counts = (
                        rows, tokens, decode_rows, gathered, prefill_rows, products, depth, 1 if emitted else 0,
                        emitted, 0, started, ends_now, longest, context,
                    )  # fmt: skip
                    expected, layers = cost.seconds(_new(StepShape, counts)), depth
                one = round(expected / TICK) * TICK
                steps.append(_new(StrideStep, (one, layers, rows, decode_rows, tokens - decode_rows, emitted)))
                blocks.append(used)
                if watch is not None and emitted and not watch.is_safe(engine.low_tokens(tick, 1, watch.threshold)):
                    is_over = self._first_trip(watch, steps, shown, tick + 1) is not None
                    shown = len(steps)
                if lead is not None and now + one > lead.until_s:
                    pool.used_blocks = used
                    lead.end_s, lead.steps = now + one, None
                    yield
                done = 1
                tick += 1
                its_tick += 1
                now += one
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
                if emitted > decoding:
                    del reading[: emitted - decoding]
            else:
                # 4. Steps of decode rows alone: to the next end, arrival, decision, or to where KV runs out.
                if decoding > max_rows or decoding > max_tokens:
                    break
                if reach is None:
                    reach = max(reaches)
                until_end, done = ends[0] - tick, 0
                left_s = -1.0 if next_s is None else next_s - now
                context = decoding * tick + sum(reaches) if counts_context else 0
                planned: list[StrideStep] = []
                while done < until_end and len(steps) + done < most:
                    longest = tick + done + reach
                    if longest > max_context:
                        break
                    if has_exits:
                        count = min(until_end - done, AT_ONCE, max_context - longest + 1)
                        held_then = context + decoding * done if counts_context else 0
                        found = engine._threshold_steps(run, tick + done, count, longest, until_end - done, held_then)
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
                    if counts_context:
                        found = over_context(cost, step, context + decoding * done, count)
                        if next_s is not None:
                            count, spent = within(found, left_s, are_alike=False)
                            left_s -= spent
                        planned += found[:count]
                        done += count
                        if next_s is not None and left_s <= 0:
                            break
                        continue
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
                    if lead is not None:
                        done = 1  # what is shown to the watch must not be taken back
                    trip = self._first_trip(watch, steps + planned[:done], shown, tick + done)
                    if trip is not None:
                        done, is_over = shown + trip + 1 - len(steps), True
                    shown = len(steps) + done
                del planned[done:], in_use[done:]
                end_s = now
                for step in planned:
                    end_s += step[0]
                if lead is not None and end_s > lead.until_s:
                    pool.used_blocks = used
                    lead.end_s = end_s
                    if done > 1:
                        lead.steps, lead.kv_blocks, lead.start_s = planned, in_use, now
                    else:
                        lead.steps = None
                    yield
                    done, end_s = len(planned), lead.end_s
                now = end_s
                steps += planned
                blocks += in_use
                grown += in_use[-1] - used
                used = in_use[-1]
                tick += done
                its_tick += done
                if done > 1:
                    running += [runs] * (done - 1)
            is_booked = False
            # 5. Who ends with it.
            if tick in ending:
                for going in engine._ending_at(tick):
                    request_id = going.request.id
                    place = ids.index(request_id)
                    if reaches[place] == reach:
                        reach = None
                    del goings[place], ids[place], reaches[place], its_ids[place], ends[0]
                    seq = sequences.pop(place)
                    block_due[-offsets.pop(place) % BLOCK_TOKENS] -= 1
                    assert seq.since is not None
                    seq.generated += its_tick - seq.since
                    seq.computed += its_tick - seq.since
                    seq.since = None
                    seq.logprob_sum = sum_of_logprobs(going, tick)
                    holds = -(-seq.computed // BLOCK_TOKENS) + beside
                    grown -= holds - held.pop(request_id)
                    used -= holds
                    record = server.finish(seq, now)
                    served.append(record)
                    if lead is not None:
                        lead.outstanding[lead.place] -= 1
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
            if done == 1:
                waiting.append(len(queue))
            else:
                waiting += [len(queue)] * done

        # What was done to the books in passing.
        batcher.ticks, batcher._is_due_booked, batcher._as_batch = its_tick, is_booked, None
        pool.used_blocks = used
        pool._grown += grown
        server._started += begun
        if not steps:
            return None
        power = engine.power_of(placement.model)
        stride = Stride(steps, ended, power)
        agrees = None
        if has_tokens:
            block = stride.tokens = engine._table.read(first_tick, len(steps))
            agrees = block.agrees
        energy = None if power is None else sum(power.of(step) for step in steps)
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
