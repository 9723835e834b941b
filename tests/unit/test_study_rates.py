"""Rates that systems are compared at, from what each can serve."""

from __future__ import annotations

import pytest

from heliosim.study_rates import FOCUS, LEAST, MOST, POINTS, capacity_per_s, fleet_rates, suggested_rates, two_digits
from tests.unit.test_comparing import systems
from tests.unit.test_what_if import scenario


@pytest.fixture(name="capacities", scope="module")
def _capacities() -> list[float]:
    return [capacity_per_s(one) for one in systems(requests=40).values()]


def test_capacity_does_not_depend_on_the_rate_of_the_scenario(capacities: list[float]) -> None:
    assert capacity_per_s(scenario(rate=5.0)) == capacity_per_s(scenario(rate=60.0)) == capacities[1]
    assert all(capacity > 0 for capacity in capacities)


def test_a_sweep_goes_from_little_load_to_too_much(capacities: list[float]) -> None:
    rates, focus = suggested_rates(systems(requests=40))
    assert len(rates) <= POINTS
    assert list(rates) == sorted(rates)
    assert rates[0] == two_digits(LEAST * min(capacities))
    assert rates[-1] == two_digits(MOST * max(capacities))
    assert focus == two_digits(FOCUS * min(capacities))


def test_a_given_focus_is_kept() -> None:
    assert suggested_rates(systems(requests=10), 7.3)[1] == 7.3


def test_rates_of_fleets_reach_beyond_the_largest(capacities: list[float]) -> None:
    rates = fleet_rates(systems(requests=40)["vanilla"], 3)
    assert rates[0] == two_digits(0.5 * capacities[0])
    assert rates[-1] > 3 * capacities[0]


def test_two_digits() -> None:
    assert [two_digits(v) for v in (0.1234, 12.34, 987.0)] == [0.12, 12.0, 990.0]
