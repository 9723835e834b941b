"""SLO, memory and aims that change during a run: HELIOS shortlists anew, and nothing else of a run's laws gives way."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from heliosim.errors import HelioSimError, InputError
from heliosim.evaluation_noise import evaluation_noise
from heliosim.formats.profile import Profile, load_profile, write_profile
from heliosim.formats.results import RunResults
from heliosim.runs import ANY_STRIDE, run_simulated
from heliosim.scenario import Scenario
from tests.behaviour.test_strides_random import drawn, drawn_ordered, drawn_pressed, run
from tests.profiles import scenario, workload, write_synthetic_profile

BUDGET, SMALL_BUDGET = 60_000, 9_000  # the large model takes 12,500 B, the small one 6,500 B


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


@pytest.fixture(scope="module")
def slow_link(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Loads that last for many steps."""
    folder = tmp_path_factory.mktemp("slow") / "synthetic"
    write_synthetic_profile(folder, max_rows=64, max_tokens=512)
    models = dict(profile.facts.models)
    for name, facts in models.items():
        load = {
            clock: fit.model_copy(update={"seconds_per": fit.seconds_per | {"weights_byte": 4e-6}})
            for clock, fit in facts.load.items()
        }
        models[name] = facts.model_copy(update={"load": load})
    write_profile(folder, profile.facts.model_copy(update={"models": models}))
    return load_profile(folder)


def changing(profile: Profile, *changes: dict[str, Any], **sections: Any) -> Scenario:
    helios = {"kind": "helios", "probe_requests": 3, "reassess_interval": 1000}
    usual = {"workload": workload(100, 100.0), "memory": {"budget_bytes": BUDGET}, "controller": helios}
    return scenario(profile, changes=changes, **(usual | sections))


def events(results: RunResults, kind: str) -> list[dict[str, Any]]:
    rows = results.events.to_pylist()
    return [json.loads(e["detail"]) | {"time_s": e["time_s"]} for e in rows if e["kind"] == kind]


def test_less_memory_leaves_out_the_model_that_does_not_fit(profile: Profile) -> None:
    results = run_simulated(changing(profile, {"at_s": 0.5, "memory": {"budget_bytes": SMALL_BUDGET}}), profile)
    (found,) = events(results, "reshortlisted")
    assert sorted(found["before"]) == ["large", "small"]
    assert found["candidates"] == ["small"]
    assert "do not fit 9,000 B" in found["refused"]["large"]
    assert found["because"] == {"at_s": 0.5, "memory": {"budget_bytes": SMALL_BUDGET}}
    assert 0.5 <= found["time_s"] < 0.6
    evaluated = [e["model"] for e in events(results, "evaluated") if e["time_s"] > 0.5]
    assert evaluated == ["small"]
    steps = results.steps.to_pylist()
    loaded_s = min(s["start_s"] for s in steps if s["kind"] == "load" and s["start_s"] >= found["time_s"])
    assert {s["model"] for s in steps if s["start_s"] >= loaded_s} == {"small"}  # until then the batch drains
    assert {s["model"] for s in steps if s["start_s"] < 0.5} == {"small", "large"}
    held = [s["weights_bytes"] + s["kv_total_bytes"] for s in steps if s["start_s"] >= found["time_s"]]
    assert max(held) <= SMALL_BUDGET


def test_a_placement_that_no_longer_fits_is_replaced_at_once(profile: Profile) -> None:
    """The full large model is gone with the change: everybody gives up KV, and the next thing done is a load."""
    evaluating = {"kind": "helios", "probe_requests": 90, "candidates": ["large", "small"]}
    change = {"at_s": 0.1, "memory": {"budget_bytes": SMALL_BUDGET}}
    results = run_simulated(changing(profile, change, controller=evaluating, workload=workload(100, 300.0)), profile)
    (found,) = events(results, "changed")
    steps = results.steps.to_pylist()
    before = [s for s in steps if s["start_s"] < found["time_s"]]
    assert (before[-1]["model"], before[-1]["depth"]) == ("large", 12)
    assert found["preempted"] == before[-1]["running"] > 0
    first = next(s for s in steps if s["start_s"] >= found["time_s"])
    assert (first["kind"], first["model"]) == ("load", "small")
    assert set(results.requests["status"].to_pylist()) == {"finished"}


