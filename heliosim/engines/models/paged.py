"""Paged KV storage and the attention over it.

Letters in shapes: T tokens of a pass, R rows with one token, H query heads, K key/value heads, G = H/K, E values per
head, N blocks, S slots a row's block table spans.

A pass of tokens through layers is prepared once (``Pass``): index tensors, masks, work buffers and every view that does
not depend on the layer. At small sizes a layer costs what its calls cost, so nothing is built twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from heliosim.formats.checkpoint import hidden_room
from heliosim.types import BLOCK_TOKENS, RequestId, blocks_for


@dataclass(frozen=True, slots=True)
class KVShape:
    """Sizes of one layer's keys and values."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Values per token and layer, keys and values together."""
        return 2 * self.kv_heads * self.head_dim


class KVLayer:
    """One layer's blocks [N, 16, 2, K, E], with the two flat views that reading and writing use: ``blocks`` [N, ...],
    and ``tokens`` [rows, 2*K*E], in which a block's 16 rows follow each other and blocks lie ``PagedKV.block_rows``
    apart.
    """

    __slots__ = ("blocks", "data", "tokens")

    def __init__(self, blocks: int, shape: KVShape, device: torch.device, dtype: torch.dtype) -> None:
        """A layer of its own, whose blocks lie side by side."""
        # zeroed: slots behind a row's end are read and masked, and 0 * nan would be nan
        self._view(torch.zeros(blocks, BLOCK_TOKENS * shape.kv_width, device=device, dtype=dtype), 0, shape)

    @classmethod
    def within(cls, cells: Tensor, layer: int, shape: KVShape) -> KVLayer:
        """Layer number ``layer`` of blocks that hold all layers: ``cells`` [N, values of a block]."""
        made = cls.__new__(cls)
        made._view(cells, layer * BLOCK_TOKENS * shape.kv_width, shape)
        return made

    def _view(self, cells: Tensor, first: int, shape: KVShape) -> None:
        width = shape.kv_width
        self.blocks = cells[:, first : first + BLOCK_TOKENS * width]
        self.data = self.blocks.unflatten(1, (BLOCK_TOKENS, 2, shape.kv_heads, shape.head_dim))
        last = cells.numel() - cells.shape[1] + BLOCK_TOKENS * width  # where the last block's rows of a first layer end
        self.tokens = cells.view(-1)[first : first + max(0, last)].view(-1, width)


def block_values(depth: int, shape: KVShape, hidden: int | None) -> int:
    """Values of a KV block over ``depth`` layers, with hidden states of width ``hidden`` (None: without)."""
    room = 0 if hidden is None else hidden_room(hidden, shape.kv_width)
    return BLOCK_TOKENS * (depth * shape.kv_width + room)


class HiddenStates:
    """Hidden states [d] of tokens, kept at the end of their KV blocks, under the slots of those."""

    def __init__(self, cells: Tensor, first: int, room: int, width: int, block_rows: int) -> None:
        """They lie behind the ``first`` values of each of ``cells``, ``room`` values for each token."""
        self._states = cells[:, first : first + BLOCK_TOKENS * room].unflatten(1, (BLOCK_TOKENS, room))[..., :width]
        self._block_rows = block_rows

    def keep(self, slots: Tensor, h: Tensor) -> None:
        """Store the states ``h`` [T, d] of the tokens in ``slots`` [T]."""
        self._states[self._places(slots)] = h

    def of(self, slots: Tensor) -> Tensor:
        """A copy of the states of the tokens in ``slots``, [T, d]."""
        return self._states[self._places(slots)]

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        blocks = slots.div(self._block_rows, rounding_mode="floor")
        return blocks, slots - blocks * self._block_rows


