"""Plan files: strict, with every mistake named; a candidate becomes the scenario it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from heliosim.errors import InputError
from heliosim.planfile import latency_of, load_plan, with_load
from heliosim.profile_view import open_profile
from heliosim.workload import WorkloadSpec, build_arrivals

SHIPPED = Path(__file__).parents[2] / "heliosim" / "plans"


def changed(tmp_path: Path, *keys: str | int, value: Any = ...) -> Path:
    """The chat plan with one place changed (``...``: taken out)."""
    raw = yaml.safe_load((SHIPPED / "chat.yaml").read_text(encoding="utf-8"))
    place: Any = raw
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["chat", "summarisation", "code"])
def test_shipped_plans_load(name: str) -> None:
    plan = load_plan(SHIPPED / f"{name}.yaml")
    assert plan.name == name
    assert len(plan.candidates) == 4


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("max_cuont",), 3, "max_count"),
        (("slo", "limits", "p99_tft_ms"), 3, "p99_ttft_ms"),
        (("slo", "limits", "p99_ttft_ms"), -3, "positive"),
        (("slo",), {}, "limits or an attainment"),
        (("slo", "attainment"), {"share": 0.9}, "at least one of"),
        (("router",), "roundrobin", "round-robin"),
        (("replications",), {"least": 5, "most": 4}, "most"),
        (("candidates", 0, "controller", "kind"), "vanila", "vanilla"),
        (("candidates", 0, "models"), ["llama"], "llama2-7b"),
        (("candidates", 0, "profile"), "llama2-a100", "llama2-a100-80gb"),
        (("candidates", 1, "name"), "a100-full", "two candidates"),
        (("candidates", 0, "batcher", "token_budget"), 4, "token_budget"),
        (("candidates",), [], "candidates"),
        (("workload", "arrivals", "rate_per_s"), 0, "rate_per_s"),
        (("name",), "a/b", "name"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, keys: tuple[str | int, ...], value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_plan(changed(tmp_path, *keys, value=value))
    assert "plan.yaml" in str(caught.value)


def test_a_candidate_becomes_a_fleet_that_a_scenario_file_can_hold(tmp_path: Path) -> None:
    plan = load_plan(SHIPPED / "chat.yaml")
    candidate = plan.candidates[0]
    profile = open_profile(candidate.profile)
    scenario = plan.scenario(candidate, profile, 3, load=2.0)
    assert scenario.fleet is not None
    assert scenario.fleet.names == ("a100-full-0", "a100-full-1", "a100-full-2")
    assert scenario.memory.budget_bytes == 72 * 10**9  # nine tenths of the device
    assert scenario.clock == "wall"
    assert scenario.workload.arrivals.rate_per_s == 60  # type: ignore[union-attr]
    assert scenario.seed == plan.seed
    assert plan.scenario(candidate, profile, 1).fleet is None


@pytest.mark.parametrize(
    ("arrivals", "field", "expected"),
    [
        ({"kind": "gamma", "rate_per_s": 4, "cv": 2}, "rate_per_s", 6.0),
        ({"kind": "constant", "rate_per_s": 4}, "rate_per_s", 6.0),
        ({"kind": "closed", "users": 5}, "users", 8),
    ],
)
def test_load_scales_every_process(arrivals: dict[str, Any], field: str, expected: float) -> None:
    spec = WorkloadSpec.model_validate(
        {"requests": 9, "arrivals": arrivals, "tasks": [{"task": "chat", "prompt_tokens": 3, "output_tokens": 2}]}
    )
    assert getattr(with_load(spec, 1.5).arrivals, field) == expected
    assert with_load(spec, 1.0) is spec


def test_load_scales_a_trace_s_own_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 3000, "input_length": 3, "output_length": 2}\n', encoding="utf-8")
    spec = WorkloadSpec(trace=str(file))
    assert build_arrivals(with_load(spec, 1.5), 0)[0].request.arrival_s == pytest.approx(2.0)


def test_latencies_have_names() -> None:
    assert latency_of("p99.9_ttft_ms") == (99.9, "ttft")
    assert latency_of("mean_e2el_ms") == (None, "e2el")
    for bad in ("p100_ttft_ms", "ttft_ms", "p99_itl_ms"):
        with pytest.raises(ValueError, match="p99_ttft_ms"):
            latency_of(bad)


def test_a_profile_without_device_memory_needs_a_budget(tmp_path: Path) -> None:
    plan = load_plan(SHIPPED / "chat.yaml")
    measured = open_profile("tiny-opt-cpu")
    with pytest.raises(InputError, match="budget_bytes"):
        plan.scenario(plan.candidates[0], measured, 1)
