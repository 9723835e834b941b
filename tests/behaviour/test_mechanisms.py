"""Turning a mechanism of HELIOS off, or another way of it on, changes the result as docs/mechanisms.md says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from heliosim.formats.profile import Energy, Profile, load_profile, write_profile
from heliosim.formats.results import RunResults
from heliosim.metrics import Summary, summarise
from heliosim.runs import run_simulated
from tests.profiles import scenario, workload, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("profile") / "p"
    energy = Energy(source="data-sheet", reason="made up", busy_w=100.0)
    made = write_synthetic_profile(folder, max_rows=64, max_tokens=512, energy=energy)
    models = dict(made.facts.models)
    for name, facts in models.items():
        slow = {
            clock: fit.model_copy(
                update={"seconds_per": fit.seconds_per | {"weights_byte": 1e-6}, "seconds_per_byte": {"disk": 3e-6}}
            )
            for clock, fit in facts.load.items()
        }
        models[name] = facts.model_copy(update={"load": slow})
    write_profile(folder, made.facts.model_copy(update={"models": models}))
    return load_profile(folder)


def ran(profile: Profile, memory: dict[str, Any] | None = None, **controller: Any) -> RunResults:
    helios = {
        "kind": "helios",
        "probe_requests": 3,
        "reassess_interval": 30,
        "max_breaches": 6,
        "window_tokens": 20,
        "coverage": 0.4,
    }
    plan = scenario(
        profile,
        workload=workload(150, 150.0),
        controller=helios | controller,
        memory={"budget_bytes": 60_000} | (memory or {}),
    )
    return run_simulated(plan, profile)


@pytest.fixture(scope="module")
def usual(profile: Profile) -> RunResults:
    return ran(profile)


def count(run: RunResults, reason: str) -> int:
    return sum(s["kind"] == "load" and s["reason"] == reason for s in run.steps.to_pylist())


def events(run: RunResults, kind: str) -> list[dict[str, Any]]:
    return [json.loads(e["detail"]) for e in run.events.to_pylist() if e["kind"] == kind]


def of(metric: str) -> Callable[[RunResults], float]:
    return lambda run: float(getattr(summarise(run), metric))


CASES: list[tuple[str, dict[str, Any], Callable[[RunResults], float], str]] = [
    ("use_greedy_depth", {"use_greedy_depth": False}, of("mean_weights_bytes"), "more"),
    ("use_greedy_depth", {"use_greedy_depth": False}, of("low_confidence_share"), "less"),
    ("use_evaluation", {"use_evaluation": False}, of("probe_request_share"), "less"),
    ("use_reassess", {"use_reassess": False}, lambda run: count(run, "evaluate"), "less"),
    ("use_switch", {"use_switch": False}, lambda run: count(run, "switch"), "less"),
    ("LD and SW", {"use_load": False, "use_switch": False}, of("low_confidence_share"), "more"),
    ("probes_count", {"probes_count": False}, lambda run: count(run, "evaluate"), "less"),
    ("max_breaches", {"max_breaches": 0}, lambda run: len(events(run, "breach")), "more"),
    ("coverage", {"coverage": 0.95}, of("mean_exit_layer"), "more"),
    ("threshold", {"threshold": 0.3}, lambda run: len(events(run, "breach")), "less"),
    ("objective", {"objective": "perplexity"}, of("perplexity"), "less"),
    ("in_flight", {"in_flight": "reprefill"}, of("preemptions"), "more"),
    ("max_candidates", {"max_candidates": 1}, lambda run: count(run, "evaluate"), "less"),
]


@pytest.mark.parametrize(("name", "change", "value", "direction"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_each_mechanism_changes_what_it_is_for(
    name: str,
    change: dict[str, Any],
    value: Callable[[RunResults], float],
    direction: str,
    profile: Profile,
    usual: RunResults,
) -> None:
    before, after = value(usual), value(ran(profile, **change))
    assert after > before if direction == "more" else after < before, (before, after)


def test_a_window_forgets(profile: Profile) -> None:
    """All breaches since the last reset pass a limit more often than those of the last 20 tokens, and these more often
    than those of one group of 20.
    """
    alone = {"max_breaches": 10, "use_load": False, "use_reassess": False}
    none, sliding, tumbling = (
        len(events(ran(profile, window=kind, **alone), "breach")) for kind in ("none", "sliding", "tumbling")
    )
    assert none > sliding > tumbling


def test_loading_is_surer_and_switching_faster(profile: Profile) -> None:
    """Switch-only leaves more tokens below TH than load-only, and runs fewer layers for each."""
    load, switch = (
        summarise(ran(profile, use_reassess=False, use_load=load, use_switch=not load)) for load in (True, False)
    )
    assert (load.low_confidence_share or 0.0) < (switch.low_confidence_share or 0.0)
    assert (load.layers_per_token or 0.0) > (switch.layers_per_token or 0.0)


def test_extending_computes_less_again_than_reprefilling(profile: Profile) -> None:
    """LD alone: kept requests go on, the others compute their tokens anew."""
    alone = {"use_switch": False, "use_reassess": False, "load_step": "next-exit"}
    again = summarise(ran(profile, in_flight="reprefill", **alone)).preemptions
    assert summarise(ran(profile, in_flight="extend", **alone)).preemptions < again


def test_loading_exit_by_exit_takes_more_loads_than_loading_all(profile: Profile) -> None:
    one_by_one, at_once = (
        count(ran(profile, use_switch=False, use_reassess=False, load_step=step), "load")
        for step in ("next-exit", "full")
    )
    assert one_by_one > at_once == 1


@pytest.mark.parametrize("objective", ["throughput", "ttft", "perplexity", "energy"])
def test_the_choice_is_the_cheapest_by_each_objective(objective: str, profile: Profile) -> None:
    """On the repository's own figures, so that no probe misleads; with no tolerance nothing ties."""
    from heliosim.assembly import repositories

    controller = {"objective": objective, "use_evaluation": False, "tie_tolerance": 0.0}
    run = ran(profile, **controller)
    plan = scenario(profile, memory={"budget_bytes": 60_000}, controller={"kind": "helios"})
    repository = repositories(plan, profile)(0.8, "wait-for-deepest")
    costs = {}
    for name, candidate in repository.candidates.items():
        depth = candidate.greedy_depth(candidate.offline_exits, 0.4)
        costs[f"{name}@{depth}"] = candidate.offline[depth].cost(objective)  # type: ignore[arg-type]
    assert events(run, "choose")[0]["placement"] == min(costs, key=lambda k: costs[k])


