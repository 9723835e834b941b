"""One model on the device, and parts of its step that can be called again and again.

What differs between devices is here: how a call is timed (processor time on a CPU, events around the whole call on a
GPU), whether it is captured into a graph first, and how much memory there is. The rest of the package does not ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from heliosim.engines.models.host import HostModel, Resident
from heliosim.engines.models.paged import PagedKV, Pass, Row
from heliosim.types import BLOCK_TOKENS, ModelSpec, Seconds, blocks_for

Call = Callable[[], Any]
KV_SHARE = 0.6
"""Share of the device's free memory that the KV of measured passes may take."""
GPU_LAYERS = 9
"""Layers of the longer of two runs whose difference is taken, on a GPU; a CPU runs all."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of a pass: ``decode`` of them with ``context`` tokens behind the pass, and chunks of ``count`` tokens behind
    ``prefix`` cached ones.
    """

    decode: int = 0
    context: int = 0
    count: int = 0
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.decode + self.count

    @property
    def blocks(self) -> int:
        chunk = blocks_for(self.prefix + self.count) if self.count else 0
        return self.decode * blocks_for(self.context) + chunk


class Timer:
    """Seconds of calls: ``cpu`` (processor time of the process) or ``wall``; on a GPU, of the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_cuda = device, device.type == "cuda"
        self.clock = "wall" if self.is_cuda else "cpu"

    def once(self, call: Call) -> Seconds:
        """One call."""
        if not self.is_cuda:
            began = time.process_time()
            call()
            return time.process_time() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def wall(self, call: Call) -> Seconds:
        """One call and the wait for the device, by the steady clock: what a host sees."""
        began = time.perf_counter()
        call()
        self.settle()
        return time.perf_counter() - began

    def settle(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def repeated(self, call: Call, repeats: int, warm_up: int = 2) -> list[Seconds]:
        for _ in range(warm_up):
            call()
        self.settle()
        return [self.once(call) for _ in range(repeats)]

    def differences(self, fewer: Call, more: Call, units: int, repeats: int) -> list[Seconds]:
        """Seconds per unit by which ``more`` takes longer, in turns so that drift meets both alike."""
        for call in (fewer, more, fewer, more):
            call()
        self.settle()
        return [(self.once(more) - self.once(fewer)) / units for _ in range(repeats)]


class Bench:
    """Weights of ``host`` on the device, KV for the passes to be measured, and calls over both."""

    def __init__(
        self, host: HostModel, spec: ModelSpec, device: torch.device, *, most_blocks: int, is_fast: bool | None = None
    ) -> None:
        """``most_blocks``: KV blocks of the largest pass; fewer are held where memory does not suffice. ``is_fast``:
        passes are those of the engine's fast path (its paged attention), by default on a GPU.
        """
        self.host, self.spec, self.device = host, spec, device
        self.is_fast = device.type == "cuda" if is_fast is None else is_fast
        self.timer = Timer(device)
        self.layers = min(spec.layers, GPU_LAYERS) if self.timer.is_cuda else spec.layers
        self.few = 1 if self.layers > 1 else 0
        self.resident: Resident = host.resident(self.layers, device)
        per_block = BLOCK_TOKENS * spec.kv_bytes_per_token_layer * self.layers
        self.blocks = max(1, min(most_blocks, int(KV_SHARE * free_bytes(device)) // per_block))
        self.kv = PagedKV(self.blocks, self.layers, host.kv_shape, device, host.dtype)
        self._generator = torch.Generator().manual_seed(0)

    def fits(self, shape: Shape) -> bool:
        """Whether the KV held here has room for the rows of a pass."""
        return shape.blocks <= self.blocks

    def hidden(self, tokens: int) -> Tensor:
        """Hidden states of plausible size, [tokens, d]."""
        made = torch.randn(tokens, self.host.info.hidden, generator=self._generator)
        return made.to(self.device, self.host.dtype)

    def ids(self, tokens: int) -> Tensor:
        made = torch.randint(0, self.host.info.vocab, (tokens,), generator=self._generator)
        return made.to(self.device)

    def rows_of(self, shape: Shape) -> list[Row]:
        """Rows in blocks of their own, from the first on."""
        rows, block = [], 0
        sizes = [(shape.context - 1, 1)] * shape.decode + ([(shape.prefix, shape.count)] if shape.count else [])
        for start, count in sizes:
            width = blocks_for(start + count)
            rows.append(Row(list(range(block, block + width)), start, count))
            block += width
        return rows

    def pass_of(self, shape: Shape) -> Any:
        """The prepared pass: index tensors, masks, buffers."""
        run = self._fast_pass(shape) if self.is_fast else self.plain_pass(shape)
        self.resident.family.begin(run)
        return run

    @cached_property
    def _attention(self) -> Any:
        """The backend an engine would choose."""
        from heliosim.engines.attention.choose import choose

        return choose("auto", self.host.kv_shape, self.device, self.host.dtype).attention

    def plain_pass(self, shape: Shape) -> Pass:
        """The pass of the plain engine."""
        rows = self.rows_of(shape)
        return Pass(rows, self.kv.shape, self.device, self.host.dtype, block_rows=self.kv.block_rows)

    def _fast_pass(self, shape: Shape) -> Any:
        """The pass of the fast engine: decode rows in fixed places, chunks behind them."""
        from heliosim.engines.fast.passes import DecodePass, MixedPass
        from heliosim.engines.fast.state import BatchState, RowNow

        attention = self._attention
        rows = self.rows_of(shape)
        decoding, chunks = rows[: shape.decode], rows[shape.decode :]
        width = max(1, blocks_for(shape.context))
        state = BatchState(max(1, shape.decode), width, self.device)
        if decoding:
            now = [RowNow(0, row.start, 8, 0, 0, row.table) for row in decoding]
            state.upload(now, len(now), 0.8)
        run = DecodePass(state, shape.decode, width, self.kv, attention) if decoding else None
        if run is not None:
            run.plan([row.table for row in decoding], [row.start + 1 for row in decoding])
        if not chunks:
            assert run is not None
            run.begin()
            return run
        ids = [[0] * row.count for row in chunks]
        mixed = MixedPass(state, run, len(decoding), chunks, ids, [True] * len(chunks), self.kv, attention)
        mixed.begin()
        return mixed

    def through(self, shape: Shape, first: int, last: int, run: Any = None, resident: Resident | None = None) -> Call:
        """A call that runs layers ``first`` (from 0) up to ``last`` of ``resident`` (the bench's own) over a prepared
        pass.
        """
        prepared, h0 = run or self.pass_of(shape), self.hidden(shape.tokens)
        held = resident or self.resident
        family, layers, stored = held.family, held.layers, self.kv.layers

        def call() -> Tensor:
            h = h0
            for i in range(first, last):
                h = family.layer(layers[i], h, prepared, stored[i])
            return h

        return call

    def fill(self, tokens: int, first: int, last: int) -> Call:
        """A call that stores what layers ``first`` up to ``last`` make of hidden states, without running them."""
        run, h = self.plain_pass(Shape(count=tokens)), self.hidden(tokens)
        self.resident.family.begin(run)
        family, layers, stored = self.resident.family, self.resident.layers, self.kv.layers

        def call() -> None:
            for i in range(first, last):
                family.fill(layers[i], h, run, stored[i])

        return call

    def copy_up(self, tokens: int, first: int, last: int) -> Call:
        """A call that gives layers ``first`` up to ``last`` the KV of the layer before ``first``."""
        run = self.plain_pass(Shape(count=tokens))
        stored = self.kv.layers
        source = stored[max(0, first - 1)].tokens

        def call() -> None:
            kv = source.index_select(0, run.slots)
            for i in range(first, last):
                run.store(stored[i], kv)

        return call

    def captured(self, call: Call) -> tuple[Call, Seconds, int]:
        """The call as a CUDA graph: replay, seconds to capture it, bytes its memory takes. GPU only."""
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.synchronize(self.device)
        before, began = free_bytes(self.device), time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        return graph.replay, seconds, max(0, before - free_bytes(self.device))

    def best(self, call: Call, shape: Shape | None = None) -> Call:
        """The call as an engine would run it: a graph on a GPU, itself elsewhere and where chunks (of ``shape``) are
        read, which are launched one by one.
        """
        is_captured = self.timer.is_cuda and (shape is None or not shape.count)
        return self.captured(call)[0] if is_captured else call


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now; of a CPU, what the system says is available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    from os import sysconf

    return int(sysconf("SC_PAGE_SIZE") * sysconf("SC_AVPHYS_PAGES"))


def total_bytes(device: torch.device) -> int:
    """Memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    from os import sysconf

    return int(sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES"))


def interquartile(values: Sequence[float]) -> float:
    """Relative interquartile range."""
    import numpy as np

    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle) if middle else 0.0
