from __future__ import annotations

import pytest

from heliosim.errors import MemoryBudgetError
from heliosim.serving.memory import MemoryPool


def test_weights_leave_blocks() -> None:
    pool = MemoryPool(1000)
    pool.place(400, 100)
    assert (pool.total_blocks, pool.free_blocks) == (6, 6)
    assert pool.take(1, 4)
    assert not pool.take(2, 3)
    assert pool.take(1, 6)
    assert pool.free_blocks == 0
    assert pool.take(1, 2), "a request never shrinks"
    assert pool.holds(1) == 6
    pool.release(1)
    pool.release(1)
    pool.check()
    assert pool.kv_used_bytes == 0


def test_fewer_weights_mean_more_blocks() -> None:
    pool = MemoryPool(1000)
    pool.place(800, 50)
    before = pool.total_blocks
    pool.place(200, 20)
    assert (before, pool.total_blocks) == (4, 40)


def test_place_refuses_what_does_not_fit_beside_blocks_in_use() -> None:
    pool = MemoryPool(1000)
    pool.place(200, 100)
    assert pool.take(7, 8)
    assert not pool.can_place(300, 100)
    with pytest.raises(MemoryBudgetError, match=r"memory.budget_bytes.*too small.*Give at least 1,100 B"):
        pool.place(300, 100)
    assert pool.weights_bytes == 200


def test_budget_must_be_positive() -> None:
    with pytest.raises(MemoryBudgetError, match="positive"):
        MemoryPool(0)


def test_check_finds_a_wrong_book() -> None:
    pool = MemoryPool(1000)
    pool.place(200, 100)
    pool.take(1, 2)
    pool.used_blocks = 1
    with pytest.raises(AssertionError):
        pool.check()


def test_common_growth_is_settled_when_a_request_leaves() -> None:
    pool = MemoryPool(1000)
    pool.place(400, 100)
    assert pool.take(1, 1)
    assert pool.take(2, 2)
    assert pool.grow(2)
    assert not pool.grow(2), "only one block is left"
    assert pool.used_blocks == 5
    pool.check()
    pool.attribute(1, 2)
    pool.release(1)
    assert pool.used_blocks == 3
    pool.release(2, 3)
    pool.check()
    assert pool.used_blocks == 0
    pool.clear()


def test_growth_that_nobody_gave_back_is_found() -> None:
    pool = MemoryPool(1000)
    pool.place(400, 100)
    assert pool.take(1, 1)
    assert pool.grow(1)
    pool.release(1)
    with pytest.raises(AssertionError):
        pool.clear()


def test_another_size_keeps_what_is_in_use() -> None:
    pool = MemoryPool(1000)
    pool.place(400, 100)
    assert pool.take(1, 3)
    pool.resize(750)
    assert (pool.total_blocks, pool.free_blocks) == (3, 0)
    pool.check()
    with pytest.raises(AssertionError, match="3 blocks in use"):
        pool.resize(600)
    pool.resize(2000)
    assert pool.free_blocks == 13


def test_a_size_the_weights_do_not_fit_leaves_no_blocks() -> None:
    pool = MemoryPool(1000)
    pool.place(400, 100)
    pool.resize(300)
    assert pool.total_blocks == 0
    assert not pool.can_place(400, 100)


def test_what_a_request_needs_beside_its_kv_comes_and_goes_with_it() -> None:
    pool = MemoryPool(1000)
    pool.place(400, 100, request_blocks=2)
    assert pool.blocks_for(17) == 4
    assert pool.take(1, pool.blocks_for(1))
    assert not pool.take(2, pool.blocks_for(17)), "three blocks are left, four needed"
    assert pool.take(2, pool.blocks_for(1))
    assert pool.kv_used_bytes == 600
    pool.check()
    pool.release(1)
    assert pool.used_blocks == 3
    pool.release(2, 3)
    pool.check()
    assert pool.used_blocks == 0


def test_new_sizes_of_blocks_book_anew_what_requests_need() -> None:
    """Two requests of two blocks of KV each; twice the block, half as many beside it."""
    pool = MemoryPool(2000)
    pool.place(400, 100, request_blocks=4)
    assert pool.take(1, 6)
    assert pool.take(2, 6)
    assert not pool.can_place(400, 200, request_blocks=3)
    with pytest.raises(MemoryBudgetError, match=r"10 KV block\(s\) 2,000 B"):
        pool.place(400, 200, request_blocks=3)
    pool.check()
    assert pool.can_place(400, 200, request_blocks=2)
    pool.place(400, 200, request_blocks=2)
    assert (pool.used_blocks, pool.holds(1), pool.free_blocks) == (8, 4, 0)
    pool.check()
    pool.release(1)
    pool.release(2, 4)
    pool.check()
    pool.clear()


def test_the_first_request_must_fit_too() -> None:
    pool = MemoryPool(1000)
    assert pool.can_place(700, 100, request_blocks=2)
    assert not pool.can_place(701, 100, request_blocks=2)