class PagedKV:
    """KV blocks of a placement and which request holds which (the server's pool only counts them).

    All layers of a block lie together, the hidden states of its tokens behind them, so a block is one piece of
    ``storage`` [values] and the storage is a grid of ``grid_blocks`` such pieces that ends where it ends. Numbers of
    blocks are places in this grid; the last ``total_blocks`` are those that may be handed out, and what lies before
    them is not touched. ``block_rows``: rows of a layer's ``tokens`` from one block to the next, so the slot of token p
    is ``table[p // 16] * block_rows + p % 16``, in every layer.
    """

    def __init__(
        self,
        blocks: int,
        depth: int,
        shape: KVShape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        hidden: int | None = None,
        storage: Tensor | None = None,
    ) -> None:
        """``hidden``: width of the hidden states to keep per token behind the last layer; None: keep none. ``storage``:
        where blocks lie, all values finite; None: memory of its own.
        """
        self.shape, self.device, self.dtype = shape, device, dtype
        self.total_blocks, self.depth, self.hidden_width = blocks, depth, hidden
        if storage is None:
            storage = torch.zeros(blocks * self.block_values, device=device, dtype=dtype)
        self.tables: dict[RequestId, list[int]] = {}
        self._free: list[int] = []
        self.bind(storage)
        assert blocks <= self.grid_blocks, f"{blocks} KV blocks in room for {self.grid_blocks}"
        self._free = list(range(self.first_block, self.grid_blocks))

    @property
    def hidden_room(self) -> int:
        """Values a token's kept hidden state takes."""
        return 0 if self.hidden_width is None else hidden_room(self.hidden_width, self.shape.kv_width)

    @property
    def block_values(self) -> int:
        """Values of a block, hidden states included."""
        return block_values(self.depth, self.shape, self.hidden_width)

    @property
    def first_block(self) -> int:
        """The lowest number handed out."""
        return self.grid_blocks - self.total_blocks

    @property
    def used_blocks(self) -> int:
        return self.total_blocks - len(self._free)

    @property
    def values(self) -> int:
        """Values of all blocks together, at the end of the storage."""
        return self.total_blocks * self.block_values

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks take."""
        size: int = self.values * self.dtype.itemsize
        return size

    def bind(self, storage: Tensor) -> None:
        """Look at blocks in ``storage``, to whose end they must have been brought."""
        old = getattr(self, "grid_blocks", None)
        self.storage = storage
        self.grid_blocks = len(storage) // self.block_values
        self.block_rows = self.block_values // self.shape.kv_width
        self.cells = storage[len(storage) - self.grid_blocks * self.block_values :].view(-1, self.block_values)
        self.layers = [KVLayer.within(self.cells, i, self.shape) for i in range(self.depth)]
        self.hidden = None if self.hidden_width is None else self._hidden_at_the_end(self.hidden_width)
        if old is not None and old != self.grid_blocks:
            self._renumber(self.grid_blocks - old)

    def _hidden_at_the_end(self, width: int) -> HiddenStates:
        room = hidden_room(width, self.shape.kv_width)
        return HiddenStates(self.cells, self.block_values - BLOCK_TOKENS * room, room, width, self.block_rows)

    def _renumber(self, by: int) -> None:
        self.tables = {request: [block + by for block in table] for request, table in self.tables.items()}
        self._free = [block + by for block in self._free]

    def take(self, request: RequestId, tokens: int) -> list[int]:
        """Let ``request`` hold blocks for ``tokens`` tokens; returns its block table."""
        table = self.tables.setdefault(request, [])
        more = blocks_for(tokens) - len(table)
        assert more <= len(self._free), (
            f"request {request} needs {more} more KV blocks for {tokens} tokens, but {len(self._free)} of "
            f"{self.total_blocks} are free: the pool's books and the engine's differ"
        )
        for _ in range(more):
            table.append(self._free.pop())
        return table

    def trim(self, request: RequestId, tokens: int) -> None:
        """Give back the blocks that a request holds beyond those for ``tokens`` tokens."""
        table = self.tables.get(request, [])
        while len(table) > blocks_for(tokens):
            self._free.append(table.pop())

    def release(self, request: RequestId) -> None:
        """Give back the blocks of a request; nothing if it holds none."""
        self._free.extend(reversed(self.tables.pop(request, [])))

    def resize(self, blocks: int) -> list[tuple[int, int]]:
        """Have ``blocks`` blocks from now on, the last of the grid. Those in use that lie before them are moved; the
        others stay where they are. Returns the moves, (from, to).
        """
        assert self.used_blocks <= blocks, f"{self.used_blocks} KV blocks are kept, but only {blocks} remain"
        assert blocks <= self.grid_blocks, f"{blocks} KV blocks in room for {self.grid_blocks}"
        first = self.grid_blocks - blocks
        free = sorted(block for block in self._free if block >= first)
        free = [*range(first, self.first_block), *free]
        moves = []
        for table in self.tables.values():
            for k, block in enumerate(table):
                if block < first:
                    table[k] = free.pop()
                    moves.append((block, table[k]))
        for source, target in moves:
            self.cells[target].copy_(self.cells[source])
        self._free, self.total_blocks = free, blocks
        return moves

    def relay(self, depth: int, blocks: int, scratch: Tensor, *, keeps_hidden: bool) -> None:
        """Make every block in use one over ``depth`` layers, in place, ``blocks`` blocks in all; the KV of the layers
        there were is kept.

        Hidden states come along if the new block has room for them behind those layers (``has_room_for_hidden``); they
        lie at its end then, which belongs to the last layers unless ``keeps_hidden``, and are dropped by
        ``drop_hidden`` once these have been run. ``scratch`` [values] is written; it holds at least a block.
        """
        assert self.used_blocks <= blocks, f"{self.used_blocks} KV blocks are kept, but only {blocks} remain"
        self.resize(self.used_blocks)
        used, old, width = self.used_blocks, self.cells, self.hidden_width
        layers = BLOCK_TOKENS * self.depth * self.shape.kv_width
        hidden = BLOCK_TOKENS * self.hidden_room if self.has_room_for_hidden(depth, keeps_hidden=keeps_hidden) else 0
        old_grid = self.grid_blocks
        self.depth, self.hidden_width = depth, width if keeps_hidden else None
        self.bind(self.storage)
        new, size = self.cells, old.shape[1]
        at_once = max(1, len(scratch) // size)
        grows = self.block_values > size
        # from the far end if blocks grow, from the near end if they shrink: none is written over before it is read
        for first in range(0, used, at_once):
            count = min(at_once, used - first)
            behind = used - first - count if grows else first  # blocks nearer to the end than these
            buffer = scratch[: count * size].view(count, size)
            buffer.copy_(old[old_grid - behind - count : old_grid - behind])
            target = new[self.grid_blocks - behind - count : self.grid_blocks - behind]
            target[:, :layers].copy_(buffer[:, :layers])
            if hidden:
                target[:, self.block_values - hidden :].copy_(buffer[:, layers : layers + hidden])
        if hidden and not keeps_hidden:
            assert width is not None
            self.hidden = self._hidden_at_the_end(width)
        self.total_blocks = blocks
        self._free = list(range(self.first_block, self.grid_blocks - used))

    def has_room_for_hidden(self, depth: int, *, keeps_hidden: bool) -> bool:
        """Whether a block over ``depth`` layers can hold the hidden states behind the KV of the present layers."""
        if self.hidden_width is None:
            return False
        more = (depth - self.depth) * self.shape.kv_width
        return keeps_hidden or more >= self.hidden_room

    def drop_hidden(self) -> None:
        """Forget hidden states that lay where the last layers' KV is."""
        self.hidden = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a pass: ``count`` tokens behind ``start`` that have KV already, in the blocks of ``table``."""

    table: Sequence[int]
    start: int
    count: int


@dataclass(slots=True)
class _Group:
    """Rows attended together: views of the pass's buffers, valid for every layer.

    ``keys``, ``values`` lie in ``gathered`` (copied from the blocks ``blocks`` before each use), or directly in the
    pass's fresh projections where a row has nothing stored yet.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    is_grouped: bool = False
    blocks: Tensor | None = None
    gathered: Tensor | None = None
    out_shape: tuple[int, int] = (0, 0)
    is_single: bool = False


