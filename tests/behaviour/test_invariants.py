"""What must hold in every simulated run, whatever the scenario: requests, time, memory, seeds, and no oracle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliosim.assembly import build_server
from heliosim.drive import Log
from heliosim.formats.profile import Profile, load_profile
from heliosim.recorder import NullRecorder, TableRecorder
from heliosim.runs import run_simulated, save, sim_engine
from heliosim.scenario import Scenario
from heliosim.serving.server import ServerStatus
from heliosim.simulate import simulate_server
from heliosim.types import Arrival, Batch, Chunk, Directive, Load, Outcome, Request, Run, Served
from heliosim.workload import OpenLoop, build, build_arrivals, contents
from tests.profiles import scenario, workload, write_synthetic_profile

SMALLEST_BUDGET = 12_884
"""The large model with all its layers and one KV block, bytes."""
EXACT = {"vanilla": {}, "early-exit": {"threshold": 0.8}, "fixed": {"depth": 4}}

few = settings(
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic", max_rows=64, max_tokens=512)


@st.composite
def helios_controllers(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kind": "helios",
        "objective": draw(st.sampled_from(["throughput", "ttft", "perplexity"])),
        "candidates": draw(st.sampled_from([[], ["small"], ["large", "small"]])),
        "threshold": draw(st.sampled_from([0.3, 0.8, 0.95])),
        "probe_requests": draw(st.integers(1, 5)),
        "coverage": draw(st.sampled_from([0.3, 0.7, 1.0])),
        "window": draw(st.sampled_from(["sliding", "tumbling", "none"])),
        "window_tokens": draw(st.integers(1, 30)),
        "max_breaches": draw(st.integers(0, 15)),
        "reassess_interval": draw(st.integers(1, 30)),
        "probes_count": draw(st.booleans()),
        "load_step": draw(st.sampled_from(["auto", "full", "next-exit"])),
        "in_flight": draw(st.sampled_from(["boundary", "reprefill", "extend"])),
        "batching": draw(st.sampled_from(["full", "wait-for-deepest"])),
        "use_evaluation": draw(st.booleans()),
        "use_greedy_depth": draw(st.booleans()),
        "use_load": draw(st.booleans()),
        "use_switch": draw(st.booleans()),
        "use_reassess": draw(st.booleans()),
    }


@st.composite
def fixed_controllers(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(EXACT)))
    model = "small" if kind == "fixed" else draw(st.sampled_from(["small", "large"]))
    return {"kind": kind, "model": model, **EXACT[kind]}


@st.composite
def scenarios(draw: st.DrawFn, controllers: st.SearchStrategy[dict[str, Any]]) -> Mapping[str, Any]:
    """Sections for ``tests.profiles.scenario``. Half of the budgets hold few blocks beside the large model."""
    max_batch = draw(st.integers(1, 12))
    arrivals = draw(
        st.sampled_from(
            [
                {"kind": "poisson", "rate_per_s": 150.0},
                {"kind": "constant", "rate_per_s": 1e6},
                {"kind": "gamma", "rate_per_s": 300.0, "cv": 3.0},
                {"kind": "closed", "users": 5, "think_s": 0.003},
                {"kind": "closed", "users": 3},
            ]
        )
    )
    longest = draw(st.sampled_from([20, 60, 200]))
    load = workload(
        requests=draw(st.integers(1, 40)),
        prompt={"kind": "uniform", "low": 1, "high": longest},
        output={"kind": "uniform", "low": 1, "high": draw(st.sampled_from([1, 12, 40]))},
        max_tokens=40,
    )
    tight = st.integers(SMALLEST_BUDGET, SMALLEST_BUDGET + 3_000)
    return {
        "seed": draw(st.integers(0, 1000)),
        "workload": load | {"arrivals": arrivals},
        "memory": {"budget_bytes": draw(st.one_of(tight, st.integers(SMALLEST_BUDGET, 60_000)))},
        "batcher": {
            "max_batch": max_batch,
            "token_budget": draw(st.integers(max_batch, 80)),
            "watermark": draw(st.sampled_from([0.0, 0.01, 0.2])),
        },
        "controller": draw(controllers),
        "clock": draw(st.sampled_from(["cpu", "wall"])),
    }


class Kept(TableRecorder):
    """A recorder that also keeps the records of served requests as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Served] = []

    def served(self, record: Served) -> None:
        super().served(record)
        self.kept.append(record)


