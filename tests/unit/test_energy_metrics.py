"""Energy by cause, idle energy, and what tokens cost in money."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heliosim.costing import energy_rows, token_cost
from heliosim.formats.profile import Energy, Profile
from heliosim.formats.results import Deployed, RunResults
from heliosim.metrics import Summary, SystemResult, summarise
from heliosim.prices import PriceTable
from heliosim.report import demo_report
from heliosim.runs import run_simulated
from heliosim.types import StepPower
from tests.profiles import scenario, workload, write_synthetic_profile

POWERS = {"idle_w": 30.0, "decode_w": 100.0, "prefill_w": 180.0, "load_w": 60.0}
TABLE = PriceTable.model_validate(
    {
        "schema_version": 1,
        "currency": "USD",
        "prices": [
            {"gpu": "X1", "provider": "p", "region": "any", "price_per_gpu_hour": 3.6, "date": "2026-04", "source": "s"}
        ],
    }
)


def made(folder: Path, **energy: Any) -> Profile:
    return write_synthetic_profile(folder / "p", energy=Energy(source="published", **energy))


def run(profile: Profile, **changes: Any) -> tuple[RunResults, Summary]:
    results = run_simulated(scenario(profile, **changes), profile)
    return results, summarise(results)


def test_powers_of_ranks_and_of_gpus_that_idle(tmp_path: Path) -> None:
    profile = made(tmp_path, gpus=4, **POWERS)
    power = profile.step_power("small")
    assert power == StepPower(100 + 3 * 30, 180 + 3 * 30, 60 + 3 * 30)
    assert profile.idle_watts == 4 * 30
    sharded = profile.facts.models["small"].model_copy(update={"tensor_parallel": 2})
    models = {**profile.facts.models, "small": sharded}
    shared = Profile(profile.folder, profile.facts.model_copy(update={"models": models}))
    assert shared.step_power("small") == StepPower(260.0, 420.0, 180.0)


def test_what_is_not_given_is_what_is_known(tmp_path: Path) -> None:
    plain = made(tmp_path, idle_w=20.0, joules_per_step_second=15.0)
    assert plain.step_power("small") == StepPower(35.0, 35.0, 35.0)
    one = made(tmp_path / "one", decode_w=100.0)
    assert one.step_power("small") == StepPower(100.0, 100.0, 100.0)
    assert one.idle_watts is None
    own = made(tmp_path / "own", decode_w=100.0, load_w=40.0, models={"large": {"decode_w": 150.0, "prefill_w": 200.0}})
    assert own.step_power("small") == StepPower(100.0, 100.0, 40.0)
    assert own.step_power("large") == StepPower(150.0, 200.0, 40.0)
    assert made(tmp_path / "two", decode_w=100.0, gpus=2).step_power("small") is None, "one GPU idles at unknown power"


def test_causes_are_all_of_the_energy(tmp_path: Path) -> None:
    """HELIOS reads, decodes, loads and evaluates; the four sum to the whole, each as its power and time say."""
    results, found = run(made(tmp_path, **POWERS))
    parts = [found.prefill_energy_j, found.decode_energy_j, found.load_energy_j, found.probe_energy_j]
    assert all(part is not None and part > 0 for part in parts)
    assert sum(part or 0.0 for part in parts) == pytest.approx(found.energy_j)
    loads = [r["seconds"] for r in results.steps.to_pylist() if r["kind"] == "load"]
    assert found.load_energy_j == pytest.approx(60.0 * sum(loads))
    assert found.duration is not None
    assert found.utilisation is not None
    assert found.idle_energy_j == pytest.approx(30.0 * found.duration * (1 - found.utilisation))
    assert found.wh_per_prompt == pytest.approx((found.energy_j or 0) / 3600 / found.completed)


def test_waiting_for_requests_costs_idle_energy_alone(tmp_path: Path) -> None:
    """The same requests ten times as far apart: about the same joules at work, many more idle."""
    profile = made(tmp_path, **POWERS)
    vanilla = {"kind": "vanilla", "model": "small"}
    _, dense = run(profile, controller=vanilla, workload=workload(rate_per_s=5.0))
    _, sparse = run(profile, controller=vanilla, workload=workload(rate_per_s=0.5))
    assert sparse.joules_per_token == pytest.approx(dense.joules_per_token, rel=0.1)
    assert (sparse.idle_energy_j or 0) > 8 * (dense.idle_energy_j or 0)
    assert (sparse.joules_per_token_with_idle or 0) > 5 * (dense.joules_per_token_with_idle or 0)


def test_servers_of_a_fleet_idle_one_by_one(tmp_path: Path) -> None:
    """Replicas that never get a request idle all the time."""
    profile = made(tmp_path, **POWERS)
    fleet = {"router": "round-robin", "replicas": [{"name": "a", "count": 3}, {"name": "b"}]}
    results, found = run(
        profile, controller={"kind": "vanilla", "model": "small"}, fleet=fleet, workload=workload(requests=2)
    )
    assert results.info.deployed["a"] == Deployed(count=3, gpus=1, idle_w=30.0)
    assert found.duration is not None
    assert found.utilisation is not None
    start, end = min(results.requests["arrival_s"].to_pylist()), max(results.requests["finish_s"].to_pylist())
    busy = [
        max(0.0, min(r["start_s"] + r["seconds"], end) - max(r["start_s"], start)) for r in results.steps.to_pylist()
    ]
    assert found.idle_energy_j == pytest.approx(30.0 * (4 * found.duration - sum(busy)))


def test_energy_without_figures_is_unavailable(tmp_path: Path) -> None:
    _, found = run(write_synthetic_profile(tmp_path / "p"))
    assert found.energy_j is None
    assert (found.decode_energy_j, found.idle_energy_j, found.wh_per_prompt, found.joules_per_token) == (None,) * 4


def test_tokens_cost_what_the_gpus_cost_meanwhile(tmp_path: Path) -> None:
    results, found = run(made(tmp_path, **POWERS))
    on_gpus = replace(
        results, info=results.info.model_copy(update={"deployed": {"replica": Deployed(gpu="X1", gpus=4, count=2)}})
    )
    cost = token_cost(on_gpus, found, TABLE)
    assert found.duration is not None
    assert cost.per_million == pytest.approx(8 * 0.001 * found.duration / found.total_output_tokens * 1e6)
    assert "USD per million output tokens" in cost.text
    assert "2026-04" in cost.text


def test_a_report_has_energy_and_cost_where_they_are_known(tmp_path: Path) -> None:
    known, _ = run(made(tmp_path, **POWERS))
    unknown, _ = run(write_synthetic_profile(tmp_path / "bare"))
    demo_report(tmp_path / "a.html", [SystemResult("it", known)], {}, [], [])
    demo_report(tmp_path / "b.html", [SystemResult("it", unknown)], {}, [], [])
    assert "Energy and cost" in (tmp_path / "a.html").read_text()
    assert "Energy and cost" not in (tmp_path / "b.html").read_text()
    (row,) = energy_rows([SystemResult("it", known), SystemResult("bare", unknown)])
    assert row[0] == "it"
    assert row[-1] == "no price for a run without a GPU"


@pytest.mark.parametrize(
    ("deployed", "said"),
    [
        ({"replica": Deployed(gpu="Z9")}, "no price for Z9"),
        ({"replica": Deployed()}, "without a GPU"),
        ({}, "does not say"),
    ],
)
def test_no_price_is_said_so(deployed: dict[str, Deployed], said: str, tmp_path: Path) -> None:
    results, found = run(made(tmp_path, **POWERS))
    bare = replace(results, info=results.info.model_copy(update={"deployed": deployed}))
    cost = token_cost(bare, found, TABLE)
    assert cost.per_million is None
    assert said in cost.text
