"""Strides and sprints are only faster: many scenarios drawn wide, each run step by step, in short and in any strides.

Wider than what ``test_strides.py`` draws: tight memory, tiny budgets, bursts, refusals, every switch of HELIOS, fleets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from heliosim.errors import HelioSimError
from heliosim.formats.profile import MemoryFacts, Profile
from heliosim.formats.results import RunResults
from heliosim.registry import EXIT_BATCHING, SKIPPED_KV
from heliosim.runs import ANY_STRIDE, run_simulated, save
from heliosim.scenario import Scenario
from tests.profiles import scenario, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Costs with curves and a term for KV really held, so that no two decode steps take the same time."""
    folder = tmp_path_factory.mktemp("profile") / "curved"
    return write_synthetic_profile(folder, max_rows=20, max_tokens=300, curves=True)


@pytest.fixture(scope="module")
def needy(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Models that need memory beside weights and KV: of each request, of each token of a step, and for good."""
    memory = MemoryFacts(
        activation_bytes_per_token=3, workspace_bytes=200, graph_bytes=50, request_bytes=300, max_rows=7
    )
    folder = tmp_path_factory.mktemp("profile") / "needy"
    return write_synthetic_profile(folder, max_rows=64, max_tokens=512, memory=memory)


def drawn_methods(seed: int) -> dict[str, Any]:
    """Exit methods of every other seed, from a stream of their own: the rest of a scenario is as it was."""
    r = Random(f"methods {seed}")
    if seed % 2 == 0 or seed >= 1000:
        return {}
    batching = r.choice(["full", "wait-for-deepest", "eager", "rebatch", "rebatch"])
    method = r.choice(["none", "copy", "propagate", "propagate", "recompute"])
    quorum, break_even = r.choice([1, 1, 2, 5]), r.choice([None, 0.0, 4.0, 9.0])
    return {"batching": batching, "skipped_kv": method, **numbers_of(batching, quorum, break_even)}


def numbers_of(batching: str, quorum: int, break_even: float | None) -> dict[str, Any]:
    """What of these an exit batching has a use for."""
    return {"eager": {"quorum": quorum}, "rebatch": {"break_even": break_even}}.get(batching, {})


def drawn_controller(r: Random) -> dict[str, Any]:
    kind = r.choice(["helios", "helios", "vanilla", "early-exit", "fixed"])
    if kind == "vanilla":
        return {"kind": kind, "model": r.choice(["small", "large"])}
    if kind == "early-exit":
        batching = r.choice(["full", "wait-for-deepest"])
        model = r.choice(["small", "large"])
        return {"kind": kind, "model": model, "threshold": r.choice([0.3, 0.6, 0.8, 0.95]), "batching": batching}
    if kind == "fixed":
        return {"kind": kind, "model": "small", "depth": r.choice([2, 4, 6])}
    switches = ("use_evaluation", "use_greedy_depth", "use_load", "use_switch", "use_reassess")
    return {
        "kind": kind,
        "threshold": r.choice([0.3, 0.6, 0.8, 0.95]),
        "probe_requests": r.choice([1, 2, 5]),
        "coverage": r.choice([0.3, 0.7, 0.9]),
        "window": r.choice(["sliding", "tumbling", "none"]),
        "window_tokens": r.choice([1, 10, 40, 100]),
        "max_breaches": r.choice([0, 3, 10, 50]),
        "reassess_interval": r.choice([1, 5, 20, 150]),
        "probes_count": r.random() < 0.7,
        "load_step": r.choice(["auto", "full", "next-exit"]),
        "in_flight": r.choice(["boundary", "reprefill", "extend"]),
        "batching": r.choice(["full", "wait-for-deepest"]),
        **{name: r.random() < 0.8 for name in switches},
    }


def drawn_workload(r: Random) -> dict[str, Any]:
    longest = r.choice([1, 5, 20, 40, 100])
    is_natural = r.random() < 0.2
    tasks: list[dict[str, Any]] = []
    for task in ("chat", "code", "qa"):
        prompt = {"kind": "uniform", "low": 1, "high": r.choice([5, 20, 60, 120])}
        output: dict[str, Any] = {"output_tokens": {"kind": "uniform", "low": 1, "high": longest}}
        tasks.append({"task": task, "prompt_tokens": prompt, **({"max_tokens": longest} if is_natural else output)})
    arrivals: list[dict[str, Any]] = [
        {"kind": "poisson", "rate_per_s": r.choice([2.0, 20.0, 150.0, 2000.0])},
        {"kind": "gamma", "rate_per_s": 100.0, "cv": 3.0},
        {"kind": "constant", "rate_per_s": 50.0},
        {"kind": "closed", "users": r.choice([1, 3, 20]), "think_s": r.choice([0.0, 0.01])},
    ]
    lengths = "natural" if is_natural else "forced"
    return {
        "requests": r.choice([3, 20, 60]), "arrivals": r.choice(arrivals), "tasks": tasks, "order": "mix",
        "lengths": lengths,
    }  # fmt: skip


def drawn_order(r: Random) -> dict[str, Any]:
    kind = r.choice(["sjf", "srpt", "srpt", "priority", "feedback"])
    keeps = {"keep_kv": r.random() < 0.5}
    ageing_s = r.choice([None, 0.001, 0.02, 1.0])
    if kind == "srpt":
        return {
            "kind": kind,
            "preempt": r.choice(["never", "limited", "always"]),
            "c": r.choice([0.0, 0.5, 0.8, 1.0]),
            **keeps,
        }
    if kind == "priority":
        return {"kind": kind, "ageing_s": ageing_s, "preempt": r.choice(["never", "always"]), **keeps}
    if kind == "feedback":
        speculative = r.random() < 0.5
        return {
            "kind": kind,
            "ageing_s": ageing_s,
            "quantum_tokens": r.choice([1, 4, 16]),
            "speculative": speculative,
            **keeps,
        }
    return {"kind": kind}


def drawn_predictor(r: Random, is_natural: bool) -> dict[str, Any]:
    refined = {"refine_every": r.choice([1, 3, 10]), "refine_shrink": 0.7}
    kinds: list[dict[str, Any]] = [
        {"kind": "none"},
        {"kind": "length", "sigma": r.choice([0.0, 0.5, 1.5])},
        {"kind": "length", "sigma": 1.0, "bias": 0.7, **refined},
        {"kind": "rank", "tau": r.choice([-1.0, 0.0, 0.5, 1.0])},
        {"kind": "bucket", "edges": [2, 8, 32, 128], "accuracy": 0.6},
    ]
    return kinds[0] if is_natural else r.choice(kinds)


def drawn_ordered(seed: int, profile: Profile) -> Scenario:
    """As ``drawn``, in other orders: predictions of every kind, classes, many starts and interruptions."""
    r = Random(seed)
    plan = drawn(seed, profile)
    load = plan.workload.model_dump(mode="json", exclude_none=True)
    load["predictor"] = drawn_predictor(r, load["lengths"] == "natural")
    load["priorities"] = {"shares": r.choice([[1.0], [0.2, 0.8], [0.3, 0.3, 0.4]])}
    batcher = plan.batcher.model_dump() | {"order": drawn_order(r)}
    sections = plan.model_dump(mode="json", exclude_unset=True) | {"workload": load, "batcher": batcher}
    return Scenario.model_validate(sections)


def drawn(seed: int, profile: Profile, **memory: Any) -> Scenario:
    """``memory``: fields of that section beside the budget."""
    r = Random(seed)
    rows = r.choice([1, 2, 4, 8, 16])
    controller = drawn_controller(r)
    if controller["kind"] in ("helios", "early-exit"):
        controller |= drawn_methods(seed)
    sections: dict[str, Any] = {
        "seed": seed,
        "controller": controller,
        "workload": drawn_workload(r),
        "memory": {"budget_bytes": r.choice([12884, 13500, 14036, 20000, 30000, 100000, 300000]), **memory},
        "batcher": {
            "max_batch": rows,
            "token_budget": max(rows, r.choice([rows, rows + 1, rows * 2, 64, 256])),
            "watermark": r.choice([0.0, 0.01, 0.2]),
        },
    }
    if r.random() < 0.2:
        sections["step_noise"] = 0
    if r.random() < 0.25:
        routers = ["round-robin", "least-outstanding", "least-kv", "power-of-two"]
        groups: list[dict[str, Any]] = [{"name": "a", "count": r.choice([1, 2, 3])}]
        if r.random() < 0.4:
            groups.append({"name": "b", "controller": {"kind": "vanilla", "model": "small"}, "clock": "wall"})
        failure = {"replica": "a-0", "at_s": r.choice([0.0, 0.01, 0.1]), "restart_after_s": r.choice([None, 0.05])}
        failures = [failure] if r.random() < 0.3 else []
        sections["fleet"] = {"router": r.choice(routers), "replicas": groups, "failures": failures}
    return scenario(profile, **sections)


def drawn_pressed(seed: int, profile: Profile, **memory: Any) -> Scenario:
    """HELIOS that evaluates again and again in short memory: drains, refusals and evictions among its probes."""
    r = Random(seed)
    helios = {
        "kind": "helios",
        "threshold": r.choice([0.3, 0.6, 0.8, 0.95]),
        "probe_requests": r.choice([2, 3, 5]),
        "coverage": r.choice([0.3, 0.7, 0.9]),
        "max_breaches": r.choice([3, 10, 50]),
        "window_tokens": r.choice([10, 40]),
        "reassess_interval": r.choice([5, 10, 20]),
        "in_flight": r.choice(["boundary", "boundary", "extend"]),
        "use_greedy_depth": r.random() < 0.5,
        "batching": r.choice(["full", "wait-for-deepest"]),
    }
    helios |= drawn_methods(seed)
    arrivals = {"kind": "poisson", "rate_per_s": r.choice([20.0, 150.0, 2000.0])}
    tasks = [
        {
            "task": task,
            "prompt_tokens": {"kind": "uniform", "low": 1, "high": r.choice([20, 60, 120])},
            "output_tokens": {"kind": "uniform", "low": 1, "high": r.choice([5, 20, 60])},
        }
        for task in ("chat", "code", "qa")
    ]
    load = {"requests": 60, "arrivals": arrivals, "order": "mix", "lengths": "forced", "tasks": tasks}
    budget = r.choice([13500, 14036, 16000, 18000, 20000, 24000, 300000])
    rows = {"max_batch": 8, "token_budget": r.choice([8, 64]), "watermark": r.choice([0.0, 0.01])}
    return scenario(
        profile, seed=seed, controller=helios, workload=load, memory={"budget_bytes": budget} | memory, batcher=rows
    )


def run(plan: Scenario, profile: Profile, max_stride: int) -> RunResults | str:
    try:
        return run_simulated(plan, profile, max_stride=max_stride)
    except HelioSimError as error:
        return str(error)


@pytest.mark.parametrize("seeds", [range(first, first + 12) for first in range(0, 96, 12)] + [[3147]], ids=str)
def test_any_stride_gives_the_same_tables(seeds: Sequence[int], profile: Profile) -> None:
    """Or the same error, to the word."""
    ran = 0
    for seed in seeds:
        try:
            plan = drawn(seed, profile)
        except HelioSimError:
            continue  # a budget that does not hold its batch
        single = run(plan, profile, 1)
        for stride in (7, ANY_STRIDE):
            other = run(plan, profile, stride)
            if isinstance(single, str) or isinstance(other, str):
                assert single == other, f"seed {seed}, strides of {stride}"
                continue
            for name in ("steps", "requests", "tokens", "events"):
                a, b = getattr(other, name), getattr(single, name)
                assert a.equals(b), f"seed {seed}, strides of {stride}: {name} differ"
            ran += 1
    assert ran >= len(seeds)


@pytest.mark.parametrize("seeds", [range(first, first + 24) for first in range(0, 72, 24)], ids=str)
def test_any_stride_in_any_order(seeds: Sequence[int], profile: Profile) -> None:
    ran = interrupted = 0
    for seed in seeds:
        try:
            plan = drawn_ordered(seed, profile)
        except HelioSimError:
            continue
        single = run(plan, profile, 1)
        for stride in (7, ANY_STRIDE):
            other = run(plan, profile, stride)
            if isinstance(single, str) or isinstance(other, str):
                assert single == other, f"seed {seed}, strides of {stride}"
                continue
            for name in ("steps", "requests", "tokens", "events"):
                a, b = getattr(other, name), getattr(single, name)
                assert a.equals(b), f"seed {seed}, strides of {stride}: {name} differ"
            ran += 1
            interrupted += sum(single.requests["preemptions"].to_pylist())
    assert ran >= len(seeds)
    assert interrupted


@pytest.mark.parametrize("seeds", [(184, 316, 1971), range(12), range(12, 24)], ids=str)
def test_helios_under_pressure(seeds: Sequence[int], profile: Profile) -> None:
    """The first three once showed probes beyond their number, drains under an older rule, and drains without end."""
    for seed in seeds:
        plan = drawn_pressed(seed, profile)
        single, other = run(plan, profile, 1), run(plan, profile, ANY_STRIDE)
        if isinstance(single, str) or isinstance(other, str):
            assert single == other, f"seed {seed}"
            continue
        for name in ("steps", "requests", "tokens", "events"):
            assert getattr(other, name).equals(getattr(single, name)), f"seed {seed}: {name} differ"


@pytest.mark.parametrize("seeds", [range(first, first + 12) for first in range(0, 48, 12)], ids=str)
def test_costs_with_curves(seeds: Sequence[int], curved: Profile) -> None:
    ran = 0
    for seed in seeds:
        try:
            plan = drawn(seed, curved)
        except HelioSimError:
            continue
        single = run(plan, curved, 1)
        for stride in (7, ANY_STRIDE):
            other = run(plan, curved, stride)
            if isinstance(single, str) or isinstance(other, str):
                assert single == other, f"seed {seed}, strides of {stride}"
                continue
            for name in ("steps", "requests", "tokens", "events"):
                assert getattr(other, name).equals(getattr(single, name)), f"seed {seed}, {stride}: {name} differ"
            ran += 1
    assert ran >= len(seeds)


@pytest.mark.parametrize("seeds", [range(first, first + 16) for first in range(0, 64, 16)], ids=str)
def test_memory_beside_weights_and_kv(seeds: Sequence[int], needy: Profile) -> None:
    """Any order, loads in the background, fleets; what a request holds beside its KV comes and goes with it."""
    ran = preempted = 0
    for seed in seeds:
        draws: list[tuple[Callable[..., Scenario], dict[str, Any]]] = [
            (drawn, {}), (drawn_ordered, {}), (drawn_pressed, {"loads": "overlapped"}),
        ]  # fmt: skip
        for draw, memory in draws:
            try:
                plan = draw(seed, needy, **memory)
            except HelioSimError:
                continue
            single = run(plan, needy, 1)
            for stride in (7, ANY_STRIDE):
                other = run(plan, needy, stride)
                if isinstance(single, str) or isinstance(other, str):
                    assert single == other, f"seed {seed}, strides of {stride}"
                    continue
                for name in ("steps", "requests", "tokens", "events"):
                    assert getattr(other, name).equals(getattr(single, name)), f"seed {seed}, {stride}: {name} differ"
                assert max(single.steps["rows"].to_pylist(), default=0) <= 7
                ran += 1
                preempted += sum(single.requests["preemptions"].to_pylist())
    assert ran >= 2 * len(seeds)
    assert preempted


@pytest.mark.parametrize("seed", [3, 21])
def test_run_folders_have_the_same_bytes(seed: int, profile: Profile, tmp_path: Path) -> None:
    """All files but the one that speaks of the machine."""
    plan = drawn(seed, profile)
    for name, stride in (("single", 1), ("any", ANY_STRIDE)):
        save(run_simulated(plan, profile, max_stride=stride), tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "single").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "any").iterdir())
    same = [f for f in files if (tmp_path / "single" / f).read_bytes() == (tmp_path / "any" / f).read_bytes()]
    assert [f for f in files if f not in same] in ([], ["host.json"])


@pytest.mark.parametrize("batching", sorted(EXIT_BATCHING.builtin))
@pytest.mark.parametrize("method", sorted(SKIPPED_KV.builtin))
def test_every_exit_method(batching: str, method: str, profile: Profile) -> None:
    """All pairs, by strides and by single steps; rows part ways and tokens wait in them."""
    for seed, (threshold, quorum, break_even) in enumerate([(0.6, 1, 0.0), (0.8, 2, 7.0)]):
        controller = {
            "kind": "early-exit", "model": "large", "threshold": threshold, "batching": batching, "skipped_kv": method,
            **numbers_of(batching, quorum, break_even),
        }  # fmt: skip
        plan = scenario(profile, seed=seed, controller=controller, memory={"budget_bytes": 60_000})
        single = run_simulated(plan, profile, max_stride=1)
        for stride in (5, ANY_STRIDE):
            other = run_simulated(plan, profile, max_stride=stride)
            for name in ("steps", "requests", "tokens", "events"):
                assert getattr(other, name).equals(getattr(single, name)), f"{name} differ"
