from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosim.assembly import build_batcher
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.profile import Profile
from heliosim.registry import ORDERS
from heliosim.scenario import BatcherSpec, Scenario, parse_kind
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.ordered_batcher import OrderedBatcher
from heliosim.serving.ordering import (
    Feedback,
    Order,
    PriorityClasses,
    ShortestJob,
    ShortestRemaining,
    expected_tokens,
)
from heliosim.types import Prediction, Request
from tests.profiles import scenario, workload, write_synthetic_profile
from tests.unit.test_batcher import pool_of, step


def request(k: int = 0, told: float | None = None, at: float = 0.0, priority: int = 0, prompt: int = 10) -> Request:
    return Request(k, at, prompt, 100, priority, None if told is None else Prediction(told))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


def test_predictions_are_looked_up_again_as_tokens_come() -> None:
    asked = Request(0, 0.0, 10, 40, 0, Prediction(30.0, 10, (25.0, 22.0, 35.0, 41.0)))
    assert [expected_tokens(asked, g) for g in (0, 9, 10, 19, 20, 39, 90)] == [30, 30, 25, 25, 22, 35, 41]
    assert expected_tokens(request(), 0) == 100, "without a prediction, what it may generate"


def test_ranks() -> None:
    long, short = request(0, 50.0), request(1, 8.0)
    assert ShortestJob().rank(long, 49) == 50, "what a job has behind it does not count"
    srpt = ShortestRemaining()
    assert srpt.rank(long, 49) == 1 < srpt.rank(short, 0) == 8
    assert srpt.rank(long, 80) == 1, "longer than predicted: any moment now"
    assert [srpt.gives_way(long, g) for g in (0, 39, 40)] == [True, True, False], "c = 0.8"
    assert ShortestRemaining("always").gives_way(long, 49)
    assert not ShortestRemaining("never").preempts


def test_classes_age() -> None:
    strict, ageing = PriorityClasses(), PriorityClasses(ageing_s=2.0)
    low, high = request(0, at=0.0, priority=1), request(1, at=1e6)
    assert strict.rank(high, 0) < strict.rank(low, 0)
    assert ageing.rank(low, 0) < ageing.rank(high, 0)
    assert ageing.rank(request(2, at=1.9), 0) < ageing.rank(low, 0) < ageing.rank(request(3, at=2.1), 0)


