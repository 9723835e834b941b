"""Decoding held against the time its weights need to be read once, and a step's time against the layers it runs."""

from __future__ import annotations

from statistics import median
from typing import Any

from .book import Book
from .machine import copy_bytes_per_s, peak_bytes_per_s
from .shapes import engine_of, shapes_of
from .steps import Bench

STEPS_GPU, STEPS_CPU = 64, 3


def roofline(book: Book) -> None:
    """Ideal time over measured time of a decode step at full depth, by batch and context."""
    engine = engine_of(book)
    peak = peak_bytes_per_s(book.options)
    bytes_per_s = peak or copy_bytes_per_s(engine.device)
    basis = "data-sheet bandwidth" if peak else "measured copy bandwidth"
    book.note(f"Ideal: bytes of layers and output head over {basis}, {bytes_per_s / 1e9:,.0f} GB/s.")
    cells = [(a, *_cell(a.key)) for a in book.measure.asked if ".ideal." in a.key]
    each_s = book.left_s / len(cells)
    for shape in shapes_of(book.shared["group"]):
        bench = Bench(engine, shape.model, book.options.seed)
        mine = [c for c in cells if c[0].key.startswith(f"{shape.model}.")]
        steps = STEPS_GPU if book.options.is_gpu else STEPS_CPU
        for asked, rows, context in mine:
            if book.is_late(0.2 * each_s):
                book.cannot(asked.key, "no time left")
                continue
            bench.place(bench.spec.layers, rows, context + 6 * steps)
            bench.fill(rows, context)
            timed = bench.step(3, steps)
            ideal_s = weight_bytes(engine, shape.model, bench.spec.layers) / bytes_per_s
            book.row(model=shape.model, rows=rows, context=context, steps=3 * steps, seconds=timed.median_s,
                     least_s=timed.least_s, most_s=timed.most_s, ideal_s=ideal_s)  # fmt: skip
            shares = [ideal_s / s for s in (timed.median_s, timed.most_s, timed.least_s)]
            book.put(asked.key, shares[0], low=shares[1], high=shares[2])
            if (rows, context) == (1, 128):
                to_ms = {"low": 1e3 * timed.least_s, "high": 1e3 * timed.most_s}
                book.put(f"{shape.model}.step", 1e3 * timed.median_s, **to_ms, note=f"ideal {1e3 * ideal_s:.2f} ms")
        bench.drop()


def _cell(key: str) -> tuple[int, int]:
    rows, _, context = key.rpartition(".")[2].partition("x")
    return int(rows), int(context)


def weight_bytes(engine: Any, model: str, depth: int) -> int:
    """Bytes of weights that a decode step reads: its layers, and the output head once; the embedding's rows are few."""
    spec, info = engine.specs[model], engine.hosts[model].info
    head: int = info.vocab * info.hidden * engine.hosts[model].dtype.itemsize
    return depth * int(spec.layer_bytes) + head


def linearity(book: Book) -> None:
    """A line through the least and the most layers; how far the depths in between are from it."""
    engine = engine_of(book)
    steps = STEPS_GPU if book.options.is_gpu else 2 * STEPS_CPU
    shapes = shapes_of(book.shared["group"])
    for shape in shapes:
        key = f"{shape.model}.linearity"
        bench = Bench(engine, shape.model, book.options.seed)
        depths = list(shape.exits)
        seconds: dict[int, list[float]] = {d: [] for d in depths}
        for _ in range(3):  # in turn, so that drift meets all depths alike
            for depth in depths:
                bench.place(depth, 4, 128 + 3 * steps)
                bench.fill(4, 128)
                bench.decode(steps)
                seconds[depth].append(bench.decode(steps) / steps)
        times = {d: median(s) for d, s in seconds.items()}
        first, last = depths[0], depths[-1]
        layer = (times[last] - times[first]) / (last - first)
        head = times[first] - first * layer
        errors = {d: times[d] / (head + d * layer) - 1 for d in depths[1:-1]}
        for depth, values in seconds.items():
            book.row(model=shape.model, depth=depth, rows=4, context=128, seconds=values)
        worst = max(errors.values(), key=abs)
        note = f"layer {1e6 * layer:.0f} us, head and the rest {1e6 * head:.0f} us; depths {depths}"
        book.put(key, worst, note=note)
        bench.drop()