def test_more_memory_lets_a_model_in(profile: Profile) -> None:
    plan = changing(
        profile,
        {"at_s": 0.5, "memory": {"budget_bytes": BUDGET}},
        memory={"budget_bytes": SMALL_BUDGET},
    )
    results = run_simulated(plan, profile)
    (first,) = events(results, "shortlist")
    (found,) = events(results, "reshortlisted")
    assert first["candidates"] == ["small"]
    assert sorted(found["candidates"]) == ["large", "small"]
    assert {e["model"] for e in events(results, "evaluated") if e["time_s"] > 0.5} == {"large", "small"}


def test_a_tighter_slo_and_another_objective_shortlist_anew(profile: Profile) -> None:
    """TPOT that the large model cannot meet; then the objective that prefers it, without that limit."""
    controller = {"kind": "helios", "probe_requests": 3, "reassess_interval": 1000, "shortlist_by_slo": True}
    plan = changing(
        profile,
        {"at_s": 0.4, "slo": {"tpot_ms": 1.1}},
        {"at_s": 0.7, "slo": {"ttft_ms": 1e6}, "objective": "perplexity"},
        controller=controller,
        slo={"tpot_ms": 1e6},
    )
    from heliosim.assembly import repositories

    rows = repositories(plan, profile)(0.8, "wait-for-deepest").candidates
    best = {name: min(row.tpot_s or 0.0 for row in one.offline.values()) for name, one in rows.items()}
    limit_ms = 1e3 * (best["small"] + best["large"]) / 2
    changes = [change.model_dump(mode="json") for change in plan.changes]
    changes[0]["slo"] = {"tpot_ms": limit_ms}
    plan = Scenario.model_validate(plan.model_dump(mode="json") | {"changes": changes})
    results = run_simulated(plan, profile)
    one, other = events(results, "reshortlisted")
    assert one["candidates"] == ["small"]
    assert "TPOT" in one["refused"]["large"]
    assert sorted(other["candidates"]) == ["large", "small"]
    assert other["objective"] == "perplexity"
    assert evaluation_noise(results, profile)[-1].time_s > 0.7


def test_running_requests_give_up_kv_youngest_first(profile: Profile) -> None:
    """A fixed placement keeps its weights; KV for two requests of 60 tokens remains."""
    fixed = {"kind": "vanilla", "model": "small"}
    load = workload(
        8, 10_000.0, prompt={"kind": "fixed", "tokens": 20}, output={"kind": "fixed", "tokens": 40}, max_tokens=40
    )
    budget = 6_500 + 8 * 16 * 2 * 6  # eight blocks
    plan = changing(profile, {"at_s": 0.02, "memory": {"budget_bytes": budget}}, controller=fixed, workload=load)
    results = run_simulated(plan, profile)
    (found,) = events(results, "changed")
    rows = sorted(results.requests.to_pylist(), key=lambda r: r["request_id"])
    preempted = [r["request_id"] for r in rows if r["preemptions"]]
    assert found["preempted"] >= 4
    assert 0 not in preempted
    assert set(range(8 - found["preempted"], 8)) <= set(preempted)
    assert {r["status"] for r in rows} == {"finished"}
    assert not any(s["kind"] == "load" for s in results.steps.to_pylist() if s["start_s"] > 0.02)
    resized = [s for s in results.steps.to_pylist() if s["reason"] == "memory"]
    assert [s["kind"] for s in resized] == ["fetch"]


