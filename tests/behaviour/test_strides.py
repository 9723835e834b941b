"""Strides are only faster: forcing one step at a time gives the identical run, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from heliosim.engines.sim import SimEngine
from heliosim.formats.profile import Profile
from heliosim.recorder import TableRecorder
from heliosim.runs import ANY_STRIDE, run_simulated, sim_engine
from heliosim.scenario import Scenario
from heliosim.types import Arrival, Batch, Chunk, Content, ExitRule, Outcome, Placement, Request, Run, StepPower
from tests.behaviour.test_invariants import SMALLEST_BUDGET, few, fixed_controllers, helios_controllers, scenarios
from tests.profiles import scenario, workload, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


def assert_same(plan: Scenario, profile: Profile) -> int:
    """Run both ways, compare every table; returns the steps of the run."""
    whole, single = run_simulated(plan, profile), run_simulated(plan, profile, max_stride=1)
    for name in ("steps", "requests", "tokens", "events"):
        a, b = getattr(whole, name), getattr(single, name)
        if not a.equals(b):
            for column in a.column_names:
                assert a[column].to_pylist() == b[column].to_pylist(), f"{name}.{column}"
        assert a.equals(b), name
    return int(whole.steps.num_rows)


@few
@given(sections=scenarios(fixed_controllers()))
def test_fixed_placements(sections: Mapping[str, Any], profile: Profile) -> None:
    assert assert_same(scenario(profile, **sections), profile) > 0


@few
@given(sections=scenarios(helios_controllers()))
def test_helios(sections: Mapping[str, Any], profile: Profile) -> None:
    assert assert_same(scenario(profile, **sections), profile) > 0


NATURAL = {
    "requests": 40,
    "lengths": "natural",
    "arrivals": {"kind": "poisson", "rate_per_s": 200.0},
    "tasks": [{"task": "chat", "prompt_tokens": {"kind": "uniform", "low": 4, "high": 40}, "max_tokens": 30}],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"step_noise": 0},
        {"step_noise": 3, "controller": {"kind": "vanilla", "model": "large"}},
        {"workload": NATURAL},
        {"controller": {"kind": "helios", "max_breaches": 3, "window_tokens": 10, "window": "tumbling"}},
    ],
    ids=["noise", "noise, vanilla", "natural lengths", "breaches"],
)
def test_options(changes: dict[str, Any], profile: Profile) -> None:
    assert assert_same(scenario(profile, **changes), profile) > 0


@pytest.mark.parametrize("seed", range(40))
def test_refusals_in_a_closed_loop(seed: int, profile: Profile) -> None:
    """Who is refused asks again at once: earlier than the arrival a stride was told of."""
    load = workload(requests=40, prompt={"kind": "uniform", "low": 1, "high": 200}) | {
        "arrivals": {"kind": "closed", "users": 5, "think_s": 0.003}
    }
    plan = scenario(profile, seed=seed, workload=load, memory={"budget_bytes": SMALLEST_BUDGET + 1_500})
    assert assert_same(plan, profile) > 0
    assert "refused" in run_simulated(plan, profile).requests["status"].to_pylist()


def test_who_starts_in_a_step_left_to_the_server_is_a_probe_that_started(profile: Profile) -> None:
    """A request starts, and the one behind it is to be refused: a sprint leaves that step, with one probe begun."""
    short, long = {"kind": "uniform", "low": 1, "high": 20}, {"kind": "uniform", "low": 1, "high": 120}
    prompts = {"chat": short, "code": long, "qa": long}
    load = {
        "requests": 20,
        "lengths": "natural",
        "order": "mix",
        "arrivals": {"kind": "poisson", "rate_per_s": 2000.0},
        "tasks": [{"task": t, "prompt_tokens": p, "max_tokens": 1} for t, p in prompts.items()],
    }
    helios = {
        "kind": "helios",
        "threshold": 0.95,
        "probe_requests": 2,
        "reassess_interval": 5,
        "in_flight": "reprefill",
    }
    small = {"max_batch": 4, "token_budget": 4, "watermark": 0.2}
    plan = scenario(
        profile, seed=702, workload=load, controller=helios, batcher=small, memory={"budget_bytes": SMALLEST_BUDGET}
    )
    assert assert_same(plan, profile) > 0
    assert "refused" in run_simulated(plan, profile).requests["status"].to_pylist()


def test_energy_is_that_of_the_steps(profile: Profile) -> None:
    plan = scenario(profile)
    runs = [
        run_simulated(plan, profile, engine=replace_watts(sim_engine(plan, profile), 50.0), max_stride=n)
        for n in (1, ANY_STRIDE)
    ]
    assert runs[0].steps.equals(runs[1].steps)
    assert runs[0].steps["energy_j"].to_pylist()[1] > 0


@pytest.mark.parametrize("controller", [{"kind": "helios"}, {"kind": "early-exit", "model": "large"}], ids=str)
def test_energy_by_kind_of_work_is_that_of_the_steps(controller: dict[str, Any], profile: Profile) -> None:
    """Reading, decoding and loading draw different powers, of two models; to the last bit, sprints or not."""
    powers = {"small": StepPower(40.0, 97.3, 61.0), "large": StepPower(81.7, 153.1, 61.0)}
    plan = scenario(profile, controller=controller)
    runs = [
        run_simulated(
            plan, profile, engine=replace_watts(sim_engine(plan, profile, strides=n > 1), powers), max_stride=n
        )
        for n in (1, 7, ANY_STRIDE)
    ]
    for run in runs[1:]:
        assert run.steps.equals(runs[0].steps)
        assert run.events.equals(runs[0].events)
    for row in runs[0].steps.to_pylist():
        power, tokens = powers[row["model"]], row["decode_rows"] + row["prefill_tokens"]
        drawn = power.load_w
        if row["kind"] == "run":
            drawn = (power.decode_w * row["decode_rows"] + power.prefill_w * row["prefill_tokens"]) / tokens
        assert row["energy_j"] == pytest.approx(drawn * row["seconds"])


def replace_watts(engine: SimEngine, watts: float | Mapping[str, StepPower]) -> SimEngine:
    engine.watts = watts
    return engine


@pytest.mark.parametrize("exits", [ExitRule("none"), ExitRule("greedy"), ExitRule("threshold", 0.8)])
@pytest.mark.parametrize("noise", [None, 0])
def test_a_cut_stride_is_as_if_it_had_never_gone_on(exits: ExitRule, noise: int | None, profile: Profile) -> None:
    """Cut anywhere, the stride holds its first steps alone, and the engine goes on as one that stopped there itself."""
    plan = scenario(profile, step_noise=noise)

    def start() -> tuple[SimEngine, Run]:
        engine = sim_engine(plan, profile, strides=True)
        for k, task in enumerate(("chat", "code", "qa")):
            engine.accept(Arrival(Request(k, 0.0, 20, 30), Content(task, None, 4 + 5 * k)))
        chunks = [(Chunk(0, 0, 20, True), Chunk(1, 0, 10, False)), (Chunk(1, 10, 10, True), Chunk(2, 0, 8, False))]
        chunks.append((Chunk(2, 8, 12, True),))
        batch = Batch.of((), (), 0, chunks[0])
        program = tuple(chunks[1:])
        return engine, Run(
            Placement("small", 6), exits, batch, max_steps=100, program=program, max_ends=None, in_stride=True
        )

    def told(outcome: Outcome) -> list[Any]:
        assert outcome.stride is not None
        assert outcome.stride.tokens is not None
        seen = outcome.stride.tokens
        columns = (seen.requests, seen.exit_layers, seen.confidences, seen.logprobs)
        return [outcome.seconds, outcome.stride.steps, outcome.stride.ended, *(c.tolist() for c in columns)]

    engine, run = start()
    whole = engine.perform(run)
    assert whole.stride is not None
    steps = len(whole.stride)
    assert steps > 8
    for cut in range(1, steps + 1):
        one, run = start()
        one.perform(run)
        other, _ = start()
        short = other.perform(replace(run, max_steps=cut))
        assert told(one.cut(cut)) == told(short)
        alive = [k for k in range(3) if k not in {r for _, r, _ in short.stride.ended}]  # type: ignore[union-attr]
        done = short.stride.steps  # type: ignore[union-attr]
        if cut < len(run.program) + 1 or not alive:
            continue
        offsets = tuple(20 + sum(1 for s in range(cut) if s > begun) for begun in range(3) if begun in alive)
        go_on = Run(
            run.placement, exits, Batch.of(tuple(alive), offsets, 0), max_steps=50, max_ends=None, in_stride=True
        )
        assert told(one.perform(go_on)) == told(other.perform(go_on))
        assert len(done) == cut


def test_a_stride_covers_many_steps(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would compare one-step runs with one-step runs."""
    lengths: list[int] = []
    kept = TableRecorder.stride
    monkeypatch.setattr(TableRecorder, "stride", lambda self, r: (lengths.append(len(r.stride)), kept(self, r))[1])
    plan = scenario(profile, controller={"kind": "vanilla", "model": "large"})
    steps = run_simulated(plan, profile).steps.num_rows
    assert max(lengths) > 5
    assert sum(lengths) > steps / 2
