"""The pure search: it finds what asking every count finds, whatever the answers, and says when they contradict."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliosim.planner import Limit, Verdict, compare, deciding, find_capacity, find_rate, overall


def exhaustive(verdicts: dict[int, Verdict]) -> int | None:
    return min((n for n, v in verdicts.items() if v == "meets"), default=None)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 3))
def test_finds_the_smallest_count_that_meets(low: int, need: int, blurred: int) -> None:
    """Below ``need`` it misses, ``blurred`` counts from there on are undecided, then it meets."""
    high = 40
    verdicts: dict[int, Verdict] = {
        n: "misses" if n < need else "undecided" if n < need + blurred else "meets" for n in range(low, high + 1)
    }
    found = find_capacity(verdicts.__getitem__, low, high)
    assert found.count == exhaustive(verdicts)
    assert found.is_monotone
    assert all(found.verdicts[n] == verdicts[n] for n in found.verdicts)
    if found.count is not None and found.count > low:
        assert found.verdicts[found.count - 1] != "meets"
    assert len(found.verdicts) <= 2 * math.ceil(math.log2(high)) + 2


def test_says_whether_it_misses_or_does_not_know() -> None:
    assert find_capacity(lambda n: "misses", 2, 9).verdict == "misses"
    assert find_capacity(lambda n: "undecided" if n == 9 else "misses", 2, 9).verdict == "undecided"
    assert find_capacity(lambda n: "meets", 3, 9).verdict == "meets"


def test_a_larger_count_that_misses_ends_the_trust_in_bisection() -> None:
    """Of 1..10, 2 and 5 meet: doubling steps 1, 2 find 2, its check at 3 contradicts, and everything below is asked."""
    asked: list[int] = []

    def judge(count: int) -> Verdict:
        asked.append(count)
        return "meets" if count in (2, 5) else "misses"

    found = find_capacity(judge, 1, 10)
    assert not found.is_monotone
    assert found.count == 2
    assert sorted(asked) == [1, 2, 3]


@pytest.mark.parametrize(("low", "high"), [(0, 4), (5, 4)])
def test_refuses_bounds_that_are_none(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="low"):
        find_capacity(lambda n: "meets", low, high)


@settings(max_examples=60)
@given(st.floats(0.02, 60), st.floats(0.005, 0.2), st.floats(1.0, 1.3))
def test_brackets_the_highest_rate(capacity: float, tolerance: float, blur: float) -> None:
    """Meets up to ``capacity``, is undecided up to ``blur`` times that, misses beyond."""

    def judge(factor: float) -> Verdict:
        return "meets" if factor <= capacity else "undecided" if factor <= capacity * blur else "misses"

    found = find_rate(judge, tolerance=tolerance)
    assert found.sustained is not None
    assert found.failed is not None
    assert found.sustained <= capacity < found.failed <= found.sustained * (1 + tolerance)
    assert found.is_monotone


def test_rates_outside_the_range_have_one_end_only() -> None:
    never = find_rate(lambda f: "misses")
    assert never.sustained is None
    assert never.failed == 1 / 64
    always = find_rate(lambda f: "meets")
    assert always.sustained == 64
    assert always.failed is None


def test_a_slower_rate_that_misses_is_noticed() -> None:
    found = find_rate(lambda f: "meets" if 1 <= f <= 3 else "misses", tolerance=0.01)
    assert found.is_monotone  # 0.9 of nearly 3 still meets
    assert not find_rate(lambda f: "meets" if 2.9 <= f <= 3 or f in (1, 2) else "misses", tolerance=0.01).is_monotone


MOST, LEAST = Limit("p99_ttft_ms", "most", 100.0), Limit("agreement", "least", 0.9)


@pytest.mark.parametrize(
    ("limit", "values", "verdict"),
    [
        (MOST, [80.0, 82.0, 81.0], "meets"),
        (MOST, [180.0, 182.0, 181.0], "misses"),
        (MOST, [98.0, 104.0, 93.0], "undecided"),
        (MOST, [80.0], "undecided"),
        (MOST, [80.0, None, 81.0], "undecided"),
        (MOST, [], "undecided"),
        (LEAST, [0.95, 0.951], "meets"),
        (LEAST, [1.0, 1.0], "meets"),
        (LEAST, [0.7, 0.71, 0.72], "misses"),
        (LEAST, [0.7, 0.95], "undecided"),
        (Limit("refused_share", "most", 0.0), [0.0, 0.0], "meets"),
        (Limit("refused_share", "most", 0.0), [0.0, 0.01], "misses"),
    ],
)
def test_a_limit_is_kept_only_by_the_whole_interval(limit: Limit, values: list[float | None], verdict: Verdict) -> None:
    assert compare(limit, values, 0.95).verdict == verdict


def test_one_broken_limit_misses_and_is_named() -> None:
    kept, broken = compare(MOST, [80.0, 81.0], 0.95), compare(LEAST, [0.1, 0.1], 0.95)
    vague = compare(MOST, [99.0, 103.0], 0.95)
    assert overall([kept, broken, vague]) == "misses"
    assert deciding([kept, broken, vague]) is broken
    assert overall([kept, vague]) == "undecided"
    assert deciding([kept, vague]) is vague
    assert overall([kept]) == "meets"
