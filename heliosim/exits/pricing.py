"""The time of a step whose rows part ways: the sum over its segments, each with the rows and tokens that walk it.

A segment is priced as a step of its own layers (``costs.StepShape``), so every term a profile knows is used as it is.
The first segment carries what a step costs once; each later one costs a regrouping: preparing a pass for other rows or
other tokens. Where a profile has not measured that (``StepCost.exits``), it is taken as a step's host work and one
layer's launches (our assumption, docs/assumptions.md).

Under ``recompute`` a row brings along the tokens that wait for a segment, and is priced as a prompt chunk there. Under
``none`` each segment needs a pass of its own, because other tokens are seen in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from heliosim.costs import TERMS, StepCost, StepShape, shape_of
from heliosim.exits.batching import AtExit, Segment, exit_batcher, segments
from heliosim.exits.skipped import skipped_kv
from heliosim.types import BLOCK_TOKENS, ExitRule, ModelSpec, Outcome, RequestId, Run, Seconds, blocks_for

_STEP, _LAYER = TERMS.index("step"), TERMS.index("layer")
_PLAIN = frozenset({"full", "wait-for-deepest"})


def is_plain(rule: ExitRule) -> bool:
    """Whether all rows of a step run the same layers and KV is propagated: one ``StepShape`` says it all."""
    return rule.kind != "threshold" or (rule.batching in _PLAIN and rule.skipped_kv == "propagate")


def needs_single_steps(rule: ExitRule) -> bool:
    """Whether what a step does depends on more than counts of exits: who is in the batch, or what waits."""
    return rule.kind == "threshold" and (
        exit_batcher(rule.batching).is_joint or skipped_kv(rule.skipped_kv).is_recomputed
    )


def segment_ends(spec: ModelSpec, depth: int) -> tuple[int, ...]:
    """Exits before ``depth``, and ``depth``: the last layers of segments."""
    return (*(e for e in spec.exits if e < depth), depth)


class StepParts(NamedTuple):
    """A step in segments. ``deeper``: those behind a regrouping; ``fills``: (layers, tokens) whose KV was skipped."""

    first: StepShape
    deeper: tuple[StepShape, ...]
    fills: tuple[tuple[int, int], ...]

    @property
    def layers_run(self) -> int:
        return self.first.layers + sum(shape.layers for shape in self.deeper)

    def seconds(self, cost: StepCost, rule: ExitRule) -> Seconds:
        total = cost.seconds(self.first)
        for shape in self.deeper:
            total += cost.seconds(shape) + (regroup_seconds(cost) - cost.coefficients[_STEP])
        method = skipped_kv(rule.skipped_kv)
        for layers, tokens in self.fills:
            total += method.seconds(cost, layers, tokens)
        return total


def regroup_seconds(cost: StepCost) -> Seconds:
    """Of going on with other rows than before in the middle of a step."""
    if cost.exits is not None:
        return cost.exits.regroup
    return cost.coefficients[_STEP] + cost.coefficients[_LAYER]


def break_even(cost: StepCost, rule: ExitRule, context: int) -> float:
    """Rows x layers that a regrouping must save to pay for itself: its seconds, and those of one more fill, against
    the seconds that a decode row of ``context`` tokens takes in a layer less what filling its KV takes.
    """
    few, many = (
        cost.seconds(_decode_shape(n, blocks_for(context), n * context, 1))
        - cost.seconds(_decode_shape(n, blocks_for(context), n * context, 0))
        for n in (8, 9)
    )
    method = skipped_kv(rule.skipped_kv)
    launch = method.seconds(cost, 1, 0)
    saved = (many - few) - (method.seconds(cost, 1, 1) - launch)
    return float("inf") if saved <= 0 else (regroup_seconds(cost) + launch) / saved


class Row(NamedTuple):
    """A row of a step: its tokens ``start`` to ``end``; ``done``: by segment, how many from the first on have KV."""

    start: int
    end: int
    done: list[int] | None = None


class Counts(NamedTuple):
    """What a step's first segment carries besides its rows."""

    rows: int
    tokens: int
    checks: int
    checked: int
    started: int
    ended: int


def parts_of(
    rule: ExitRule, ends: Sequence[int], rows: Sequence[Row], exits: Sequence[int] | None, counts: Counts
) -> tuple[StepParts, list[list[int]]]:
    """A step row by row. ``exits``: exit layer of every row of a step of decode rows alone; None: all layers run.

    Returns the parts, and by row and segment how many tokens have KV behind the step.
    """
    method, batcher = skipped_kv(rule.skipped_kv), exit_batcher(rule.batching)
    was = [row.done or [row.start] * len(ends) for row in rows]
    dones = [list(done) for done in was]
    walking = list(range(len(rows)))
    shapes: list[StepShape] = []
    stopped: list[tuple[int, int]] = []  # (layer, tokens) that go no deeper
    starts: list[int] = []
    layer = 0
    for i, end in enumerate(ends):
        new_starts = [was[row][i] for row in walking]
        if shapes and not method.has_gaps and new_starts == starts and len(starts) == len(walking):
            shapes[-1] = shapes[-1]._replace(layers=shapes[-1].layers + end - layer)
        else:
            spans = [(start, rows[row].end) for start, row in zip(new_starts, walking, strict=True)]
            shapes.append(_shape(spans, end - layer))
        starts, layer = new_starts, end
        for row in walking:
            dones[row][i] = rows[row].end
        if exits is None or i + 1 == len(ends):
            continue
        undecided = [row for row in walking if exits[row] > end]
        left = sum(e > end for e in exits)
        verdict = batcher.verdict(AtExit(len(rows), len(walking), left, ends[i + 1] - end), rule)
        if verdict == "stop":
            break
        if verdict == "regroup" and undecided and len(undecided) < len(walking):
            stopped.append((layer, len(walking) - len(undecided)))
            walking, starts = undecided, []
    first = shapes[0]._replace(
        rows=counts.rows, tokens=counts.tokens, checks=counts.checks, checked_rows=counts.checked,
        started=counts.started, ended=counts.ended,
    )  # fmt: skip
    stopped.append((layer, len(walking)))
    return StepParts(first, tuple(shapes[1:]), _fills(stopped, ends[-1])), dones


