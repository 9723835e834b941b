"""What must hold in every fleet, whatever its replicas, router and failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliosim.errors import InputError
from heliosim.fleet import NO_REPLICA
from heliosim.formats.profile import Energy, Profile, load_profile
from heliosim.formats.results import RunResults, load_run
from heliosim.metrics import summarise
from heliosim.runs import run_live, run_simulated, save
from heliosim.workload import contents
from tests.behaviour.test_invariants import few, fixed_controllers, helios_controllers, scenarios
from tests.profiles import scenario, workload, write_synthetic_profile

ROUTERS = ("round-robin", "least-outstanding", "least-kv", "power-of-two")
TABLES = ("requests", "steps", "tokens", "events")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Any]:
    """One to three groups; some replicas fail, some of these come back, a few fail at the same moment."""
    groups: list[dict[str, Any]] = [{"name": "a", "count": draw(st.integers(1, 3))}]
    if draw(st.booleans()):
        groups.append({"name": "b", "controller": draw(fixed_controllers()), "clock": "wall"})
    if draw(st.booleans()):
        groups.append({"name": "c", "batcher": {"max_batch": 2, "token_budget": 16}})
    names = [f"{g['name']}-{k}" for g in groups for k in range(g.get("count", 1))]
    failures = [
        {
            "replica": name,
            "at_s": draw(st.sampled_from([0.0, 0.01, 0.05, 0.0501, 0.1])),
            "restart_after_s": draw(st.sampled_from([None, 1e-6, 0.03, 0.2])),
        }
        for name in names
        if draw(st.booleans())
    ]
    return {"router": draw(st.sampled_from(ROUTERS)), "replicas": groups, "failures": failures}


any_scenario = scenarios(st.one_of(helios_controllers(), fixed_controllers()))


def assert_equal(one: RunResults, other: RunResults) -> None:
    for name in TABLES:
        a, b = getattr(one, name), getattr(other, name)
        if not a.equals(b):
            for column in a.column_names:
                assert a[column].to_pylist() == b[column].to_pylist(), f"{name}.{column}"
        assert a.equals(b), name


@few
@given(sections=any_scenario, fleet=fleets(), noise=st.sampled_from([None, 0]))
def test_requests_end_once_and_strides_change_nothing(
    profile: Profile, sections: Mapping[str, Any], fleet: dict[str, Any], noise: int | None
) -> None:
    plan = scenario(profile, **sections, fleet=fleet, step_noise=noise)
    run = run_simulated(plan, profile)
    check_requests(run, {k: c.output_tokens or 0 for k, c in contents(plan.workload, plan.seed).items()})
    check_steps(run)
    check_tokens(run)
    check_events(run)
    assert_equal(run, run_simulated(plan, profile, max_stride=1))


def check_requests(run: RunResults, lengths: Mapping[int, int]) -> None:
    rows = run.requests.to_pylist()
    assert sorted(row["request_id"] for row in rows) == sorted(lengths)
    assert [row["finish_s"] for row in rows] == sorted(row["finish_s"] for row in rows)
    for row in rows:
        if row["status"] == "finished":
            assert row["output_tokens"] == lengths[row["request_id"]]
            assert row["arrival_s"] <= row["admitted_s"] < row["first_token_s"] <= row["finish_s"]
        else:
            assert row["refusal"]
            assert (row["replica"] is None) == (row["refusal"] == NO_REPLICA)


def check_steps(run: RunResults) -> None:
    """Steps of one replica follow each other; none runs while it is down."""
    steps = run.steps.to_pandas()
    assert steps["step"].tolist() == list(range(len(steps)))
    assert steps["start_s"].is_monotonic_increasing
    for name, own in steps.groupby("replica"):
        ends = (own["start_s"] + own["seconds"]).to_numpy()
        assert (own["start_s"].to_numpy()[1:] >= ends[:-1]).all(), name
        assert (own.loc[own["kind"] != "lost", "seconds"] > 0).all()
        assert (own.loc[own["kind"] == "lost", "tokens_out"] == 0).all()


def check_tokens(run: RunResults) -> None:
    """A request's tokens are those of its last attempt, one behind the other, from steps of one replica."""
    tokens, requests = run.tokens.to_pandas(), run.requests.to_pandas().set_index("request_id")
    steps = run.steps.to_pandas()
    assert tokens["time_s"].is_monotonic_increasing
    assert len(tokens) == requests["output_tokens"].sum()
    at = steps.loc[tokens["step"].to_numpy()]
    assert (at["start_s"] + at["seconds"]).to_numpy() == pytest.approx(tokens["time_s"].to_numpy(), abs=0)
    assert (at["replica"].to_numpy() == requests.loc[tokens["request_id"].to_numpy(), "replica"].to_numpy()).all()
    for request, own in tokens.groupby("request_id"):
        assert own["position"].tolist() == list(range(len(own)))
        assert own["time_s"].iloc[0] == requests.loc[request, "first_token_s"]