class Logged:
    """The simulated engine of a scenario, with what it was asked and answered, and which text each request met."""

    def __init__(self, plan: Scenario, profile: Profile) -> None:
        self.engine = sim_engine(plan, profile)
        self.log: Log = []
        self.met: dict[int, tuple[Request, str]] = {}

    def accept(self, arrival: Arrival) -> None:
        self.engine.accept(arrival)
        request = arrival.request
        self.met[request.id] = (request, self.engine.behaviour.assign(request.id, arrival.content.task, 0))

    def perform(self, action: Run | Load) -> Outcome:
        outcome = self.engine.perform(action)
        self.log.append((action, outcome))
        return outcome

    def forget(self, request_id: int) -> None:
        self.engine.forget(request_id)


def run_logged(plan: Scenario, profile: Profile, arrivals: list[Arrival] | None = None) -> Logged:
    """Simulate with the given arrivals, or the scenario's own."""
    engine = Logged(plan, profile)
    source = OpenLoop(build_arrivals(plan.workload, plan.seed) if arrivals is None else arrivals)
    simulate_server(build_server(plan, profile, NullRecorder()), engine, source)
    return engine


# --- requests, time, memory -------------------------------------------------------------------------------------------


@few
@given(sections=scenarios(st.one_of(helios_controllers(), helios_controllers(), fixed_controllers())))
def test_requests_time_and_memory(profile: Profile, sections: Mapping[str, Any]) -> None:
    plan = scenario(profile, **sections)
    recorder = Kept()
    server = build_server(plan, profile, recorder)
    budget = plan.memory.budget_bytes

    def check_books(now: float) -> None:
        pool = server.pool
        pool.check()
        assert pool.weights_bytes + pool.kv_total_bytes <= budget
        assert len(server.batcher.in_kv()) <= plan.batcher.max_batch

    simulate_server(server, sim_engine(plan, profile), build(plan.workload, plan.seed), check_books)
    assert server.pool.used_blocks == server.pool.weights_bytes == server.pool.kv_used_bytes == 0
    tables = recorder.tables()
    check_requests(recorder.kept, {k: c.output_tokens or 0 for k, c in contents(plan.workload, plan.seed).items()})
    check_steps(tables.steps, plan)
    check_tokens(tables.tokens, recorder.kept)


def check_requests(kept: Sequence[Served], lengths: Mapping[int, int]) -> None:
    """Each request ends once, finished with its own length or refused with a reason."""
    assert sorted(s.id for s in kept) == sorted(lengths)
    for s in kept:
        if s.status == "finished":
            assert s.output_tokens == lengths[s.id]
            assert s.admitted_s is not None
            assert s.first_token_s is not None
            assert s.arrival_s <= s.admitted_s < s.first_token_s <= s.finish_s
        else:
            assert s.refusal
            assert s.output_tokens < lengths[s.id]
            assert s.finish_s >= s.arrival_s


def check_steps(steps: pa.Table, plan: Scenario) -> None:
    """Steps follow each other on the clock and never use more than there is."""
    start, seconds = (steps[c].to_numpy() for c in ("start_s", "seconds"))
    assert (seconds > 0).all()
    assert (start[1:] >= (start + seconds)[:-1]).all()
    held = steps["weights_bytes"].to_numpy() + steps["kv_used_bytes"].to_numpy()
    assert held.max() <= plan.memory.budget_bytes
    assert steps["rows"].to_numpy().max() <= plan.batcher.max_batch
    computed = steps["decode_rows"].to_numpy() + steps["prefill_tokens"].to_numpy()
    assert computed.max() <= plan.batcher.token_budget
    assert (steps["layers_run"].to_numpy() <= steps["depth"].to_numpy()).all()


