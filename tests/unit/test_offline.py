"""The repository's offline figures follow from costs, sizes and exits of the synthetic profile."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from heliosim.formats.profile import Energy, Profile
from heliosim.offline import build_repository
from heliosim.serving.repository import Repository
from heliosim.types import Placement
from tests.profiles import LOAD_SECONDS, MODELS, SMALL, STEP_SECONDS, WALL_FACTOR, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


def build(profile: Profile, budget: int = 1_000_000, max_batch: int = 8, threshold: float = 0.8) -> Repository:
    return build_repository(profile, ("small", "large"), "cpu", budget, max_batch, threshold)


def test_every_exit_of_every_model_has_figures(profile: Profile) -> None:
    repository = build(profile)
    assert list(repository.candidates) == ["small", "large"]
    for name, candidate in repository.candidates.items():
        assert candidate.spec == MODELS[name]
        assert tuple(candidate.offline) == MODELS[name].exits
        for performance in candidate.offline.values():
            assert performance.throughput_tok_per_s > 0
            assert performance.ttft_s > 0
            assert performance.perplexity > 1
            assert performance.energy_j is None


def test_a_partial_model_answers_sooner_than_a_deeper_one(profile: Profile) -> None:
    for candidate in build(profile).candidates.values():
        ttft = [candidate.offline[e].ttft_s for e in candidate.spec.exits]
        assert ttft == sorted(ttft)
        first, second = (candidate.offline[e].throughput_tok_per_s for e in candidate.spec.exits[:2])
        assert first > second


def test_one_decode_step_by_hand(profile: Profile) -> None:
    """small@2, eight rows: prompts of 24-26 tokens and texts of 20 make a context of 25 + 10, gathered as 48."""
    s, rows, layers = STEP_SECONDS, 8, 2
    by_hand = (
        s["step"]
        + rows * (s["row"] + s["token"] + s["check_row"])
        + s["check"]
        + rows * 48 * s["gathered"]
        + layers * (s["layer"] + s["layer_many"] + s["layer_decode"] + s["layer_decode_many"])
        + layers * rows * (s["layer_token"] + s["layer_decode_row"] + 48 * s["layer_decode_kv"])
    )
    figures = build(profile).candidates["small"].offline[2]
    assert figures.throughput_tok_per_s == pytest.approx(rows / by_hand)
    prefill = s["step"] + s["row"] + 25 * s["token"] + s["check"] + s["check_row"] + s["started"]
    prefill += layers * (s["layer"] + s["layer_many"] + 16 * s["layer_token"] + 9 * s["layer_token_more"])
    prefill += layers * (s["layer_prefill_row"] + 625 * s["layer_prefill_kv"])
    assert figures.ttft_s == pytest.approx(prefill)


def test_the_full_model_pays_for_the_deepest_token_of_its_batch(profile: Profile) -> None:
    """With one row the mean exit counts; with more the deepest one, so each row gains less."""
    alone = build(profile, max_batch=1).candidates["small"].offline
    many = build(profile, max_batch=16).candidates["small"].offline
    gain = {d: many[d].throughput_tok_per_s / alone[d].throughput_tok_per_s for d in (2, 6)}
    assert 1 < gain[6] < gain[2]
    never = build(profile, threshold=1.1).candidates["small"].offline[6]
    always = build(profile, threshold=0.0).candidates["small"].offline[6]
    usual = build(profile).candidates["small"].offline[6]
    assert never.throughput_tok_per_s < usual.throughput_tok_per_s < always.throughput_tok_per_s


def test_memory_bounds_the_batch_and_freed_weights_enlarge_it(profile: Profile) -> None:
    """Beside large@12 (12,500 B) 13,652 B hold one row of 3 blocks; beside large@4 there is room for many."""
    tight, wide = build(profile, budget=12_500 + 3 * 384).candidates["large"], build(profile).candidates["large"]
    alone = build(profile, max_batch=1).candidates["large"]
    assert tight.offline[12].throughput_tok_per_s == pytest.approx(alone.offline[12].throughput_tok_per_s)
    assert tight.offline[4].throughput_tok_per_s == pytest.approx(wide.offline[4].throughput_tok_per_s)
    too_small = build(profile, budget=12_500).candidates["large"]
    assert too_small.offline[12] == tight.offline[12], "what does not fit is figured with one row"


def test_exits_are_those_of_the_behaviour_table(profile: Profile) -> None:
    for name, candidate in build(profile).candidates.items():
        assert candidate.offline_exits == profile.behaviour.exit_shares(name, f"{name}:threshold", 0.8)
        assert math.fsum(candidate.offline_exits.values()) == pytest.approx(1.0)


def test_perplexity_is_each_policys_own(profile: Profile) -> None:
    small = build(profile).candidates["small"].offline
    assert small[2].perplexity == profile.behaviour.perplexity("small", 2, "small:greedy@2", None)
    assert small[6].perplexity == profile.behaviour.perplexity("small", 6, "small:threshold", 0.8)
    assert small[6].perplexity < small[2].perplexity


def test_expected_loads(profile: Profile) -> None:
    load = build(profile, budget=100_000).load_seconds
    kv = 100_000 - SMALL.weights_bytes(6)
    by_hand = LOAD_SECONDS["load"] + 6 * LOAD_SECONDS["layer"] + kv * LOAD_SECONDS["kv_byte"]
    by_hand += SMALL.weights_bytes(6) * LOAD_SECONDS["weights_byte"]
    assert load(None, Placement("small", 6)) == pytest.approx(by_hand)
    assert load(Placement("large", 4), Placement("small", 6)) == pytest.approx(by_hand)
    steps = [load(Placement("small", d), Placement("small", 6)) for d in (2, 4, 6)]
    assert all(a > b for a, b in pairwise([by_hand, *steps])), "the more is there, the less must come"


def test_the_clock_is_the_one_asked_for(profile: Profile) -> None:
    cpu = build(profile).candidates["small"].offline[2]
    wall = build_repository(profile, ("small",), "wall", 1_000_000, 8, 0.8).candidates["small"].offline[2]
    assert wall.ttft_s == pytest.approx(WALL_FACTOR * cpu.ttft_s)
    assert wall.throughput_tok_per_s == pytest.approx(cpu.throughput_tok_per_s / WALL_FACTOR)


def test_energy_is_power_times_a_requests_share_of_time(tmp_path: Path) -> None:
    energy = Energy(source="rapl", idle_w=20.0, joules_per_step_second=30.0)
    figures = build(write_synthetic_profile(tmp_path / "p", energy=energy)).candidates["small"].offline[2]
    seconds = figures.ttft_s + 20 / figures.throughput_tok_per_s
    assert figures.energy_j == pytest.approx(50.0 * seconds)


def test_a_load_beside_steps_costs_what_of_it_is_exposed(profile: Profile) -> None:
    """Where both fit; where they do not, the whole load."""
    old, new = Placement("large", 4), Placement("small", 6)
    exposed, whole = (
        build_repository(profile, tuple(MODELS), "cpu", 100_000, 8, 0.8, overlaps=o).load_seconds for o in (True, False)
    )
    kv = 100_000 - SMALL.weights_bytes(6)
    assert exposed(old, new) == pytest.approx(LOAD_SECONDS["load"] + kv * LOAD_SECONDS["kv_byte"])
    assert exposed(None, new) == whole(None, new)
    tight = build_repository(profile, tuple(MODELS), "cpu", 8_000, 8, 0.8, overlaps=True).load_seconds
    assert tight(old, new) > LOAD_SECONDS["load"] + SMALL.weights_bytes(6) * LOAD_SECONDS["weights_byte"]
