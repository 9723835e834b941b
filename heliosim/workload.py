"""Workloads: which requests arrive and when, from a specification and a seed.

``WorkloadSpec`` is what a scenario embeds; ``build`` makes a ``Source`` of it, which both drivers read. A source holds
no clock: open arrivals are a sorted list, a closed loop answers to finished requests.

Every draw comes from a named stream (``streams.stream``), one number per request and purpose. So the k-th request's
task and lengths depend on the seed and k alone, not on the arrival process nor on how many requests there are, and a
change of one distribution moves nothing else. (Only what is shared out by count depends on the counts.)
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from heliosim.arrivals import ARRIVALS, ArrivalProcess, Closed, Gaps, Replay, parse_arrivals
from heliosim.errors import InputError
from heliosim.formats.files import Strict, without_none
from heliosim.formats.trace import Trace, TraceRow, import_trace
from heliosim.lengths import Lengths, cumulative_shares
from heliosim.predictors import AnyPredictor, Priorities
from heliosim.streams import stream
from heliosim.types import Arrival, Content, Prediction, Request, RequestId, Seconds, tick

# --- sources ------------------------------------------------------------------------------------------------


class Source(Protocol):
    """What a driver reads arrivals from. Pure: it knows no time but what it is told."""

    @property
    def next_s(self) -> Seconds | None:
        """Time of the next arrival known now; None when none is pending."""
        ...

    def take(self, now: Seconds) -> list[Arrival]:
        """Hand over all arrivals due by ``now``, in order of time."""
        ...

    def finished(self, request_id: RequestId, now: Seconds) -> None:
        """A request has left the server, served or refused."""
        ...

    @property
    def is_exhausted(self) -> bool:
        """Whether no arrival will ever come again."""
        ...

    @property
    def is_answering(self) -> bool:
        """Whether a request's end makes another one come."""
        ...


_GONE = Arrival(Request(-1, 0.0, 0, 0), Content())


class OpenLoop:
    """Arrivals at given times, whatever the server does."""

    is_answering = False

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        for before, after in pairwise(arrivals):
            if after.request.arrival_s < before.request.arrival_s:
                raise ValueError(f"arrivals must be sorted by time; request {after.request.id} is too early")
        self._begin(list(arrivals))

    @classmethod
    def of_sorted(cls, arrivals: list[Arrival]) -> OpenLoop:
        """The same of a list that is known to be sorted and is nobody else's."""
        source = cls.__new__(cls)
        source._begin(arrivals)
        return source

    def _begin(self, arrivals: list[Arrival]) -> None:
        self._arrivals = arrivals
        self._taken = 0
        self.next_s: Seconds | None = self._arrivals[0].request.arrival_s if self._arrivals else None

    def take(self, now: Seconds) -> list[Arrival]:
        arrivals, at = self._arrivals, self._taken
        if not at and arrivals and arrivals[-1].request.arrival_s <= now:  # all at once
            self._arrivals, self.next_s = [], None
            return arrivals
        if self.next_s is None or self.next_s > now:
            return []
        count = len(arrivals)
        at += 1
        while at < count and arrivals[at].request.arrival_s <= now:
            at += 1
        self.next_s = arrivals[at].request.arrival_s if at < count else None
        if at - self._taken == 1:
            due = [arrivals[self._taken]]
            arrivals[self._taken], self._taken = _GONE, at
            return due
        due = arrivals[self._taken : at]
        arrivals[self._taken : at] = [_GONE] * len(due)  # kept no longer than who serves them keeps them
        self._taken = at
        return due

    def finished(self, request_id: RequestId, now: Seconds) -> None:
        """Open arrivals do not react."""

    @property
    def is_exhausted(self) -> bool:
        return self._taken == len(self._arrivals)


@dataclass(frozen=True, slots=True)
class Body:
    """A request before it has a time."""

    prompt_tokens: int
    max_tokens: int
    content: Content
    priority: int = 0
    prediction: Prediction | None = None

    def at(self, request_id: RequestId, arrival_s: Seconds) -> Arrival:
        """This request, arriving."""
        sizes = (self.prompt_tokens, self.max_tokens)
        return Arrival(Request(request_id, arrival_s, *sizes, self.priority, self.prediction), self.content)