def check_tokens(tokens: pa.Table, kept: Sequence[Served]) -> None:
    """The tokens of a request come one behind the other, none before it was admitted, none after it ended."""
    by_id = {s.id: s for s in kept}
    seen: dict[int, list[float]] = {}
    for request, position, time in zip(
        *(tokens[c].to_pylist() for c in ("request_id", "position", "time_s")), strict=True
    ):
        times = seen.setdefault(request, [])
        assert position == len(times)
        times.append(time)
    for request, times in seen.items():
        s = by_id[request]
        assert times == sorted(times)
        assert s.admitted_s is not None
        assert s.admitted_s < times[0] == s.first_token_s
        assert len(times) == s.output_tokens
        assert times[-1] <= s.finish_s
    assert sum(s.output_tokens for s in kept) == tokens.num_rows


def test_the_tight_budgets_do_preempt_and_refuse(profile: Profile) -> None:
    """The random scenarios above would prove little if nothing ever ran short."""
    load = workload(requests=60, rate_per_s=1e6, prompt=30, output=30)
    short = run_simulated(scenario(profile, workload=load, memory={"budget_bytes": SMALLEST_BUDGET + 2_500}), profile)
    assert sum(short.requests["preemptions"].to_pylist()) > 0
    none = run_simulated(scenario(profile, workload=load, memory={"budget_bytes": SMALLEST_BUDGET + 400}), profile)
    assert none.counts["refused"] > 0


def test_a_kept_request_that_outgrows_the_deeper_placement_is_refused(profile: Profile) -> None:
    """It gives up its own KV and nothing else runs: the server must not go idle on it."""
    load = workload(requests=1, prompt=110, output=40, max_tokens=40)
    load = load | {"tasks": [t for t in load["tasks"] if t["task"] == "qa"], "order": None}
    controller = {
        "kind": "helios",
        "candidates": ["large"],
        "in_flight": "extend",
        "coverage": 0.1,
        "window_tokens": 5,
        "max_breaches": 2,
        "use_evaluation": False,
    }
    plan = scenario(profile, workload=load, controller=controller, memory={"budget_bytes": SMALLEST_BUDGET + 7 * 384})
    results = run_simulated(plan, profile)
    assert results.steps["depth"].to_pylist()[-1] == 12
    assert results.requests["status"].to_pylist() == ["refused"]
    assert results.requests["preemptions"].to_pylist() == [1]


def test_an_evaluation_goes_on_when_those_it_waited_for_are_refused(profile: Profile) -> None:
    """Interrupted requests that only fit beside the partial model are refused; those behind them must be served."""
    prompt, output = {"kind": "uniform", "low": 1, "high": 100}, {"kind": "uniform", "low": 1, "high": 40}
    load = workload(requests=13, rate_per_s=1e6, prompt=prompt, output=output, max_tokens=40)
    controller = {
        "kind": "helios",
        "candidates": ["large"],
        "in_flight": "reprefill",
        "threshold": 0.95,
        "coverage": 0.3,
        "max_breaches": 2,
        "window_tokens": 5,
        "use_switch": False,
        "probe_requests": 2,
        "reassess_interval": 3,
    }
    sections = {"memory": {"budget_bytes": 14_683}, "batcher": {"max_batch": 5, "token_budget": 64}}
    plan = scenario(profile, seed=1148, workload=load, controller=controller, **sections)
    counts = run_simulated(plan, profile).counts
    assert counts["finished"] + counts["refused"] == 13
    assert counts["refused"] > 0


