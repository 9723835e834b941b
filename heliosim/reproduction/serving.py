"""Composed pairs under load, with batches of more than one: nothing here was measured as steps.

``opt``: the OPT pair in FP16 on one A100-40GB under Poisson arrivals, for what the paper left out. ``large``:
CodeLlama-34B (TP 2) and Llama2-70B (TP 4) on four of them, with as many users as memory may serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from heliosim.composing import Wanted, compose_profile
from heliosim.examples import systems
from heliosim.formats.profile import Profile, load_profile
from heliosim.hardware.device import open_device
from heliosim.metrics import Slo
from heliosim.reproduction import inputs
from heliosim.reproduction.shapes import GIB, architecture
from heliosim.scenario import BatcherSpec, Memory, Scenario
from heliosim.workload import WorkloadSpec

SLO = Slo(ttft_ms=1000.0, tpot_ms=50.0)
REQUESTS, LARGE_REQUESTS = 800, 600
MAX_BATCH, TOKEN_BUDGET = 256, 2048
PAIRS: Mapping[str, tuple[str, tuple[tuple[str, int], ...], str]] = {
    "opt": ("opt-pair", (("opt-1.3b", 1), ("opt-6.7b", 1)), "fixed"),
    "large": ("codellama-llama2", (("codellama-34b", 2), ("llama2-70b", 4)), "anywhere"),
}
"""Exit spec, models with their ranks, and kind of exits."""


@cache
def profile(pair: str) -> Profile:
    """The composed profile of a pair, with exits drawn once from its spec."""
    from heliosim.reproduction.opt_pair import Kept
    from heliosim.synthetic.spec import load_spec

    spec_name, models, kind = PAIRS[pair]
    spec = load_spec(spec_name)
    wanted = [Wanted(name, architecture(name), tp, tuple(spec.models[name].exits), kind) for name, tp in models]
    with TemporaryDirectory() as parent:
        folder = Path(parent) / f"composed-{pair}"
        compose_profile(
            folder, wanted, open_device(inputs.DEVICE), dtype="fp16", host="graph", behaviour=spec_name, seed=0
        )
        read = load_profile(folder, verify=False)
        kept = Kept(Path(folder.name), read.facts, read.hash)
        vars(kept)["behaviour"] = read.behaviour
    return kept


@cache
def made(pair: str) -> Mapping[str, Mapping[str, Any]]:
    """The five systems by name."""
    small, large = (name for name, _ in PAIRS[pair][1])
    short = {small: "small", large: "large"}
    return {_renamed(name, short): controller for name, controller in systems(small, large).items()}


def _renamed(name: str, short: Mapping[str, str]) -> str:
    for model, word in short.items():
        name = name.replace(model, word)
    return name


def under_load(controller: Mapping[str, Any], rate_per_s: float, seed: int, share: float = 1.0) -> Scenario:
    """One system of the OPT pair under Poisson arrivals of its four tasks, mixed; lengths drawn."""
    tasks = [
        {
            "task": task,
            "share": 1.0,
            "prompt_tokens": {"kind": "lognormal", "mean": 300, "cv": 1.0, "high": 1024},
            "output_tokens": {"kind": "lognormal", "mean": 150, "cv": 0.8, "high": 600},
        }
        for task in sorted(profile("opt").facts.behaviour.tasks)
    ]
    arrivals = {"kind": "poisson", "rate_per_s": rate_per_s}
    return _scenario("opt", controller, arrivals, tasks, max(20, round(REQUESTS * share)), seed)


def with_users(controller: Mapping[str, Any], users: int, seed: int, share: float = 1.0) -> Scenario:
    """One system of the large pair in a closed loop of so many users, with lengths like ShareGPT's."""
    task = {
        "task": "sharegpt",
        "share": 1.0,
        "prompt_tokens": {"kind": "lognormal", "mean": 220, "cv": 1.0, "high": 1024},
        "output_tokens": {"kind": "lognormal", "mean": 200, "cv": 0.8, "high": 1024},
    }
    arrivals = {"kind": "closed", "users": users}
    return _scenario("large", controller, arrivals, [task], max(40, round(LARGE_REQUESTS * share)), seed)


def _scenario(
    pair: str, controller: Mapping[str, Any], arrivals: Mapping[str, Any], tasks: list[Any], requests: int, seed: int
) -> Scenario:
    found = profile(pair)
    workload = WorkloadSpec.model_validate({"arrivals": arrivals, "requests": requests, "order": "mix", "tasks": tasks})
    return Scenario(
        name=found.folder.name,
        seed=seed,
        profile=found.folder.name,
        models=tuple(name for name, _ in PAIRS[pair][1]),
        workload=workload,
        memory=Memory(
            budget_bytes=round(inputs.HBM_GIB[inputs.DEVICE] * inputs.USABLE_SHARE * GIB), loads="overlapped"
        ),
        batcher=BatcherSpec(max_batch=MAX_BATCH, token_budget=TOKEN_BUDGET),
        controller=dict(controller),
        clock="wall",
        slo=SLO if pair == "opt" else None,
    )
