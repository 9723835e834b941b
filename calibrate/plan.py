"""Which serving situations to measure: batch sizes, contexts, chunk sizes and exit modes, as small real workloads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from heliosim.streams import stream

from heliosim.types import ExitRule, ModelSpec


@dataclass(frozen=True, slots=True)
class Mode:
    """A depth and an exit rule: one way in which a server may run a model."""

    name: str
    depth: int
    exits: ExitRule


@dataclass(frozen=True, slots=True)
class Point:
    """One small workload: ``requests`` of the given lengths, all waiting from the start, at most ``rows`` at a time."""

    mode: Mode
    rows: int
    token_budget: int
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    arrives_at_once: bool


def modes_of(spec: ModelSpec, threshold: float) -> list[Mode]:
    """Vanilla, early exit on the full model with either batch rule, and every partial depth."""
    modes = [
        Mode("vanilla", spec.layers, ExitRule("none")),
        Mode("threshold", spec.layers, ExitRule("threshold", threshold, "wait-for-deepest")),
        Mode("threshold-full", spec.layers, ExitRule("threshold", threshold, "full")),
    ]
    partial = [e for e in spec.exits if e < spec.layers]
    return modes + [Mode(f"greedy@{e}", e, ExitRule("greedy", threshold)) for e in partial]


def points(
    spec: ModelSpec, threshold: float, max_rows: int, token_budget: int, max_context: int, rounds: int, seed: int
) -> Iterator[Point]:
    """Every mode at every batch size, ``rounds`` times with fresh lengths, in shuffled order so that drift hits all alike."""
    sizes = sorted({min(b, max_rows) for b in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, max_rows)})
    todo = [(mode, rows, r) for r in range(rounds) for mode in modes_of(spec, threshold) for rows in sizes]
    order = stream(seed, "calibrate", spec.name, "order").permutation(len(todo))
    for k in order:
        mode, rows, r = todo[int(k)]
        rng = stream(seed, "calibrate", spec.name, mode.name, rows, r)
        count = rows + max(2, rows // 2)
        longest_prompt = max(8, min(max_context - 64, int(max_context * (0.25, 0.5, 0.75)[r % 3])))
        prompts = tuple(int(n) for n in rng.integers(8, longest_prompt + 1, count))
        outputs = tuple(int(rng.integers(8, max(9, min(56, max_context - p)))) for p in prompts)
        budget = max(rows, (token_budget, token_budget // 2, token_budget // 4)[r % 3])
        yield Point(mode, rows, budget, prompts, outputs, arrives_at_once=r % 2 == 0)
