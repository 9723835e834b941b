"""A small Triton kernel of our own for decoding over paged KV. Triton comes with torch for GPUs. See ``split.py``."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from heliosim.engines.attention.base import Chunks, Paged
from heliosim.engines.models.paged import KVLayer, PagedKV


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot be used; empty: it can."""
    if find_spec("triton") is None:
        return "Triton is not installed (it comes with torch for GPUs)"
    return "" if device.type == "cuda" else f"it runs on a GPU, not on {device.type}"


class TritonRows:
    """Work buffers of one kind of step: what each split of each row found, [R, H, splits, E] and its log-sum."""

    def __init__(self, kv: PagedKV, paged: Paged) -> None:
        from heliosim.engines.fast.triton_decode import splits_for

        self.kv, self.paged, self.shape = kv, paged, kv.shape
        rows, width = paged.tables.shape
        heads, size = kv.shape.heads, kv.shape.head_dim
        self.splits = splits_for(rows * kv.shape.kv_heads, width, kv.device)
        self.tables = torch.zeros(rows, width, device=kv.device, dtype=torch.int32)
        made = {"device": kv.device, "dtype": torch.float32}
        self.parts = torch.zeros(rows, heads, self.splits, size, **made)
        self.sums = torch.zeros(rows, heads, self.splits, **made)
        self.out = torch.zeros(rows, heads * size, device=kv.device, dtype=kv.dtype)

    def begin(self) -> None:
        self.tables.copy_(self.paged.tables)

    def decode(self, query: Tensor, layer: KVLayer) -> Tensor:
        from heliosim.engines.fast.triton_decode import decode

        decode(query, layer.tokens, self.tables, self.paged.lengths, self.kv, self.parts, self.sums, self.out)
        return self.out


class Triton:
    name, reads_width = "triton", False

    def rows(self, kv: PagedKV, paged: Paged) -> TritonRows:
        return TritonRows(kv, paged)

    def prefill(self, query: Tensor, layer: KVLayer, kv: PagedKV, chunks: Chunks) -> Tensor | None:
        return None
