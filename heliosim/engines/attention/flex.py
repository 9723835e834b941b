"""FlexAttention over paged KV: the whole storage is the keys, and a block mask says which of it belongs to which row.

Nothing is gathered: a kernel visits the KV blocks of a row alone. On a CPU it runs uncompiled, as a reference in tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from heliosim.engines.attention.base import Chunks, Paged
from heliosim.engines.models.paged import KVLayer, PagedKV
from heliosim.types import BLOCK_TOKENS


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot be used; empty: it can."""
    try:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no FlexAttention"
    return ""


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _plain() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    return plain


class FlexRows:
    """``first``, ``owner``: of each block of the storage, the position of its first token in the text of the row it
    belongs to, and that row (-1: of no row here); [blocks].
    """

    def __init__(self, kv: PagedKV, paged: Paged) -> None:
        self.paged, self.shape = paged, kv.shape
        rows, width = paged.tables.shape
        device = kv.device
        self.step = kv.block_rows // BLOCK_TOKENS
        self.blocks = (kv.layers[0].blocks.shape[0] - 1) * self.step + 1
        self.first = torch.zeros(self.blocks, device=device, dtype=torch.int32)
        self.owner = torch.zeros(self.blocks, device=device, dtype=torch.int64)
        self.lengths = torch.zeros(rows, device=device, dtype=torch.int32)
        self.used = torch.zeros(rows, 1, 1, device=device, dtype=torch.int32)
        # one entry per block of the storage: a kernel may read behind those in use
        self.indices = torch.zeros(rows, 1, 1, max(self.blocks, width), device=device, dtype=torch.int32)
        self.starts = torch.arange(width, device=device, dtype=torch.int32) * BLOCK_TOKENS
        self.mask = self._block_mask()

    def _block_mask(self) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        first, owner, lengths, sources = self.first, self.owner, self.lengths, self.paged.sources

        def is_seen(row: Tensor, head: Tensor, query: Tensor, place: Tensor) -> Tensor:
            block = place // BLOCK_TOKENS
            return (owner[block] == sources[row]) & (first[block] + place % BLOCK_TOKENS < lengths[row])

        return BlockMask.from_kv_blocks(
            self.used,
            self.indices,
            BLOCK_SIZE=(128, BLOCK_TOKENS),
            mask_mod=is_seen,
            seq_lengths=(1, self.blocks * BLOCK_TOKENS),
            compute_q_blocks=False,
        )

    def begin(self) -> None:
        tables, lengths = self.paged.tables, self.paged.lengths
        rows, width = tables.shape
        self.lengths.copy_(lengths)
        self.used.view(-1).copy_((lengths + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS)
        held = self.starts < lengths[:, None]
        # behind a row's end its table may name anybody's blocks: those entries say what its first one says
        blocks = torch.where(held, tables, tables[:, :1]) * self.step
        self.indices.view(rows, -1)[:, :width] = blocks
        numbers = blocks.reshape(-1).long()
        self.first.index_copy_(0, numbers, torch.where(held, self.starts, 0).reshape(-1))
        self.owner.fill_(-1).index_copy_(0, numbers, self.paged.sources[:, None].expand(rows, width).reshape(-1))

    def decode(self, query: Tensor, layer: KVLayer) -> Tensor:
        shape, rows = self.shape, query.shape[0]
        heads = query.view(rows, shape.heads, 1, shape.head_dim)
        tokens = layer.tokens[: self.blocks * BLOCK_TOKENS].view(1, -1, 2, shape.kv_heads, shape.head_dim)
        keys, values = tokens[:, :, 0].transpose(1, 2), tokens[:, :, 1].transpose(1, 2)
        with warnings.catch_warnings():
            if not query.is_cuda:
                warnings.simplefilter("ignore")  # uncompiled: a reference, and slow
            function = _compiled() if query.is_cuda else _plain()
            out = function(heads, keys, values, block_mask=self.mask, enable_gqa=shape.heads != shape.kv_heads)
        made: Tensor = out.reshape(rows, shape.query_width)
        return made


class Flex:
    name, reads_width = "flex", False

    def rows(self, kv: PagedKV, paged: Paged) -> FlexRows:
        return FlexRows(kv, paged)

    def prefill(self, query: Tensor, layer: KVLayer, kv: PagedKV, chunks: Chunks) -> Tensor | None:
        return None