class ClosedLoop:
    """``users`` who each send a request, wait for its end, think for ``think_s`` seconds and send the next.

    All start at time 0. Bodies go out in their order, whoever sends them; the k-th has id k.
    """

    is_answering = True

    def __init__(self, bodies: Sequence[Body], users: int, think_s: Seconds) -> None:
        if users < 1 or not 0 <= think_s < math.inf:
            raise ValueError(f"a closed loop needs users >= 1 and think_s >= 0, not {users} and {think_s}")
        self._bodies = list(bodies)
        self._think_s = tick(think_s)
        self._due: list[Seconds] = [0.0] * min(users, len(bodies))
        self._sent = 0
        self._running: set[RequestId] = set()

    @property
    def next_s(self) -> Seconds | None:
        return self._due[0] if self._due else None

    def take(self, now: Seconds) -> list[Arrival]:
        arrivals = []
        while self._due and self._due[0] <= now:
            arrivals.append(self._bodies[self._sent].at(self._sent, heapq.heappop(self._due)))
            self._running.add(self._sent)
            self._sent += 1
        return arrivals

    def finished(self, request_id: RequestId, now: Seconds) -> None:
        if request_id not in self._running:
            raise ValueError(f"request {request_id} is not in flight")
        self._running.remove(request_id)
        # as many send times may be pending as there are bodies left to send
        if self._sent + len(self._due) < len(self._bodies):
            heapq.heappush(self._due, tick(now + self._think_s))

    @property
    def is_exhausted(self) -> bool:
        return self._sent == len(self._bodies)


# --- specification ------------------------------------------------------------------------------------------


class TaskSpec(Strict):
    """Requests of one task family.

    ``share`` (a weight, of any sum) or ``count``; neither means share 1. ``prompt_tokens`` and ``output_tokens`` are
    left out with a trace, which has its own; ``output_tokens`` also with natural lengths. ``max_tokens``: what the
    client allows; default: the largest output length that can be drawn, the same for all requests of the task.
    """

    task: str
    share: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    count: int | None = Field(default=None, ge=1)
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        if self.share is not None and self.count is not None:
            raise ValueError("give share or count, not both")
        if self.output_tokens and self.max_tokens is not None and self.max_tokens < self.output_tokens.largest:
            largest = self.output_tokens.largest
            raise ValueError(f"max_tokens ({self.max_tokens}) is less than the largest of output_tokens ({largest})")
        return self


class WorkloadSpec(Strict):
    """What arrives: bodies from ``tasks`` or from the rows of a ``trace``, at the times of an arrival process.

    ``requests``: how many; default: all of the trace, or the sum of the tasks' counts.
    ``arrivals``: default with a trace: its own times; without one it must be given.
    ``order``: tasks in consecutive ``blocks`` or as a ``mix`` (shares: drawn for each request; counts: shuffled).
    ``trace``: a native trace or a file ``formats.trace.import_trace`` recognises. Given with ``tasks``, the tasks name
    its requests (which must not have names) and have shares or counts, but no lengths.
    ``max_tokens``: with a trace, what clients allow where the trace does not say; default: the trace's largest output
    length, the same for all, since a limit of each request's own would tell the server its length.
    ``lengths``: ``forced`` generates the given output lengths whatever the model says; ``natural`` lets the model end.
    ``predictor``: what a scheduler is told of lengths; None: nothing. ``priorities``: classes of requests, drawn; None:
    those of the trace, or one class (docs/scheduling.md).
    """

    requests: int | None = Field(default=None, ge=1)
    arrivals: Annotated[SerializeAsAny[ArrivalProcess], BeforeValidator(parse_arrivals)] | None = None
    tasks: tuple[TaskSpec, ...] = ()
    order: Literal["blocks", "mix"] | None = None
    trace: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    lengths: Literal["forced", "natural"] = "forced"
    predictor: AnyPredictor | None = None
    priorities: Priorities | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(handler(self), "predictor", "priorities")

    @model_validator(mode="after")
    def _consistent(self) -> WorkloadSpec:
        self._check_tasks()
        if self.lengths == "natural" and self.predictor is not None and self.predictor.kind != "none":
            raise ValueError("predictor: natural lengths are known to nobody before they are generated; use kind none")
        if self.trace is None:
            self._check_without_trace()
        else:
            self._check_with_trace()
        return self

    def _check_tasks(self) -> None:
        with_count = [task for task in self.tasks if task.count is not None]
        if with_count and len(with_count) < len(self.tasks):
            raise ValueError("tasks: give all a count or none")
        total = sum(task.count or 0 for task in self.tasks)
        if with_count and self.requests is not None and self.requests != total:
            raise ValueError(f"requests ({self.requests}) is not the sum of the tasks' counts ({total}); leave it out")
        if len(self.tasks) > 1 and self.order is None:
            raise ValueError("order: say blocks or mix for more than one task")
        if not self.tasks and self.order is not None:
            raise ValueError("order: there are no tasks to order; leave it out")

    def _check_without_trace(self) -> None:
        if not self.tasks:
            raise ValueError("give tasks or a trace")
        if self.requests is None and self.tasks[0].count is None:
            raise ValueError("requests: give a number, or each task a count")
        if self.arrivals is None:
            raise ValueError(f"arrivals: give a process; known: {', '.join(sorted(ARRIVALS))}")
        if isinstance(self.arrivals, Replay):
            raise ValueError("arrivals: replay needs a trace")
        if self.max_tokens is not None:
            raise ValueError("max_tokens: is for a trace; give it to the tasks")
        for task in self.tasks:
            name = f"task {task.task!r}"
            if task.prompt_tokens is None:
                raise ValueError(f"{name}: prompt_tokens is missing")
            if self.lengths == "forced" and task.output_tokens is None:
                raise ValueError(f"{name}: output_tokens is missing (lengths are forced)")
            if self.lengths == "natural" and (task.output_tokens is not None or task.max_tokens is None):
                raise ValueError(f"{name}: natural lengths need max_tokens and no output_tokens")

    def _check_with_trace(self) -> None:
        for task in self.tasks:
            if task.prompt_tokens or task.output_tokens or task.max_tokens is not None:
                raise ValueError(f"task {task.task!r}: lengths come from the trace; leave them out")


