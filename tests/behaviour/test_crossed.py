"""Features that were made apart, together: random scenarios over all of them at once.

Exit methods, loads beside steps and host memory, orders with predictions and classes, curves, energy by kind of work,
step noise, fleets of unlike replicas that fail: any stride gives the same tables, the books balance, nobody is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from heliosim.energy_metrics import CAUSES
from heliosim.errors import HelioSimError
from heliosim.formats.profile import (
    Energy,
    ExitMethodFit,
    MemoryFacts,
    ModelPower,
    Profile,
    load_profile,
    write_profile,
)
from heliosim.formats.results import RunResults, load_run
from heliosim.metrics import summarise
from heliosim.runs import ANY_STRIDE, run_simulated, save
from heliosim.scenario import Scenario, load_scenario
from tests.behaviour.test_strides_random import drawn_controller, drawn_order, drawn_predictor, drawn_workload
from tests.profiles import scenario, write_synthetic_profile

POWER = Energy(
    source="data-sheet", reason="made up", idle_w=70.0, decode_w=250.0, prefill_w=390.0, load_w=110.0,
    models={"large": ModelPower(decode_w=300.0)},
)  # fmt: skip
NEEDS = MemoryFacts(activation_bytes_per_token=2, workspace_bytes=200, request_bytes=150, max_rows=6)
EXITS = ExitMethodFit(regroup=3e-4, copy_layer=5e-6, copy_layer_token=3e-8, steps=10)


@pytest.fixture(scope="module", params=[None, NEEDS], ids=["plain", "needy"])
def profiles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Profile]:
    """Straight costs and curved ones, both with slow loads and with what other exit methods cost; ``needy``: models that
    need memory beside weights and KV.
    """
    found = []
    for curves, limits in ((False, (64, 512)), (True, (20, 300))):
        folder = tmp_path_factory.mktemp("profile") / "crossed"
        made = write_synthetic_profile(
            folder, max_rows=limits[0], max_tokens=limits[1], curves=curves, energy=POWER, memory=request.param
        ).facts
        models = {}
        for name, facts in made.models.items():
            load = {
                clock: fit.model_copy(
                    update={
                        "seconds_per": fit.seconds_per | {"weights_byte": 4e-6},
                        "seconds_per_byte": {"disk": 1e-5, "pageable": 6e-6},
                    }
                )
                for clock, fit in facts.load.items()
            }
            step = {clock: fit.model_copy(update={"exit_methods": EXITS}) for clock, fit in facts.step.items()}
            models[name] = facts.model_copy(update={"load": load, "step": step})
        write_profile(folder, made.model_copy(update={"models": models}))
        found.append(load_profile(folder))
    return found


def crossed_controller(r: Random) -> dict[str, Any]:
    found = drawn_controller(r)
    if found["kind"] == "helios":
        found |= {
            "objective": r.choice(["throughput", "ttft", "energy", "perplexity"]),
            "shortlist_by_slo": r.random() < 0.3,
            "probe_requests": r.choice([1, 2, 3]),
            "max_breaches": r.choice([0, 3, 6]),
            "window_tokens": r.choice([5, 10, 40]),
            "reassess_interval": r.choice([5, 10, 20]),
        }
    if found["kind"] in ("helios", "early-exit"):
        found |= {
            "batching": r.choice(["wait-for-deepest", "eager", "rebatch"]),
            "skipped_kv": r.choice(["none", "copy", "propagate", "recompute"]),
            "break_even": r.choice([None, 0.0, 4.0]),
        }
    return found


def crossed_memory(r: Random) -> dict[str, Any]:
    return {
        "budget_bytes": r.choice([14036, 16000, 20000, 24000, 40000, 100000]),
        "loads": r.choice(["blocking", "overlapped", "overlapped"]),
        "is_pipelined": r.random() < 0.4,
        "host": r.choice(["pinned", "pinned", "pageable"]),
        "host_bytes": r.choice([None, 0, 9000, 14000, 30000]),
    }


def crossed_batcher(r: Random) -> dict[str, Any]:
    rows = r.choice([1, 4, 8])
    order = drawn_order(r) if r.random() < 0.6 else None
    return {"max_batch": rows, "token_budget": max(rows, r.choice([8, 64])), "order": order}


def crossed(seed: int, profiles: Sequence[Profile]) -> tuple[Scenario, Profile]:
    r = Random(f"crossed {seed}")
    profile = r.choice(profiles)
    load = drawn_workload(r)
    load["predictor"] = drawn_predictor(r, load["lengths"] == "natural")
    load["priorities"] = {"shares": r.choice([[1.0], [0.2, 0.8], [0.3, 0.3, 0.4]])}
    sections: dict[str, Any] = {
        "seed": seed,
        "workload": load,
        "controller": crossed_controller(r),
        "memory": crossed_memory(r),
        "batcher": crossed_batcher(r),
        "clock": r.choice(["cpu", "wall"]),
        "slo": {"ttft_ms": r.choice([10, 300]), "tpot_ms": r.choice([2, 20])},
        "allow_extrapolation": r.random() < 0.5,
    }
    if r.random() < 0.15:
        sections["step_noise"] = 0
    if r.random() < 0.4:
        other = {"controller": crossed_controller(r), "memory": crossed_memory(r), "batcher": crossed_batcher(r)}
        groups = [{"name": "a", "count": r.choice([1, 2])}, {"name": "b", **other, "profile": str(profiles[0].folder)}]
        failure = {"replica": "a-0", "at_s": r.choice([0.0, 0.02, 0.1]), "restart_after_s": r.choice([None, 0.05])}
        failures = [failure] if r.random() < 0.4 else []
        routers = ["round-robin", "least-outstanding", "least-kv", "power-of-two"]
        sections["fleet"] = {"router": r.choice(routers), "replicas": groups, "failures": failures}
    return scenario(profile, **sections), profile


def run(plan: Scenario, profile: Profile, max_stride: int) -> RunResults | str:
    try:
        return run_simulated(plan, profile, max_stride=max_stride)
    except HelioSimError as error:
        return str(error)


def check_requests(plan: Scenario, found: RunResults) -> None:
    """Each has one row and, if it ended and nobody failed, each of its tokens once."""
    rows = found.requests.to_pylist()
    assert sorted(row["request_id"] for row in rows) == list(range(plan.workload.requests or 0))
    positions: dict[int, list[int]] = {}
    for request, position in zip(*(found.tokens[c].to_pylist() for c in ("request_id", "position")), strict=True):
        positions.setdefault(request, []).append(position)
    for row in rows:
        if row["status"] == "finished":
            assert row["arrival_s"] <= row["admitted_s"] <= row["first_token_s"] <= row["finish_s"]
        if plan.fleet is None or not plan.fleet.failures:
            assert positions.get(row["request_id"], []) == list(range(row["output_tokens"]))


def check_steps(plan: Scenario, found: RunResults) -> None:
    """One at a time on each replica, within its memory and its batcher's limits."""
    limits: dict[str, Scenario] = {}
    for group in plan.fleet.replicas if plan.fleet is not None else ():
        limits |= dict.fromkeys(group.replicas, plan.of_group(group))
    until: dict[str, float] = {}
    for row in found.steps.to_pylist():
        own = limits.get(row["replica"], plan)
        assert row["weights_bytes"] + row["kv_total_bytes"] <= own.memory.budget_bytes
        assert row["kv_used_bytes"] <= row["kv_total_bytes"]
        assert row["rows"] <= own.batcher.max_batch
        assert row["prefill_tokens"] + row["decode_rows"] <= own.batcher.token_budget
        assert row["start_s"] >= until.get(row["replica"], 0.0)
        until[row["replica"]] = row["start_s"] + row["seconds"]