def check_events(run: RunResults) -> None:
    """As many requests are said to be routed anew as the requests say of themselves; every restart had a failure."""
    events = run.events.to_pylist()
    details = {kind: [json.loads(e["detail"]) for e in events if e["kind"] == kind] for kind in ("failed", "rerouted")}
    assert sum(d["requests"] for d in details["rerouted"]) == sum(run.requests["retries"].to_pylist())
    assert sum(d["running"] + d["waiting"] for d in details["failed"]) == sum(run.requests["retries"].to_pylist())
    assert run.steps["kind"].to_pylist().count("lost") == len(details["failed"])
    down: set[str] = set()
    for event in events:
        if event["kind"] == "failed":
            assert event["replica"] not in down
            down.add(event["replica"])
        elif event["kind"] == "restarted":
            down.remove(event["replica"])


@few
@given(sections=any_scenario, router=st.sampled_from(ROUTERS), noise=st.sampled_from([None, 2]))
def test_a_fleet_of_one_is_a_single_server(
    profile: Profile, sections: Mapping[str, Any], router: str, noise: int | None
) -> None:
    alone = run_simulated(scenario(profile, **sections, step_noise=noise), profile)
    fleet = {"router": router, "replicas": [{"name": "replica"}]}
    one = run_simulated(scenario(profile, **sections, step_noise=noise, fleet=fleet), profile)
    assert_equal(alone, one)
    assert summarise(alone) == summarise(one)
    assert alone.info.profile_hash == one.info.profile_hash
    assert alone.info.scenario_hash != one.info.scenario_hash


# --- routers ----------------------------------------------------------------------------------------------------------


def test_knowing_the_replicas_pays(profile: Profile) -> None:
    """At high load with lengths that vary, mean TTFT falls with what the router knows."""
    load = workload(
        requests=600,
        rate_per_s=950.0,
        prompt={"kind": "uniform", "low": 4, "high": 80},
        output={"kind": "lognormal", "mean": 20, "cv": 1.2, "high": 100},
        max_tokens=100,
    )
    vanilla = {"kind": "vanilla", "model": "small"}
    mean = {}
    for router in ROUTERS:
        fleet = {"router": router, "replicas": [{"name": "r", "count": 4}]}
        plans = [scenario(profile, seed=k, workload=load, controller=vanilla, fleet=fleet) for k in range(2)]
        mean[router] = np.mean([summarise(run_simulated(plan, profile)).mean_ttft_ms for plan in plans])
    assert mean["least-outstanding"] < mean["power-of-two"] < mean["round-robin"]


# --- failures ---------------------------------------------------------------------------------------------------------

FAILING = {
    "router": "least-outstanding",
    "replicas": [{"name": "r", "count": 3}],
    "failures": [{"replica": "r-0", "at_s": 0.05, "restart_after_s": 0.1}, {"replica": "r-2", "at_s": 0.08}],
}


@pytest.mark.parametrize("kind", ["vanilla", "early-exit"])
def test_a_failure_costs_time_and_no_answer(profile: Profile, kind: str) -> None:
    """Every request is served in full, with the same tokens where the model is the same; what was lost shows."""
    controller = {"kind": kind, "model": "small"}
    plan = scenario(profile, workload=workload(120, 700.0), controller=controller, fleet=FAILING)
    calm = scenario(profile, workload=workload(120, 700.0), controller=controller, fleet=FAILING | {"failures": []})
    failed, whole = run_simulated(plan, profile), run_simulated(calm, profile)
    assert failed.counts["finished"] == whole.counts["finished"] == 120
    assert summarise(failed).total_output_tokens == summarise(whole).total_output_tokens
    assert sum(failed.requests["retries"].to_pylist()) > 3
    columns = ["request_id", "position", "exit_layer", "confidence"]
    keys = [("request_id", "ascending"), ("position", "ascending")]
    assert failed.tokens.select(columns).sort_by(keys).equals(whole.tokens.select(columns).sort_by(keys))
    assert sum(failed.steps["tokens_out"].to_pylist()) > failed.tokens.num_rows
    assert sum(whole.steps["tokens_out"].to_pylist()) == whole.tokens.num_rows
    assert (summarise(failed).mean_ttft_ms or 0) > (summarise(whole).mean_ttft_ms or 0)


