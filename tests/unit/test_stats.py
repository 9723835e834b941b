"""Intervals, pairing, warm-up and saturation on series whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from heliosim.stats import (
    Interval,
    StoppingRule,
    delay_drift,
    is_saturated,
    mser5,
    paired_difference,
    t_interval,
    t_quantile,
)


def test_t_interval_by_hand() -> None:
    interval = t_interval([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.3027 (tables)
    assert interval.mean == pytest.approx(2.0)
    assert interval.half_width == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert interval.holds(0.0)
    assert not interval.holds(4.6)


@pytest.mark.parametrize(("share", "degrees", "value"), [(0.975, 4, 2.776), (0.95, 9, 1.833), (0.995, 30, 2.750)])
def test_t_quantiles_of_the_tables(share: float, degrees: int, value: float) -> None:
    assert t_quantile(share, degrees) == pytest.approx(value, abs=1e-3)


def test_an_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = sum(t_interval(list(rng.normal(5.0, 2.0, 6))).holds(5.0) for _ in range(4000))
    assert 0.94 < hits / 4000 < 0.96


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "no data"),
        ([3.0], "one replication"),
        ([None, None], "no data"),
        ([1.0, None, 2.0], "no data in 1 of 3 replications"),
        ([2.0, 2.0, 2.0], "the same every time"),
    ],
)
def test_an_interval_that_cannot_be_said_is_unavailable(values: list[float | None], reason: str) -> None:
    interval = t_interval(values)
    assert interval.half_width is None
    assert interval.low is None
    assert interval.reason == reason
    assert not interval.holds(1.5)


def test_equal_values_have_no_interval_but_the_value_is_kept() -> None:
    interval = t_interval([0.1] * 7)  # seven times 0.1 sums to something else
    assert (interval.mean, interval.is_constant) == (0.1, True)
    difference = paired_difference([1.0, 2.0, 4.0], [0.5, 1.5, 3.5])
    assert (difference.interval.mean, difference.interval.half_width) == (0.5, None)
    assert difference.variance_ratio is None


def test_a_pair_without_a_value_makes_the_difference_unavailable() -> None:
    found = paired_difference([1.0, None, 4.0], [0.5, 1.0, 3.0])
    assert found.interval.half_width is None
    assert found.interval.reason == "no data in 1 of 3 replications"
    assert found.variance_ratio is None


def test_relative_half_width() -> None:
    assert Interval(10.0, 0.5, 3).relative_half_width == pytest.approx(0.05)
    assert Interval(-10.0, 0.5, 3).relative_half_width == pytest.approx(0.05)
    assert Interval(0.0, 0.0, 3).relative_half_width == 0.0
    assert Interval(0.0, 0.5, 3).relative_half_width is None


def test_common_random_numbers_show_in_the_variance_ratio() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 3.0, 50)
    a, b = 10 + shared + rng.normal(0, 0.3, 50), 9 + shared + rng.normal(0, 0.3, 50)
    found = paired_difference(list(a), list(b))
    assert found.interval.holds(1.0)
    assert found.variance_ratio is not None
    assert found.variance_ratio > 20
    with pytest.raises(ValueError, match="paired"):
        paired_difference([1.0], [1.0, 2.0])


def test_mser5_finds_a_start_up_bias() -> None:
    rng = np.random.default_rng(2)
    series = rng.normal(1.0, 0.2, 2000)
    series[:300] += np.linspace(8.0, 0.0, 300)
    cut = mser5(series)
    assert cut is not None
    assert 200 <= cut <= 400
    assert cut % 5 == 0


def test_mser5_keeps_a_settled_series_and_refuses_one_that_never_settles() -> None:
    rng = np.random.default_rng(3)
    settled = mser5(rng.normal(1.0, 0.2, 2000))
    assert settled is not None
    assert settled < 200
    assert mser5(np.arange(2000.0)) is None
    assert mser5([1.0] * 19) is None


def test_mser5_is_not_fooled_by_a_quiet_end() -> None:
    """A handful of last batches that happen to agree would have the least error of all; cuts that far are not tried."""
    rng = np.random.default_rng(4)
    series = rng.normal(1.0, 0.5, 1000)
    series[-20:] = 1.0
    cut = mser5(series)
    assert cut is not None
    assert cut < 250


def test_cutting_a_queue_by_its_own_mser5_makes_its_mean_too_small() -> None:
    """Why the warm-up comes from a pilot run: the rule likes to cut where little happens afterwards."""

    def cut(run: np.ndarray) -> int:
        found = mser5(run)
        return len(run) // 2 if found is None else found

    runs = [_queue(0.8, 1000, seed)[1] for seed in range(80)]
    own = [run[cut(run) :].mean() for run in runs]
    by_another = [run[cut(pilot) :].mean() for run, pilot in zip(runs, runs[1:] + runs[:1], strict=True)]
    assert np.mean(own) < 0.95 * np.mean(by_another)


def _queue(load: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Waiting times of an M/M/1 queue by Lindley's recursion; service 1 s."""
    rng = np.random.default_rng(seed)
    gaps, service = rng.exponential(1 / load, count), rng.exponential(1.0, count)
    waits = np.zeros(count)
    for k in range(1, count):
        waits[k] = max(0.0, waits[k - 1] + service[k - 1] - gaps[k])
    return np.cumsum(gaps), waits


