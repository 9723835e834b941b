"""torch's own variable-length attention over paged KV (torch >= 2.12, on a GPU, half precision). Not tested on one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heliosim.engines.attention.base import Chunks, Paged, heads_of, is_half, keys_values
from heliosim.engines.models.paged import KVLayer, PagedKV
from heliosim.types import BLOCK_TOKENS


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot be used; empty: it can."""
    found = _function()
    if found is None:
        return f"torch {torch.__version__} has no variable-length attention over a block table (2.12 has)"
    if device.type != "cuda":
        return f"it runs on a GPU, not on {device.type}"
    return "" if is_half(dtype) else f"it computes in half precision, not in {dtype}"


def _function() -> Any:
    """``varlen_attn``, if it knows block tables."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    import inspect

    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


class VarlenRows:
    def __init__(self, kv: PagedKV, paged: Paged) -> None:
        self.paged, self.shape, self.function = paged, kv.shape, _function()
        rows, width = paged.tables.shape
        self.cu_query = torch.arange(rows + 1, device=kv.device, dtype=torch.int32)
        self.most = width * BLOCK_TOKENS
        self.tables = torch.zeros(rows, width, device=kv.device, dtype=torch.int32)

    def begin(self) -> None:
        self.tables.copy_(self.paged.tables)

    def decode(self, query: Tensor, layer: KVLayer) -> Tensor:
        keys, values = keys_values(layer)
        out: Tensor = self.function(
            heads_of(query, self.shape),
            keys,
            values,
            self.cu_query,
            None,
            1,
            self.most,
            enable_gqa=self.shape.heads != self.shape.kv_heads,
            seqused_k=self.paged.lengths,
            block_table=self.tables,
        )
        return out.reshape(query.shape)


class Varlen:
    name, reads_width = "varlen", False

    def rows(self, kv: PagedKV, paged: Paged) -> VarlenRows:
        return VarlenRows(kv, paged)

    def prefill(self, query: Tensor, layer: KVLayer, kv: PagedKV, chunks: Chunks) -> Tensor | None:
        keys, values = keys_values(layer)
        out: Tensor = _function()(
            heads_of(query, kv.shape),
            keys,
            values,
            chunks.cu_query,
            None,
            chunks.longest_query,
            chunks.longest_stored,
            window_size=(-1, 0),
            enable_gqa=kv.shape.heads != kv.shape.kv_heads,
            seqused_k=chunks.lengths,
            block_table=chunks.tables,
        )
        return out.reshape(query.shape)
