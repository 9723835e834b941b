"""Strides are only faster also where loads overlap with steps: a stride ends when a transfer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heliosim.errors import HelioSimError
from heliosim.formats.profile import Profile, load_profile, write_profile
from heliosim.runs import ANY_STRIDE
from tests.behaviour.test_strides_random import drawn, drawn_pressed, run
from tests.profiles import write_synthetic_profile

OTHER_LOADS: list[dict[str, Any]] = [
    {"loads": "overlapped"},
    {"is_pipelined": True},
    {"loads": "overlapped", "is_pipelined": True, "host_bytes": 14_000},
]


@pytest.fixture(scope="module")
def slow_link(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Loads that last for many steps, and a disk that is slower still."""
    return with_slow_link(tmp_path_factory.mktemp("slow") / "synthetic")


@pytest.fixture(scope="module")
def slowing_link(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """The same, and steps beside a load take half as long again."""
    return with_slow_link(tmp_path_factory.mktemp("slowing") / "synthetic", 1.5)


def with_slow_link(folder: Path, step_slowdown: float | None = None) -> Profile:
    profile = write_synthetic_profile(folder, max_rows=64, max_tokens=512)
    models = dict(profile.facts.models)
    for name, facts in models.items():
        load = {
            clock: fit.model_copy(
                update={
                    "seconds_per": fit.seconds_per | {"weights_byte": 4e-6},
                    "seconds_per_byte": {"disk": 1e-5},
                    "step_slowdown": step_slowdown,
                }
            )
            for clock, fit in facts.load.items()
        }
        models[name] = facts.model_copy(update={"load": load})
    write_profile(folder, profile.facts.model_copy(update={"models": models}))
    return load_profile(folder)


@pytest.mark.parametrize("memory", OTHER_LOADS, ids=str)
@pytest.mark.parametrize("draw", [drawn, drawn_pressed], ids=["any", "pressed"])
def test_loads_beside_steps(draw: Any, memory: dict[str, Any], slow_link: Profile) -> None:
    """A stride ends when a transfer does, as it would step by step."""
    seen: set[str] = set()
    for seed in range(30):
        try:
            plan = draw(seed, slow_link, **memory)
        except HelioSimError:
            continue
        single = run(plan, slow_link, 1)
        for stride in (7, ANY_STRIDE):
            other = run(plan, slow_link, stride)
            if isinstance(single, str) or isinstance(other, str):
                assert single == other, f"seed {seed}, strides of {stride}"
                continue
            for name in ("steps", "requests", "tokens", "events"):
                a, b = getattr(other, name), getattr(single, name)
                assert a.equals(b), f"seed {seed}, strides of {stride}: {name} differ"
            seen |= set(single.events["kind"].to_pylist())
    assert ("fetched" in seen) == ("loads" in memory)
    assert ("stalled" in seen) == ("is_pipelined" in memory)


def test_steps_beside_a_transfer_take_longer_where_a_profile_says_so(slow_link: Profile, slowing_link: Profile) -> None:
    """By what the profile says, no step but those, and in strides as step by step."""
    ratios: set[float] = set()
    for seed in range(12):
        try:
            plain, slowed = (drawn(seed, p, loads="overlapped") for p in (slow_link, slowing_link))
        except HelioSimError:
            continue
        single, other = run(slowed, slowing_link, 1), run(slowed, slowing_link, ANY_STRIDE)
        before = run(plain, slow_link, 1)
        if isinstance(single, str) or isinstance(other, str) or isinstance(before, str):
            assert single == other
            continue
        assert other.steps.equals(single.steps)
        assert other.tokens.equals(single.tokens)
        is_first = True  # until a step took longer, the two runs are one
        for a, b in zip(before.steps.to_pylist(), single.steps.to_pylist(), strict=False):
            if not is_first:
                break
            ratios.add(round(b["seconds"] / a["seconds"], 3) if a["seconds"] else 1.0)
            is_first = a["seconds"] == b["seconds"]
    assert ratios == {1.0, 1.5}
