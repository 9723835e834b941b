"""How far evaluations miss what the profile expects, and when that changes the choice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heliosim.errors import InputError
from heliosim.evaluation_noise import Evaluated, evaluation_noise, noise_line
from heliosim.formats.profile import Profile
from heliosim.formats.results import RunResults
from heliosim.runs import run_simulated
from heliosim.serving.repository import Evaluation
from heliosim.types import Served, Tokens
from tests.profiles import scenario, workload, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "p", max_rows=64, max_tokens=512)


def ran(profile: Profile, requests: int = 120, **controller: Any) -> RunResults:
    helios = {"kind": "helios", "reassess_interval": 20, "probe_requests": 3} | controller
    plan = scenario(profile, controller=helios, workload=workload(requests, 30.0), batcher={"max_batch": 1})
    return run_simulated(plan, profile)


def median_miss(found: list[Evaluated]) -> float:
    return float(np.median([abs(c.measured_cost / c.expected_cost - 1) for one in found for c in one.candidates]))


def test_every_evaluation_has_an_estimate_an_error_and_an_expected_value(profile: Profile) -> None:
    run = ran(profile)
    found = evaluation_noise(run, profile)
    events = run.events.to_pylist()
    assert len(found) == sum(e["kind"] == "evaluated" for e in events) // 2 > 2
    for one in found:
        assert [c.model for c in one.candidates] == ["small", "large"]
        assert one.chosen in ("small", "large")
        for candidate in one.candidates:
            assert candidate.standard_error is not None
            assert set(candidate.standard_error) == {"throughput_tok_per_s", "ttft_s", "perplexity"}
            assert candidate.expected.throughput_tok_per_s > 0
    line = noise_line(found)
    assert line is not None
    assert line.startswith(f"evaluations: {len(found)}; noise")


def test_more_probes_are_nearer_to_what_is_expected(profile: Profile) -> None:
    few = evaluation_noise(ran(profile, requests=400, probe_requests=2), profile)
    many = evaluation_noise(ran(profile, requests=400, probe_requests=60, reassess_interval=130), profile)
    assert median_miss(many) < 0.7 * median_miss(few)


def test_a_choice_is_changed_where_the_other_is_expected_to_be_cheaper(profile: Profile) -> None:
    """Of single probes with no tolerance some mislead; where costs are as expected the choice is, too."""
    found = evaluation_noise(ran(profile, requests=300, probe_requests=1, tie_tolerance=0.0), profile)
    for one in found:
        cheapest = min(one.candidates, key=lambda c: c.expected_cost)
        assert one.expected_choice == cheapest.model
        assert one.is_changed == (one.chosen != cheapest.model)
        assert all(c.standard_error is None for c in one.candidates)


def test_what_evaluates_nothing_is_refused(profile: Profile) -> None:
    run = run_simulated(scenario(profile, controller={"kind": "vanilla", "model": "small"}), profile)
    with pytest.raises(InputError, match="evaluates nothing"):
        evaluation_noise(run, profile)
    assert noise_line(evaluation_noise(ran(profile, use_evaluation=False), profile)) is None


def test_standard_errors_by_hand(tmp_path: Path) -> None:
    """Two probes of 10 tokens: 0.1 and 0.3 s per token, first tokens after 1 and 2 s, 0.5 and 0.7 nats per token."""
    evaluation = Evaluation()
    evaluation.add_step(4.0, Tokens((0, 1), (2, 2), (0.9, 0.9), (-0.6, -0.6), (True, True)), None)
    for k, (seconds, first_s, nats) in enumerate(((1.0, 1.0, 5.0), (3.0, 2.0, 7.0))):
        evaluation.add_served(Served(k, 0.0, 0.0, first_s, seconds, 5, 10, 10, "finished", logprob_sum=-nats))
    found = evaluation.standard_errors()
    assert found is not None
    assert found["ttft_s"] == pytest.approx(0.5)
    assert found["throughput_tok_per_s"] == pytest.approx(2 / 4.0 * 0.1 / 0.2)
    assert found["perplexity"] == pytest.approx(math.exp(0.6) * 0.1)
