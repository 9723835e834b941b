"""Decode attention over paged KV as a Triton kernel: split over the KV, then combined.

One program takes one row, one key head and one split of the row's blocks: it attends with all G queries that share the
key head (padded to 16, the least a tensor core takes), ``TILE`` tokens at a time, with a running maximum and sum. The
second kernel weighs the splits of a row by their log-sums. KV is read once and nowhere copied.

``split_reference`` is the same arithmetic in plain torch, tested on every machine; the kernels need a GPU, or
``TRITON_INTERPRET=1``, and have not run on a GPU here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from heliosim.engines.models.paged import PagedKV
from heliosim.types import BLOCK_TOKENS

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU
    triton = tl = None

_LEAST_ROWS = 16  # and columns, of a tensor-core product
_MOST_SPLITS = 32
TILE = 64
"""Tokens that a program looks at together: four blocks, wherever they lie."""


def splits_for(programs: int, width: int, device: torch.device) -> int:
    """How many splits fill the device twice over, each of at least a tile; a power of two."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = max(1, min(2 * cores // max(1, programs), -(-width * BLOCK_TOKENS // TILE), _MOST_SPLITS))
    return 1 << (wanted.bit_length() - 1)


def split_reference(
    query: Tensor, tokens: Tensor, tables: Tensor, lengths: Tensor, kv: PagedKV, splits: int
) -> tuple[Tensor, Tensor]:
    """What the first kernel writes, for query [R, H*E]: parts [R, H, splits, E], each a softmax average over its own
    tokens, and sums [R, H, splits], natural logs of the sums of exponentials (-inf: a split without tokens).
    """
    shape, rows = kv.shape, query.shape[0]
    groups = shape.heads // shape.kv_heads
    parts = torch.zeros(rows, shape.heads, splits, shape.head_dim)
    sums = torch.full((rows, shape.heads, splits), float("-inf"))
    for row in range(rows):
        length = int(lengths[row])
        tiles = -(-length // TILE)
        per_split = -(-tiles // splits) * TILE
        places = torch.arange(length)
        slots = tables[row, places // BLOCK_TOKENS].long() * kv.block_rows + places % BLOCK_TOKENS
        pair = tokens.index_select(0, slots).view(length, 2, shape.kv_heads, shape.head_dim).float()
        for split in range(splits):
            mine = slice(split * per_split, (split + 1) * per_split)
            keys, values = (pair[mine, k].repeat_interleave(groups, 1) for k in (0, 1))
            if not len(keys):
                continue
            heads = query[row].view(shape.heads, shape.head_dim).float()
            scores = torch.einsum("he,the->ht", heads, keys) / math.sqrt(shape.head_dim)
            sums[row, :, split] = scores.logsumexp(-1)
            parts[row, :, split] = torch.einsum("ht,the->he", scores.softmax(-1), values)
    return parts, sums


def combined_reference(parts: Tensor, sums: Tensor) -> Tensor:
    """What the second kernel writes: splits weighed by their shares, [R, H*E]."""
    weights = (sums - sums.logsumexp(-1, keepdim=True)).exp()
    return (parts * weights[..., None]).sum(2).flatten(1)


def decode(
    query: Tensor,
    tokens: Tensor,
    tables: Tensor,
    lengths: Tensor,
    kv: PagedKV,
    parts: Tensor,
    sums: Tensor,
    out: Tensor,
) -> None:
    """Attend with query [R, H*E] (rows may be strided) over a layer's ``tokens``; writes out [R, H*E]."""
    assert triton is not None, "Triton is not installed"
    shape, rows, splits = kv.shape, query.shape[0], parts.shape[2]
    groups, size = shape.heads // shape.kv_heads, shape.head_dim
    padded_size = max(_LEAST_ROWS, triton.next_power_of_2(size))
    _attend[(rows, shape.kv_heads, splits)](
        query, tokens, tables, lengths, parts, sums,
        1.0 / math.sqrt(size), query.stride(0), tokens.stride(0), tables.stride(0), kv.block_rows,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, GROUPS=groups,
        PADDED_GROUPS=max(_LEAST_ROWS, triton.next_power_of_2(groups)),
        SIZE=size, PADDED_SIZE=padded_size, SPLITS=splits, BLOCK=BLOCK_TOKENS, TILE=TILE,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine[(rows, shape.heads)](
        parts, sums, out, out.stride(0),
        HEADS=shape.heads, SIZE=size, PADDED_SIZE=padded_size, SPLITS=splits,
        num_warps=1,
    )  # fmt: skip


def _attend_kernel(  # type: ignore[no-untyped-def]
    query, tokens, tables, lengths, parts, sums,
    scale, query_stride, token_stride, table_stride, block_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    tiles = (length + TILE - 1) // TILE
    per_split = (tiles + SPLITS - 1) // SPLITS
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    group = tl.arange(0, PADDED_GROUPS)
    value = tl.arange(0, PADDED_SIZE)
    token = tl.arange(0, TILE)
    is_group = group < GROUPS
    is_value = value < SIZE
    head = kv_head * GROUPS + group
    both = is_group[:, None] & is_value[None, :]
    q = tl.load(query + row * query_stride + head[:, None] * SIZE + value[None, :], mask=both, other=0.0)
    best = tl.full([PADDED_GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUPS], tl.float32)
    found = tl.zeros([PADDED_GROUPS, PADDED_SIZE], tl.float32)
    for number in range(first, last):
        position = number * TILE + token
        is_token = position < length
        block = tl.load(tables + row * table_stride + position // BLOCK, mask=is_token, other=0).to(tl.int64)
        place = (block * block_rows + position % BLOCK) * token_stride + kv_head * SIZE
        seen = is_token[:, None] & is_value[None, :]
        k = tl.load(tokens + place[:, None] + value[None, :], mask=seen, other=0.0)
        v = tl.load(tokens + place[:, None] + KV_HEADS * SIZE + value[None, :], mask=seen, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        faded = tl.exp(best - higher)
        shares = tl.exp(scores - higher[:, None])
        total = total * faded + tl.sum(shares, 1)
        found = found * faded[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        best = higher
    is_empty = first >= last
    total = tl.where(is_empty, 1.0, total)
    logs = tl.where(is_empty, float("-inf"), best + tl.log(total))
    place = ((row * HEADS + head) * SPLITS + split).to(tl.int64)
    tl.store(parts + place[:, None] * SIZE + value[None, :], found / total[:, None], mask=both)
    tl.store(sums + place, logs, mask=is_group)


def _combine_kernel(  # type: ignore[no-untyped-def]
    parts, sums, out, out_stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    value = tl.arange(0, PADDED_SIZE)
    is_value = value < SIZE
    place = (row * HEADS + head).to(tl.int64) * SPLITS + split
    logs = tl.load(sums + place)
    weights = tl.exp(logs - tl.max(logs, 0))
    weights = weights / tl.sum(weights, 0)
    part = tl.load(parts + place[:, None] * SIZE + value[None, :], mask=is_value[None, :], other=0.0)
    whole = tl.sum(part * weights[:, None], 0)
    tl.store(out + row * out_stride + head * SIZE + value, whole.to(out.dtype.element_ty), mask=is_value)


_attend: Any = triton.jit(_attend_kernel) if triton is not None else None
_combine: Any = triton.jit(_combine_kernel) if triton is not None else None
