"""What an architecture's layers need of a step on the fast path: positions, places in the KV, and attention.

They stand where ``models/paged.Pass`` stands on the plain path, and a layer cannot tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heliosim.engines.attention.base import Attention, Chunks, DecodeRows, HostPlanned, Paged
from heliosim.engines.fast.state import BatchState
from heliosim.engines.models.paged import KVLayer, PagedKV, Pass, Row
from heliosim.types import BLOCK_TOKENS


class DecodePass:
    """Decode rows in ``bucket`` fixed places, whose tables span ``width`` blocks.

    ``begin`` works out, on the device, what all layers share: which rows are real, their tokens and positions, where
    their keys and values go. ``qkv`` [bucket, (H+2K)*E]: the buffer a layer projects into; ``turns`` and ``rotating``
    belong to an architecture with rotary positions.
    """

    turns: Tensor
    rotating: Tensor

    def __init__(
        self,
        state: BatchState,
        bucket: int,
        width: int,
        kv: PagedKV,
        attention: Attention,
    ) -> None:
        self.state, self.tokens, self.shape, self.kv_storage = state, bucket, kv.shape, kv
        whole = {"device": kv.device, "dtype": torch.int64}
        self.numbers = torch.arange(bucket, **whole)
        self.sources, self.ids, self.positions, self.slots = (torch.zeros(bucket, **whole) for _ in range(4))
        self.is_on = torch.zeros(bucket, device=kv.device, dtype=torch.bool)
        self.tables = torch.zeros(bucket, width, device=kv.device, dtype=torch.int32)
        self.lengths = torch.zeros(bucket, device=kv.device, dtype=torch.int32)
        size = kv.shape.query_width + kv.shape.kv_width
        self.qkv = qkv = torch.zeros(bucket, size, device=kv.device, dtype=kv.dtype)
        self.query, self.kv = qkv[:, : kv.shape.query_width], qkv[:, kv.shape.query_width :]
        self.rows: DecodeRows = attention.rows(kv, Paged(self.tables, self.lengths, self.sources))

    @property
    def is_planned(self) -> bool:
        """Whether attention must be told of lengths before each step."""
        return isinstance(self.rows, HostPlanned)

    def plan(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Tell it, rows filled up with the first one."""
        if isinstance(self.rows, HostPlanned):
            more = self.tokens - len(lengths)
            self.rows.plan([*tables, *([tables[0]] * more)], [*lengths, *([lengths[0]] * more)])

    def begin(self) -> None:
        """Read the state. Slots: ``table[p // 16] * block_rows + p % 16``."""
        state, n = self.state, self.tokens
        torch.lt(self.numbers, state.count, out=self.is_on)
        torch.mul(self.numbers, self.is_on, out=self.sources)
        torch.index_select(state.ids[:n], 0, self.sources, out=self.ids)
        torch.index_select(state.positions[:n], 0, self.sources, out=self.positions)
        width = self.tables.shape[1]
        torch.index_select(state.tables[:n, :width], 0, self.sources, out=self.tables)
        block = self.tables.gather(1, (self.positions // BLOCK_TOKENS)[:, None])[:, 0]
        self.slots.copy_(block * self.kv_storage.block_rows + self.positions % BLOCK_TOKENS)
        self.lengths.copy_(self.positions + 1)
        self.rows.begin()

    def attend(self, layer: KVLayer) -> Tensor:
        """Store the keys and values in ``qkv`` and attend with its queries; [bucket, H*E]."""
        layer.tokens.index_copy_(0, self.slots, self.kv)
        return self.rows.decode(self.query, layer)

    def store(self, layer: KVLayer, kv: Tensor) -> None:
        """Store keys and values [bucket, 2*K*E] made elsewhere (state propagation)."""
        layer.tokens.index_copy_(0, self.slots, kv)


class MixedPass:
    """A step that reads prompts: decode rows first, then chunks. Prepared anew for each step, and never captured; only
    its decode rows' attention goes through a pass that is kept.
    """

    turns: Tensor
    rotating: Tensor

    def __init__(
        self,
        state: BatchState,
        decode: DecodePass | None,
        decoding: int,
        chunks: Sequence[Row],
        ids: Sequence[Sequence[int]],
        emits: Sequence[bool],
        kv: PagedKV,
        attention: Attention,
    ) -> None:
        """``decode``: of at least ``decoding`` rows (None: there are none); ``ids``: of the chunks' tokens; ``emits``:
        whose last token yields another.
        """
        self.state, self.kv_storage, self.attention = state, kv, attention
        self.decode, self.decoding, self.emitting = decode, decoding, decoding + sum(emits)
        size = kv.shape.query_width + kv.shape.kv_width
        self.tokens = decoding + sum(row.count for row in chunks)
        self.qkv = torch.empty(self.tokens, size, device=kv.device, dtype=kv.dtype)
        self.kv = self.qkv[:, kv.shape.query_width :]
        self.chunks = Pass(
            chunks, kv.shape, kv.device, kv.dtype, ids=ids, emits=emits,
            buffer=self.qkv[decoding:], block_rows=kv.block_rows,
        )  # fmt: skip
        self.ids, self.positions, self.slots = self.chunks.ids, self.chunks.positions, self.chunks.slots
        has_own = attention.name in ("flash-infer", "varlen")
        self.told: Chunks | None = _told(self.chunks, chunks, kv) if has_own else None
        self.ends = self._ends(sum(emits))

    def _ends(self, emitting: int) -> Tensor:
        """Places of the tokens that yield others: decode rows, then chunks."""
        device = self.qkv.device
        rows = torch.arange(self.decoding, device=device)
        if not emitting:
            return rows
        last = self.chunks.ends
        places = torch.arange(emitting, device=device) if last is None else last
        return torch.cat((rows, places + self.decoding))

    def begin(self) -> None:
        """Read the state of the decode rows; from then on those that yield a first token are rows too."""
        if self.decode is not None:
            self.state.use(self.decoding)
            self.decode.begin()
            pairs = (
                (own[: self.decoding], read)
                for own, read in zip(self._of(self.decode), self._of(self.chunks), strict=True)
            )
            self.ids, self.positions, self.slots = (torch.cat(pair) for pair in pairs)
        self.state.use(self.emitting)

    @staticmethod
    def _of(run: DecodePass | Pass) -> tuple[Tensor, Tensor, Tensor]:
        return run.ids, run.positions, run.slots

    def attend(self, layer: KVLayer) -> Tensor:
        """As ``DecodePass.attend``; [T, H*E]."""
        read = self._read(layer)
        if self.decode is None:
            return read
        # rows that fill the kept pass up repeat the first one
        torch.index_select(self.qkv[: self.decoding], 0, self.decode.sources, out=self.decode.qkv)
        return torch.cat((self.decode.attend(layer)[: self.decoding], read))

    def _read(self, layer: KVLayer) -> Tensor:
        if self.told is not None:
            self.chunks.store(layer, self.chunks.kv)
            query = self.qkv[self.decoding :, : self.kv_storage.shape.query_width]
            found = self.attention.prefill(query, layer, self.kv_storage, self.told)
            if found is not None:
                return found
        return self.chunks.attend(layer)


def _told(run: Pass, chunks: Sequence[Row], kv: PagedKV) -> Chunks:
    """Chunks in the order they lie in the pass, for kernels that take them together."""
    rows = [chunks[i] for i in run.order]
    counts = [row.count for row in rows]
    lengths = [row.start + row.count for row in rows]
    width = max(len(row.table) for row in rows)
    flat: list[int] = [0]
    for count in counts:
        flat.append(flat[-1] + count)
    sums = [0]
    for length in lengths:
        sums.append(sums[-1] + length)
    tables = [[*row.table, *([0] * (width - len(row.table)))] for row in rows]
    numbers = torch.tensor([*flat, *sums, *lengths, *(b for table in tables for b in table)], dtype=torch.int32)
    if kv.device.type == "cuda":
        numbers = numbers.pin_memory().to(kv.device, non_blocking=True)
    n = len(rows)
    parts: Any = numbers.split([n + 1, n + 1, n, n * width])
    return Chunks(
        parts[0], parts[1], parts[3].view(n, width), parts[2], max(counts), max(lengths),
        tuple(counts), tuple(lengths), tuple(tuple(row.table) for row in rows),
    )  # fmt: skip
