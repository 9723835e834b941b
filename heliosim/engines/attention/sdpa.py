"""The plain backend: gather the blocks of each row, then torch's own scaled dot-product attention. Works everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from heliosim.engines.attention.base import Chunks, Paged
from heliosim.engines.models.paged import KVLayer, PagedKV
from heliosim.types import BLOCK_TOKENS


class SdpaRows:
    """Buffers of one kind of step: the gathered blocks, and the mask that all layers share."""

    def __init__(self, kv: PagedKV, paged: Paged) -> None:
        self.paged, self.shape = paged, kv.shape
        rows, width = paged.tables.shape
        self.rows, self.width, self.span = rows, width, width * BLOCK_TOKENS
        self.places = torch.arange(self.span, device=kv.device)
        self.gathered = torch.zeros(rows * width, BLOCK_TOKENS * kv.shape.kv_width, device=kv.device, dtype=kv.dtype)
        self.blocks = torch.zeros(rows * width, device=kv.device, dtype=torch.int64)
        self.mask = torch.zeros(rows, 1, 1, self.span, device=kv.device, dtype=kv.dtype)
        pair = self.gathered.view(rows, self.span, 2, kv.shape.kv_heads, kv.shape.head_dim).permute(2, 0, 3, 1, 4)
        self.keys, self.values = pair[0], pair[1]

    def begin(self) -> None:
        self.blocks.copy_(self.paged.tables.view(-1) if self.paged.tables.is_contiguous() else self._flat())
        hidden = self.places >= self.paged.lengths[:, None]
        self.mask.view(self.rows, self.span).zero_().masked_fill_(hidden, float("-inf"))

    def _flat(self) -> Tensor:
        return self.paged.tables.reshape(-1)

    def decode(self, query: Tensor, layer: KVLayer) -> Tensor:
        torch.index_select(layer.blocks, 0, self.blocks, out=self.gathered)
        # the G queries that share a key head become G query positions: nothing is repeated
        grouped = query.view(self.rows, self.shape.kv_heads, -1, self.shape.head_dim)
        out = scaled_dot_product_attention(grouped, self.keys, self.values, attn_mask=self.mask)
        return out.reshape(self.rows, self.shape.query_width)


class Sdpa:
    """Gathers what the tables span, so it reads (and writes) more than it must: the fallback, and the reference."""

    name, reads_width = "sdpa", True

    def rows(self, kv: PagedKV, paged: Paged) -> SdpaRows:
        return SdpaRows(kv, paged)

    def prefill(self, query: Tensor, layer: KVLayer, kv: PagedKV, chunks: Chunks) -> Tensor | None:
        """``models/paged.Pass`` does it so already."""
        return None