def test_overload_drifts_by_what_is_too_much() -> None:
    drift = delay_drift(*_queue(1.25, 20_000, 5))
    assert drift == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("seed", range(10))
def test_saturation_is_told_from_a_busy_queue(seed: int) -> None:
    assert is_saturated(*_queue(1.2, 4000, seed))
    assert not is_saturated(*_queue(0.8, 4000, seed))


def test_saturation_needs_enough_to_say() -> None:
    assert not is_saturated([0.0] * 50, list(np.arange(50.0)))
    assert not is_saturated([0.0, 1.0], [0.0, 9.0])


def test_the_rule_stops_when_all_are_narrow_or_the_limit_is_reached() -> None:
    rule = StoppingRule(least=3, most=6, relative_half_width=0.1)
    narrow, wide = [1.0, 1.001, 0.999], [1.0, 3.0, 0.5]
    assert not rule.is_done({"a": narrow[:2]})
    assert rule.is_done({"a": narrow})
    assert not rule.is_done({"a": narrow, "b": wide})
    assert rule.is_done({"a": narrow * 2, "b": wide * 2})
    assert rule.is_done({"a": narrow, "missing": [None, None, None]})
    assert rule.is_done({"a": narrow, "constant": [1.0, 1.0, 1.0]})
    assert not rule.is_done({})


def test_widths_are_compared_with_the_size_given() -> None:
    rule = StoppingRule(least=3, most=60, relative_half_width=0.1)
    difference = [0.01, -0.02, 0.03]  # its own mean is next to nothing
    assert rule.widest({"a": difference}) > 10
    assert rule.widest({"a": difference}, {"a": 10.0}) < 0.1
    assert rule.is_done({"a": difference}, {"a": 10.0})
    assert not rule.is_done({"a": difference}, {"a": 0.0})
    assert rule.widest({"a": [None, 1.0, 2.0]}) == 0.0


def test_exactly_so_many() -> None:
    rule = StoppingRule.exactly(4)
    assert not rule.is_done({"a": [1.0, 1.0, 1.0]})
    assert rule.is_done({"a": [1.0, 50.0, 900.0, 3.0]})


@pytest.mark.parametrize(
    "bad", [{"least": 1}, {"least": 5, "most": 4}, {"relative_half_width": 0.0}, {"confidence": 1.0}]
)
def test_rules_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"least|relative|confidence"):
        StoppingRule(**bad)  # type: ignore[arg-type]
