"""Measures steps and loads inside the real serving loop: the live driver, server, batcher, pool and recorder of a live
run.

A micro-benchmark of a layer in isolation misses what the loop adds (allocator, caches, Python), so nothing here is
timed outside it. Each step yields its shape and its seconds on both clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from heliosim.costs import StepShape, load_terms, shape_of
from heliosim.live import serve_live
from heliosim.recorder import TableRecorder
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.controller import FixedPlacement
from heliosim.serving.memory import MemoryPool
from heliosim.serving.server import Server
from heliosim.streams import stream
from heliosim.types import (
    Arrival,
    Batch,
    Content,
    ExitRule,
    Load,
    ModelSpec,
    Outcome,
    Placement,
    Request,
    Run,
    blocks_for,
    tick,
)
from heliosim.workload import OpenLoop

from .plan import Point

Clocks = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StepSample:
    """One measured step. ``clocks``: seconds by clock name (``cpu``, ``wall``). ``visit``: which point it was of."""

    model: str
    mode: str
    shape: StepShape
    clocks: Clocks
    visit: int = 0


@dataclass(frozen=True, slots=True)
class LoadSample:
    """One measured load with the values of ``costs.LOAD_TERMS``."""

    model: str
    terms: tuple[float, ...]
    clocks: Clocks


def arrivals_of(point: Point, text: Sequence[int]) -> list[Arrival]:
    """Requests of a point, prompts cut from ``text`` one behind the other; all at once or one every few steps."""
    arrivals, at = [], 0
    for i, (prompt, output) in enumerate(zip(point.prompts, point.outputs, strict=True)):
        if at + prompt > len(text):
            at = 0
        ids = tuple(text[at : at + prompt])
        at += prompt
        when = 0.0 if point.arrives_at_once else tick(i * 0.004)
        arrivals.append(Arrival(Request(i, when, prompt, output), Content("", ids, output)))
    return arrivals


def measure_steps(
    engine: object, spec: ModelSpec, point: Point, text: Sequence[int], pool_bytes: int, visit: int = 0
) -> list[StepSample]:
    """Run one point through the live loop and return its steps."""
    return [
        StepSample(spec.name, point.mode.name, shape_of(action, outcome, spec), clocks, visit)
        for action, outcome, clocks in run_point(engine, spec, point, text, pool_bytes)
        if isinstance(action, Run)
    ]


def run_point(
    engine: object, spec: ModelSpec, point: Point, text: Sequence[int], pool_bytes: int
) -> list[tuple[Run | Load, Outcome, Clocks]]:
    """Run one point through the live loop; its actions behind the first load, and their seconds by clock."""
    controller = FixedPlacement(spec, point.mode.exits, point.mode.depth)
    batcher = ContinuousBatcher(point.rows, point.token_budget)
    server = Server(controller, batcher, MemoryPool(pool_bytes), {spec.name: spec}, TableRecorder())
    walls: list[float] = []
    done = serve_live(
        server,
        engine,  # type: ignore[arg-type]
        OpenLoop(arrivals_of(point, text)),
        "cpu",
        on_progress=lambda _now: walls.append(time.perf_counter()),
    )
    found: list[tuple[Run | Load, Outcome, Clocks]] = []
    for k in range(1, len(done.log)):  # the first action is the load
        action, outcome = done.log[k]
        found.append((action, outcome, {"cpu": outcome.seconds, "wall": walls[k] - walls[k - 1]}))
    return found


def measure_loads(
    engine: object,
    specs: Mapping[str, ModelSpec],
    budget_bytes: int,
    repeats: int,
    seed: int,
    token: int = 5,
    on_progress: Callable[[], None] | None = None,
) -> list[LoadSample]:
    """Loads between every pair of placements in shuffled order, at several KV sizes, and extensions of running
    requests.
    """
    places = [Placement(s.name, d) for s in specs.values() for d in s.exits]
    jumps = [(a, b, r) for r in range(repeats) for a in places for b in places if a != b]
    samples = []
    for k in stream(seed, "calibrate", "loads").permutation(len(jumps)):
        a, b, r = jumps[int(k)]
        kv_share = (1.0, 0.5, 0.25)[r % 3]
        _perform(engine, _load(specs[a.model], a, budget_bytes, kv_share))
        load = _load(specs[b.model], b, budget_bytes, kv_share)
        samples.append(_sample(engine, specs[b.model], load, a.depth if a.model == b.model else 0))
        if on_progress is not None:
            on_progress()
    for spec in specs.values():
        for old in spec.exits[:-1]:
            for new in (e for e in spec.exits if e > old):
                for rows in (2, 6) * max(1, repeats // 2):
                    samples.append(_extension(engine, spec, old, new, rows, budget_bytes, token))
    return samples


def _load(spec: ModelSpec, place: Placement, budget: int, kv_share: float, stores_hidden: bool = False) -> Load:
    free = budget - spec.weights_bytes(place.depth)
    blocks = max(1, int(free * kv_share) // spec.block_bytes(place.depth, stores_hidden))
    return Load(place, blocks, "calibrate", stores_hidden and place.depth < spec.layers)


def _extension(
    engine: object, spec: ModelSpec, old: int, new: int, rows: int, budget: int, token: int, prompt: int = 64
) -> LoadSample:
    """Load more layers while ``rows`` requests of ``prompt`` tokens keep their KV."""
    _perform(engine, _load(spec, Placement(spec.name, old), budget, 1.0, stores_hidden=True))
    ids = tuple(range(rows))
    for i in ids:
        arrival = Arrival(Request(i, 0.0, prompt, 8), Content("", (token,) * prompt, 8))
        engine.accept(arrival)  # type: ignore[attr-defined]
    batch = Batch(ids, (0,) * rows, (prompt,) * rows, (True,) * rows)
    _perform(engine, Run(Placement(spec.name, old), ExitRule("greedy"), batch))
    deeper = Placement(spec.name, new)
    blocks = (budget - spec.weights_bytes(new)) // spec.block_bytes(new, True)
    kept = tuple((i, prompt) for i in ids)
    assert blocks >= rows * blocks_for(prompt + 8)
    sample = _sample(engine, spec, Load(deeper, blocks, "calibrate", new < spec.layers, kept), old)
    empty = _load(spec, deeper, budget, 1.0)
    _perform(engine, Load(empty.placement, empty.kv_blocks, "calibrate", False, (), ids))
    for i in ids:
        engine.forget(i)  # type: ignore[attr-defined]
    return sample


def _sample(engine: object, spec: ModelSpec, load: Load, resident: int) -> LoadSample:
    kv_bytes = load.kv_blocks * spec.block_bytes(load.placement.depth, load.stores_hidden)
    return LoadSample(spec.name, load_terms(load, spec, resident, kv_bytes), _perform(engine, load))


def _perform(engine: object, action: Run | Load) -> Clocks:
    cpu, wall = time.process_time(), time.perf_counter()
    engine.perform(action)  # type: ignore[attr-defined]
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