# --- building -----------------------------------------------------------------------------------------------


def build(spec: WorkloadSpec, seed: int) -> Source:
    """A fresh source. Raises InputError for traces that cannot be used."""
    bodies, rows = _bodies(spec, seed)
    if isinstance(spec.arrivals, Closed):
        return ClosedLoop(bodies, spec.arrivals.users, spec.arrivals.think_s)
    return OpenLoop(_at_times(bodies, _times(spec, rows, len(bodies), seed)))


def build_arrivals(spec: WorkloadSpec, seed: int) -> list[Arrival]:
    """The arrivals of an open workload, sorted. Raises InputError for a closed one: its times are the server's."""
    if isinstance(spec.arrivals, Closed):
        remedy = "Use build, or an open arrival process."
        raise InputError("arrivals.kind", "closed", "a closed loop has no arrival times of its own", remedy)
    bodies, rows = _bodies(spec, seed)
    return _at_times(bodies, _times(spec, rows, len(bodies), seed))


def contents(spec: WorkloadSpec, seed: int) -> dict[RequestId, Content]:
    """What each request of a workload, open or closed, asks of an engine: task, text, length."""
    bodies, _ = _bodies(spec, seed)
    return {k: body.at(k, 0.0).content for k, body in enumerate(bodies)}


def _at_times(bodies: Sequence[Body], times: Sequence[Seconds]) -> list[Arrival]:
    return [body.at(k, time) for k, (body, time) in enumerate(zip(bodies, times, strict=True))]


def _times(spec: WorkloadSpec, rows: Sequence[TraceRow], count: int, seed: int) -> list[Seconds]:
    process = spec.arrivals or Replay()
    if isinstance(process, Replay):
        return process.times(rows, str(spec.trace))
    if isinstance(process, Gaps):
        return process.times(count, seed)
    raise InputError("arrivals.kind", process.kind, "neither open nor closed", "Extend arrivals.Gaps.")


def _bodies(spec: WorkloadSpec, seed: int) -> tuple[list[Body], Sequence[TraceRow]]:
    """Bodies, and the trace rows they come from (none for drawn ones)."""
    bodies, rows = _plain_bodies(spec, seed)
    if spec.priorities is not None:
        classes = spec.priorities.classes(len(bodies), seed)
        bodies = [replace(body, priority=c) for body, c in zip(bodies, classes, strict=True)]
    if spec.predictor is not None:
        lengths = [min(body.content.output_tokens or body.max_tokens, body.max_tokens) for body in bodies]
        told = spec.predictor.predictions(lengths, [body.max_tokens for body in bodies], seed)
        if told is not None:
            bodies = [replace(body, prediction=p) for body, p in zip(bodies, told, strict=True)]
    return bodies, rows