class Pass:
    """A prepared pass of rows through layers.

    Tokens lie row after row, rows with one token first: ``order`` lists the given rows in that order. ``qkv``
    [T, (H+2K)*E] is the buffer a layer projects into before it calls ``attend``. ``ends`` [emitting rows] indexes the
    last token of each row that emits, in the order rows were given; None where that is every token in order. ``turns``
    and ``rotating`` belong to an architecture with rotary positions.
    """

    turns: Tensor
    rotating: Tensor

    def __init__(
        self,
        rows: Sequence[Row],
        shape: KVShape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        ids: Sequence[Sequence[int]] | None = None,
        emits: Sequence[bool] | None = None,
        visible: Tensor | None = None,
        block_rows: int = BLOCK_TOKENS,
        buffer: Tensor | None = None,
    ) -> None:
        """``ids``: token ids of each row's new tokens; None where hidden states are given instead. ``visible``: which
        tokens of which blocks hold KV that may be attended to, [16 * blocks]; None: all that rows reach.
        ``block_rows``: of the storage (``PagedKV``). ``buffer``: what is ``qkv``; None: memory of its own.
        """
        assert all(row.count > 0 for row in rows), "a row of a pass computes at least one token"
        order = sorted(range(len(rows)), key=lambda i: rows[i].count > 1)
        self.order, self.shape, self.visible = order, shape, visible
        singles = [rows[i] for i in order if rows[i].count == 1]
        chunks = [rows[i] for i in order if rows[i].count > 1]
        numbers = _Numbers()
        token_ids = numbers.add(i for row in order for i in ids[row]) if ids is not None else slice(0, 0)
        positions = numbers.add(p for i in order for p in range(rows[i].start, rows[i].start + rows[i].count))
        slots = numbers.add(slot for i in order for slot in slots_of(rows[i], block_rows))
        width = max((blocks_for(row.start + 1) for row in singles), default=0)
        table = numbers.add(
            block for row in singles for block in _padded(row.table[: blocks_for(row.start + 1)], width)
        )
        lengths = numbers.add(row.start + 1 for row in singles)
        older = [numbers.add(row.table[: blocks_for(row.start + row.count)]) for row in chunks]
        ends = numbers.add(_ends(rows, order, emits)) if emits is not None and (chunks or not all(emits)) else None
        # one list, one tensor: one copy to the device for all index data of a pass
        on_device = numbers.tensor(device)
        self.ids, self.positions, self.slots = on_device[token_ids], on_device[positions], on_device[slots]
        self.ends = None if ends is None else on_device[ends]
        self.tokens = self.slots.shape[0]
        if buffer is None:
            buffer = torch.empty(self.tokens, shape.query_width + shape.kv_width, device=device, dtype=dtype)
        self.qkv = buffer
        self.kv = self.qkv[:, shape.query_width :]
        self._groups: list[_Group] = []
        if singles:
            self._add_singles(len(singles), width, on_device[table], on_device[lengths], [r.start + 1 for r in singles])
        first = len(singles)
        for row, blocks in zip(chunks, older, strict=True):
            self._add_chunk(row, first, on_device[blocks])
            first += row.count

    def _add_singles(self, count: int, width: int, table: Tensor, lengths: Tensor, known: list[int]) -> None:
        shape = self.shape
        span = width * BLOCK_TOKENS
        gathered = self.qkv.new_empty(count * width, BLOCK_TOKENS * shape.kv_width)
        pair = gathered.view(count, span, 2, shape.kv_heads, shape.head_dim).permute(2, 0, 3, 1, 4)
        keys, values, mask = pair[0], pair[1], None
        if min(known) == max(known) and self.visible is None:
            keys, values = keys[:, :, : known[0]], values[:, :, : known[0]]
        else:
            # additive, because a boolean one would be converted again in every layer
            hides = torch.arange(span, device=lengths.device) >= lengths[:, None]
            if self.visible is not None:
                hides |= ~self.visible.view(-1, BLOCK_TOKENS).index_select(0, table).view(count, span)
            mask = self.qkv.new_zeros(count, span).masked_fill_(hides, float("-inf")).view(count, 1, 1, span)
        # the G queries that share a key head become G query positions: nothing is repeated
        query = self.qkv[:count, : shape.query_width].view(count, shape.kv_heads, -1, shape.head_dim)
        out_shape = (count, shape.query_width)
        self._groups.append(
            _Group(query, keys, values, mask, blocks=table, gathered=gathered, out_shape=out_shape, is_single=True)
        )

    def _add_chunk(self, row: Row, first: int, blocks: Tensor) -> None:
        shape, end = self.shape, row.start + row.count
        part = self.qkv[first : first + row.count]
        heads = part.view(1, row.count, shape.heads + 2 * shape.kv_heads, shape.head_dim).transpose(1, 2)
        group = _Group(
            query=heads[:, : shape.heads],
            keys=heads[:, shape.heads : shape.heads + shape.kv_heads],
            values=heads[:, shape.heads + shape.kv_heads :],
            is_causal=row.start == 0,
            is_grouped=shape.heads != shape.kv_heads,
            out_shape=(row.count, shape.query_width),
        )
        if row.start:
            group.blocks = blocks
            group.gathered = self.qkv.new_empty(blocks.shape[0], BLOCK_TOKENS * shape.kv_width)
            stored = group.gathered.view(1, -1, 2, shape.kv_heads, shape.head_dim)[:, :end].permute(2, 0, 3, 1, 4)
            group.keys, group.values = stored[0], stored[1]
            reach = torch.arange(row.start, end, device=blocks.device)[:, None]
            hides = torch.arange(end, device=blocks.device) > reach
            if self.visible is not None:
                hides |= ~self.visible.view(-1, BLOCK_TOKENS).index_select(0, blocks).view(-1)[:end]
            group.mask = self.qkv.new_zeros(row.count, end).masked_fill_(hides, float("-inf"))
        self._groups.append(group)

    def attend(self, layer: KVLayer) -> Tensor:
        """Store the keys and values in ``qkv`` and attend with its queries over everything stored; [T, H*E]."""
        layer.tokens.index_copy_(0, self.slots, self.kv)
        parts = []
        for group in self._groups:
            if group.blocks is not None:
                torch.index_select(layer.blocks, 0, group.blocks, out=group.gathered)
            out = scaled_dot_product_attention(
                group.query,
                group.keys,
                group.values,
                attn_mask=group.mask,
                is_causal=group.is_causal,
                enable_gqa=group.is_grouped,
            )
            parts.append((out if group.is_single else out.transpose(1, 2)).reshape(group.out_shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def store(self, layer: KVLayer, kv: Tensor) -> None:
        """Store keys and values [T, 2*K*E] made elsewhere (state propagation)."""
        layer.tokens.index_copy_(0, self.slots, kv)


class _Numbers:
    """Integers collected for one tensor, remembered as slices of it."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def add(self, values: Iterable[int]) -> slice:
        first = len(self._values)
        self._values.extend(values)
        return slice(first, len(self._values))

    def tensor(self, device: torch.device) -> Tensor:
        made = torch.tensor(self._values, dtype=torch.int64)
        return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def slots_of(row: Row, block_rows: int = BLOCK_TOKENS) -> Iterable[int]:
    """Places of a row's new tokens in the token view of a storage whose blocks lie ``block_rows`` rows apart."""
    return (
        row.table[p // BLOCK_TOKENS] * block_rows + p % BLOCK_TOKENS for p in range(row.start, row.start + row.count)
    )


def _padded(table: Sequence[int], width: int) -> list[int]:
    """A table filled up with a block of its own, whose values are finite and masked."""
    return [*table, *([table[0]] * (width - len(table)))]


def _ends(rows: Sequence[Row], order: Sequence[int], emits: Sequence[bool]) -> list[int]:
    """Places of the last tokens of emitting rows, in the order rows were given."""
    ends, last = [0] * len(rows), -1
    for i in order:
        last += rows[i].count
        ends[i] = last
    return [end for end, is_emitting in zip(ends, emits, strict=True) if is_emitting]
