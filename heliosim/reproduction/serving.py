"""What the paper left out: the same systems under load, with batches of more than one and limits on latency.

Costs are those of the shipped profile ``llama2-a100-80gb`` (composed of published kernel times; its exits synthetic).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from heliosim.examples import pair_of, systems
from heliosim.formats.profile import Profile
from heliosim.metrics import Slo
from heliosim.profile_view import open_profile
from heliosim.scenario import BatcherSpec, Memory, Scenario
from heliosim.workload import WorkloadSpec

NAME = "llama2-a100-80gb"
SLO = Slo(ttft_ms=1000.0, tpot_ms=50.0)
REQUESTS = 800
MAX_BATCH = 64


@cache
def profile() -> Profile:
    return open_profile(NAME)


class _Systems(Mapping[str, Mapping[str, Any]]):
    """The five systems, made when first asked for: they name the profile's models."""

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return _made()[name]

    def __iter__(self) -> Any:
        return iter(_made())

    def __len__(self) -> int:
        return len(_made())


@cache
def _made() -> Mapping[str, Mapping[str, Any]]:
    small, large = pair_of(profile())
    found = systems(small, large)
    short = {small: "small", large: "large"}
    return {_renamed(name, short): controller for name, controller in found.items()}


def _renamed(name: str, short: Mapping[str, str]) -> str:
    for model, word in short.items():
        name = name.replace(model, word)
    return name


SYSTEMS: Mapping[str, Mapping[str, Any]] = _Systems()


def scenario(controller: Mapping[str, Any], rate_per_s: float, seed: int, share: float = 1.0) -> Scenario:
    """One system under Poisson arrivals of the profile's tasks, mixed; lengths drawn."""
    made = profile()
    tasks = [
        {
            "task": task,
            "share": 1.0,
            "prompt_tokens": {"kind": "lognormal", "mean": 500, "cv": 1.0, "high": 2048},
            "output_tokens": {"kind": "lognormal", "mean": 150, "cv": 0.8, "high": 600},
        }
        for task in sorted(made.facts.behaviour.tasks)
    ]
    workload = WorkloadSpec.model_validate(
        {
            "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
            "requests": max(20, round(REQUESTS * share)),
            "order": "mix",
            "tasks": tasks,
        }
    )
    return Scenario(
        name=NAME,
        seed=seed,
        profile=NAME,
        models=pair_of(made),
        workload=workload,
        memory=Memory(budget_bytes=40 * 2**30),
        batcher=BatcherSpec(max_batch=MAX_BATCH, token_budget=1024),
        controller=dict(controller),
        clock=made.clock(),
        slo=SLO,
    )
