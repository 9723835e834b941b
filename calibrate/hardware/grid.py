"""Which cells there are: the grids of the passes, the parts of a step beside its layers, and single facts.

Grids are ordered so that any beginning of them is worth having: corners first, then always the cell that is farthest
(in logarithms of its coordinates) from those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from heliosim.types import ModelSpec, Seconds

from .cell import MACHINE, Cell

LAYER_KINDS = ("decode_layer", "prefill_layer", "mixed_layer")
"""Cells that the layer's cost is fitted to."""
REGIONS = ("decode 1-4", "decode 5+", "long context", "prefill", "mixed")
CHECKS = ("max-prob", "margin", "entropy")
SOURCES = ("pinned", "pageable", "disk-warm", "disk-cold")
FILLS = ("none", "copy", "propagate", "recompute")
PHASES = ("idle", "decode", "prefill", "load")


@dataclass(frozen=True)
class Extent:
    """How far to measure, and how densely. ``is_full``: every row of the table; else what takes a few seconds.
    ``repeats``: wanted samples of a cell; ``cell_s``: what a cell may take for them.
    """

    max_rows: int
    max_context: int
    max_tokens: int
    is_full: bool
    repeats: int = 30
    cell_s: Seconds = 1.0


Estimate = Callable[[Cell], Seconds]


