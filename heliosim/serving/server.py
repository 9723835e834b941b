"""The one state machine: it composes a controller, a batcher and a memory pool, and holds no clock.

A driver calls ``submit`` for arrivals, ``next_action`` for something to do, lets an engine do it, and calls
``complete``. Simulated and live drivers do exactly this, so whatever differs between them lies in the engine or in the
clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from heliosim.errors import LoadError
from heliosim.recorder import Recorder
from heliosim.serving.batcher import Batcher, Planned
from heliosim.serving.batcher import Sequence as Going
from heliosim.serving.changes import Change
from heliosim.serving.controller import Controller, require_placeable
from heliosim.serving.loading import Fetch, Loading, nearest
from heliosim.serving.memory import MemoryPool
from heliosim.types import (
    Action,
    Arriving,
    Batch,
    Bytes,
    Directive,
    Failure,
    Idle,
    Load,
    LoadPart,
    ModelSpec,
    Outcome,
    Placement,
    Request,
    RequestStatus,
    Run,
    Seconds,
    Served,
    Setting,
    StepKind,
    StepRecord,
    Stride,
    StrideRecord,
)

_IDLE = Idle()
_NOBODY: list[Served] = []
_FAILURES_RUNNING = 8
"""So many actions of a live engine may fail one behind the other; a batch is halved as often."""


class ServerStatus:
    """What a controller may see of a server: a view that is true until the server acts."""

    __slots__ = ("_server", "now")

    def __init__(self, server: Server) -> None:
        self._server = server
        self.now: Seconds = 0.0

    @property
    def placement(self) -> Placement | None:
        return self._server.placement

    @property
    def waiting(self) -> int:
        return self._server.batcher.waiting

    @property
    def running(self) -> int:
        return self._server.batcher.running

    @property
    def interrupted(self) -> int:
        return self._server.batcher.interrupted

    @property
    def weights_bytes(self) -> int:
        return self._server.pool.weights_bytes

    @property
    def kv_used_bytes(self) -> int:
        return self._server.pool.kv_used_bytes

    @property
    def kv_total_bytes(self) -> int:
        return self._server.pool.kv_total_bytes


class Server:
    """``models``: sizes of every model a controller may name. ``max_stride``: steps an engine may do per action.
    ``loading``: whether loads overlap with steps, and where weights wait. ``changes``: what becomes different during
    the run, in order of time; a server learns of each at its first turn then or later. ``less_memory``: what the
    controller is told when the engine finds that its device has fewer bytes for weights and KV.
    """

    def __init__(
        self,
        controller: Controller,
        batcher: Batcher,
        pool: MemoryPool,
        models: Mapping[str, ModelSpec],
        recorder: Recorder,
        max_stride: int = 1,
        loading: Loading | None = None,
        changes: Sequence[Change] = (),
        less_memory: Callable[[Bytes, Seconds], Change] | None = None,
    ) -> None:
        self.controller, self.batcher, self.pool, self.models, self.recorder = (
            controller,
            batcher,
            pool,
            models,
            recorder,
        )
        self.max_stride = max_stride
        self.placement: Placement | None = None
        self.max_context = min(spec.max_context for spec in models.values())
        self.loading = loading or Loading()
        self.fetch: Fetch | None = None
        self._given_up: Placement | None = None
        self._less_memory = less_memory
        self._failures = 0
        self._changes = deque(changes)
        self._is_resized = self._must_load = False
        self._arriving: tuple[int, Seconds | None] | None = None
        self._directive: Directive | None = None
        self._evicted: list[int] = []
        self._refused: list[Served] = []
        self._started = 0
        self._status = ServerStatus(self)
        self._settings: dict[bool, Setting] = {}

    def status(self, now: Seconds) -> ServerStatus:
        """The read-only view a controller decides on."""
        self._status.now = now
        return self._status

    def submit(self, request: Request, now: Seconds) -> None:
        """Take a request. One that no context window holds is refused at once (see ``take_refused``)."""
        if request.prompt_tokens + request.max_tokens > self.max_context:
            self._refuse(Going(request), "longer than the context window", now)
            return
        self.batcher.add(request)

    def next_action(self, now: Seconds, next_arrival_s: Seconds | None = None, max_ends: int | None = 1) -> Action:
        """What to do now. A wanted change of placement waits for running requests, or takes their KV, as directed.

        A stride of steps ends when the driver must speak again: at ``next_arrival_s``, known to it alone, and behind
        the ``max_ends``-th request that ends (None: whoever sent it will not react).
        """
        directive = self.ask(now)
        return _IDLE if directive is None else self.act(directive, now, next_arrival_s, max_ends)

    def ask(self, now: Seconds) -> Directive | None:
        """What the controller wants now; None if there is nothing to decide on."""
        if self._changes and self._changes[0].at_s <= now and self._arriving is None:
            self._take_changes(now)
        if self.placement is not None and not self._must_load and self._is_empty:
            return None
        directive = self.controller.decide(now, self.status(now))
        self._take_notes(now)
        return directive

    def act(self, directive: Directive, now: Seconds, next_arrival_s: Seconds | None, max_ends: int | None) -> Action:
        """The next action under a directive just given; otherwise as ``next_action``."""
        due_s = nearest(next_arrival_s, self._changes[0].at_s if self._changes else None)
        within = None if due_s is None else max(0.0, due_s - now)
        if self._must_load and directive.placement == self.placement:
            require_placeable(self.models[directive.placement.model], directive.placement.depth, self.pool.total_bytes)
        if self._is_resized:
            self._is_resized = False
            assert self.placement is not None
            return self._background(self.placement, "memory", "drop")
        refused = len(self._refused)
        if directive.max_ends is not None and (max_ends is None or directive.max_ends < max_ends):
            max_ends = directive.max_ends
        if directive.placement is not self.placement and directive.placement != self.placement:
            if self.loading.overlaps:
                meanwhile = self._meanwhile(directive, now, within, max_ends)
                if meanwhile is None and len(self._refused) > refused:
                    return self.next_action(now, now, max_ends)  # the refused may answer at once
                if meanwhile is not None:
                    return meanwhile
            drain = self.drain(directive)
            if drain is not None:
                action = self._run(drain, now, within, max_ends, admit=0)
                if action is not None:
                    return action
            return self._load(directive, now)
        if self.fetch is not None:
            return self._drop_fetch(now)
        self.follow(directive)
        # who started in a step that a sprint left to be done here counts
        admit = None if directive.admit is None else directive.admit - self._started
        action = self._run(directive, now, within, max_ends, admit=admit)
        if action is None and len(self._refused) > refused:
            # the controller may have waited for those just refused; they may answer at once
            return self.next_action(now, now, max_ends)
        return action or _IDLE

    def follow(self, directive: Directive) -> None:
        """Remember a directive for what is resident: running requests drain under it when another is wanted."""
        self._directive = directive
        self._given_up = None

    def drain(self, directive: Directive) -> Directive | None:
        """How running requests go on while another placement is wanted: as before, and nobody starts. None: they do
        not wait for that.
        """
        if directive.in_flight != "boundary" or self._directive is None or not self.batcher.running:
            return None
        return replace(self._directive, admit=0, max_ends=directive.max_ends)

    def may_sprint(self, directive: Directive) -> bool:
        """Whether no weights are under way, or will be at once: then nothing but requests needs attention."""
        if self.fetch is not None or self._arriving is not None or self._changes or self._is_resized or self._must_load:
            return False
        wanted = directive.placement
        return not self.loading.overlaps or wanted in (self.placement, self._given_up)

    # -- changes --------------------------------------------------------------------------------------------------

    def _take_changes(self, now: Seconds) -> None:
        """Let the changes that are due happen, and tell the controller, if it wants to know."""
        while self._changes and self._changes[0].at_s <= now:
            change = self._changes.popleft()
            preempted = (
                0 if change.budget_bytes is None else self._resize(change.budget_bytes - change.set_aside_bytes, now)
            )
            self.recorder.event(now, "changed", {**change.detail, "preempted": preempted})
            tell = getattr(self.controller, "changed", None)
            if tell is not None:
                tell(now, change)
                self._take_notes(now)

    def _resize(self, total_bytes: int, now: Seconds) -> int:
        """Go on in another amount of memory; returns how many requests gave up their KV for it, the youngest first.

        A transfer under way is given up. Where the resident weights do not fit any more, another placement is next.
        """
        pool, before = self.pool, len(self._evicted)
        if self.fetch is not None:
            self._abandon(now)
        weights, block = pool.weights_bytes, pool.block_bytes
        blocks = max(0, (total_bytes - weights) // block) if block else 0
        keep = self.batcher.running
        if pool.used_blocks > blocks:
            self._evicted += self.batcher.preempt(pool, keep=keep)
        while pool.used_blocks > blocks:
            keep -= 1
            self._evicted += self.batcher.preempt(pool, keep=keep)
        pool.resize(total_bytes)
        self._given_up = None
        self._settings.clear()
        is_serving = self.placement is not None
        self._must_load = is_serving and blocks < 1 + pool.request_blocks
        self._is_resized = is_serving and not self._must_load
        return len(self._evicted) - before

    # -- loads in the background --------------------------------------------------------------------------------------

    def _meanwhile(
        self, directive: Directive, now: Seconds, within_s: Seconds | None, max_ends: int | None
    ) -> Action | None:
        """What to do while the wanted weights come. None: they are there, nobody can run meanwhile, or there is no room
        for both; then the placement changes as it does without overlap.
        """
        wanted, fetch = directive.placement, self.fetch
        if fetch is not None and fetch.placement != wanted:
            if not self._can_fetch(wanted):
                self._given_up = wanted
                return self._drop_fetch(now)
            self._abandon(now)
            fetch = None
        if fetch is None:
            if wanted == self._given_up:
                return None
            if not self._can_fetch(wanted):
                self._given_up = wanted
                return None
            return self._begin_fetch(directive, now)
        if fetch.is_done(now):
            return None
        assert self._directive is not None
        going_on = replace(
            self._directive,
            admit=None,
            is_probe=False,
            guard=None,
            max_steps=1 if self.loading.slows_steps else directive.max_steps,
            max_ends=directive.max_ends,
        )
        run = self._run(going_on, now, nearest(within_s, fetch.left_s(now)), max_ends, admit=None)
        if run is not None:
            run.is_slowed = self.loading.slows_steps
        return run

    def _new_bytes(self, wanted: Placement) -> int:
        """Bytes of weights that a placement needs beyond those resident."""
        spec, old = self.models[wanted.model], self.placement
        resident = old.depth if old is not None and old.model == wanted.model else 0
        if resident >= wanted.depth:
            return 0
        return spec.weights_bytes(wanted.depth) - (spec.weights_bytes(resident) if resident else 0)

    def _can_fetch(self, wanted: Placement) -> bool:
        """Whether steps can go on while a placement's weights come: something is resident, and both fit."""
        more = self._new_bytes(wanted)
        return self.placement is not None and self._directive is not None and more > 0 and self.pool.can_reserve(more)

    def _begin_fetch(self, directive: Directive, now: Seconds) -> Load:
        wanted = directive.placement
        self.pool.reserve(self._new_bytes(wanted))
        self._settings.clear()
        self.fetch = Fetch(wanted, directive.reason, now)
        return self._background(wanted, directive.reason, "begin")

    def _drop_fetch(self, now: Seconds) -> Load:
        self._abandon(now)
        assert self.placement is not None
        return self._background(self.placement, "abandon", "drop")

    def _abandon(self, now: Seconds) -> None:
        fetch = self.fetch
        assert fetch is not None
        detail = {"placement": str(fetch.placement), "reason": fetch.reason, "hidden_s": fetch.hidden_s(now)}
        self.recorder.event(now, "fetch abandoned", detail)
        self.fetch = None
        self.pool.reserve(0)
        self._settings.clear()

    def _background(self, placement: Placement, reason: str, part: LoadPart) -> Load:
        here = self.placement
        assert here is not None
        return Load(
            placement,
            self.pool.total_blocks,
            reason,
            stores_hidden=self.pool.block_bytes != self.models[here.model].block_bytes(here.depth),
            evicted=self._take_evicted(),
            part=part,
            **(self._from_host(placement) if part == "begin" else {}),
        )

    def _from_host(self, placement: Placement) -> dict[str, Any]:
        """Where the weights of a load come from, and what host memory holds behind it."""
        host, old = self.loading.host, self.placement
        if host is None:
            return {}
        resident = old.depth if old is not None and old.model == placement.model else 0
        missing = host.missing_bytes(placement, resident)
        host.use(placement)
        return {"disk_bytes": missing, "host": host.held}

    def _book_load(self, load: Load, outcome: Outcome, now: Seconds) -> None:
        """What a load that ended at ``now`` says of weights under way."""
        fetch = self.fetch
        if load.part == "begin":
            assert fetch is not None
            fetch.began_s, fetch.issue_s = now, outcome.seconds
        elif load.part == "finish":
            assert fetch is not None
            start_s = now - outcome.seconds
            if fetch.due_s is None and outcome.arrives_s is not None:
                fetch.due_s = now + outcome.arrives_s
            detail = {
                "placement": str(fetch.placement),
                "reason": fetch.reason,
                "hidden_s": fetch.hidden_s(start_s),
                "exposed_s": fetch.issue_s + outcome.seconds,
                "transfer_s": None if fetch.due_s is None else fetch.due_s - fetch.began_s,
            }
            self.recorder.event(now, "fetched", detail)
            self.fetch = None
        elif load.is_pipelined and outcome.arrives_s is not None:
            assert self._arriving is not None
            self._arriving = (self._arriving[0], now + outcome.arrives_s)

    def _book_arrival(self, action: Run, outcome: Outcome, now: Seconds) -> None:
        """What a run that ended at ``now`` says of weights under way."""
        if outcome.arrives_s is not None and self.fetch is not None:
            self.fetch.due_s = now + outcome.arrives_s
        if action.arriving is not None:
            self._arriving = None  # every step needs every layer
            detail = {"placement": str(action.placement), "seconds": outcome.stalled_s}
            self.recorder.event(now, "stalled", detail)

    # -- what an engine could not do ----------------------------------------------------------------------------------

    def _fail(self, action: Run | Load, outcome: Outcome, failure: Failure, now: Seconds) -> None:
        """Book an action that was not done, and go on so that another can be.

        Behind a load nothing is resident, everybody waits, and the next action is a load again; where a transfer beside
        steps could not begin, what is resident serves on. Behind a step that did not fit the device, half of those who
        run wait, and batches stay that small. Raises LoadError if nothing but failures comes.
        """
        self._failures += 1
        if self._failures > _FAILURES_RUNNING:
            raise LoadError(f"{self._failures} actions running failed, the last because of: {failure.problem}")
        kv_used, before = self.pool.kv_used_bytes, len(self._evicted)
        if not failure.is_intact or (isinstance(action, Load) and action.part in ("whole", "finish")):
            self._vacate(now)
        elif isinstance(action, Load):
            self._give_up_fetch(now)
        else:
            self._run_fewer(action.batch)
        self._record_step(action, outcome, now, kv_used)
        preempted = len(self._evicted) - before
        detail = {"action": _name_of(action), "placement": str(action.placement), "problem": failure.problem}
        self.recorder.event(now, "failed", {**detail, "preempted": preempted})
        if failure.available_bytes is not None and failure.available_bytes < self.pool.total_bytes:
            self._live_with(failure.available_bytes, now)

    def _vacate(self, now: Seconds) -> None:
        """Have nothing resident; everybody waits at the head, in the old order."""
        if self.fetch is not None:
            self._abandon(now)
        self._evicted += self.batcher.preempt(self.pool)
        self.pool.vacate()
        self.placement = self._directive = self._given_up = self._arriving = None
        self._is_resized = self._must_load = False
        self._settings.clear()

    def _give_up_fetch(self, now: Seconds) -> None:
        """Go on without a transfer that could not begin, or came to nothing; the engine is told of the blocks."""
        if self.fetch is not None:
            self._given_up = self.fetch.placement
            self._abandon(now)
        self._is_resized = True

    def _lose_fetch(self, failure: Failure, now: Seconds) -> None:
        """Go on without a transfer that came to nothing; the placement it was for is loaded without overlap."""
        if self.fetch is None:
            return
        detail = {"action": "fetch", "placement": str(self.fetch.placement), "problem": failure.problem, "preempted": 0}
        self.recorder.event(now, "failed", detail)
        self._give_up_fetch(now)

    def _run_fewer(self, batch: Batch) -> None:
        rows = self.batcher.running
        self._evicted += self.batcher.preempt(self.pool, keep=rows // 2)
        self.batcher.limit(rows // 2, batch.tokens // 2)

    def _live_with(self, total_bytes: Bytes, now: Seconds) -> None:
        """Go on in less memory than the scenario gave; the controller is told."""
        preempted = self._resize(total_bytes, now)
        detail: dict[str, Any] = {"budget_bytes": total_bytes, "reason": "the device has no more"}
        self.recorder.event(now, "changed", {**detail, "preempted": preempted})
        tell = getattr(self.controller, "changed", None)
        if tell is not None and self._less_memory is not None:
            tell(now, self._less_memory(total_bytes, now))
            self._take_notes(now)

    # -- booking --------------------------------------------------------------------------------------------------

    def complete(self, action: Run | Load, outcome: Outcome, now: Seconds) -> list[Served]:
        """Book an action that ended at ``now``; returns the requests that ended with it."""
        if outcome.failure is not None:
            if outcome.failure.what != "fetch":
                self._fail(action, outcome, outcome.failure, now)
                return []
            served = self.complete(action, outcome._replace(failure=None), now)
            self._lose_fetch(outcome.failure, now)
            return served
        self._failures = 0
        if isinstance(action, Load):
            if outcome.arrives_s is not None and self.fetch is not None and action.part == "begin":
                self.fetch.due_s = now + outcome.arrives_s
            self._book_load(action, outcome, now)
            self._record_step(action, outcome, now, self.pool.kv_used_bytes)
            return []
        if self.fetch is not None or action.arriving is not None:
            self._book_arrival(action, outcome, now)
        stride = outcome.stride
        if stride is not None:
            return self._complete_stride(action, outcome, stride, now)
        kv_used = self.pool.kv_used_bytes  # what the step really held: before ended requests give theirs back
        ended = self.batcher.settle(action.batch, outcome.tokens, self.pool, now, outcome.logprob_sums)
        served = [self._served(seq, now, "finished", "") for seq in ended]
        self.controller.observe(now, action, _as_seen_live(outcome), served, self._started)
        self._started = 0
        self.recorder.tokens(now, action, outcome)
        for record in served:
            self.recorder.served(record)
        self._record_step(action, outcome, now, kv_used)
        self._take_notes(now)
        return served

    def _complete_stride(self, action: Run, outcome: Outcome, stride: Stride, now: Seconds) -> list[Served]:
        start_s = now - outcome.seconds
        ended, blocks, running = self.batcher.settle_stride(action, stride, self.pool, start_s)
        served = [self.finish(seq, at) for seq, at in ended]
        waiting = [self.batcher.waiting] * len(stride.steps)
        self.tell(action, outcome, served, now, waiting, running, blocks)
        return served

    def finish(self, seq: Going, now: Seconds) -> Served:
        """Put a request that has ended on record."""
        record = self._served(seq, now, "finished", "")
        self.recorder.served(record)
        return record

    def tell(
        self,
        run: Run,
        outcome: Outcome,
        served: list[Served],
        now: Seconds,
        waiting: list[int],
        running: list[int],
        kv_blocks: list[int],
    ) -> None:
        """Tell controller and recorder of a stride that ended at ``now``. Lists: by step, as in ``StrideRecord``."""
        stride = outcome.stride
        assert stride is not None
        start_s, agrees = now - outcome.seconds, outcome.agrees
        if agrees is not None:
            outcome = outcome._replace(agrees=None)  # nobody knows that live
        self.controller.observe(now, run, outcome, served, self._started)
        self._started = 0
        setting = self._settings.get(run.is_probe)
        if setting is None:
            placement, kv_bytes = run.placement, self.pool.kv_total_bytes
            setting = Setting(placement.model, placement.depth, self.pool.weights_bytes, kv_bytes, run.is_probe)
            self._settings[run.is_probe] = setting
        breaches = self.controller.breaches_over(len(stride.steps))
        block_bytes = self.pool.block_bytes
        self.recorder.stride(
            StrideRecord(start_s, stride, setting, waiting, running, kv_blocks, block_bytes, breaches, agrees)
        )
        self._take_notes(now)

    def take_refused(self) -> list[Served]:
        """Requests refused since the last call; the driver tells their senders and the engine."""
        if not self._refused:
            return _NOBODY
        refused, self._refused = self._refused, []
        return refused

    @property
    def has_refused(self) -> bool:
        """Whether ``take_refused`` would give any."""
        return bool(self._refused)

    def stop(self) -> None:
        """Check the books and give up the weights. Raises AssertionError if anything is left behind."""
        assert self._is_empty, f"{self.batcher.waiting} waiting, {self.batcher.running} running"
        assert self.pool.used_blocks == 0, f"{self.pool.used_blocks} blocks still held"
        self.pool.check()
        self.pool.clear()

    @property
    def _is_empty(self) -> bool:
        return not self.batcher.waiting and not self.batcher.running

    def _run(
        self, directive: Directive, now: Seconds, within_s: Seconds | None, max_ends: int | None, *, admit: int | None
    ) -> Run | None:
        plan = self.batcher.next_batch(self.pool, now=now, admit=admit, is_probe=directive.is_probe)
        if plan.started or plan.evicted or plan.refused:
            self._book(plan, now)
        if plan.batch is None:
            return None
        assert self.placement is not None
        evicted = self._take_evicted() if self._evicted else ()
        steps = min(plan.max_steps, self.max_stride)
        if directive.max_steps is not None and directive.max_steps < steps:
            steps = directive.max_steps
        in_stride = directive.max_steps is None and self.max_stride > 1
        if self._arriving is not None:
            arriving = self._take_arriving(now)
            if arriving is not None:
                run = Run(self.placement, directive.exits, plan.batch, evicted, directive.is_probe)
                run.arriving = arriving
                return run
        if steps == 1 or plan.refused:  # the refused may answer at once, earlier than the arrival the driver knew of
            return Run(self.placement, directive.exits, plan.batch, evicted, directive.is_probe, in_stride=in_stride)
        return Run(
            self.placement,
            directive.exits,
            plan.batch,
            evicted,
            directive.is_probe,
            steps,
            within_s,
            directive.guard,
            plan.program,
            max_ends if plan.may_pass_ends else 1,
            in_stride,
        )

    def _take_arriving(self, now: Seconds) -> Arriving | None:
        """What of the resident placement has not arrived; None, and no longer asked for, if all has."""
        assert self._arriving is not None
        present, due_s = self._arriving
        if due_s is not None and due_s <= now:
            self._arriving = None
            return None
        return Arriving(present, None if due_s is None else due_s - now)

    def _book(self, plan: Planned, now: Seconds) -> None:
        self._evicted += plan.evicted
        self._started += plan.started
        for seq, reason in plan.refused:
            self._refuse(seq, reason, now)

    def _load(self, directive: Directive, now: Seconds) -> Load:
        """Change the placement in the books and say what the engine must do for it."""
        old, new = self.placement, directive.placement
        spec = self.models[new.model]
        fetch = self.fetch if self.fetch is not None and self.fetch.placement == new else None
        if self.fetch is not None and fetch is None:
            self._abandon(now)
        came_from = {} if fetch is not None else self._from_host(new)
        is_same = old is not None and old.model == new.model
        present = old.depth if old is not None and is_same else 0
        is_pipelined = self.loading.is_pipelined and fetch is None and present < new.depth
        stores_hidden = directive.in_flight == "extend"
        weights, block = spec.weights_bytes(new.depth), spec.block_bytes(new.depth, stores_hidden)
        beside = spec.request_blocks(new.depth, stores_hidden)
        extends = stores_hidden and old is not None and old.model == new.model and old.depth < new.depth
        keep = self.batcher.running if extends else 0
        self._evicted += self.batcher.preempt(self.pool, keep=keep)
        while not self.pool.can_place(weights, block, beside) and keep:
            keep -= 1
            self._evicted += self.batcher.preempt(self.pool, keep=keep)
        self.pool.place(weights, block, beside)
        self.placement = new
        self._settings.clear()
        self._directive = directive
        self._given_up = None
        self._is_resized = self._must_load = False
        self._arriving = (present, None) if is_pipelined else None
        return Load(
            placement=new,
            kv_blocks=self.pool.total_blocks,
            reason=directive.reason,
            stores_hidden=stores_hidden and new.depth < spec.layers,
            kept=tuple(self.batcher.in_kv()),
            evicted=self._take_evicted(),
            part="whole" if fetch is None else "finish",
            left_s=None if fetch is None else fetch.left_s(now),
            is_pipelined=is_pipelined,
            **came_from,
        )

    def _take_evicted(self) -> tuple[int, ...]:
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def _refuse(self, seq: Going, reason: str, now: Seconds) -> None:
        record = self._served(seq, now, "refused", reason)
        self._refused.append(record)
        self.recorder.served(record)

    def _served(self, seq: Going, now: Seconds, status: RequestStatus, refusal: str) -> Served:
        request = seq.request
        return Served(
            request.id,
            request.arrival_s,
            seq.admitted_s,
            seq.first_token_s,
            now,
            request.prompt_tokens,
            request.max_tokens,
            seq.generated,
            status,
            refusal,
            seq.preemptions,
            seq.logprob_sum,
            seq.is_probe,
            self.placement,
            request.priority,
            request.predicted_tokens,
            seq.recomputed,
        )

    def _take_notes(self, now: Seconds) -> None:
        notes = self.controller.take_notes()
        for note in notes:
            self.recorder.event(now, note.kind, dict(note.detail))

    def _record_step(self, action: Run | Load, outcome: Outcome, now: Seconds, kv_used: int) -> None:
        batch = action.batch if isinstance(action, Run) else None
        placement = action.placement
        kind: StepKind = "run"
        if isinstance(action, Load):
            kind = "load"
            if action.part in ("begin", "drop"):
                assert self.placement is not None
                placement, kind = self.placement, "fetch"
        decode = batch.decode_rows if batch is not None else 0
        self.recorder.step(
            StepRecord(
                start_s=now - outcome.seconds,
                seconds=outcome.seconds,
                kind=kind,
                reason=action.reason if isinstance(action, Load) else "",
                model=placement.model,
                depth=placement.depth,
                layers_run=outcome.layers_run,
                rows=len(batch) if batch is not None else 0,
                decode_rows=decode,
                prefill_tokens=batch.tokens - decode if batch is not None else 0,
                tokens_out=len(outcome.tokens),
                waiting=self.batcher.waiting,
                running=self.batcher.running,
                weights_bytes=self.pool.weights_bytes,
                kv_used_bytes=kv_used,
                kv_total_bytes=self.pool.kv_total_bytes,
                breaches=self.controller.breaches,
                is_probe=isinstance(action, Run) and action.is_probe,
                energy_j=outcome.energy_j,
            )
        )


def _name_of(action: Run | Load) -> str:
    if isinstance(action, Run):
        return "run"
    return "load" if action.part in ("whole", "finish") else "fetch"


def _as_seen_live(outcome: Outcome) -> Outcome:
    """An outcome without what only a simulated engine knows: whether the full model would have agreed."""
    if outcome.tokens.agrees is None:
        return outcome
    return outcome._replace(tokens=replace(outcome.tokens, agrees=None))
