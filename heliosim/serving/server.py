"""The one state machine: it composes a controller, a batcher and a memory pool, and holds no clock.

A driver calls ``submit`` for arrivals, ``next_action`` for something to do, lets an engine do it, and calls
``complete``. Simulated and live drivers do exactly this, so whatever differs between them lies in the engine or in the
clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from heliosim.errors import MemoryBudgetError
from heliosim.recorder import Recorder
from heliosim.serving.batcher import Batcher, Planned, Sequence
from heliosim.serving.controller import Controller
from heliosim.serving.memory import MemoryPool
from heliosim.types import (
    Action,
    Directive,
    Idle,
    Load,
    ModelSpec,
    Outcome,
    Placement,
    Request,
    Run,
    Seconds,
    Served,
    Status,
    StepRecord,
)


class Server:
    """``models`` are the sizes of every model a controller may name."""

    def __init__(
        self,
        controller: Controller,
        batcher: Batcher,
        pool: MemoryPool,
        models: Mapping[str, ModelSpec],
        recorder: Recorder,
    ) -> None:
        self.controller, self.batcher, self.pool, self.models, self.recorder = (
            controller,
            batcher,
            pool,
            models,
            recorder,
        )
        self.placement: Placement | None = None
        self.max_context = min(spec.max_context for spec in models.values())
        self._directive: Directive | None = None
        self._evicted: list[int] = []
        self._refused: list[Served] = []
        self._started = 0

    def status(self, now: Seconds) -> Status:
        """The read-only snapshot a controller decides on."""
        return Status(
            now=now,
            placement=self.placement,
            waiting=self.batcher.waiting,
            running=self.batcher.running,
            interrupted=self.batcher.interrupted,
            weights_bytes=self.pool.weights_bytes,
            kv_used_bytes=self.pool.kv_used_bytes,
            kv_total_bytes=self.pool.kv_total_bytes,
        )

    def submit(self, request: Request, now: Seconds) -> None:
        """Take a request. One that no context window holds is refused at once (see ``take_refused``)."""
        if request.prompt_tokens + request.max_tokens > self.max_context:
            self._refuse(Sequence(request), "longer than the context window", now)
            return
        self.batcher.add(request)

    def next_action(self, now: Seconds) -> Action:
        """What to do now. A wanted change of placement waits for running requests, or takes their KV, as directed."""
        if self._is_empty and self.placement is not None:
            return Idle()
        directive = self.controller.decide(now, self.status(now))
        self._take_notes(now)
        if directive.placement != self.placement:
            if self.batcher.running and directive.in_flight == "boundary" and self._directive is not None:
                action = self._run(self._directive, now, admit=0)
                if action is not None:
                    return action
            return self._load(directive, now)
        self._directive = directive
        refused = len(self._refused)
        action = self._run(directive, now, admit=directive.admit)
        if action is None and len(self._refused) > refused:
            return self.next_action(now)  # those the controller waited for may be the ones just refused
        return action or Idle()

    def complete(self, action: Run | Load, outcome: Outcome, now: Seconds) -> list[Served]:
        """Book an action that ended at ``now``; returns the requests that ended with it."""
        if isinstance(action, Load):
            self._record(action, outcome, now, self.pool.kv_used_bytes)
            return []
        kv_used = self.pool.kv_used_bytes  # before ended requests give theirs back: what the step really held
        ended = self.batcher.settle(action.batch, outcome.tokens, self.pool, now)
        served = [self._served(seq, now, "finished", "") for seq in ended]
        self.controller.observe(now, action, _as_seen_live(outcome), served, self._started)
        self._started = 0
        self.recorder.tokens(now, action, outcome)
        for record in served:
            self.recorder.served(record)
        self._record(action, outcome, now, kv_used)
        self._take_notes(now)
        return served

    def take_refused(self) -> list[Served]:
        """Requests refused since the last call; the driver tells their senders and the engine."""
        refused, self._refused = self._refused, []
        return refused

    def stop(self) -> None:
        """Check the books and give up the weights. Raises AssertionError if anything is left behind."""
        assert self._is_empty, f"{self.batcher.waiting} waiting, {self.batcher.running} running"
        assert self.pool.used_blocks == 0, f"{self.pool.used_blocks} blocks still held"
        self.pool.check()
        self.pool.clear()

    @property
    def _is_empty(self) -> bool:
        return not self.batcher.waiting and not self.batcher.running

    def _run(self, directive: Directive, now: Seconds, *, admit: int | None) -> Run | None:
        plan = self.batcher.next_batch(self.pool, now=now, admit=admit, is_probe=directive.is_probe)
        self._book(plan, now)
        if plan.batch is None:
            return None
        assert self.placement is not None
        return Run(self.placement, directive.exits, plan.batch, self._take_evicted(), directive.is_probe)

    def _book(self, plan: Planned, now: Seconds) -> None:
        self._evicted += plan.evicted
        self._started += plan.started
        for seq, reason in plan.refused:
            self._refuse(seq, reason, now)

    def _load(self, directive: Directive, now: Seconds) -> Load:
        """Change the placement in the books and say what the engine must do for it."""
        old, new = self.placement, directive.placement
        spec = self.models[new.model]
        stores_hidden = directive.in_flight == "extend"
        weights, block = spec.weights_bytes(new.depth), spec.block_bytes(new.depth, stores_hidden)
        extends = stores_hidden and old is not None and old.model == new.model and old.depth < new.depth
        keep = self.batcher.running if extends else 0
        self._evicted += self.batcher.preempt(self.pool, keep=keep)
        while not self.pool.can_place(weights, block) and keep:
            keep -= 1
            self._evicted += self.batcher.preempt(self.pool, keep=keep)
        self.pool.place(weights, block)
        self.placement = new
        self._directive = directive
        return Load(
            placement=new,
            kv_blocks=self.pool.total_blocks,
            reason=directive.reason,
            stores_hidden=stores_hidden and new.depth < spec.layers,
            kept=tuple(self.batcher.in_kv()),
            evicted=self._take_evicted(),
        )

    def _take_evicted(self) -> tuple[int, ...]:
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def _refuse(self, seq: Sequence, reason: str, now: Seconds) -> None:
        record = self._served(seq, now, "refused", reason)
        self._refused.append(record)
        self.recorder.served(record)

    def _served(self, seq: Sequence, now: Seconds, status: str, refusal: str) -> Served:
        return Served(
            id=seq.request.id,
            arrival_s=seq.request.arrival_s,
            admitted_s=seq.admitted_s,
            first_token_s=seq.first_token_s,
            finish_s=now,
            prompt_tokens=seq.request.prompt_tokens,
            max_tokens=seq.request.max_tokens,
            output_tokens=seq.generated,
            status="finished" if status == "finished" else "refused",
            refusal=refusal,
            preemptions=seq.preemptions,
            logprob_sum=seq.logprob_sum,
            is_probe=seq.is_probe,
            placement=self.placement,
        )

    def _take_notes(self, now: Seconds) -> None:
        for note in self.controller.take_notes():
            self.recorder.event(now, note.kind, dict(note.detail))

    def _record(self, action: Run | Load, outcome: Outcome, now: Seconds, kv_used: int) -> None:
        rows = action.batch if isinstance(action, Run) else None
        decode = 0
        if rows is not None:
            decode = sum(
                1 for s, n, e in zip(rows.starts, rows.counts, rows.emits, strict=True) if s > 0 and n == 1 and e
            )
        tokens = sum(rows.counts) if rows else 0
        self.recorder.step(
            StepRecord(
                start_s=now - outcome.seconds,
                seconds=outcome.seconds,
                kind="run" if isinstance(action, Run) else "load",
                reason=action.reason if isinstance(action, Load) else "",
                model=action.placement.model,
                depth=action.placement.depth,
                layers_run=outcome.layers_run,
                rows=len(rows) if rows else 0,
                decode_rows=decode,
                prefill_tokens=tokens - decode,
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


def _as_seen_live(outcome: Outcome) -> Outcome:
    """An outcome without what only a simulated engine knows: whether the full model would have agreed."""
    if outcome.tokens.agrees is None:
        return outcome
    return replace(outcome, tokens=replace(outcome.tokens, agrees=None))


def require_placeable(spec: ModelSpec, depth: int, budget_bytes: int) -> None:
    """Raise MemoryBudgetError unless ``depth`` layers of a model and one KV block fit the budget."""
    need = spec.weights_bytes(depth) + spec.block_bytes(depth)
    if need > budget_bytes:
        raise MemoryBudgetError(
            "memory.budget_bytes",
            budget_bytes,
            f"too small for {spec.name} at {depth} of {spec.layers} layers with one KV block",
            f"Give at least {need:,} B, or choose a smaller model.",
        )
