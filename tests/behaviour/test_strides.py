"""Strides are only faster: forcing one step at a time gives the identical run, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given

from heliosim.formats.profile import Profile
from heliosim.recorder import TableRecorder
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from tests.behaviour.test_invariants import few, fixed_controllers, helios_controllers, scenarios
from tests.profiles import scenario, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


def assert_same(plan: Scenario, profile: Profile) -> int:
    """Run both ways, compare every table; returns the steps of the run."""
    whole, single = run_simulated(plan, profile), run_simulated(plan, profile, max_stride=1)
    for name in ("steps", "requests", "tokens", "events"):
        a, b = getattr(whole, name), getattr(single, name)
        if not a.equals(b):
            for column in a.column_names:
                assert a[column].to_pylist() == b[column].to_pylist(), f"{name}.{column}"
        assert a.equals(b), name
    return int(whole.steps.num_rows)


@few
@given(sections=scenarios(fixed_controllers()))
def test_fixed_placements(sections: Mapping[str, Any], profile: Profile) -> None:
    assert assert_same(scenario(profile, **sections), profile) > 0


@few
@given(sections=scenarios(helios_controllers()))
def test_helios(sections: Mapping[str, Any], profile: Profile) -> None:
    assert assert_same(scenario(profile, **sections), profile) > 0


def test_a_stride_covers_many_steps(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would compare one-step runs with one-step runs."""
    lengths: list[int] = []
    kept = TableRecorder.stride
    monkeypatch.setattr(TableRecorder, "stride", lambda self, r: (lengths.append(len(r.stride)), kept(self, r))[1])
    plan = scenario(profile, controller={"kind": "vanilla", "model": "large"})
    steps = run_simulated(plan, profile).steps.num_rows
    assert max(lengths) > 5
    assert sum(lengths) > steps / 2