def test_levels_of_feedback() -> None:
    plain, guessing = Feedback(quantum_tokens=8, levels=4), Feedback(quantum_tokens=8, levels=4, speculative=True)
    assert [plain.level(request(), g) for g in (0, 7, 8, 15, 16, 31, 32, 500)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [guessing.level(request(told=t), 0) for t in (1.0, 8.0, 9.0, 17.0, 99.0)] == [0, 0, 1, 2, 3]
    assert plain.sure_for(request(), 5) == 3
    assert plain.sure_for(request(), 500) is None


ORDERS_DRAWN = st.one_of(
    st.builds(ShortestJob),
    st.builds(ShortestRemaining, st.sampled_from(["never", "limited", "always"]), st.floats(0, 1)),
    st.builds(PriorityClasses, st.none() | st.floats(0.1, 10)),
    st.builds(Feedback, st.integers(1, 20), st.integers(1, 6), st.booleans(), st.none() | st.floats(0.1, 10)),
)
PREDICTIONS = st.none() | st.builds(
    Prediction, st.floats(1, 90), st.none() | st.integers(1, 9), st.lists(st.floats(1, 90), max_size=20).map(tuple)
)


@given(order=ORDERS_DRAWN, told=PREDICTIONS, priority=st.integers(0, 3), generated=st.integers(0, 90))
def test_orders_keep_their_word(order: Order, told: Prediction | None, priority: int, generated: int) -> None:
    """For as long as an order is sure, ranks do not rise and nobody becomes interruptible: strides rest on it."""
    asked = Request(0, 3.0, 10, 90, priority, told)
    sure = order.sure_for(asked, generated)
    assert sure is None or sure >= 1
    ahead = range(generated, generated + (60 if sure is None else sure))
    ranks = [order.rank(asked, g) for g in ahead]
    assert all(a >= b for a, b in itertools.pairwise(ranks))
    open_ = [order.gives_way(asked, g) for g in ahead]
    assert all(a or not b for a, b in itertools.pairwise(open_))


def test_waiting_requests_start_by_rank() -> None:
    batcher, pool = OrderedBatcher(ShortestJob(), 2, 64), pool_of(100)
    for k, told in enumerate((9.0, 3.0, 7.0, 3.0)):
        batcher.add(request(k, told))
    batch = step(batcher, pool).batch
    assert batch is not None
    assert batch.requests == (1, 3), "the shortest two, equals as they came"


def test_a_shorter_request_takes_the_row_of_the_longest_and_pays_for_it() -> None:
    batcher, pool = OrderedBatcher(ShortestRemaining("always"), 2, 64), pool_of(100)
    for k, told in enumerate((50.0, 30.0)):
        batcher.add(request(k, told))
    for _ in range(3):
        step(batcher, pool)
    batcher.add(request(2, 5.0))
    plan = step(batcher, pool)
    assert plan.evicted == (0,)
    assert plan.batch is not None
    assert plan.batch.requests == (1, 2)
    assert batcher.interrupted == 1
    victim = batcher._waiting[0]
    assert (victim.generated, victim.computed, victim.recomputed, victim.preemptions) == (3, 0, 12, 1)
    pool.check()
    ended = step(batcher, pool, lasts=True)
    assert ended.batch is not None
    again = step(batcher, pool).batch
    assert again is not None
    assert (again.requests, again.starts, again.counts) == ((0,), (0,), (13,)), "prompt and generated tokens anew"


def test_nobody_is_interrupted_in_vain() -> None:
    """One who would not fit even then, late in life, or not behind the one who waits."""
    batcher, pool = OrderedBatcher(ShortestRemaining("limited", 0.1), 1, 64), pool_of(100)
    batcher.add(request(0, 20.0))
    step(batcher, pool)
    step(batcher, pool)
    batcher.add(request(1, 2.0))
    assert step(batcher, pool).evicted == (), "two of twenty tokens: too late"
    batcher, pool = OrderedBatcher(ShortestRemaining("always"), 4, 64), pool_of(12)
    batcher.add(request(0, 20.0))
    batcher.add(Request(1, 0.0, 150, 10, 0, Prediction(2.0)))
    for _ in range(3):
        step(batcher, pool)
    assert batcher.running == 2
    batcher.add(Request(2, 0.0, 90, 10, 0, Prediction(5.0)))
    assert step(batcher, pool).evicted == (), "what the longer one holds is not enough"


def test_who_gives_way_for_want_of_memory_ranks_last() -> None:
    batcher, pool = OrderedBatcher(PriorityClasses(), 3, 96), pool_of(9)
    evicted: list[int] = []
    for k, priority in enumerate((1, 0, 0)):  # the last in order started first
        batcher.add(request(k, priority=priority, prompt=30))
        evicted += step(batcher, pool).evicted
    for _ in range(60):
        evicted += step(batcher, pool).evicted
        pool.check()
    assert evicted[:2] == [0, 2]


def test_nobody_is_refused_for_room_that_weights_on_their_way_take() -> None:
    """As first come, first served: who does not fit beside them may fit once they are there."""
    for batcher in (OrderedBatcher(PriorityClasses(), 4, 64, 0.0), ContinuousBatcher(4, 64, 0.0)):
        pool = pool_of(10)
        pool.reserve(80)
        batcher.add(request(prompt=40))
        waits = batcher.next_batch(pool, now=0.0, admit=None)
        assert (waits.refused, waits.batch, batcher.waiting) == ((), None, 1)
        pool.reserve(0)
        assert batcher.next_batch(pool, now=0.0, admit=None).started == 1
        pool.place(140, 10)
        batcher.add(request(1, prompt=40))
        assert [seq.request.id for seq, _ in batcher.next_batch(pool, now=0.0, admit=None).refused] == [1]


def test_those_who_had_started_go_on_when_nobody_new_may() -> None:
    """Otherwise a controller that waits for them would wait for ever."""
    batcher, pool = OrderedBatcher(ShortestRemaining("always"), 1, 64), pool_of(100)
    batcher.add(request(0, 50.0))
    step(batcher, pool)
    batcher.add(request(1, 5.0))
    assert step(batcher, pool).evicted == (0,)
    batcher.add(request(2, 5.0))
    step(batcher, pool, lasts=True)
    batch = step(batcher, pool, admit=0).batch
    assert batch is not None
    assert batch.requests == (0,)


def test_first_come_first_served_is_the_batcher_there_was(profile: Profile) -> None:
    plain = scenario(profile)
    assert type(build_batcher(plain)) is ContinuousBatcher
    same = plain.model_copy(update={"batcher": plain.batcher.model_copy(update={"order": {"kind": "fcfs"}})})
    assert type(build_batcher(same)) is ContinuousBatcher
    assert "order" not in plain.model_dump()["batcher"]
    assert "predictor" not in plain.to_yaml()


def test_a_scenario_with_an_order_is_written_and_read_back(profile: Profile, tmp_path: Path) -> None:
    from heliosim.scenario import load_scenario

    order = {"kind": "srpt", "preempt": "always"}
    load = workload() | {"predictor": {"kind": "rank", "tau": 0.5}, "priorities": {"shares": [1, 3]}}
    plan = scenario(profile, batcher={"max_batch": 8, "token_budget": 64, "order": order}, workload=load)
    plan.save(tmp_path / "a.yaml")
    assert load_scenario(tmp_path / "a.yaml") == plan
    assert plan.hash != scenario(profile).hash
    assert isinstance(build_batcher(plan), OrderedBatcher)
    assert BatcherSpec(order="sjf").order == {"kind": "sjf"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"kind": "srtp"}, "srtp"),
        ({"kind": "srpt", "preemt": "always"}, "batcher.order.preemt"),
        ({"kind": "srpt", "c": 1.5}, "batcher.order.c"),
        ({"kind": "srpt", "preempt": "sometimes"}, "batcher.order.preempt"),
        ({"kind": "priority", "ageing_s": -1}, "batcher.order.ageing_s"),
        ({"kind": "feedback", "levels": 0}, "batcher.order.levels"),
        ({"kind": "feedback", "levels": True}, "batcher.order.levels"),
        ({}, "batcher.order.kind"),
    ],
)
def test_bad_orders_are_refused_in_a_line(order: Mapping[str, Any], said: str, profile: Profile) -> None:
    with pytest.raises((InputError, UnknownNameError), match=said) as caught:
        scenario(profile, batcher={"order": dict(order)})
    assert "\n" not in str(caught.value)