def test_a_tie_goes_to_the_cheaper_weights(profile: Profile) -> None:
    """With everything a tie, the smaller partial model wins whatever it delivers."""
    run = ran(profile, objective="perplexity", tie_tolerance=9.0, use_evaluation=False)
    assert events(run, "choose")[0]["placement"].startswith("small@")


def test_loads_beside_steps_and_pipelined_loads_are_exposed_less(profile: Profile, usual: RunResults) -> None:
    def shares(summary: Summary) -> float:
        return (summary.exposed_load_s or 0.0) / (summary.load_s or 1.0)

    assert shares(summarise(usual)) == 1.0
    assert shares(summarise(ran(profile, {"loads": "overlapped"}))) < 1.0
    first = summarise(ran(profile, {"is_pipelined": True})).initial_load_s or 0.0
    assert first < (summarise(usual).initial_load_s or 0.0)


def test_less_host_memory_makes_loads_longer(profile: Profile) -> None:
    per_load = []
    for host_bytes in (100_000, 13_000, 0):
        summary = summarise(ran(profile, {"host_bytes": host_bytes}, use_load=False, use_switch=False))
        per_load.append((summary.load_s or 0.0) / summary.transitions)
    assert per_load[0] < per_load[1] <= per_load[2]


@pytest.mark.parametrize("model", ["small", "large"])
@pytest.mark.parametrize("budget", [20_000, 60_000])
def test_one_candidate_at_full_depth_is_the_early_exit_baseline(model: str, budget: int, profile: Profile) -> None:
    """Every table, but for the controller's own notes and the word it gives as the reason of its load."""
    sections: dict[str, Any] = {"workload": workload(150, 300.0), "memory": {"budget_bytes": budget}}
    helios = {
        "kind": "helios",
        "candidates": [model],
        "use_greedy_depth": False,
        "use_evaluation": False,
    }
    one = run_simulated(scenario(profile, controller=helios, **sections), profile)
    plain = {"kind": "early-exit", "model": model}
    other = run_simulated(scenario(profile, controller=plain, **sections), profile)
    assert one.requests.equals(other.requests)
    assert one.tokens.equals(other.tokens)
    assert one.steps.drop_columns(["reason"]).equals(other.steps.drop_columns(["reason"]))
    covered = run_simulated(
        scenario(profile, controller=helios | {"use_greedy_depth": True, "coverage": 1.0}, **sections), profile
    )
    assert covered.steps.equals(one.steps)
