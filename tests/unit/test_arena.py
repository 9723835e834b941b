"""The arena, and KV blocks that move and change size in place."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from heliosim.engines.models.arena import PAGE_BYTES, Arena, allocate  # noqa: E402
from heliosim.engines.models.paged import KVShape, PagedKV, Row, block_values, slots_of  # noqa: E402
from heliosim.formats.checkpoint import hidden_room  # noqa: E402

CPU, F32 = torch.device("cpu"), torch.float32
SHAPES = {"wide": (KVShape(2, 2, 4), 8), "grouped": (KVShape(6, 2, 8), 48), "odd": (KVShape(3, 3, 2), 10)}
"""Shapes with the width of their hidden states: K and V are twice as wide, narrower, and no multiple."""


def test_an_arena_takes_whole_pages_and_keeps_both_ends_when_it_grows() -> None:
    arena = Arena(CPU, F32)
    assert arena.nbytes == 0
    assert arena.grow(1000, 0, 0)
    assert arena.nbytes == PAGE_BYTES["cpu"]
    arena.part(0, 10).fill_(1)
    arena.data[-7:].fill_(2)
    assert not arena.grow(1024, 10, 7)
    assert arena.grow(1025, 10, 7)
    assert arena.nbytes == 2 * PAGE_BYTES["cpu"]
    assert (arena.data == 1).nonzero().flatten().tolist() == list(range(10))
    assert (arena.data == 2).nonzero().flatten().tolist() == list(range(2041, 2048))
    assert arena.allocations == 2


def test_an_arena_that_cannot_grow_is_as_it_was() -> None:
    sizes: list[int] = []

    def scarce(values: int, device: Any, dtype: Any) -> Any:
        sizes.append(values)
        if values > 1024:
            raise torch.OutOfMemoryError("no")
        return allocate(values, device, dtype)

    arena = Arena(CPU, F32, scarce)
    arena.grow(1024, 0, 0)
    arena.part(0, 5).fill_(3)
    with pytest.raises(torch.OutOfMemoryError):
        arena.grow(5000, 5, 0)
    assert arena.part(0, 5).tolist() == [3] * 5
    assert sizes == [1024, 5120]


def test_host_memory_that_is_not_there_is_refused_before_it_is_touched() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="cannot allocate"):
        allocate(1 << 60, CPU, F32)


@pytest.mark.parametrize("by", [0, 1, 3, 10, 25])
def test_values_move_left_over_themselves(by: int) -> None:
    arena = Arena(CPU, F32)
    arena.grow(100, 0, 0)
    arena.part(by, 17).copy_(torch.arange(17))
    arena.move_left(by, 17, by)
    assert arena.part(0, 17).tolist() == list(range(17))


@pytest.mark.parametrize("name", SHAPES)
def test_room_for_a_hidden_state_is_whole_rows(name: str) -> None:
    shape, hidden = SHAPES[name]
    room = hidden_room(hidden, shape.kv_width)
    assert room >= hidden
    assert 16 * room % shape.kv_width == 0
    assert room == hidden or name == "odd"


def filled(kv: PagedKV, tokens: dict[int, int]) -> dict[int, Any]:
    """Write numbers into every token of requests; what each then holds."""
    generator = torch.Generator().manual_seed(len(tokens))
    held = {}
    for request, count in tokens.items():
        slots = slots_at(kv, request, count)
        parts = [torch.randn(count, kv.shape.kv_width, generator=generator) for _ in kv.layers]
        for layer, part in zip(kv.layers, parts, strict=True):
            layer.tokens.index_copy_(0, slots, part)
        states = None
        if kv.hidden is not None:
            states = torch.randn(count, kv.hidden_width or 0, generator=generator)
            kv.hidden.keep(slots, states)
        held[request] = parts, states
    return held


def slots_at(kv: PagedKV, request: int, count: int) -> Any:
    return torch.tensor(list(slots_of(Row(kv.take(request, count), 0, count), kv.block_rows)))


def check(kv: PagedKV, tokens: dict[int, int], held: dict[int, Any], *, has_hidden: bool) -> None:
    for request, count in tokens.items():
        slots = slots_at(kv, request, count)
        parts, states = held[request]
        for layer, part in zip(kv.layers, parts, strict=False):
            assert torch.equal(layer.tokens.index_select(0, slots), part)
            blocks = torch.tensor(kv.tables[request])
            gathered = layer.blocks.index_select(0, blocks).view(-1, kv.shape.kv_width)[:count]
            assert torch.equal(gathered, part)
        if has_hidden:
            assert kv.hidden is not None
            assert torch.equal(kv.hidden.of(slots), states)
    in_use = [block for table in kv.tables.values() for block in table]
    assert len(set(in_use)) == len(in_use) == kv.used_blocks
    assert all(kv.first_block <= block < kv.grid_blocks for block in in_use)


requests = st.dictionaries(st.integers(0, 9), st.integers(1, 70), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    tokens=requests,
    gone=st.sets(st.integers(0, 9)),
    depths=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    keeps=st.booleans(),
    spare=st.integers(0, 4),
    scratch=st.integers(1, 4),
)
def test_blocks_in_use_survive_moves_and_changes_of_size(
    name: str,
    tokens: dict[int, int],
    gone: set[int],
    depths: tuple[int, int],
    keeps: bool,
    spare: int,
    scratch: int,
) -> None:
    shape, hidden = SHAPES[name]
    before, more = depths
    after = before + more
    blocks = sum(-(-n // 16) for n in tokens.values()) + spare
    small, large = block_values(before, shape, hidden), block_values(after, shape, hidden if keeps else None)
    storage = torch.zeros(blocks * max(small, large) + 13)
    kv = PagedKV(blocks, before, shape, CPU, F32, hidden=hidden, storage=storage)
    held = filled(kv, tokens)
    for request in gone:
        kv.release(request)
        tokens.pop(request, None)
    ahead = storage[: len(storage) - kv.values].clone()
    tables = {request: list(table) for request, table in kv.tables.items()}
    moves = kv.resize(kv.used_blocks + min(spare, blocks - kv.used_blocks))
    stayed = {block for table in tables.values() for block in table if block >= kv.first_block}
    assert stayed == {b for table in kv.tables.values() for b in table} - {target for _, target in moves}
    check(kv, tokens, held, has_hidden=True)
    fits = kv.has_room_for_hidden(after, keeps_hidden=keeps)
    assert fits or large < small
    kv.relay(after, blocks, torch.empty(scratch * small), keeps_hidden=keeps)
    assert kv.nbytes == 4 * blocks * large
    check(kv, tokens, held, has_hidden=fits)
    untouched = min(len(ahead), len(storage) - kv.values)
    assert torch.equal(storage[:untouched], ahead[:untouched]), "what lies before the blocks belongs to weights"


def test_a_larger_storage_keeps_blocks_at_its_end() -> None:
    shape, hidden = SHAPES["grouped"]
    kv = PagedKV(6, 2, shape, CPU, F32, hidden=hidden)
    tokens = {0: 20, 1: 33}
    held = filled(kv, tokens)
    larger = torch.zeros(2 * len(kv.storage) + 5)
    larger[len(larger) - kv.values :] = kv.storage
    kv.bind(larger)
    check(kv, tokens, held, has_hidden=True)
    assert kv.total_blocks == 6
    kv.resize(9)
    check(kv, tokens, held, has_hidden=True)
    assert kv.used_blocks == 5
