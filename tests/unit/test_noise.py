"""Recorded step-time noise: mean, phases, and the same draw twice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from heliosim.noise import RecordedNoise
from heliosim.streams import stream


def test_mean_over_expected_time_is_that_of_the_recording() -> None:
    rng = np.random.default_rng(1)
    expected = rng.uniform(0.5, 3.0, 400)
    ratios = rng.lognormal(0.0, 0.4, 400)
    noise = RecordedNoise(list(ratios), list(expected))
    player = noise.player(stream(0, "step noise", 0))
    steps = rng.uniform(0.1, 0.4, 40_000)
    total = sum(s * player.factor(s) for s in steps)
    truth = float((ratios * expected).sum() / expected.sum())
    assert total / steps.sum() == pytest.approx(truth, rel=0.02)


def test_a_slow_phase_keeps_its_length() -> None:
    noise = RecordedNoise([1.0] * 50 + [3.0] * 50, [0.01] * 100)
    player = noise.player(stream(3, "step noise", 1))
    factors = [player.factor(0.005) for _ in range(200)]  # once round
    changes = sum(a != b for a, b in pairwise(factors))
    assert changes in (1, 2)
    assert abs(factors.count(3.0) - 100) <= 1


def test_draws_differ_and_repeat() -> None:
    noise = RecordedNoise(list(np.linspace(0.5, 2.0, 1000)), [0.001] * 1000)
    first, again, other = (
        [noise.player(stream(0, "step noise"), k).factor(0.001) for _ in range(3)] for k in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_steps_longer_than_the_recording_go_round() -> None:
    player = RecordedNoise([2.0, 1.0], [0.5, 0.5]).player(stream(0, "step noise", 0))
    assert {player.factor(7.25) for _ in range(50)} == {1.0, 2.0}


@pytest.mark.parametrize(("ratios", "expected"), [([], []), ([1.0], []), ([0.0], [1.0]), ([1.0], [0.0])])
def test_unusable_recordings_are_refused(ratios: list[float], expected: list[float]) -> None:
    with pytest.raises(ValueError, match="ratios"):
        RecordedNoise(ratios, expected)


def test_a_few_draws_of_one_seed_cover_the_recording_evenly() -> None:
    """Whatever the seed, five draws of a recording with one slow fifth meet it about once."""
    noise = RecordedNoise([1.0] * 80 + [6.0] * 20, [0.01] * 100)
    for seed in range(20):
        firsts = [noise.player(stream(seed, "step noise"), k).factor(0.01) for k in range(10)]
        assert 1 <= firsts.count(6.0) <= 3, seed