def _plain_bodies(spec: WorkloadSpec, seed: int) -> tuple[list[Body], Sequence[TraceRow]]:
    """Bodies without classes and predictions."""
    if spec.trace is None:
        return _drawn_bodies(spec, seed), ()
    trace = import_trace(spec.trace)
    rows = _first_rows(trace, _count(spec, trace.kept))
    tasks = _task_of_each(spec.tasks, spec.order, len(rows), seed) if spec.tasks else None
    if tasks is not None and (named := next((row for row in rows if row.task), None)):
        where = f"{trace.source}, task"
        raise InputError(where, named.task, "the trace names its tasks", "Leave tasks out of the workload.")
    if spec.priorities is not None and (ranked := next((row for row in rows if row.priority is not None), None)):
        where = f"{trace.source}, priority"
        raise InputError(where, ranked.priority, "the trace has classes", "Leave priorities out of the workload.")
    names = [row.task for row in rows] if tasks is None else [task.task for task in tasks]
    return _trace_bodies(spec, trace, rows, names), rows


def _count(spec: WorkloadSpec, available: int | None = None) -> int:
    counts = [task.count for task in spec.tasks if task.count is not None]
    count = spec.requests if spec.requests is not None else sum(counts) or available
    assert count is not None  # checked by the specification
    return count


def _first_rows(trace: Trace, count: int) -> Sequence[TraceRow]:
    if count > trace.kept:
        remedy = "Ask for fewer requests or give a longer trace."
        raise InputError(f"{trace.source}, requests", count, f"the trace has only {trace.kept} requests", remedy)
    return trace.rows[:count]


def _trace_bodies(spec: WorkloadSpec, trace: Trace, rows: Sequence[TraceRow], names: Sequence[str]) -> list[Body]:
    longest = max((row.output_tokens for row in trace.rows if row.output_tokens is not None), default=None)
    bodies = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True), 1):
        limit = row.max_tokens or spec.max_tokens or longest
        if limit is None or (spec.lengths == "forced" and row.output_tokens is None):
            remedy = "Use natural lengths." if limit else "Give the workload max_tokens."
            raise InputError(f"{trace.source}, request {number}, output_length", None, "unknown length", remedy)
        if spec.lengths == "forced" and row.output_tokens is not None and row.output_tokens > limit:
            where = f"{trace.source}, request {number}, output_length"
            problem = f"more than the workload's max_tokens {limit}"
            raise InputError(where, row.output_tokens, problem, "Raise max_tokens or leave it out.")
        output = row.output_tokens if spec.lengths == "forced" else None
        bodies.append(Body(row.prompt_tokens, limit, Content(name, row.prompt_ids, output), row.priority or 0))
    return bodies


def _drawn_bodies(spec: WorkloadSpec, seed: int) -> list[Body]:
    count = _count(spec)
    tasks = _task_of_each(spec.tasks, spec.order, count, seed)
    prompts, outputs = _uniforms(seed, "prompt", count), _uniforms(seed, "output", count)
    bodies = []
    for task, prompt, output in zip(tasks, prompts, outputs, strict=True):
        assert task.prompt_tokens is not None
        limit = task.max_tokens or (task.output_tokens.largest if task.output_tokens else None)
        assert limit is not None
        length = task.output_tokens.draw(output) if task.output_tokens else None
        bodies.append(Body(task.prompt_tokens.draw(prompt), limit, Content(task.task, None, length)))
    return bodies


def _uniforms(seed: int, purpose: str, count: int) -> list[float]:
    """One number in [0, 1) per request; the k-th does not depend on ``count``."""
    return [float(u) for u in stream(seed, purpose).random(count)]


def _task_of_each(
    tasks: Sequence[TaskSpec], order: Literal["blocks", "mix"] | None, count: int, seed: int
) -> list[TaskSpec]:
    """The task of each request. Blocks of shares have the nearest whole sizes."""
    shares = [task.share or 1.0 for task in tasks]
    sizes = [task.count for task in tasks if task.count is not None]
    if order == "mix" and not sizes:
        cumulative = cumulative_shares(shares)
        return [tasks[bisect_right(cumulative, u)] for u in _uniforms(seed, "tasks", count)]
    if sizes and sum(sizes) != count:
        raise InputError("tasks", sizes, f"the counts do not sum to {count} requests", "Correct them.")
    blocks = [task for task, size in zip(tasks, sizes or apportion(shares, count), strict=True) for _ in range(size)]
    if order != "mix":
        return blocks
    ranks = np.argsort(stream(seed, "tasks").random(count), kind="stable")
    return [blocks[int(i)] for i in ranks]


def apportion(shares: Sequence[float], count: int) -> list[int]:
    """Whole sizes that sum to ``count``; the largest remainders round up."""
    exact = [count * share / sum(shares) for share in shares]
    sizes = [int(size) for size in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: count - sum(sizes)]:
        sizes[i] += 1
    return sizes
