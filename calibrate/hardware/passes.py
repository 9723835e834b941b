"""Measures cells of layers and of what a step does beside them: embedding, norm, head, sampling, checks, KV fill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heliosim.types import Seconds

from .bench import Bench, Call, Shape
from .cell import AT_LEAST, Cell, Row, absent
from .grid import Extent

Seen = list[Seconds]


def repeats_for(bench: Bench, calls: Sequence[Call], extent: Extent) -> int:
    """How many samples fit into a cell's time: at least three, at most those wanted."""
    began = time.perf_counter()
    for call in calls:
        call()
    bench.timer.settle()
    each = max(1e-6, time.perf_counter() - began)
    return max(AT_LEAST, min(extent.repeats, int(extent.cell_s / each)))


def measure_layer(bench: Bench, cell: Cell, extent: Extent) -> Row:
    """Seconds of one layer: the slope between runs of few and of more layers."""
    shape = shape_of(cell)
    if not bench.fits(shape):
        return absent(cell, "s", f"needs {shape.blocks} KV blocks, memory has room for {bench.blocks}")
    run = bench.pass_of(shape)
    few, more = (bench.best(bench.through(shape, 0, n, run), shape) for n in (bench.few, bench.layers))
    units = bench.layers - bench.few
    values = bench.timer.differences(few, more, units, repeats_for(bench, (few, more), extent))
    return Row(cell, "s", tuple(values))


def shape_of(cell: Cell) -> Shape:
    """The pass of a layer cell."""
    if cell.kind == "decode_layer":
        return Shape(decode=cell.number("rows"), context=cell.number("context"))
    return Shape(cell.number("rows"), cell.number("context"), cell.number("tokens"), cell.number("prefix"))


def measure_part(bench: Bench, cell: Cell, extent: Extent) -> Row:
    """Seconds of one part of a step, as one call."""
    if cell.kind == "kv_fill":
        return _fill(bench, cell, extent)
    call = bench.best(_CALLS[cell.kind](bench, cell))
    return Row(cell, "s", tuple(bench.timer.repeated(call, repeats_for(bench, (call,), extent))))


def _fill(bench: Bench, cell: Cell, extent: Extent) -> Row:
    """Seconds per token of what each method stores for one skipped layer; ``recompute``: the layer, run later in a pass
    that runs anyway.
    """
    tokens, method, few, many = cell.number("tokens"), cell.where["method"], bench.few, bench.layers
    if method == "none":
        return Row(cell, "s", (0.0,), facts={"by_definition": "nothing is stored"})
    if not bench.fits(Shape(count=tokens + 1)):
        return absent(cell, "s", f"{tokens} tokens need more KV blocks than memory has room for")
    if method == "recompute":
        alone, together = (bench.through(Shape(count=n), few, many) for n in (1, tokens + 1))
    else:
        make = bench.copy_up if method == "copy" else bench.fill
        alone, together = bench.best(make(tokens, 0, few)), bench.best(make(tokens, 0, many))
    repeats = repeats_for(bench, (alone, together), extent)
    units = tokens * (many - few)
    return Row(cell, "s", tuple(bench.timer.differences(alone, together, units, repeats)))


# --- the calls of single parts ---------------------------------------------------------------------------------------


def _embedding(bench: Bench, cell: Cell) -> Call:
    tokens = cell.number("tokens")
    ids = bench.ids(tokens)
    positions = torch.arange(tokens, device=bench.device) % bench.host.info.positions
    family, base = bench.resident.family, bench.resident.base
    return lambda: family.embed(base, ids, positions)


def _final_norm(bench: Bench, cell: Cell) -> Call:
    h, family, base = bench.hidden(cell.number("rows")), bench.resident.family, bench.resident.base
    return lambda: family.normed(base, h)


def _head(bench: Bench, cell: Cell) -> Call:
    """The output product alone, without the norm before it."""
    h, unembed = bench.hidden(cell.number("rows")), unembedding(bench)
    return lambda: torch.mm(h, unembed)


def unembedding(bench: Bench) -> Tensor:
    """The output matrix, [d, vocabulary]."""
    base = bench.resident.base
    matrix: Tensor = base.get("head", base["embed"]).t()
    return matrix


def _exit_head(bench: Bench, cell: Cell) -> Call:
    """A trained exit's own part, norm and output product included."""
    rows, exits = cell.number("rows"), [e for e in bench.resident.heads if e <= bench.layers]
    h = bench.hidden(rows)
    depth = exits[0] if exits else bench.layers
    return lambda: bench.resident.logits(h, depth)


def _logits(bench: Bench, cell: Cell) -> Tensor:
    return bench.resident.logits(bench.hidden(cell.number("rows")), bench.layers).clone()


def _sampler(bench: Bench, cell: Cell) -> Call:
    """The engine's own, from logits to ids."""
    from heliosim.engines.sampler import Sampler
    from heliosim.sampling import GREEDY, Sampling

    logits = _logits(bench, cell)
    if cell.where["method"] == "greedy":
        greedy = Sampler(GREEDY)
        return lambda: greedy.choose(logits)
    drawing = Sampler(Sampling(temperature=0.8, top_p=0.95))
    seeds = torch.arange(cell.number("rows"), device=bench.device)
    return lambda: drawing.choose(logits, seeds, seeds)


def _check(bench: Bench, cell: Cell) -> Call:
    """From logits of the full vocabulary to the batch's answer: who is sure, and whether all are."""
    logits = _logits(bench, cell)
    confidence = _CONFIDENCE[str(cell.where["method"])]

    def call() -> tuple[Tensor, Tensor]:
        is_sure = confidence(logits) >= 0.8
        return is_sure, is_sure.all()

    return call


def _max_prob(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.float32).amax(-1)


def _margin(logits: Tensor) -> Tensor:
    best = torch.softmax(logits, -1, dtype=torch.float32).topk(2, -1).values
    return best[:, 0] - best[:, 1]


def _certainty(logits: Tensor) -> Tensor:
    """One less the entropy over its largest value."""
    logp = torch.log_softmax(logits, -1, dtype=torch.float32)
    return 1.0 + (logp.exp() * logp).sum(-1) / float(torch.log(torch.tensor(float(logits.shape[-1]))))


_CONFIDENCE: dict[str, Callable[[Tensor], Tensor]] = {"max-prob": _max_prob, "margin": _margin, "entropy": _certainty}
_CALLS: dict[str, Callable[[Bench, Cell], Call]] = {
    "embedding": _embedding,
    "final_norm": _final_norm,
    "head": _head,
    "exit_head": _exit_head,
    "sampler": _sampler,
    "check": _check,
}
