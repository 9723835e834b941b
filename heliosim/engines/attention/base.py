"""What an attention backend is: decoding over paged KV, and reading prompts.

Letters in shapes: R rows with one new token, T new tokens of a chunk, H query heads, K key/value heads, E values per
head, W blocks that a row's table spans. KV lies as ``models/paged.py`` says: a token's row in a layer's ``tokens`` is
``table[p // 16] * block_rows + p % 16``.

A backend is made once per engine. For each kind of step it prepares ``DecodeRows`` over buffers that keep their
addresses, so that a step can be captured as a CUDA graph: ``begin`` and ``decode`` run on the device and depend on
nothing that the host changes, except in a backend that plans on the host, which must be told the lengths
(``plan``) before each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from heliosim.engines.models.paged import KVLayer, KVShape, PagedKV


@dataclass(frozen=True, slots=True)
class Paged:
    """Rows of a decode step on the device: ``tables`` [R, W] int32, ``lengths`` [R] int32 (tokens attended to, the new
    one included), ``sources`` [R] int64 (its own number, or that of the row it repeats to fill up the step). All keep
    their addresses.
    """

    tables: Tensor
    lengths: Tensor
    sources: Tensor


class DecodeRows(Protocol):
    """Attention of one kind of decode step."""

    def begin(self) -> None:
        """Make what all layers of a step share, on the device."""
        ...

    def decode(self, query: Tensor, layer: KVLayer) -> Tensor:
        """query [R, H*E] over everything stored of each row; [R, H*E]."""
        ...


class HostPlanned:
    """Base of ``DecodeRows`` whose kernels are planned on the host."""

    def plan(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Prepare a step of rows with these blocks and lengths, without waiting for the device."""
        raise NotImplementedError


class Attention(Protocol):
    """``name``: as a scenario says it. ``reads_width``: what a step reads grows with the width of the tables it was
    prepared for, not with lengths, so narrow tables are worth a graph of their own.
    """

    name: str
    reads_width: bool

    def rows(self, kv: PagedKV, paged: Paged) -> DecodeRows:
        """Prepare a kind of decode step."""
        ...

    def prefill(self, query: Tensor, layer: KVLayer, kv: PagedKV, chunks: Chunks) -> Tensor | None:
        """Queries [T, H*E] of chunks whose KV is stored already, over everything stored; None: this backend has no way
        of its own, and the plain one is taken.
        """
        ...


@dataclass(frozen=True, slots=True)
class Chunks:
    """Prompt chunks of a step, one behind the other: ``cu_query``, ``cu_stored`` [n+1] int32 running sums of their new
    and of all their tokens, ``tables`` [n, W] int32 and ``lengths`` [n] int32 on the device; the longest of each on the
    host, with their blocks and lengths.
    """

    cu_query: Tensor
    cu_stored: Tensor
    tables: Tensor
    lengths: Tensor
    longest_query: int
    longest_stored: int
    host_counts: tuple[int, ...]
    host_lengths: tuple[int, ...]
    host_tables: tuple[tuple[int, ...], ...]


def heads_of(query: Tensor, shape: KVShape) -> Tensor:
    """Queries [R, H*E] as [R, H, E]."""
    return query.view(query.shape[0], shape.heads, shape.head_dim)


def keys_values(layer: KVLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer by block, [N, 16, K, E] each: views, their strides alike."""
    return layer.data[:, :, 0], layer.data[:, :, 1]


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)
