"""The simulated engine: a profile's costs and recorded behaviour in place of a device.

It predicts, for each step, which token leaves where (behaviour replay) and how long the step takes (cost model), from
the same shape a live step would have. It knows true lengths; the server does not.

Decoding requests move in step with each other, so the engine keeps one counter (``ticks``) and, for each of them, the
tick at which it ends. What their tokens will do is laid out in a table of ticks when they begin to decode. A stride of
steps is planned from those two alone and touches a request only where it begins or ends. What was planned becomes true
when the engine is asked for something else; until then ``cut`` can take the later steps back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from heliosim.behaviour import Behaviour, Text, Walk
from heliosim.costs import STEP_SLOWDOWN, StepCost, StepShape, action_seconds, stall_seconds, transfer_seconds
from heliosim.engines.joint import Fan, JointBlock, leave_together
from heliosim.engines.token_table import CONFIDENCES, EXIT_LAYERS, Lane, TokenBlock, TokenTable
from heliosim.errors import OutOfRangeError
from heliosim.exits.batching import exit_batcher
from heliosim.exits.pricing import (
    Counts,
    Row,
    is_plain,
    needs_single_steps,
    parts_from_counts,
    parts_of,
    segment_ends,
)
from heliosim.exits.skipped import skipped_kv
from heliosim.noise import NoisePlayer
from heliosim.types import (
    BLOCK_TOKENS,
    TICK,
    Arrival,
    Batch,
    Chunk,
    Content,
    ExitRule,
    Load,
    ModelSpec,
    Outcome,
    Placement,
    Request,
    RequestId,
    Run,
    Seconds,
    StepPower,
    Stride,
    StrideStep,
    Tokens,
    tick,
)

_FOREVER = 2**62
StepTokens = TokenBlock | JointBlock
"""Tokens of one step, in batch order."""
_NO_TOKENS = Tokens()
_tuple_new = tuple.__new__
AT_ONCE = 64
"""Steps under a threshold that are looked at together."""


@dataclass(slots=True, eq=False)
class Going:
    """A request inside the engine: what it is, which recorded prompt it stands for, and how far it got.

    ``generated`` is true up to tick ``since`` while it decodes. ``length``: tokens it will have generated in all, under
    the text it follows now; ``end``: the tick behind the last of them. ``done``: by segment, the tokens in KV there,
    where some wait for layers they skipped. ``fan``: of its text, where its exits depend on its batch.
    """

    request: Request
    content: Content
    sequence: str
    generated: int = 0
    since: int | None = None
    length: int = 0
    end: int = 0
    walk: Walk | None = None
    lane: Lane | None = None
    logprob_sum: float = 0.0
    done: list[int] | None = None
    fan: Fan | None = None


class _Change(NamedTuple):
    """With step ``step`` a request began to decode (``place`` None), or ended and left that place among the others."""

    step: int
    going: Going
    place: int | None = None
    reach: int = 0


@dataclass(slots=True, eq=False)
class _Plan:
    """A stride that was planned: its steps, and what to do if some of them are taken back.

    ``extrapolated``: steps outside the calibrated range; ``noise_at_s``: where the noise stood before each step.
    """

    stride: Stride
    changes: list[_Change] = field(default_factory=list)
    extrapolated: list[int] = field(default_factory=list)
    noise_at_s: list[float] = field(default_factory=list)


class SimEngine:
    """``costs``: step cost by model on the run's clock; ``loads``: load coefficients by model; ``behaviour``: None for
    studies of time alone (tokens then have no exits, and no figure of quality can be had).

    ``allow_extrapolation``: answer outside the calibrated batch, context or chunk range instead of refusing;
    ``extrapolated_steps`` counts such steps. ``watts``: mean power while busy, or by model what it does;
    None: energy is unavailable.
    ``noise``: scales each step's expected time; None: every step takes it exactly. ``strides``: whether it may be
    hurried over many arrivals (``sprint.py``).
    """

    def __init__(
        self,
        models: Mapping[str, ModelSpec],
        costs: Mapping[str, StepCost],
        loads: Mapping[str, Mapping[str, float]],
        behaviour: Behaviour | None,
        seed: int,
        allow_extrapolation: bool = False,
        watts: float | Mapping[str, StepPower] | None = None,
        noise: NoisePlayer | None = None,
        strides: bool = False,
    ) -> None:
        self.strides = strides
        self.models, self.costs, self.loads, self.behaviour, self.seed = models, costs, loads, behaviour, seed
        self.allow_extrapolation, self.watts, self.noise = allow_extrapolation, watts, noise
        self._extrapolated_before = 0
        self.ticks = 0
        self._going: dict[RequestId, Going] = {}
        self._resident: Placement | None = None
        # Decoding requests in batch order: themselves, their ids, their tokens in KV less ticks. Then the ticks at
        # which requests end, sorted, and who ends there.
        self._decoding: list[Going] = []
        self._ids: list[RequestId] = []
        self._reaches: list[int] = []
        self._ends: list[int] = []
        self._ending: dict[int, list[Going]] = {}
        self._seen: tuple[RequestId, ...] = ()
        self._table = TokenTable()
        self._placement: Placement | None = None
        self._exits: ExitRule | None = None
        self._walks: dict[str, tuple[Text, Walk]] = {}
        self._walks_by_policy: dict[tuple[Placement, ExitRule], dict[str, tuple[Text, Walk]]] = {}
        self._decode_steps: dict[tuple[int, ...], StrideStep] = {}
        self._decode_steps_by_policy: dict[tuple[Placement, ExitRule], dict[tuple[int, ...], StrideStep]] = {}
        self._plan: _Plan | None = None
        # Of the present rule: whether one shape prices a step, whether exits depend on the batch, whether steps must be
        # done one by one, and whether tokens wait for layers they skipped.
        self._is_plain, self._is_joint, self._one_by_one, self._can_wait = True, False, False, False
        self._joint: tuple[int, JointBlock] | None = None

    # -- protocol -------------------------------------------------------------------------------------------------

    def accept(self, arrival: Arrival) -> None:
        request, content = arrival.request, arrival.content
        sequence = self.behaviour.assign(request.id, content.task, self.seed) if self.behaviour else ""
        self._going[request.id] = Going(request, content, sequence)

    def forget(self, request_id: int) -> None:
        self._going.pop(request_id, None)

    def perform(self, action: Run | Load) -> Outcome:
        if isinstance(action, Load):
            if self._plan is not None:
                self._commit(self._plan)
            return self._load(action)
        self.get_ready(action.placement, action.exits, action.batch)
        return self._stride(action) if action.in_stride or action.max_steps > 1 else self._step(action)

    def can_sprint(self, exits: ExitRule) -> bool:
        """Whether many steps at once can be worked out from counters and arrays under this rule."""
        return self.behaviour is None or not needs_single_steps(exits)

    def get_ready(self, placement: Placement, exits: ExitRule, batch: Batch) -> None:
        """Have what was planned done, and decode a batch's decoding requests, in its order, under this policy."""
        if self._plan is not None:
            self._commit(self._plan)
        if placement is not self._placement or exits is not self._exits:
            self._follow(placement, exits)
        decoding = batch.decoding
        if decoding is not self._seen or len(decoding) != len(self._ids):
            if tuple(self._ids) != decoding:
                self._gather(batch)
            self._seen = decoding

    def cut(self, steps: int) -> Outcome:
        """The stride performed last, as if it had ended behind ``steps`` of its steps."""
        plan = self._plan
        assert plan is not None, "nothing to cut"
        whole = plan.stride
        assert 1 <= steps <= len(whole.steps)
        if steps == len(whole.steps):
            return _outcome_of(whole)
        while plan.changes and plan.changes[-1].step >= steps:
            self._take_back(plan.changes.pop())
        plan.extrapolated = [step for step in plan.extrapolated if step < steps]
        if self.noise is not None:
            self.noise.at_s = plan.noise_at_s[steps]
        plan.stride = Stride(
            whole.steps[:steps],
            [end for end in whole.ended if end[0] < steps],
            whole.watts,
            whole.tokens.first(steps) if isinstance(whole.tokens, TokenBlock) else None,
        )
        return _outcome_of(plan.stride)

    def share(self, other: SimEngine) -> bool:
        """Before any step: let another find what this one works out of steps and texts, and the other way round, where
        both are of the same models, costs and behaviour. Returns whether they are.
        """
        is_alike = other.behaviour is self.behaviour and (other.models, other.costs) == (self.models, self.costs)
        if is_alike:
            other._walks_by_policy = self._walks_by_policy
            other._decode_steps_by_policy = self._decode_steps_by_policy
        return is_alike

    @property
    def extrapolated_steps(self) -> int:
        return self._extrapolated_before + (len(self._plan.extrapolated) if self._plan is not None else 0)

    # -- loads ----------------------------------------------------------------------------------------------------

    def low_tokens(self, at: int, steps: int, threshold: float) -> int:
        """How many tokens of the steps from tick ``at`` on leave below a confidence threshold."""
        return self._table.count_low(at, steps, threshold)

    def _load(self, load: Load) -> Outcome:
        """What a load takes. A transfer in the background is known to the tick; the server tells what is left of it."""
        spec = self.models[load.placement.model]
        same = self._resident is not None and self._resident.model == load.placement.model
        resident = self._resident.depth if same and self._resident else 0
        holds = load.placement
        if load.part in ("begin", "drop"):
            assert self._resident is not None
            holds = self._resident
        kv_bytes = load.kv_blocks * self.models[holds.model].block_bytes(holds.depth, load.stores_hidden)
        self._resident = holds
        costs = self.loads[spec.name]
        seconds = tick(action_seconds(costs, load, spec, resident, kv_bytes) + (load.left_s or 0.0))
        arrives_s = None
        if load.part == "begin" or load.is_pipelined:
            arrives_s = tick(transfer_seconds(costs, load, spec, resident))
        return Outcome(seconds=seconds, energy_j=self._load_j(spec.name, seconds), arrives_s=arrives_s)

    # -- who decodes ----------------------------------------------------------------------------------------------

    def _follow(self, placement: Placement, exits: ExitRule) -> None:
        """Under another placement or rule, texts and exits differ from here on."""
        is_same = (placement, exits) == (self._placement, self._exits)
        self._placement, self._exits = placement, exits
        if is_same:
            return
        self._table.forget_planes()
        policy = (placement, exits)
        self._walks = self._walks_by_policy.setdefault(policy, {})
        self._decode_steps = self._decode_steps_by_policy.setdefault(policy, {})
        self._is_plain, self._one_by_one = is_plain(exits) or self.behaviour is None, not self.can_sprint(exits)
        self._can_wait = self._one_by_one and skipped_kv(exits.skipped_kv).is_recomputed
        is_recorded = self.behaviour is not None and self.behaviour.is_recorded_run
        self._is_joint = exits.kind == "threshold" and exit_batcher(exits.batching).is_joint and not is_recorded
        for going in self._decoding:
            self._catch_up(going)
            self._leave_table(going, self.ticks)
        self._ends, self._ending = [], {}
        for going in self._decoding:
            self._lay_out(going, self.ticks)

    def _gather(self, batch: Batch) -> None:
        """Make the decoding requests those of a batch, in its order; others stop, keeping what they generated."""
        wanted = set(batch.decoding)
        for going in [g for g in self._decoding if g.request.id not in wanted]:
            self._stop(going)
        known = set(self._ids)
        if self._ids != [request for request in batch.decoding if request in known]:
            for going in list(self._decoding):  # another order: everybody anew
                self._stop(going)
            known = set()
        for request, offset in zip(batch.decoding, batch.offsets, strict=True):
            if request not in known:
                self._join(self._going[request], self.ticks, offset + batch.ticks + 1)

    def _join(self, going: Going, at: int, reach: int) -> None:
        """From tick ``at`` on a request yields a token per step. ``reach``: tokens in its KV behind a decode step
        there.
        """
        going.since = at
        self._decoding.append(going)
        self._ids.append(going.request.id)
        self._reaches.append(reach - at)
        self._lay_out(going, at)

    def _lay_out(self, going: Going, at: int) -> None:
        """Find the text a request follows now and enter what is left of it, one token at least."""
        if self.behaviour is None:
            going.length = going.content.output_tokens or going.request.max_tokens
        else:
            self._find_text(going)
        left = going.length - going.generated
        if left < 1:
            left = 1
        end = going.end = at + left
        insort(self._ends, end)
        ending = self._ending
        if end in ending:
            ending[end].append(going)
        else:
            ending[end] = [going]
        if going.walk is not None:
            going.lane = Lane(going.request.id, going.walk, going.generated, at, left)
            self._table.enter(going.lane, self.ticks)

    def _expect_end(self, going: Going) -> None:
        insort(self._ends, going.end)
        known = self._ending.get(going.end)
        if known is None:
            self._ending[going.end] = [going]
        else:
            known.append(going)

    def _forget_end(self, going: Going) -> None:
        del self._ends[bisect_left(self._ends, going.end)]
        ending = self._ending[going.end]
        if len(ending) == 1:
            del self._ending[going.end]
        else:
            ending.remove(going)

    def _stop(self, going: Going) -> None:
        """A request stops decoding now; it may go on later from where it stands."""
        self._remove(going)
        self._catch_up(going)
        going.since = None
        self._leave_table(going, self.ticks)

    def _remove(self, going: Going) -> int:
        """Take a request out of the decoding ones; returns its place among them."""
        place = self._ids.index(going.request.id)
        del self._decoding[place], self._ids[place], self._reaches[place]
        self._forget_end(going)
        return place

    def _leave_table(self, going: Going, at: int) -> None:
        if going.lane is not None:
            self._table.leave(going.lane, at)
            going.lane = None

    def _take_back(self, change: _Change) -> None:
        going = change.going
        if change.place is None:  # it began
            self._remove(going)
            self._leave_table(going, self.ticks)
            going.since = None
            return
        self._decoding.insert(change.place, going)
        self._ids.insert(change.place, going.request.id)
        self._reaches.insert(change.place, change.reach)
        self._expect_end(going)

    def _commit(self, plan: _Plan) -> None:
        """What was planned has happened."""
        self.ticks += len(plan.stride)
        self._extrapolated_before += len(plan.extrapolated)
        for change in plan.changes:
            if change.place is not None:
                self._leave_table(change.going, change.going.end)
                del self._going[change.going.request.id]
        self._plan = None

    def _catch_up(self, going: Going) -> None:
        """Count the tokens generated since the counts were last true."""
        if going.since is None or going.since == self.ticks:
            return
        going.logprob_sum = sum_of_logprobs(going, self.ticks)
        going.generated += self.ticks - going.since
        going.since = self.ticks

    def _find_text(self, going: Going) -> None:
        limit = going.content.output_tokens or going.request.max_tokens
        if self.behaviour is None or self._placement is None or self._exits is None:
            going.length = limit
            return
        found = self._walks.get(going.sequence)
        if found is None:
            placement, exits = self._placement, self._exits
            source = self.behaviour.source(placement, exits, self.models[placement.model].layers)
            text = self.behaviour.text(going.sequence, source)
            found = self._walks[going.sequence] = (text, self.behaviour.walk(text, placement, exits))
        text, going.walk = found
        going.fan = None
        if self._is_joint:
            going.walk, going.fan = None, Fan(*self.behaviour.fan(text, self._placement))
        going.length = limit if going.content.output_tokens or text.end is None else min(limit, text.end)

    # -- one step -------------------------------------------------------------------------------------------------

    def _step(self, run: Run) -> Outcome:
        """The plain way, a step at a time: what strides must agree with, to the last bit."""
        cost = self.costs[run.placement.model]
        longest = self.ticks + max(self._reaches, default=0)
        asked = _asked(run.batch.chunks, len(self._ids), longest, self._context(self.ticks))
        if not self._is_calibrated(cost, asked.rows, asked.longest, asked.tokens):
            self._extrapolated_before += 1
        self._emit(run.batch.chunks, self.ticks, 0, [])
        ending = self._ending_at(self.ticks + 1)
        block = self._read(self.ticks, run.batch.chunks) if self.behaviour is not None else None
        expected, layers = self.priced(run, self.ticks, run.batch.chunks, asked, len(ending), block)
        if run.is_slowed:
            expected *= self.loads[run.placement.model].get(STEP_SLOWDOWN, 1.0)
        seconds = self._noisy(tick(expected))
        stalled_s = 0.0
        if run.arriving is not None:
            shape = self._shape(run, asked, len(ending), block)
            tail_s = cost.seconds(shape._replace(layers=0, filled_layers=0))
            stalled_s = tick(stall_seconds(expected, tail_s, run.placement.depth, run.arriving))
            seconds += stalled_s
        tokens = self._tokens(block, {going.request.id for going in ending})
        self.ticks += 1
        for going in ending:
            self._stop(going)
            del self._going[going.request.id]
        sums = {going.request.id: going.logprob_sum for going in ending}
        power = self.power_of(run.placement.model)
        read = asked.tokens - asked.decode_rows
        energy_j = None if power is None else power.joules(seconds, asked.decode_rows, read)
        return Outcome(seconds, tokens, layers, energy_j, logprob_sums=sums, stalled_s=stalled_s)

    def _context(self, at: int) -> int:
        """KV tokens that decoding requests hold behind a step from tick ``at`` on, summed."""
        return len(self._reaches) * at + sum(self._reaches)

    def _emit(self, chunks: Sequence[Chunk], at: int, step: int, changes: list[_Change]) -> None:
        """Requests whose prompt is read to its end yield their first token at tick ``at`` and decode from then on."""
        for chunk in chunks:
            if chunk.emits:
                going = self._going[chunk.request]
                self._join(going, at, chunk.start + chunk.count)
                going.done = None
                changes.append(_Change(step, going))

    def _ending_at(self, at: int) -> list[Going]:
        """Requests whose last token is that of the step up to tick ``at``, in batch order."""
        ending = self._ending.get(at)
        if ending is None:
            return []
        if len(ending) == 1:
            return [ending[0]]
        return sorted(ending, key=lambda going: self._ids.index(going.request.id))

    def _tokens(self, block: StepTokens | None, ending: set[RequestId]) -> Tokens:
        requests = tuple(self._ids)
        lasts = tuple(request in ending for request in requests)
        if block is None:
            return Tokens(requests, lasts=lasts)
        return Tokens(
            requests,
            tuple(block.exit_layers.tolist()),
            tuple(block.confidences.tolist()),
            tuple(block.logprobs.tolist()),
            lasts,
            None,
            tuple(block.agrees().tolist()),
        )

    def _read(self, at: int, chunks: Sequence[Chunk]) -> StepTokens:
        """Tokens of the step at tick ``at``, whose requests have begun to decode."""
        if not self._is_joint:
            return self._table.read(at, 1)
        if self._joint is not None and self._joint[0] == at:
            return self._joint[1]
        assert self._placement is not None
        assert self._exits is not None
        seen = []
        for going in self._decoding:
            assert going.fan is not None
            assert going.since is not None
            seen.append(going.fan.at(going.generated + at - going.since))
        ends = segment_ends(self.models[self._placement.model], self._placement.depth)
        may_stop = all(chunk.is_decode for chunk in chunks)
        block = leave_together(self._exits, ends, self._ids, seen, may_stop)
        for going, logprob in zip(self._decoding, block.logprobs.tolist(), strict=True):
            going.logprob_sum += logprob
        self._joint = (at, block)
        return block

    def priced(
        self,
        run: Run,
        at: int,
        chunks: Sequence[Chunk],
        asked: Asked,
        ended: int,
        block: StepTokens | None,
    ) -> tuple[Seconds, int]:
        """Expected seconds of the step at tick ``at``, whose requests have begun to decode, and its deepest layer."""
        cost = self.costs[run.placement.model]
        if self._is_plain or block is None:
            shape = self._shape(run, asked, ended, block)
            return cost.seconds(shape), shape.layers
        ends = segment_ends(self.models[run.placement.model], run.placement.depth)
        begun = sum(chunk.emits for chunk in chunks)
        old = len(self._ids) - begun
        goings = self._decoding[:old]
        rows = [
            Row(at + reach - 1, at + reach, going.done) for reach, going in zip(self._reaches, goings, strict=False)
        ]
        rows += [Row(chunk.start, chunk.start + chunk.count) for chunk in chunks]
        exits = block.exit_layers
        checks, checked = (0, 0)
        if len(exits):
            checks, checked = _checks(ends, int(exits.max()), exits)
        counts = Counts(asked.rows, asked.tokens, checks, checked, asked.started, ended)
        per_row = None if asked.prefill_rows else exits.tolist()
        parts, dones = parts_of(run.exits, ends, rows, per_row, counts)
        if self._can_wait:
            for going, done, row in zip(goings, dones, rows, strict=False):
                going.done = done if min(done) <= row.start else None
        return parts.seconds(cost, run.exits), parts.layers_run

    def _shape(self, run: Run, asked: Asked, ended: int, block: StepTokens | None) -> StepShape:
        """The shape ``costs.shape_of`` finds, from counts. ``block``: the step's tokens, where exits are known."""
        rows, tokens, decode_rows, longest_decode, prefill_rows, products, started, emitted, longest, context = asked
        depth = layers = run.placement.depth
        checks, checked, filled = (1, emitted, 0) if emitted else (0, 0, 0)
        if emitted and block is not None and run.exits.kind == "threshold":
            exits = block.exit_layers
            deepest = int(exits.max())
            if run.exits.batching != "full" and not prefill_rows:
                layers = deepest
            checks, checked = _checks(self.models[run.placement.model].exits, deepest, exits)
            filled = depth - layers
        gathered = decode_rows * -(-longest_decode // BLOCK_TOKENS) * BLOCK_TOKENS
        shape = (
            rows, tokens, decode_rows, gathered, prefill_rows, products, layers, checks, checked, filled, started,
            ended, longest, context,
        )  # fmt: skip
        return _tuple_new(StepShape, shape)

    # -- many steps -----------------------------------------------------------------------------------------------

    def _stride(self, run: Run) -> Outcome:
        """Steps until enough requests ended, an arrival is due or the guard trips, from counters and whole arrays."""
        stride = Stride([], [], self.power_of(run.placement.model))
        plan = self._plan = _Plan(stride)
        self._plan_steps(run, plan)
        if self.behaviour is None:
            return _outcome_of(stride)
        block: StepTokens
        block = self._joint[1] if self._is_joint and self._joint else self._table.read(self.ticks, len(stride.steps))
        stride.tokens = block
        if run.guard is not None:
            trip = run.guard.first_trip(block.confidences, stride.token_ends())
            if trip is not None:
                return self.cut(trip + 1)
        return _outcome_of(stride)

    def _plan_steps(self, run: Run, plan: _Plan) -> None:
        """Reading steps one by one, decoding steps from one end of a request to the next."""
        steps, most, max_ends = plan.stride.steps, 1 if self._one_by_one else run.max_steps, run.max_ends
        chunks, program = run.batch.chunks, run.program
        left_s = _FOREVER if run.within_s is None else run.within_s
        if left_s <= 0:  # somebody answered at once, and comes behind this step
            left_s, most = _FOREVER, 1
        k = ended = 0
        while True:
            if chunks:
                if not self._plan_reading(run, chunks, plan):
                    return
                left_s -= steps[k][0]
            elif self._ids:
                left_s -= self._plan_decoding(run, most - k, left_s, plan)
            else:
                return
            if len(steps) == k:
                return
            k = len(steps)
            chunks = program[k - 1] if k <= len(program) else ()
            at = self.ticks + k
            if at in self._ending:
                for going in self._ending_at(at):
                    ended += 1
                    reach = self._reaches[self._ids.index(going.request.id)]
                    plan.changes.append(_Change(k - 1, going, self._remove(going), reach))
                    plan.stride.ended.append((k - 1, going.request.id, sum_of_logprobs(going, at)))
                if chunks or (max_ends is not None and ended >= max_ends):
                    return
            if k >= most or left_s <= 0:
                return

    def _plan_reading(self, run: Run, chunks: tuple[Chunk, ...], plan: _Plan) -> bool:
        """One step that reads prompts. False, and nothing planned, for a later step outside the calibrated range."""
        steps, cost = plan.stride.steps, self.costs[run.placement.model]
        k = len(steps)
        at = self.ticks + k
        longest = at + max(self._reaches) if self._reaches else 0
        asked = _asked(chunks, len(self._ids), longest, self._context(at) if cost.needs_context else 0)
        if not self._is_calibrated(cost, asked[0], asked[8], asked[1], may_refuse=k == 0):
            if not self.allow_extrapolation:
                return False
            plan.extrapolated.append(k)
        self._emit(chunks, at, k, plan.changes)
        has_exits = run.exits.kind == "threshold" and self.behaviour is not None
        block = self._read(at, chunks) if has_exits else None
        ending = self._ending.get(at + 1)
        expected, layers = self.priced(run, at, chunks, asked, 0 if ending is None else len(ending), block)
        one = round(expected / TICK) * TICK
        if self.noise is not None:
            plan.noise_at_s.append(self.noise.at_s)
            one = self._noisy(one)
        rows, tokens, decode_rows, _, _, _, _, emitted, _, _ = asked
        step = (one, layers, rows, decode_rows, tokens - decode_rows, emitted)
        steps.append(_tuple_new(StrideStep, step))
        return True

    def _plan_decoding(self, run: Run, most: int, left_s: Seconds, plan: _Plan) -> Seconds:
        """Decode steps up to the next request's end; returns their seconds. None for a later step outside the range."""
        planned, cost, depth = plan.stride.steps, self.costs[run.placement.model], run.placement.depth
        first = len(planned)
        at, rows, reach = self.ticks + first, len(self._ids), max(self._reaches)
        until_end = self._ends[0] - at
        done, spent = 0, 0.0
        most = min(most, until_end)
        has_exits = run.exits.kind == "threshold" and self.behaviour is not None
        context = self._context(at) if cost.needs_context else 0
        while done < most and spent < left_s:
            longest = at + done + reach
            if not self._is_calibrated(cost, rows, longest, rows, may_refuse=first + done == 0):
                if not self.allow_extrapolation:
                    break
                plan.extrapolated.append(first + done)
                count = 1
            else:
                count = min(most - done, cost.max_context - longest + 1)
            if has_exits:
                count = min(count, AT_ONCE)
                steps = self._threshold_steps(run, at + done, count, longest, until_end - done, context + rows * done)
            else:
                blocks = -(-longest // BLOCK_TOKENS)
                count = min(count, BLOCK_TOKENS * blocks - longest + 1)
                if done + count == until_end and count > 1:
                    count -= 1  # the last one ends requests, which has its own price
                ended = len(self._ending[at + until_end]) if done + count == until_end else 0
                step = self._decode_step(cost, rows, blocks, depth, 1, rows, 0, ended)
                steps = over_context(cost, step, context + rows * done, count) if context else [step] * count
            if self.noise is not None:
                spent += self._noisy_steps(steps, left_s - spent, plan)
            else:
                fitting, seconds = within(steps, left_s - spent, are_alike=not (has_exits or context))
                del steps[fitting:]
                spent += seconds
            planned += steps
            done += len(steps)
        return spent

    def _decode_step(
        self, cost: StepCost, rows: int, blocks: int, layers: int, checks: int, checked: int, filled: int, ended: int
    ) -> StrideStep:
        """A step of decode rows alone in its expected time; ``blocks``: KV blocks of the longest. Where its time
        depends on ``context``: what it takes without, not rounded to ticks yet.
        """
        key = (rows, blocks, layers, checks, checked, ended)
        known = self._decode_steps.get(key)
        if known is None:
            gathered = rows * blocks * BLOCK_TOKENS
            shape = StepShape(rows, rows, rows, gathered, 0, 0, layers, checks, checked, filled, 0, ended, gathered)
            seconds = cost.seconds(shape)
            seconds = seconds if cost.needs_context else tick(seconds)
            known = self._decode_steps[key] = StrideStep(seconds, layers, rows, rows, 0, rows)
        return known

    def _noisy_steps(self, steps: list[StrideStep], left_s: Seconds, plan: _Plan) -> Seconds:
        """Scale expected times by the noise, in place, up to the step that lasts to ``left_s``; returns their sum."""
        assert self.noise is not None
        spent = 0.0
        for k, step in enumerate(steps):
            plan.noise_at_s.append(self.noise.at_s)
            one = self._noisy(step.seconds)
            steps[k] = step._replace(seconds=one)
            spent += one
            if spent >= left_s:
                del steps[k + 1 :]
                break
        return spent

    def _threshold_steps(
        self, run: Run, at: int, count: int, longest: int, until_end: int, context: int
    ) -> list[StrideStep]:
        """``count`` steps of decode rows under a threshold, from tick ``at`` on, in their expected times. ``context``:
        KV tokens held behind the first, summed; 0 where they cost nothing.
        """
        spec, cost = self.models[run.placement.model], self.costs[run.placement.model]
        depth, rows = run.placement.depth, len(self._ids)
        if not self._is_plain:
            return self._method_steps(run, at, count, until_end)
        block = self._table.read(at, count)
        exits = np.where(np.isnan(block.cells(CONFIDENCES)), 0, block.cells(EXIT_LAYERS))
        layers = np.array(spec.exits)
        left = np.add.reduce(exits[:, :, None] >= layers, axis=1, dtype=np.int64)
        steps: list[StrideStep] = []
        for k, undecided in enumerate(left.tolist()):
            checks = len(undecided) - undecided.count(0)
            walked = depth if run.exits.batching == "full" else spec.exits[checks - 1]
            ended = len(self._ending[at + until_end]) if k + 1 == until_end else 0
            blocks = -(-(longest + k) // BLOCK_TOKENS)
            step = self._decode_step(cost, rows, blocks, walked, checks, sum(undecided), depth - walked, ended)
            if context:
                seconds = tick(step[0] + cost.context_seconds(walked, context + rows * k))
                step = _tuple_new(StrideStep, (seconds, *step[1:]))
            steps.append(step)
        return steps

    def _method_steps(self, run: Run, at: int, count: int, until_end: int) -> list[StrideStep]:
        """The same where rows part ways: from counts of rows behind each exit, and the longest of them."""
        cost, rows = self.costs[run.placement.model], len(self._ids)
        if self._one_by_one:
            ended = len(self._ending[at + 1]) if until_end == 1 else 0
            asked = _asked((), rows, at + max(self._reaches), self._context(at))
            expected, layers = self.priced(run, at, (), asked, ended, self._read(at, ()))
            return [StrideStep(tick(expected), layers, rows, rows, 0, rows)]
        ends = segment_ends(self.models[run.placement.model], run.placement.depth)
        block = self._table.read(at, count)
        exits = np.where(np.isnan(block.cells(CONFIDENCES)), 0, block.cells(EXIT_LAYERS))
        reaches = np.zeros(exits.shape[1], np.int64)
        for going, reach in zip(self._decoding, self._reaches, strict=True):
            assert going.lane is not None
            reaches[going.lane.column - block.columns.start] = at + reach
        is_left = exits[:, :, None] >= np.array(ends)
        left = np.add.reduce(is_left, axis=1, dtype=np.int64)
        longest = np.max(np.where(is_left, reaches[None, :, None], 0), axis=1) + np.arange(count)[:, None]
        blocks = -(-longest // BLOCK_TOKENS)
        contexts, none_held = [], [0] * len(ends)
        if cost.needs_context:
            contexts = np.sum(np.where(is_left, reaches[None, :, None], 0), axis=1).tolist()
        steps: list[StrideStep] = []
        for k, (undecided, in_blocks) in enumerate(zip(left.tolist(), blocks.tolist(), strict=True)):
            ended = len(self._ending[at + until_end]) if k + 1 == until_end else 0
            held = [h + k * n for h, n in zip(contexts[k], undecided, strict=True)] if cost.needs_context else none_held
            key = (ended, *undecided, *in_blocks, *held)
            known = self._decode_steps.get(key)
            if known is None:
                parts = parts_from_counts(run.exits, ends, undecided, in_blocks, held, ended)
                seconds = tick(parts.seconds(cost, run.exits))
                known = self._decode_steps[key] = StrideStep(seconds, parts.layers_run, rows, rows, 0, rows)
            steps.append(known)
        return steps

    # -- time and energy ------------------------------------------------------------------------------------------

    def _noisy(self, seconds: Seconds) -> Seconds:
        return seconds if self.noise is None else tick(seconds * self.noise.factor(seconds))

    def _load_j(self, model: str, seconds: Seconds) -> float | None:
        power = self.power_of(model)
        return None if power is None else power.load_w * seconds

    def power_of(self, model: str) -> StepPower | None:
        """Power while it works with a model; None: unknown."""
        watts = self.watts
        if watts is None or isinstance(watts, Mapping):
            return None if watts is None else watts.get(model)
        return StepPower(watts, watts, watts)

    def _is_calibrated(self, cost: StepCost, rows: int, context: int, tokens: int, may_refuse: bool = True) -> bool:
        """Whether a step lies inside what was calibrated. Raises OutOfRangeError if not, unless that is allowed or
        ``may_refuse`` is False.
        """
        if rows <= cost.max_rows and context <= cost.max_context and tokens <= cost.max_tokens:
            return True
        if self.allow_extrapolation or not may_refuse:
            return False
        model = "" if self._placement is None else self._placement.model
        raise OutOfRangeError(
            f"profile costs of {model}",
            {"batch": rows, "context": context, "tokens": tokens},
            f"a step lies outside the calibrated range (batch <= {cost.max_rows}, context <= {cost.max_context}, "
            f"tokens per step <= {cost.max_tokens})",
            "Calibrate a wider range, lower the batcher's limits, or "
            "set allow_extrapolation: true (heliosim run: --allow-extrapolation).",
        )


class Asked(NamedTuple):
    """What a step was asked to compute, before exits are known.

    Tuples made for every step are made by ``_tuple_new``: three times as fast as calling their class.
    """

    rows: int
    tokens: int
    decode_rows: int
    longest_decode: int
    prefill_rows: int
    products: int
    started: int
    emitted: int
    longest: int
    context: int


def _asked(chunks: Sequence[Chunk], decoding: int, longest_decode: int, context: int) -> Asked:
    """``longest_decode``: tokens in KV of the decoding request that has most, its newest included; ``context``: of all
    of them.
    """
    if not decoding:
        longest_decode = 0
    decode_rows, emitted, tokens, longest = decoding, decoding, decoding, longest_decode
    prefill_rows = products = started = 0
    for chunk in chunks:
        start, count = chunk.start, chunk.count
        end = start + count
        tokens += count
        if end > longest:
            longest = end
        if not start:
            started += 1
        emitted += chunk.emits
        if count == 1 and chunk.emits and start:  # like a decode row
            decode_rows += 1
            longest_decode = max(longest_decode, end)
            context += end
        else:
            prefill_rows += 1
            products += count * end
    rows = decoding + len(chunks)
    asked = (rows, tokens, decode_rows, longest_decode, prefill_rows, products, started, emitted, longest, context)
    return _tuple_new(Asked, asked)


def _checks(layers: Sequence[int], deepest: int, exits: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Exit checks of a step, and rows checked in all: each exit up to the deepest asks those who have not left."""
    checks = checked = 0
    for exit_layer in layers:
        if exit_layer > deepest:
            break
        checks += 1
        checked += int(np.count_nonzero(exits >= exit_layer))
    return checks, checked


def over_context(cost: StepCost, step: StrideStep, context: int, count: int) -> list[StrideStep]:
    """``count`` steps alike but for the KV tokens their rows hold: ``context`` in the first, a token per row more in
    each. ``step``: as ``SimEngine._decode_step`` gives it; the sums are those of ``StepCost.seconds``.
    """
    _, layers, rows, decode_rows, prefill_tokens, emitted = step
    held = context + rows * np.arange(count)
    seconds = np.rint((step[0] + layers * (cost.per_context * held)) / TICK) * TICK
    return [
        _tuple_new(StrideStep, (one, layers, rows, decode_rows, prefill_tokens, emitted)) for one in seconds.tolist()
    ]


def within(steps: Sequence[StrideStep], left_s: Seconds, *, are_alike: bool) -> tuple[int, Seconds]:
    """How many steps are done until they last to ``left_s``, that many or all, and their seconds."""
    if are_alike:
        one, count = steps[0][0], len(steps)
        if one > 0 and left_s < one * count:
            count = max(1, -(-round(left_s / TICK) // round(one / TICK)))
        return count, one * count
    sums = list(accumulate(step[0] for step in steps))
    count = min(len(steps), bisect_left(sums, left_s) + 1)
    return count, sums[count - 1]


def sum_of_logprobs(going: Going, ticks: int) -> float:
    """Sum of the log probabilities of the tokens generated up to a tick."""
    if going.walk is None or going.since is None:
        return going.logprob_sum
    logprobs, start = going.walk.logprobs, going.generated
    stop = start + ticks - going.since
    taken = logprobs[start:stop] if stop <= len(logprobs) else logprobs[np.arange(start, stop) % len(logprobs)]
    return going.logprob_sum + float(np.add.reduce(taken))


def _outcome_of(stride: Stride) -> Outcome:
    seconds = 0.0
    for step in stride.steps:
        seconds += step[0]
    energy = None if stride.watts is None else sum(stride.watts.of(step) for step in stride.steps)
    agrees = None if stride.tokens is None else stride.tokens.agrees  # type: ignore[attr-defined]
    layers = stride.steps[-1][1]
    return _tuple_new(Outcome, (seconds, _NO_TOKENS, layers, energy, stride, None, agrees, None, 0.0, None))