@few
@given(controller=helios_controllers(), seed=st.integers(0, 50))
def test_an_evaluation_counts_only_its_own_candidate(profile: Profile, controller: dict[str, Any], seed: int) -> None:
    """Requests of the placement before may still be draining when a candidate's turn comes."""
    load = workload(requests=60, rate_per_s=400.0)
    results = run_simulated(scenario(profile, seed=seed, workload=load, controller=controller), profile)
    for kind, detail in zip(results.events["kind"].to_pylist(), results.events["detail"].to_pylist(), strict=True):
        if kind == "evaluated":
            seen = json.loads(detail)
            assert {int(e) for e in seen["exits"]} <= set(profile.spec(seen["model"]).exits)


# --- seeds ------------------------------------------------------------------------------------------------------------


@settings(few, max_examples=6)
@given(sections=scenarios(helios_controllers()))
def test_same_seed_same_bytes_and_another_seed_differs(
    profile: Profile, tmp_path_factory: pytest.TempPathFactory, sections: Mapping[str, Any]
) -> None:
    plan = scenario(profile, **sections)
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", plan.seed), ("b", plan.seed), ("other", plan.seed + 1)):
        again = plan.model_copy(update={"seed": seed})
        save(run_simulated(again, load_profile(profile.folder)), folder / name)
    names = sorted(p.name for p in (folder / "a").iterdir())
    assert {"run.json", "scenario.yaml", "requests.parquet", "steps.parquet"} < set(names)
    for name in names:
        if name != "host.json":
            assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes(), name
    assert (folder / "a" / "requests.parquet").read_bytes() != (folder / "other" / "requests.parquet").read_bytes()


@settings(few, max_examples=8)
@given(one=helios_controllers(), other=fixed_controllers(), seed=st.integers(0, 100))
def test_two_controllers_meet_the_same_requests(
    profile: Profile, one: dict[str, Any], other: dict[str, Any], seed: int
) -> None:
    a = run_logged(scenario(profile, seed=seed, controller=one), profile)
    b = run_logged(scenario(profile, seed=seed, controller=other), profile)
    assert a.met == b.met
    assert len(a.met) == 40


# --- no oracle --------------------------------------------------------------------------------------------------------


def _names(kind: type) -> set[str]:
    names = set(getattr(kind, "_fields", ()) or getattr(kind, "__slots__", ()))
    assert names, kind
    return names


def test_what_a_policy_sees_holds_no_future() -> None:
    arrives_with = {"id", "arrival_s", "prompt_tokens", "max_tokens", "priority", "prediction"}
    assert {f.name for f in fields(Request)} == arrives_with
    assert {n for n in vars(ServerStatus) if not n.startswith("_")} == {
        "now",
        "placement",
        "waiting",
        "running",
        "interrupted",
        "weights_bytes",
        "kv_used_bytes",
        "kv_total_bytes",
    }
    hidden = {"content", "task", "text", "prompt_ids", "sequence", "exit_layers", "true_tokens"}
    for kind in (Request, ServerStatus, Served, Directive, Batch, Chunk, Run):
        assert not hidden & _names(kind), kind


@few
@given(sections=scenarios(helios_controllers()), first=st.integers(0, 20), extra=st.integers(1, 20))
def test_lengths_yet_unknown_change_no_action(
    profile: Profile, sections: Mapping[str, Any], first: int, extra: int
) -> None:
    """Two runs whose requests from ``first`` on have other lengths act alike until an outcome has differed."""
    load = {**sections["workload"], "arrivals": {"kind": "poisson", "rate_per_s": 300.0}}
    plan = scenario(profile, **{**sections, "workload": load})
    arrivals = build_arrivals(plan.workload, plan.seed)
    changed = [
        replace(a, content=replace(a.content, output_tokens=1 + ((a.content.output_tokens or 0) + extra) % 40))
        if a.request.id >= first
        else a
        for a in arrivals
    ]
    assert [a.request for a in changed] == [a.request for a in arrivals]
    one, other = run_logged(plan, profile, arrivals).log, run_logged(plan, profile, changed).log
    for (action, outcome), (other_action, other_outcome) in zip(one, other, strict=False):
        assert action == other_action
        if outcome != other_outcome:
            break
    else:
        assert len(one) == len(other)
