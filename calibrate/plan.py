"""Which serving situations to measure: batch sizes, contexts, chunk sizes and exit modes, as small real workloads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from heliosim.errors import InputError
from heliosim.exits.batching import exit_batcher
from heliosim.exits.skipped import skipped_kv
from heliosim.registry import EXIT_BATCHING, SKIPPED_KV
from heliosim.streams import stream
from heliosim.types import ExitRule, ModelSpec

LONGEST_OUTPUT = 24
"""Tokens a measured request generates at most."""

VISITS: Mapping[int, int] = {1: 4, 2: 3, 4: 2}
"""Visits per round of small batch sizes; others have one."""


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


def method_modes(spec: ModelSpec, threshold: float, methods: Sequence[str]) -> list[Mode]:
    """Early exit under further exit methods, each ``batching+skipped_kv``, or ``all`` of them. Raises InputError or
    UnknownNameError.
    """
    found = []
    for name in [m for named in methods for m in (every_method() if named == "all" else [named])]:
        batching, plus, method = name.partition("+")
        if not plus:
            raise InputError("--exit-methods", name, "not of the form batching+skipped_kv", "Example: eager+propagate.")
        exit_batcher(batching)
        skipped_kv(method)
        found.append(Mode(name, spec.layers, ExitRule("threshold", threshold, batching, method)))
    return found


def every_method() -> list[str]:
    """Every pair of an exit batching and a skipped-KV method; the usual one where all layers run, nothing skipped."""
    return [
        f"{batching}+{method}"
        for batching in EXIT_BATCHING.names()
        for method in (["propagate"] if exit_batcher(batching).runs_all else SKIPPED_KV.names())
    ]


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
    """Every mode at every batch size, ``rounds`` times with fresh lengths; small batches more often, because their
    steps are short, few and the noisiest.

    Prompt lengths, chunk sizes and arrivals vary from point to point; one point of each mode holds the largest batch,
    the longest prompts and the full token budget, so that the calibrated range is the one asked for.
    """
    sizes = sorted({min(b, max_rows) for b in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, max_rows)})
    modes = modes_of(spec, threshold)
    todo = [
        (mode, rows, r) for mode in modes for rows in (*sizes, None) for r in range(rounds * VISITS.get(rows or 0, 1))
    ]
    for mode, rows, r in todo:
        rng = stream(seed, "calibrate", spec.name, mode.name, rows or "largest", r)
        if rows is None:
            prompts = (max_context - LONGEST_OUTPUT,) * min(max_rows, 6)
            yield Point(mode, max_rows, max(max_rows, token_budget), prompts, (LONGEST_OUTPUT,) * len(prompts), True)
            continue
        count = rows + max(2, rows // 2)
        longest_prompt = max(8, int(max_context * rng.choice((0.25, 0.5, 0.75))))
        prompts = tuple(int(n) for n in rng.integers(8, longest_prompt + 1, count))
        outputs = tuple(int(rng.integers(8, max(9, min(LONGEST_OUTPUT, max_context - p)))) for p in prompts)
        budget = max(rows, token_budget // int(rng.choice((1, 2, 4))))
        yield Point(mode, rows, budget, prompts, outputs, bool(rng.integers(2)))