def parts_of_run(
    run: Run, outcome: Outcome, spec: ModelSpec, waiting: Mapping[RequestId, list[int]] | None = None
) -> tuple[StepParts, list[list[int]]]:
    """A measured step, as ``costs.shape_of`` of one whose rows go together. ``waiting``: by request and segment, how
    many tokens have KV, where some wait. Returns what ``parts_of`` does.
    """
    shape = shape_of(run, outcome, spec)
    batch, exits = run.batch, outcome.tokens.exit_layers
    known = waiting or {}
    rows = [
        Row(start, start + count, known.get(request) if start else None)
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True)
    ]
    counts = Counts(shape.rows, shape.tokens, shape.checks, shape.checked_rows, shape.started, shape.ended)
    ends = segment_ends(spec, run.placement.depth)
    return parts_of(run.exits, ends, rows, None if shape.prefill_rows else exits, counts)


def _shape(spans: Sequence[tuple[int, int]], layers: int) -> StepShape:
    """One segment of rows that compute tokens ``start`` to ``end`` of their requests."""
    decode = [end for start, end in spans if end == start + 1 and start]
    chunks = [(start, end) for start, end in spans if end != start + 1 or not start]
    gathered = len(decode) * blocks_for(max(decode, default=0)) * BLOCK_TOKENS
    return StepShape(
        rows=0,
        tokens=sum(end - start for start, end in spans),
        decode_rows=len(decode),
        gathered=gathered,
        prefill_rows=len(chunks),
        prefill_products=sum((end - start) * end for start, end in chunks),
        layers=layers,
        checks=0,
        checked_rows=0,
        filled_layers=0,
        started=0,
        ended=0,
        longest=max(end for _, end in spans),
        context=sum(decode),
    )


def _fills(stopped: Sequence[tuple[int, int]], depth: int) -> tuple[tuple[int, int], ...]:
    """(layers, tokens) skipped, from who stopped where, in order of depth."""
    found, tokens = [], 0
    for k, (layer, more) in enumerate(stopped):
        tokens += more
        until = stopped[k + 1][0] if k + 1 < len(stopped) else depth
        if until > layer:
            found.append((until - layer, tokens))
    return tuple(found)


def parts_from_counts(
    rule: ExitRule, ends: Sequence[int], left: Sequence[int], blocks: Sequence[int], held: Sequence[int], ended: int
) -> StepParts:
    """A step of decode rows alone under a rule that needs no single steps. ``left``: rows that have not left in front
    of each exit, the first all of them; ``blocks``: KV blocks of the longest of those; ``held``: KV tokens of
    all of those, 0 where they cost nothing; [exits].
    """
    rows = left[0]
    undecided = left[1:]
    walked = segments(rule, ends, rows, undecided)
    checks = sum(1 for count in left if count)
    shapes, stopped, before = [], [], rows
    for segment in walked:
        behind = segment.behind + 1
        if before > segment.walking:
            stopped.append((segment.first - 1, before - segment.walking))
            before = segment.walking
        for first, last in _passes(rule, ends, segment):
            shapes.append(_decode_shape(segment.walking, blocks[behind], held[behind], last - first + 1))
    stopped.append((walked[-1].last, before))
    first_shape = shapes[0]._replace(rows=rows, checks=checks, checked_rows=sum(left), ended=ended)
    return StepParts(first_shape, tuple(shapes[1:]), _fills(stopped, ends[-1]))


def _passes(rule: ExitRule, ends: Sequence[int], segment: Segment) -> list[tuple[int, int]]:
    """First and last layers of the passes that a segment needs."""
    if not skipped_kv(rule.skipped_kv).has_gaps:
        return [(segment.first, segment.last)]
    found, first = [], segment.first
    for end in ends:
        if first <= end <= segment.last:
            found.append((first, end))
            first = end + 1
    return found


def _decode_shape(rows: int, blocks: int, held: int, layers: int) -> StepShape:
    gathered = rows * blocks * BLOCK_TOKENS
    return StepShape(0, rows, rows, gathered, 0, 0, layers, 0, 0, 0, 0, 0, blocks * BLOCK_TOKENS, held)
