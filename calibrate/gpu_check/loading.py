"""How fast layers come to the device, and what decoding loses meanwhile."""

from __future__ import annotations

import time
from statistics import median

from heliosim.types import Load, Placement, blocks_for

from .book import Book
from .machine import pinned_bytes_per_s
from .shapes import engine_of, shapes_of
from .steps import Bench

ROWS, CONTEXT = 4, 128


def run(book: Book) -> None:
    """Both figures for each shape of the group."""
    engine = engine_of(book)
    for shape in shapes_of(book.shared["group"]):
        bench = Bench(engine, shape.model, book.options.seed)
        _load(book, bench, shape.model, shape.exits)
        _slowdown(book, bench, shape.model, shape.exits)
        bench.drop()


def _load(book: Book, bench: Bench, model: str, exits: tuple[int, ...]) -> None:
    """From the fewest layers to all of them: bytes of the new ones over the load's seconds, host work included."""
    shallow, full = exits[0], exits[-1]
    moved = bench.spec.weights_bytes(full) - bench.spec.weights_bytes(shallow)
    rates = []
    for _ in range(3):
        bench.place(shallow, ROWS, CONTEXT)
        began = time.perf_counter()
        bench.place(full, ROWS, CONTEXT)
        seconds = time.perf_counter() - began
        rates.append(moved / seconds)
        book.row(kind="load", model=model, layers=full - shallow, bytes=moved, seconds=seconds)
    pinned = pinned_bytes_per_s(bench.engine.device, 0.5)
    note = f"{full - shallow} layers at {median(rates) / 1e9:.2f} GB/s; a pinned copy has {pinned / 1e9:.2f} GB/s"
    shares = [rate / pinned for rate in rates]
    book.put(f"{model}.load", median(shares), low=min(shares), high=max(shares), note=note)


def _slowdown(book: Book, bench: Bench, model: str, exits: tuple[int, ...]) -> None:
    """Step times at the fewest layers while all others come in the background, over those before and after."""
    key, shallow, full = f"{model}.slowdown", exits[0], exits[-1]
    room = CONTEXT + 400
    quiet: list[float] = []
    beside: list[float] = []
    for _ in range(3):
        bench.place(shallow, ROWS, room)
        bench.fill(ROWS, CONTEXT)
        bench.decode(2)
        quiet += [bench.decode(1) for _ in range(20)]
        blocks = ROWS * blocks_for(room + 1) + 1
        target = Placement(model, full)
        bench.engine.perform(Load(target, blocks, "gpu check", part="begin"))
        fetch = bench.engine.residency.fetch
        for _ in range(150):
            if fetch is None or fetch.done_at is not None:
                break
            beside.append(bench.decode(1))
        bench.engine.perform(Load(Placement(model, shallow), blocks, "gpu check", part="drop"))
        quiet += [bench.decode(1) for _ in range(20)]
    book.row(kind="slowdown", model=model, quiet_s=quiet, beside_s=beside)
    if len(beside) < 6:
        book.cannot(key, f"the transfer ended within {len(beside)} steps, too few to judge")
        return
    note = f"{len(beside)} steps beside transfers, {len(quiet)} without; step by step, not in strides"
    book.put(key, median(beside) / median(quiet) - 1, note=note)