def test_a_restarted_controller_starts_anew(profile: Profile) -> None:
    run = run_simulated(scenario(profile, workload=workload(200, 400.0), fleet=FAILING), profile)
    events = [e for e in run.events.to_pylist() if e["replica"] == "r-0"]
    back = next(k for k, e in enumerate(events) if e["kind"] == "restarted")
    assert events[back]["time_s"] == pytest.approx(0.15)
    assert [e["kind"] for e in events[back + 1 : back + 3]] == ["shortlist", "transition"]
    assert json.loads(events[back + 2]["detail"])["from"] is None


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_replicas_of_different_kinds(profile: Profile, tmp_path: Path) -> None:
    """Own profile, models, memory, batcher, controller and clock: each shows in its replica's steps alone."""
    other = write_synthetic_profile(tmp_path / "other", max_rows=64, max_tokens=512, energy=Energy(
        source="nvml", idle_w=1.0, joules_per_step_second=10.0
    ))  # fmt: skip
    fleet = {
        "router": "round-robin",
        "replicas": [
            {"name": "plain", "controller": {"kind": "vanilla", "model": "large"}},
            {"name": "slow", "clock": "wall", "controller": {"kind": "vanilla", "model": "large"}},
            {"name": "small", "models": ["small"], "controller": {"kind": "vanilla", "model": "small"}},
            {"name": "tight", "memory": {"budget_bytes": 20_000}, "batcher": {"max_batch": 2, "token_budget": 8}},
            {"name": "other", "profile": str(other.folder)},
        ],
    }
    run = run_simulated(scenario(profile, workload=workload(200, 400.0), fleet=fleet), profile)
    steps = run.steps.to_pandas()
    own = {name: steps[(steps["replica"] == f"{name}-0") & (steps["kind"] == "run")] for name in
           ("plain", "slow", "small", "tight", "other")}  # fmt: skip
    assert set(own["plain"]["model"]) == {"large"}
    assert set(own["small"]["model"]) == {"small"}
    one = ["plain", "slow"]
    seconds = [own[n].loc[(own[n]["decode_rows"] == 1) & (own[n]["rows"] == 1), "seconds"].min() for n in one]
    assert seconds[1] == pytest.approx(1.5 * seconds[0], rel=1e-6)
    assert own["tight"]["rows"].max() == 2
    assert own["plain"]["rows"].max() > 2
    held = own["tight"]["weights_bytes"] + own["tight"]["kv_total_bytes"]
    assert held.max() <= 20_000
    assert own["other"]["energy_j"].notna().all()
    assert own["plain"]["energy_j"].isna().all()
    assert run.info.profile_hash not in (profile.hash, other.hash)


def test_step_noise_differs_by_replica(profile: Profile) -> None:
    fleet = {"router": "round-robin", "replicas": [{"name": "r", "count": 2}]}
    load = workload(60, 2000.0, prompt=20, output=20) | {"arrivals": {"kind": "constant", "rate_per_s": 1e6}}
    vanilla = {"kind": "vanilla", "model": "small"}
    quiet, noisy = (
        run_simulated(scenario(profile, workload=load, controller=vanilla, fleet=fleet, step_noise=k), profile)
        for k in (None, 0)
    )

    def ratios(run: RunResults) -> list[float]:
        steps = run.steps.to_pandas()
        a, b = (steps[(steps["replica"] == n) & (steps["kind"] == "run")]["seconds"].tolist() for n in ("r-0", "r-1"))
        return [x / y for x, y in zip(a, b, strict=False)]

    assert max(abs(r - 1) for r in ratios(quiet)) < 0.1
    assert max(abs(r - 1) for r in ratios(noisy)) > 0.5


@settings(few, max_examples=5)
@given(sections=any_scenario, fleet=fleets())
def test_same_seed_same_bytes(
    profile: Profile, tmp_path_factory: pytest.TempPathFactory, sections: Mapping[str, Any], fleet: dict[str, Any]
) -> None:
    plan = scenario(profile, **sections, fleet=fleet)
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        save(run_simulated(plan, load_profile(profile.folder)), folder / name)
    for file in sorted(p.name for p in (folder / "a").iterdir()):
        if file != "host.json":
            assert (folder / "a" / file).read_bytes() == (folder / "b" / file).read_bytes(), file
    again = load_run(folder / "a")
    assert summarise(again) == summarise(run_simulated(plan, profile))


def test_a_live_run_refuses_a_fleet(profile: Profile) -> None:
    with pytest.raises(InputError, match=r"^fleet: a fleet cannot run live \(value: '3 replicas'\)"):
        run_live(scenario(profile, fleet=FAILING), profile)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"memory": {"budget_bytes": 100}}, "fleet group 'odd': memory.budget_bytes: too small"),
        ({"models": ["small", "lage"]}, "fleet group 'odd': .*Did you mean 'large'"),
        ({"profile": "nowhere"}, "fleet group 'odd': .*nowhere"),
        ({"controller": {"kind": "fixed", "model": "small", "depth": 3}}, "fleet group 'odd': controller.depth"),
    ],
)
def test_a_group_that_cannot_be_built_is_named(profile: Profile, group: dict[str, Any], said: str) -> None:
    fleet = {"replicas": [{"name": "fine"}, {"name": "odd", **group}]}
    with pytest.raises(InputError, match=said):
        run_simulated(scenario(profile, fleet=fleet), profile)