def layer_cells(spec: ModelSpec, extent: Extent) -> dict[str, list[Cell]]:
    """Cells of one layer by region, in the order to measure them."""
    context = min(extent.max_context, spec.max_context)
    points = 6 if extent.is_full else 3
    rows = _doubling(1, extent.max_rows, 9 if extent.is_full else 4)
    contexts = [c // 16 * 16 or 16 for c in _even(min(32, context), context, points)]
    found: dict[str, list[Cell]] = {region: [] for region in REGIONS}
    for r in rows:
        for c in sorted(set(contexts)):
            region = "long context" if 2 * c > context else "decode 1-4" if r <= 4 else "decode 5+"
            found[region].append(Cell.of(spec.name, "decode_layer", region, rows=r, context=c))
    chunks = [t for t in _doubling(16, extent.max_tokens, 8 if extent.is_full else 3) if t <= context]
    for t in chunks or [context]:
        for share in (0.0, 0.25, 0.75) if extent.is_full else (0.0, 0.5):
            prefix = int((context - t) * share) // 16 * 16
            if share == 0.0 or prefix:
                found["prefill"].append(Cell.of(spec.name, "prefill_layer", "prefill", tokens=t, prefix=prefix))
    for r in (rows[1:] or rows)[:: 3 if extent.is_full else 2]:
        for t in chunks[:: 3 if extent.is_full else 2]:
            if t + r <= extent.max_tokens and t < context:
                where = {"rows": r, "context": max(16, context // 2 // 16 * 16), "tokens": t, "prefix": 0}
                found["mixed"].append(Cell.of(spec.name, "mixed_layer", "mixed", **where))
    return {region: spread_out(cells) for region, cells in found.items() if cells}


def part_cells(spec: ModelSpec, extent: Extent) -> list[Cell]:
    """What a step does beside its layers, and what exits add to it."""
    n, full = spec.name, extent.is_full
    rows = _doubling(1, extent.max_rows, 5 if full else 3)
    tokens = _doubling(1, extent.max_tokens, 5 if full else 3)
    cells = [Cell.of(n, "embedding", "parts", tokens=t) for t in spread(tokens)]
    for r in spread(rows):
        cells += [Cell.of(n, kind, "parts", rows=r) for kind in ("final_norm", "head")]
        cells += [Cell.of(n, "sampler", "parts", rows=r, method=m) for m in ("greedy", "top-p")]
        cells += [Cell.of(n, "check", "parts", rows=r, method=m) for m in CHECKS]
    cells += [Cell.of(n, "exit_head", "parts", rows=r) for r in rows if spec.exit_head_bytes]
    fills = tokens[:: max(1, len(tokens) // 3)] if full else tokens[::2]
    cells += [Cell.of(n, "kv_fill", "parts", tokens=t, method=m) for m in FILLS for t in fills]
    return cells


def fact_cells(spec: ModelSpec, extent: Extent, budgets: Sequence[int]) -> list[Cell]:
    """Single facts of a model: bytes, graphs, loads, largest batches, blocks of the pool."""
    n, full = spec.name, extent.is_full
    cells = [Cell.of(n, "bytes", "memory", part=p) for p in ("layer", "base", "heads", "kv")]
    cells += [Cell.of(n, kind, "memory") for kind in ("activations", "workspace")]
    cells += [Cell.of(n, "graph", "graph", rows=r) for r in _doubling(1, extent.max_rows, 3 if full else 1)]
    counts = _doubling(1, max(1, spec.layers - 1), 4 if full else 2)
    for source in ("host", "disk"):
        cells += [Cell.of(n, "layer_load", "load", layers=k, source=source) for k in spread(counts)]
    context = min(extent.max_context, spec.max_context)
    contexts = _doubling(max(16, context // 4), context, 3) if full else [context]
    depths = spec.exits if full or len(spec.exits) <= 3 else (spec.exits[0], spec.exits[-1])
    for budget in budgets:
        for depth in depths:
            at = {"depth": depth, "budget_bytes": budget}
            cells += [Cell.of(n, "largest_batch", "memory", context=c, **at) for c in contexts]
            cells.append(Cell.of(n, "kv_blocks", "memory", **at))
    return cells


def host_cells(spec: ModelSpec, extent: Extent) -> list[Cell]:
    """What the host does for each step and each request."""
    rows = _doubling(1, extent.max_rows, 4 if extent.is_full else 3)
    lengths = _doubling(16, min(extent.max_context, spec.max_context), 3)
    cells = [Cell.of(spec.name, "host_step", "host", rows=r) for r in spread(rows)]
    cells += [Cell.of(spec.name, "host_prepare", "host", rows=r) for r in rows]
    cells += [Cell.of(spec.name, "ingress", "host", tokens=t) for t in lengths]
    return cells + [Cell.of(spec.name, "detokenise", "host", rows=r) for r in rows]


def machine_cells(extent: Extent) -> list[Cell]:
    """What no model changes: the way back to the host, and links, alone and beside decoding."""
    cells = [Cell.of(MACHINE, "decision", "host")]
    return cells + [
        Cell.of(MACHINE, "link", "link", source=s, beside=b) for s in SOURCES for b in ("nothing", "decode")
    ]


def energy_cells(spec: ModelSpec) -> list[Cell]:
    """Windows of energy, the idle one first."""
    return [Cell.of(spec.name, "energy", "energy", phase=p) for p in PHASES]


def with_estimates(cells: Iterable[Cell], estimate: Estimate) -> list[Cell]:
    return [replace(cell, estimate_s=estimate(cell)) for cell in cells]


# --- order -----------------------------------------------------------------------------------------------------------


def spread_out(cells: Sequence[Cell]) -> list[Cell]:
    """Corners first, then always the cell farthest from those before."""
    points = [_logs(cell) for cell in cells]
    lows, highs = [min(c) for c in zip(*points, strict=True)], [max(c) for c in zip(*points, strict=True)]
    left = list(range(len(cells)))
    order: list[int] = []
    for corner in sorted(left, key=lambda i: -_cornerness(points[i], lows, highs))[: 2 ** len(lows)]:
        if _cornerness(points[corner], lows, highs) == len(lows) and len(order) < 8:
            order.append(corner)
    left = [i for i in left if i not in order]
    while left:
        best = max(left, key=lambda i: min((_distance(points[i], points[k]) for k in order), default=0.0))
        left.remove(best)
        order.append(best)
    return [cells[i] for i in order]


def spread(values: Sequence[int]) -> list[int]:
    """Both ends first, then the middle."""
    ends = list(dict.fromkeys([values[0], values[-1]]))
    return ends + [v for v in values if v not in ends]


def _logs(cell: Cell) -> tuple[float, ...]:
    return tuple(math.log2(1 + float(value)) for _, value in cell.at)


def _cornerness(point: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> int:
    return sum(x in (low, high) for x, low, high in zip(point, lows, highs, strict=True))


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return math.dist(a, b)


def _doubling(low: int, high: int, most: int) -> list[int]:
    """At most ``most`` numbers from low to high, about evenly in logarithms, both ends among them."""
    if high <= low or most < 2:
        return [min(low, high)] if high <= low else [high]
    ratio = math.log(high / low) / (most - 1)
    found = sorted({low, high, *(round(low * math.exp(ratio * k)) for k in range(most))})
    return [a for a, b in pairwise([*found, high + 1]) if b > a]


def _even(low: int, high: int, most: int) -> list[int]:
    if high <= low or most < 2:
        return [high]
    return sorted({round(low + (high - low) * k / (most - 1)) for k in range(most)})
