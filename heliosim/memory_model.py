"""What fits into a GPU's memory: weights by depth, what a step needs beside them, and how many requests KV then holds.

    rows = min(cap, blocks that fit(budget - weights(depth) - workspace - graphs - activations)
                    // (blocks of KV(context) + blocks of what a request needs beside it))

Weights and KV are those of one rank, as everywhere. A server sets aside what its most demanding model needs beside
weights and KV (``engine_needs``) and books the rest in whole KV blocks, as it is counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heliosim.costs import StepCost, StepShape
from heliosim.formats.profile import MemoryFacts, ModelFacts
from heliosim.types import BLOCK_TOKENS, Bytes, ModelSpec, Seconds, blocks_for

STEP_TOKENS = 2048
"""Tokens of the largest step where nobody says how many: what the batches named in composed profiles leave room for."""


@dataclass(frozen=True)
class MemoryNeeds:
    """``fixed``: bytes beside weights and KV of an engine that computes at most so many tokens in a step. ``cap``: most
    rows an engine serves at once; None: no limit of its own. What each request needs is in ``ModelSpec``.
    """

    fixed: Bytes = 0
    cap: int | None = None


def needs_of(facts: ModelFacts, step_tokens: int) -> MemoryNeeds:
    """What a model needs beside weights and KV when its largest step has ``step_tokens`` tokens."""
    m = facts.memory or MemoryFacts()
    fixed = m.workspace_bytes + m.graph_bytes + m.activation_bytes_per_token * step_tokens
    return MemoryNeeds(fixed, m.max_rows)


def engine_needs(models: Iterable[ModelFacts], step_tokens: int) -> MemoryNeeds:
    """What one engine sets aside that serves these models: the most that any needs, and the least of their caps."""
    needs = [needs_of(facts, step_tokens) for facts in models]
    caps = [n.cap for n in needs if n.cap is not None]
    return MemoryNeeds(max((n.fixed for n in needs), default=0), min(caps, default=None))


def largest_batch(spec: ModelSpec, depth: int, context: int, budget: Bytes, needs: MemoryNeeds | None = None) -> int:
    """Rows of ``context`` tokens each that fit beside ``depth`` layers; 0 if not even the weights do."""
    n = needs or MemoryNeeds()
    free = budget - spec.weights_bytes(depth) - n.fixed
    rows = max(0, free) // spec.block_bytes(depth) // (blocks_for(context) + spec.request_blocks(depth))
    return rows if n.cap is None else min(rows, n.cap)


@dataclass(frozen=True)
class CliffRow:
    """One depth and context: rows that KV holds, output tokens/s of a decode step of that many, and what more rows
    would give if KV did not end: at ``wanted`` rows.
    """

    depth: int
    context: int
    rows: int
    tok_per_s: float
    wanted: int
    wanted_tok_per_s: float

    @property
    def lost(self) -> float:
        """Share of throughput that the end of KV takes, against ``wanted`` rows."""
        return 0.0 if self.wanted_tok_per_s == 0 else 1 - self.tok_per_s / self.wanted_tok_per_s


def cliff(
    spec: ModelSpec,
    cost: StepCost,
    budget: Bytes,
    contexts: Sequence[int],
    wanted: int,
    needs: MemoryNeeds | None = None,
) -> list[CliffRow]:
    """Where throughput falls off because KV ends: every exit and context, against ``wanted`` rows (at most the fitted
    ones).
    """
    wanted = min(wanted, cost.max_rows)
    found = []
    for depth in spec.exits:
        for context in contexts:
            rows = min(wanted, largest_batch(spec, depth, context, budget, needs))
            now = rows / _decode_seconds(cost, depth, rows, context) if rows else 0.0
            free = wanted / _decode_seconds(cost, depth, wanted, context)
            found.append(CliffRow(depth, context, rows, now, wanted, free))
    return found


def _decode_seconds(cost: StepCost, depth: int, rows: int, context: int) -> Seconds:
    """A decode step of ``rows`` rows that hold ``context`` tokens each."""
    gathered = rows * blocks_for(context) * BLOCK_TOKENS
    return cost.seconds(StepShape(rows, rows, rows, gathered, 0, 0, depth, 1, rows, 0, 0, 0, context, rows * context))
