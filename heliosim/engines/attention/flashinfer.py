"""FlashInfer's paged kernels (extra ``gpu``), planned on the host whenever lengths change. Not tested on a GPU.

KV is read where it lies: keys and values are two strided views of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from heliosim.engines.attention.base import Chunks, HostPlanned, Paged, heads_of, is_half, keys_values
from heliosim.engines.models.paged import KVLayer, PagedKV
from heliosim.types import BLOCK_TOKENS, blocks_for

_WORKSPACE_BYTES = 128 << 20


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot be used; empty: it can."""
    if find_spec("flashinfer") is None:
        return "the package flashinfer is not installed (extra gpu: pip install 'heliosim[gpu]')"
    if device.type != "cuda":
        return f"it runs on a GPU, not on {device.type}"
    return "" if is_half(dtype) else f"it computes in half precision, not in {dtype}"


def paged_arrays(tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """How FlashInfer is told of pages: running sums of pages, the pages of all rows in order, and how many tokens the
    last page of each row holds.
    """
    sums: list[int] = [0]
    pages: list[int] = []
    last: list[int] = []
    for table, length in zip(tables, lengths, strict=True):
        held = blocks_for(length)
        pages.extend(table[:held])
        sums.append(len(pages))
        last.append((length - 1) % BLOCK_TOKENS + 1)
    return sums, pages, last


def _int32(values: Sequence[int]) -> Tensor:
    made = torch.tensor(values, dtype=torch.int32)
    return made.pin_memory() if torch.cuda.is_available() else made


class FlashInferRows(HostPlanned):
    """A decode wrapper with buffers of its own, so that its kernels can be captured."""

    def __init__(self, backend: FlashInfer, kv: PagedKV, paged: Paged) -> None:
        import flashinfer

        self.kv, self.shape = kv, kv.shape
        rows, width = paged.tables.shape
        made = {"device": kv.device, "dtype": torch.int32}
        self.wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            backend.workspace(kv.device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=kv.shape.heads // kv.shape.kv_heads >= 4,
            paged_kv_indptr_buffer=torch.zeros(rows + 1, **made),
            paged_kv_indices_buffer=torch.zeros(rows * width, **made),
            paged_kv_last_page_len_buffer=torch.zeros(rows, **made),
        )

    def plan(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        sums, pages, last = paged_arrays(tables, lengths)
        shape, dtype = self.shape, self.kv.dtype
        self.wrapper.plan(
            _int32(sums),
            _int32(pages).to(self.kv.device, non_blocking=True),  # its copy from the host would wait
            _int32(last),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            BLOCK_TOKENS,
            q_data_type=dtype,
            kv_data_type=dtype,
            non_blocking=True,
        )

    def begin(self) -> None:
        """Everything was said to the plan."""

    def decode(self, query: Tensor, layer: KVLayer) -> Tensor:
        out: Tensor = self.wrapper.run(heads_of(query, self.shape), keys_values(layer))
        return out.reshape(query.shape)


class FlashInfer:
    name, reads_width = "flash-infer", False

    def __init__(self) -> None:
        self._workspaces: dict[torch.device, Tensor] = {}
        self._prefill: Any = None
        self._planned: Chunks | None = None

    def workspace(self, device: torch.device) -> Tensor:
        """Scratch memory that all wrappers of a device share; steps run one after the other."""
        if device not in self._workspaces:
            self._workspaces[device] = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return self._workspaces[device]

    def rows(self, kv: PagedKV, paged: Paged) -> FlashInferRows:
        return FlashInferRows(self, kv, paged)

    def prefill(self, query: Tensor, layer: KVLayer, kv: PagedKV, chunks: Chunks) -> Tensor | None:
        import flashinfer

        shape = kv.shape
        if self._prefill is None:
            self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=kv.device), "NHD"
            )
        if self._planned is not chunks:
            sums, pages, last = paged_arrays(chunks.host_tables, chunks.host_lengths)
            queries = [0]
            for count in chunks.host_counts:
                queries.append(queries[-1] + count)
            self._prefill.plan(
                _int32(queries),
                _int32(sums),
                _int32(pages),
                _int32(last),
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                BLOCK_TOKENS,
                causal=True,
                q_data_type=kv.dtype,
                kv_data_type=kv.dtype,
                non_blocking=True,
            )
            self._planned = chunks
        out: Tensor = self._prefill.run(heads_of(query, shape), keys_values(layer))
        return out.reshape(query.shape)
