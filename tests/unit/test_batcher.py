from __future__ import annotations

from heliosim.serving.batcher import ContinuousBatcher, Planned
from heliosim.serving.memory import MemoryPool
from heliosim.types import Batch, Tokens
from tests.helpers import arrival


def pool_of(blocks: int) -> MemoryPool:
    pool = MemoryPool(100 + blocks * 10)
    pool.place(100, 10)
    return pool


def step(batcher: ContinuousBatcher, pool: MemoryPool, lasts: bool = False, admit: int | None = None) -> Planned:
    plan = batcher.next_batch(pool, now=0.0, admit=admit)
    if plan.batch is not None:
        batcher.settle(plan.batch, emitted(plan.batch, lasts), pool, 1.0)
    return plan


def emitted(batch: Batch, lasts: bool) -> Tokens:
    ids = tuple(r for r, e in zip(batch.requests, batch.emits, strict=True) if e)
    return Tokens(ids, (6,) * len(ids), (0.9,) * len(ids), (0.0,) * len(ids), (lasts,) * len(ids))


def test_a_prompt_is_read_in_chunks_and_emits_with_the_last() -> None:
    batcher, pool = ContinuousBatcher(4, 16), pool_of(50)
    batcher.add(arrival(0, prompt=40).request)
    plans = [step(batcher, pool).batch for _ in range(4)]
    assert [p.counts for p in plans if p] == [(16,), (16,), (8,), (1,)]
    assert [p.starts for p in plans if p] == [(0,), (16,), (32,), (40,)]
    assert [p.emits for p in plans if p] == [(False,), (False,), (True,), (True,)]


def test_decoding_rows_come_before_chunks() -> None:
    batcher, pool = ContinuousBatcher(4, 16), pool_of(50)
    batcher.add(arrival(0, prompt=10).request)
    step(batcher, pool)
    batcher.add(arrival(1, prompt=40).request)
    batch = step(batcher, pool).batch
    assert batch is not None
    assert batch.requests == (0, 1)
    assert batch.counts == (1, 15)


def test_the_youngest_gives_way_and_is_recomputed() -> None:
    batcher, pool = ContinuousBatcher(4, 64), pool_of(4)
    batcher.watermark = 0.0
    for k in range(2):
        batcher.add(arrival(k, prompt=30, output=30).request)
    assert step(batcher, pool).batch is not None
    evicted: list[int] = []
    for _ in range(4):
        evicted += step(batcher, pool).evicted
    assert evicted == [1]
    assert (batcher.running, batcher.waiting) == (1, 1)
    pool.check()
    for _ in range(40):
        plan = batcher.next_batch(pool, now=0.0, admit=None)
        assert plan.batch is not None
        first = plan.batch.requests[0]
        done = first == 0 and plan.batch.starts[0] >= 56
        batcher.settle(plan.batch, emitted(plan.batch, done), pool, 1.0)
        if done:
            break
    restarted = batcher.next_batch(pool, now=0.0, admit=None).batch
    assert restarted is not None
    assert restarted.requests == (1,)
    assert restarted.starts == (0,)
    assert restarted.counts[0] > 30, "prompt and generated tokens are read again"


def test_requests_larger_than_the_pool_are_refused() -> None:
    batcher, pool = ContinuousBatcher(4, 64), pool_of(3)
    batcher.add(arrival(0, prompt=40, output=10).request)
    batcher.add(arrival(1, prompt=20, output=4).request)
    plan = batcher.next_batch(pool, now=0.0, admit=None)
    assert [(s.request.id, why) for s, why in plan.refused] == [(0, "larger than the memory pool")]
    assert plan.batch is not None
    assert plan.batch.requests == (1,)


def test_admission_is_limited_by_permission_rows_and_memory() -> None:
    batcher, pool = ContinuousBatcher(3, 64), pool_of(100)
    for k in range(6):
        batcher.add(arrival(k, prompt=10).request)
    assert batcher.next_batch(pool, now=0.0, admit=0).batch is None
    first = step(batcher, pool, admit=1)
    assert first.started == 1
    assert step(batcher, pool).started == 2
    assert step(batcher, pool).started == 0


def test_ended_requests_return_their_blocks() -> None:
    batcher, pool = ContinuousBatcher(4, 64), pool_of(10)
    batcher.add(arrival(0, prompt=20).request)
    step(batcher, pool, lasts=True)
    assert pool.used_blocks == 0
    assert batcher.running == 0


def test_preempt_keeps_order() -> None:
    batcher, pool = ContinuousBatcher(4, 64), pool_of(100)
    for k in range(4):
        batcher.add(arrival(k, prompt=10).request)
    step(batcher, pool)
    assert batcher.preempt(pool, keep=1) == [3, 2, 1]
    batch = step(batcher, pool).batch
    assert batch is not None
    assert batch.requests == (0, 1, 2, 3)