def test_an_order_by_length_needs_somebody_who_predicts(profile: Profile) -> None:
    plan = scenario(profile, batcher={"max_batch": 8, "token_budget": 64, "order": "sjf"})
    with pytest.raises(InputError, match=r"workload\.predictor"):
        build_batcher(plan)


def test_every_shipped_order_can_be_built_by_name() -> None:
    for name in ORDERS.names():
        assert isinstance(parse_kind(ORDERS, {"kind": name}, "", "batcher.order"), Order)
    assert isinstance(Scenario.model_fields["batcher"].default.the_order(), Order)


def test_run_folders_of_before_are_read(profile: Profile, tmp_path: Path) -> None:
    """Without the columns of classes and predictions, and without what servers run on."""
    import json

    import pyarrow.parquet as pq

    from heliosim.formats.results import load_run, write_table
    from heliosim.metrics import summarise
    from heliosim.runs import run_simulated, save

    save(run_simulated(scenario(profile), profile), tmp_path / "run")
    later = ["priority", "predicted_tokens", "recomputed_tokens"]
    old = pq.read_table(tmp_path / "run" / "requests.parquet").drop_columns(later)
    write_table(tmp_path / "run" / "requests.parquet", old)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    del info["deployed"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    found = load_run(tmp_path / "run", verify=False)
    assert set(found.requests["priority"].to_pylist()) == {0}
    assert summarise(found).recomputed_tokens is None
    assert summarise(found).prediction_tau is None