def test_without_changes_nothing_changes(profile: Profile) -> None:
    """A change behind the last request is none; the file and the hash of a scenario without any are as before."""
    plain = changing(profile)
    late = changing(profile, {"at_s": 1000.0, "memory": {"budget_bytes": SMALL_BUDGET}})
    one, other = run_simulated(plain, profile), run_simulated(late, profile)
    for name in ("steps", "requests", "tokens", "events"):
        assert getattr(one, name).equals(getattr(other, name)), name
    assert "changes" not in plain.to_yaml()
    assert plain.hash != late.hash


@pytest.mark.parametrize(
    ("controller", "change", "said"),
    [
        ({"kind": "vanilla", "model": "large"}, {"memory": {"budget_bytes": SMALL_BUDGET}}, "large at 12 of 12 layers"),
        ({"kind": "vanilla", "model": "large"}, {"objective": "ttft"}, "'vanilla' has no objective"),
        ({"kind": "helios"}, {"memory": {"budget_bytes": 5_000}}, "no candidate fits"),
        ({"kind": "helios"}, {"objective": "energy"}, "no energy figures"),
        ({"kind": "helios"}, {"max_perplexity": 1.0001}, "no candidate fits"),
    ],
    ids=["too small", "no such parameter", "nobody left", "no figures", "too good"],
)
def test_what_cannot_be_served_is_refused_before_the_run(
    controller: dict[str, Any], change: dict[str, Any], said: str, profile: Profile
) -> None:
    with pytest.raises(InputError, match=r"changes at 0\.5 s") as error:
        run_simulated(changing(profile, {"at_s": 0.5} | change, controller=controller), profile)
    assert said in str(error.value)


def with_changes(plan: Scenario, seed: int) -> Scenario:
    """One to three changes at drawn times, of memory most often."""
    r = Random(f"changes {seed}")
    changes: list[dict[str, Any]] = []
    at_s = 0.0
    for _ in range(r.choice([1, 2, 3])):
        at_s += r.choice([1e-4, 0.01, 0.05, 0.1, 0.3]) * r.uniform(0.5, 1.5)
        change: dict[str, Any] = {"at_s": at_s}
        if r.random() < 0.8:
            change["memory"] = {"budget_bytes": r.choice([7_500, 7_500, 9_000, 13_000, 16_000, 60_000])}
        if len(change) == 1 or r.random() < 0.3:
            change["slo"] = {"ttft_ms": r.choice([5.0, 100.0])}
        changes.append(change)
    return Scenario.model_validate(plan.model_dump(mode="json") | {"changes": changes})


@pytest.mark.parametrize("memory", [{}, {"loads": "overlapped"}, {"is_pipelined": True}], ids=str)
@pytest.mark.parametrize("draw", [drawn, drawn_pressed, drawn_ordered], ids=["any", "pressed", "ordered"])
def test_strides_are_only_faster(draw: Any, memory: dict[str, Any], slow_link: Profile) -> None:
    """Tables by single steps and by strides of any length are the same, or the errors are; in fleets, too."""
    ran, preempted, kinds = 0, 0, set[str]()
    for seed in range(24):
        try:
            plan = draw(seed, slow_link) if draw is drawn_ordered else draw(seed, slow_link, **memory)
        except HelioSimError:
            continue
        plan = with_changes(plan, seed)
        single = run(plan, slow_link, 1)
        for stride in (7, ANY_STRIDE):
            other = run(plan, slow_link, stride)
            if isinstance(single, str) or isinstance(other, str):
                assert single == other, f"seed {seed}, strides of {stride}"
                continue
            for name in ("steps", "requests", "tokens", "events"):
                a, b = getattr(other, name), getattr(single, name)
                assert a.equals(b), f"seed {seed}, strides of {stride}: {name} differ"
            ran += 1
            kinds |= set(single.events["kind"].to_pylist())
            preempted += sum(e["preempted"] for e in events(single, "changed"))
    assert ran >= 12
    assert "changed" in kinds
    assert preempted
