"""What models need beside weights and KV, as a server books it: the largest batch is what a run really holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliosim.assembly import build_server
from heliosim.errors import MemoryBudgetError
from heliosim.formats.profile import MemoryFacts, Profile
from heliosim.memory_model import engine_needs, largest_batch, needs_of
from heliosim.recorder import NullRecorder
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.types import Load, Outcome, Request, Run
from tests.profiles import scenario, write_synthetic_profile

BUDGET = 40_000
FACTS = {
    "nothing": None,
    "steps": MemoryFacts(activation_bytes_per_token=1, workspace_bytes=700, graph_bytes=90),
    "requests": MemoryFacts(request_bytes=200),
    "cap": MemoryFacts(request_bytes=10, max_rows=5),
    "all": MemoryFacts(activation_bytes_per_token=1, workspace_bytes=300, request_bytes=65, max_rows=200),
}


def plan(profile: Profile, depth: int, context: int, *, token_budget: int, budget: int = BUDGET) -> Scenario:
    """More requests at once than can fit, with prompts of ``context`` tokens."""
    load = {
        "requests": 100,
        "arrivals": {"kind": "constant", "rate_per_s": 1e6},
        "tasks": [{"task": "chat", "prompt_tokens": context, "output_tokens": 2}],
        "lengths": "forced",
    }
    return scenario(
        profile,
        models=("small",),
        workload=load,
        controller={"kind": "fixed", "model": "small", "depth": depth},
        memory={"budget_bytes": budget},
        batcher={"max_batch": 1000, "token_budget": token_budget, "watermark": 0.0},
        allow_extrapolation=True,
    )


@pytest.mark.parametrize("case", FACTS)
@pytest.mark.parametrize(("depth", "context"), [(2, 1), (2, 12), (4, 17), (6, 96)])
def test_the_largest_batch_is_what_a_full_server_holds(case: str, depth: int, context: int, tmp_path: Path) -> None:
    """A server that is offered a thousand requests starts so many, and gives all their bytes back."""
    profile = write_synthetic_profile(tmp_path / "p", max_rows=200, max_tokens=1024, memory=FACTS[case])
    facts, token_budget = profile.model("small"), 8000
    expected = largest_batch(facts.spec("small"), depth, context, BUDGET, needs_of(facts, token_budget))
    assert 0 < expected * context <= token_budget
    server = build_server(plan(profile, depth, context, token_budget=token_budget), profile, NullRecorder())
    for k in range(1000):
        server.submit(Request(k, 0.0, context, 1), 0.0)
    load = server.next_action(0.0)
    assert isinstance(load, Load)
    server.complete(load, Outcome(0.0), 0.0)
    run = server.next_action(0.0)
    assert isinstance(run, Run)
    assert len(run.batch) == server.batcher.running == expected
    server.pool.check()
    server.batcher.preempt(server.pool)
    assert server.pool.used_blocks == 0
    server.pool.check()


def test_each_need_makes_the_batch_smaller(tmp_path: Path) -> None:
    most = {}
    for case, memory in FACTS.items():
        profile = write_synthetic_profile(tmp_path / case, max_rows=200, max_tokens=1024, memory=memory)
        run = run_simulated(plan(profile, 4, 96, token_budget=1000, budget=20_000))
        most[case] = max(run.steps["rows"].to_pylist())
    assert most["cap"] == 5
    assert most["all"] < most["steps"] < most["nothing"]
    assert most["requests"] < most["nothing"]


def test_weights_and_kv_stay_below_what_is_left(tmp_path: Path) -> None:
    """A server of two models sets aside what the more demanding one needs."""
    memory = MemoryFacts(activation_bytes_per_token=7, workspace_bytes=300)
    profile = write_synthetic_profile(tmp_path / "p", max_rows=200, max_tokens=1024, memory=memory)
    models = {"large": profile.model("large").model_copy(update={"memory": MemoryFacts(workspace_bytes=9_000)})}
    facts = profile.facts.model_copy(update={"models": profile.facts.models | models})
    needs = engine_needs(facts.models.values(), 64)
    assert needs.fixed == 9_000
    run = run_simulated(scenario(profile, memory={"budget_bytes": 20_000}))
    sizes = (run.steps[name].to_pylist() for name in ("weights_bytes", "kv_total_bytes"))
    most = max(weights + kv for weights, kv in zip(*sizes, strict=True))
    left = 20_000 - 300 - 64 * 7
    assert left - 2 * 12 * 16 < most <= left


def test_a_budget_that_holds_the_weights_but_no_step(tmp_path: Path) -> None:
    memory = MemoryFacts(activation_bytes_per_token=30)
    profile = write_synthetic_profile(tmp_path / "p", memory=memory)
    with pytest.raises(MemoryBudgetError, match=r"beside 30,000 B of activations and workspace"):
        run_simulated(plan(profile, 2, 16, token_budget=1000, budget=32_000))
