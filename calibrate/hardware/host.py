"""Measures what the host does: per step in the real loop, per request that comes, per token that leaves as text, and
how long a decision on the device takes to reach it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from heliosim.live import serve_live
from heliosim.recorder import TableRecorder
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.controller import FixedPlacement
from heliosim.serving.memory import MemoryPool
from heliosim.serving.server import Server
from heliosim.types import Arrival, Content, ExitRule, Load, ModelSpec, Outcome, Request, Run, blocks_for
from heliosim.workload import OpenLoop

from .bench import Bench, Shape
from .cell import Cell, Row, absent
from .grid import Extent

OUTPUT, PROMPT = 16, 16
NO_TOKENIZER = "the checkpoint has no tokenizer.json"


class Timed:
    """An engine that notes the seconds it took for each action, on the clock that the loop charges."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def perform(self, action: Run | Load) -> Outcome:
        began = time.process_time()
        outcome: Outcome = self._engine.perform(action)
        self.seconds.append(time.process_time() - began)
        return outcome


def server_of(spec: ModelSpec, rows: int, pool_bytes: int, depth: int | None = None) -> Server:
    """A server that keeps one placement."""
    controller = FixedPlacement(spec, ExitRule("none"), spec.layers if depth is None else depth)
    pool = MemoryPool(pool_bytes)
    return Server(controller, ContinuousBatcher(rows, max(rows, 256)), pool, {spec.name: spec}, TableRecorder())


def measure_host_step(engine: Any, spec: ModelSpec, cell: Cell, text: Sequence[int]) -> Row:
    """Processor seconds of a step of the live loop outside the engine: scheduling, bookkeeping, recording."""
    rows = cell.number("rows")
    pool = spec.weights_bytes(spec.layers) + (rows + 1) * (blocks_for(PROMPT + OUTPUT) + 1) * spec.block_bytes(
        spec.layers
    )
    timed = Timed(engine)
    arrivals = [_arrival(i, text, PROMPT, OUTPUT) for i in range(rows)]
    done = serve_live(server_of(spec, rows, pool), timed, OpenLoop(arrivals), "cpu")  # type: ignore[arg-type]
    values = [
        outcome.seconds - inside
        for (action, outcome), inside in zip(done.log, timed.seconds, strict=True)
        if isinstance(action, Run) and not action.batch.chunks and len(action.batch) == rows
    ]
    return Row(cell, "s", tuple(values)) if values else absent(cell, "s", "no step held as many rows")


def measure_prepare(bench: Bench, cell: Cell, extent: Extent) -> Row:
    """Processor seconds to prepare a decode pass: tables, masks, views. An engine may hide them behind the device."""
    shape = Shape(decode=cell.number("rows"), context=min(64, extent.max_context))
    if not bench.fits(shape):
        return absent(cell, "s", f"needs {shape.blocks} KV blocks, memory has room for {bench.blocks}")
    values = []
    for _ in range(extent.repeats):
        began = time.process_time()
        bench.pass_of(shape)
        values.append(time.process_time() - began)
    return Row(cell, "s", tuple(values))


def measure_ingress(
    engine: Any, spec: ModelSpec, cell: Cell, texts: Sequence[str], tokenizer: Path | None, n: int
) -> Row:
    """Seconds from a request's text to its place in the queue: tokenised, made, accepted, submitted."""
    tokens = cell.number("tokens")
    if tokenizer is None:
        return absent(cell, "s", NO_TOKENIZER)
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer))
    text, k = "", 0
    while len(encode.encode(text).ids) < tokens:
        text, k = f"{text} {texts[k % len(texts)]}", k + 1
    server = server_of(spec, 1, 4 * spec.weights_bytes(spec.layers))
    values = []
    for i in range(n):
        began = time.process_time()
        ids = tuple(encode.encode(text).ids[:tokens])
        arrival = Arrival(Request(i, 0.0, len(ids), 1), Content("", ids, 1))
        engine.accept(arrival)
        server.submit(arrival.request, 0.0)
        values.append(time.process_time() - began)
        engine.forget(i)
    return Row(cell, "s", tuple(values), facts={"prompt_tokens": tokens})


def measure_detokenise(cell: Cell, text: Sequence[int], tokenizer: Path | None, n: int) -> Row:
    """Seconds to turn one token of each of ``rows`` rows into text, a few tokens before it decoded along."""
    if tokenizer is None:
        return absent(cell, "s", NO_TOKENIZER)
    from tokenizers import Tokenizer

    decode, rows = Tokenizer.from_file(str(tokenizer)), cell.number("rows")
    windows = [list(text[i % max(1, len(text) - 8) :][:8]) for i in range(rows)]
    values = []
    for _ in range(n):
        began = time.process_time()
        for window in windows:
            decode.decode(window)
        values.append(time.process_time() - began)
    return Row(cell, "s", tuple(values))


def measure_decision(bench: Bench, cell: Cell, extent: Extent) -> Row:
    """Seconds that a layer's pass takes longer because the host reads a flag behind it before it goes on: the whole
    idle gap of the device, not the copy alone. On a GPU the flag goes to pinned memory, and an event says so.
    """
    call = bench.best(bench.through(Shape(decode=1, context=16), 0, 1))
    flag = torch.ones(1, dtype=torch.bool, device=bench.device)
    pinned = torch.empty(1, dtype=torch.bool, pin_memory=True) if bench.timer.is_cuda else None
    chain = 8

    def without() -> None:
        for _ in range(chain):
            call()
            flag.logical_not()

    def reading() -> None:
        for _ in range(chain):
            call()
            said = flag.logical_not()
            if pinned is None:
                said.item()
                continue
            pinned.copy_(said, non_blocking=True)
            there = torch.cuda.Event()
            there.record()
            there.synchronize()
            pinned.item()

    for _ in range(3):
        without()
        reading()
    values = []
    for _ in range(extent.repeats):
        if bench.timer.is_cuda:
            values.append((bench.timer.wall(reading) - bench.timer.wall(without)) / chain)
        else:
            values.append((bench.timer.once(reading) - bench.timer.once(without)) / chain)
    how = "pinned flag and event" if bench.timer.is_cuda else "a tensor read on the same processor"
    return Row(cell, "s", tuple(values), facts={"how": how})


def measure_kv_blocks(engine: Any, spec: ModelSpec, cell: Cell) -> Row:
    """KV blocks that the engine holds for a placement in a budget, against those the server's pool counts on."""
    depth, budget = cell.number("depth"), cell.number("budget_bytes")
    server = server_of(spec, 1, budget, depth)
    server.submit(Request(0, 0.0, 8, 8), 0.0)
    action = server.next_action(0.0)
    if not isinstance(action, Load):
        return absent(cell, "blocks", "the server refuses: the weights leave no room for KV")
    engine.perform(action)
    blocks = engine.books()["kv_blocks"]
    engine.reset()
    if blocks != action.kv_blocks:
        raise AssertionError(f"{spec.name}@{depth}: the engine holds {blocks} KV blocks, the pool {action.kv_blocks}")
    return Row(cell, "blocks", (float(blocks),), facts={"pool_blocks": action.kv_blocks})


def _arrival(i: int, text: Sequence[int], prompt: int, output: int) -> Arrival:
    first = (7 * i) % max(1, len(text) - prompt)
    return Arrival(Request(i, 0.0, prompt, output), Content("", tuple(text[first : first + prompt]), output))
