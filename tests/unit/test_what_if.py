"""Settings tried out: what is kept of them, and differences against the one before."""

from __future__ import annotations

import json

import pytest

from heliosim.errors import InputError
from heliosim.replicate import replication_seed
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.what_if import QUANTILES, are_paired, differences, plain_tried, quantiles_of, tried_of, try_out
from tests.studies import tried


def scenario(threshold: float = 0.8, rate: float = 60.0, requests: int = 40, seed: int = 3) -> Scenario:
    return Scenario.model_validate(
        {
            "name": "early",
            "seed": seed,
            "profile": "tiny-opt-cpu",
            "models": ["tiny-opt-s", "tiny-opt-l"],
            "workload": {
                "requests": requests,
                "arrivals": {"kind": "poisson", "rate_per_s": rate},
                "tasks": [
                    {
                        "task": "chat",
                        "prompt_tokens": {"kind": "uniform", "low": 10, "high": 40},
                        "output_tokens": {"kind": "uniform", "low": 5, "high": 20},
                    }
                ],
            },
            "memory": {"budget_bytes": "60 MB"},
            "controller": {"kind": "early-exit", "model": "tiny-opt-l", "threshold": threshold},
            "slo": {"ttft_ms": 200.0},
        }
    )


@pytest.fixture(name="early", scope="module")
def _early():  # type: ignore[no-untyped-def]
    return try_out(scenario(), 3)


def test_replications_are_those_of_the_scenario(early) -> None:  # type: ignore[no-untyped-def]
    seeds = [r.seed for r in early.replicated.replications]
    assert seeds == [replication_seed(3, k) for k in range(3)]
    alone = run_simulated(scenario().model_copy(update={"seed": seeds[0]}))
    assert early.course["time_s"]
    assert max(early.course["rows"]) == alone.steps["rows"].to_numpy().max()


def test_first_requests_are_left_out(early) -> None:  # type: ignore[no-untyped-def]
    assert early.requests == 40
    assert [r.requests for r in early.replicated.replications] == [36, 36, 36]
    assert early.counts["ttft"] == 108
    assert sum(share for _, _, share in early.exits) == pytest.approx(1)


def test_it_survives_as_plain_data(early) -> None:  # type: ignore[no-untyped-def]
    again = tried_of(json.loads(json.dumps(plain_tried(early))))
    assert again.replicated == early.replicated
    assert again.exits == early.exits
    assert again.latencies == early.latencies


def test_same_setting_shows_no_difference(early) -> None:  # type: ignore[no-untyped-def]
    table = differences(try_out(scenario(), 3), early)
    assert set(table["verdict"]) <= {"no difference shown", "not known"}
    assert table[table["metric"] == "p99_ttft_ms"]["difference"].item() == 0


def test_a_lower_threshold_saves_layers(early) -> None:  # type: ignore[no-untyped-def]
    table = differences(try_out(scenario(threshold=0.2), 3), early).set_index("metric")
    assert table.loc["layers_per_token", "verdict"] == "better"
    assert table.loc["layers_per_token", "high"] < 0
    assert table.loc["agreement", "verdict"] == "worse"


def test_other_seeds_cannot_be_paired(early) -> None:  # type: ignore[no-untyped-def]
    other = try_out(scenario(seed=4, requests=20), 2)
    assert not are_paired(other, early)
    with pytest.raises(InputError, match="same seed"):
        differences(other, early)


def test_progress_is_said_and_may_stop() -> None:
    said: list[tuple[str, float]] = []

    def stop(text: str, share: float) -> None:
        said.append((text, share))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_out(scenario(requests=10), 4, on_progress=stop)
    assert said == [("replication 1 of 4", 0.25)]


@pytest.mark.parametrize(("replications", "settling", "field"), [(1, 0.1, "replications"), (3, 1.0, "settling")])
def test_bad_input_names_the_field(replications: int, settling: float, field: str) -> None:
    with pytest.raises(InputError, match=field):
        try_out(scenario(), replications, settling=settling)


def test_overload_takes_the_intervals_away() -> None:
    calm = tried({"p99_ttft_ms": [1, 2, 3]})
    table = differences(tried({"p99_ttft_ms": [5, 6, 8]}), calm, ("p99_ttft_ms", "mean_e2el_ms"))
    assert table["verdict"].tolist() == ["worse", "not known"]
    assert table["reason"].tolist()[1] == "no data"


def test_long_distributions_are_thinned() -> None:
    import numpy as np

    assert len(quantiles_of(np.arange(5000.0))) == QUANTILES
    assert quantiles_of(np.array([3.0, 1.0])) == [1.0, 3.0]