def check_sums(plan: Scenario, found: RunResults) -> Mapping[str, Any]:
    """Energy by cause adds up to the whole; what of loads is exposed is no more than they took."""
    summary = summarise(found, slo=plan.slo)
    if summary.energy_j is not None:
        parts = [getattr(summary, f"{cause}_energy_j") for cause in CAUSES]
        assert sum(parts) == pytest.approx(summary.energy_j, rel=1e-9)
    if summary.load_s is not None and summary.exposed_load_s is not None:
        assert summary.exposed_load_s <= summary.load_s + 1e-12
    assert summary.idle_energy_j is None or summary.idle_energy_j > -1e-9
    assert summary.utilisation is None or 0 <= summary.utilisation < 1 + 1e-9
    return summary.to_dict()


@pytest.mark.parametrize("seeds", [range(first, first + 12) for first in range(0, 60, 12)], ids=str)
def test_features_together(seeds: Sequence[int], profiles: Sequence[Profile], tmp_path: Path) -> None:
    ran = 0
    for seed in seeds:
        plan, profile = crossed(seed, profiles)
        single = run(plan, profile, 1)
        for stride in (7, ANY_STRIDE):
            other = run(plan, profile, stride)
            if isinstance(single, str) or isinstance(other, str):
                assert single == other, f"seed {seed}, strides of {stride}"
                continue
            for name in ("steps", "requests", "tokens", "events"):
                assert getattr(other, name).equals(getattr(single, name)), f"seed {seed}, {stride}: {name} differ"
        if isinstance(single, str):
            continue
        ran += 1
        check_requests(plan, single)
        check_steps(plan, single)
        summary = check_sums(plan, single)
        if seed % 6 == 0:
            save(single, tmp_path / str(seed))
            assert summarise(load_run(tmp_path / str(seed)), slo=plan.slo).to_dict() == summary
            plan.save(tmp_path / "scenario.yaml")
            assert load_scenario(tmp_path / "scenario.yaml") == plan
    assert ran >= len(seeds) // 2
