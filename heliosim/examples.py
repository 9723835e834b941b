"""Example scenarios over a profile: the five systems of the demo and a fleet, ready to run and to change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliosim.errors import InputError
from heliosim.formats.files import FolderKind, new_folder, write_text
from heliosim.formats.profile import Profile
from heliosim.profile_view import open_profile, shipped_profiles
from heliosim.scenario import BatcherSpec, Failure, Fleet, Memory, ReplicaGroup, Scenario
from heliosim.workload import WorkloadSpec

REFERENCE = "tiny-opt-cpu"
"""The measured profile that is shipped, which the shipped models can be run against."""


def systems(small: str, large: str, **helios: Any) -> dict[str, dict[str, Any]]:
    """The five systems that HELIOS is compared with, as controller sections by name."""
    return {
        f"vanilla {small}": {"kind": "vanilla", "model": small},
        f"vanilla {large}": {"kind": "vanilla", "model": large},
        f"early exit {small}": {"kind": "early-exit", "model": small},
        f"early exit {large}": {"kind": "early-exit", "model": large},
        "HELIOS": {"kind": "helios", "in_flight": "extend", **helios},
    }


def name_of(profile: Profile) -> str:
    """How a scenario names a profile: a shipped one by its name, so that the file works elsewhere, others by folder."""
    shipped = shipped_profiles()
    return profile.folder.name if profile.folder in shipped.values() else str(profile.folder.resolve())


def pair_of(profile: Profile) -> tuple[str, str]:
    """The two models of a profile, fewer layers first."""
    names = sorted(profile.facts.models, key=lambda n: (profile.facts.models[n].layers, n))
    if len(names) < 2:
        raise InputError(str(profile.folder), names, "has fewer than two models", "Calibrate a pair.")
    return names[0], names[-1]


def tight_budget(profile: Profile) -> int:
    """Memory in which the larger model, fully loaded, leaves as much for KV as it takes itself: batches feel freed
    weights.
    """
    return 2 * max(profile.spec(n).weights_bytes(profile.spec(n).layers) for n in profile.facts.models)


def scenario_for(
    name: str,
    controller: Mapping[str, Any],
    profile: Profile,
    workload: WorkloadSpec,
    *,
    seed: int = 0,
    max_batch: int = 16,
) -> Scenario:
    """One system over a profile's pair, in the tight budget."""
    return Scenario(
        name=name.replace(" ", "-"),
        seed=seed,
        profile=name_of(profile),
        models=pair_of(profile),
        workload=workload,
        memory=Memory(budget_bytes=tight_budget(profile)),
        batcher=BatcherSpec(max_batch=max_batch, token_budget=256),
        controller=dict(controller),
        clock=profile.clock(),
    )


def drawn_workload(profile: Profile, requests_per_task: int = 60, rate_per_s: float = 20.0) -> WorkloadSpec:
    """Tasks of the profile in consecutive blocks, lengths drawn, Poisson arrivals; needs no text, so it runs live with
    random weights or replayed exits alone. One task without a name where the profile knows none.
    """
    tasks = [
        {
            "task": task,
            "count": requests_per_task,
            "prompt_tokens": {"kind": "uniform", "low": 30, "high": 90},
            "output_tokens": {"kind": "uniform", "low": 16, "high": 48},
        }
        for task in sorted(profile.facts.behaviour.tasks)[:4] or [""]
    ]
    return WorkloadSpec.model_validate(
        {"arrivals": {"kind": "poisson", "rate_per_s": rate_per_s}, "tasks": tasks, "order": "blocks"}
    )


def fleet_example(profile: Profile, workload: WorkloadSpec) -> Scenario:
    """Two HELIOS replicas and one that exits early, one of which fails and comes back."""
    _, large = pair_of(profile)
    fleet = Fleet(
        router="least-outstanding",
        replicas=(
            ReplicaGroup(name="helios", count=2),
            ReplicaGroup(name="plain", controller={"kind": "early-exit", "model": large}),
        ),
        failures=(Failure(replica="helios-0", at_s=2.0, restart_after_s=2.0),),
    )
    controller = {"kind": "helios", "in_flight": "extend"}
    return scenario_for("fleet", controller, profile, workload).model_copy(update={"fleet": fleet})


def _text_workload(profile: Profile, folder: Path, final: Path, requests_per_task: int = 40) -> WorkloadSpec | None:
    """Real prompts, so that the scenarios also run live; None where no tokenizer is at hand, or no model to run.

    The trace is written into ``folder``, which will become ``final``.
    """
    from importlib.util import find_spec

    from heliosim.arrivals import Poisson
    from heliosim.formats.checkpoint import checkpoint_path
    from heliosim.formats.trace import save_trace
    from heliosim.synth import TextTask, text_trace

    if not profile.is_measured or profile.random_models:
        return None
    tokenizer = checkpoint_path(next(iter(profile.facts.models.values())).checkpoint) / "tokenizer.json"
    if find_spec("tokenizers") is None or not tokenizer.is_file():
        return None
    tasks = [TextTask(t, requests_per_task, (16, 48)) for t in sorted(profile.facts.behaviour.tasks)[:4]]
    rows = text_trace(tasks, order="blocks", arrivals=Poisson(rate_per_s=20.0), seed=0, tokenizer_file=tokenizer)
    save_trace(rows, folder / "workload.jsonl")
    return WorkloadSpec(trace=str((final / "workload.jsonl").resolve()))


def write_plans(out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the example plans and the shipped price table into ``out``. Raises InputError if it exists."""
    shipped = sorted((Path(__file__).parent / "plans").glob("*.yaml"))
    kind = FolderKind("example plans", "prices.yaml", frozenset(file.name for file in shipped))
    with new_folder(out, kind, overwrite=overwrite) as folder:
        for file in shipped:
            write_text(folder / file.name, file.read_text(encoding="utf-8"))
    return [out / file.name for file in shipped]


def _file_name(system: str) -> str:
    return f"{system.replace(' ', '-').lower()}.yaml"


def write_examples(out: Path, profile_folder: Path | None, *, overwrite: bool = False) -> list[Path]:
    """Write one scenario per system, and a fleet, into ``out``. Raises InputError if it exists."""
    if profile_folder is None:
        shipped = shipped_profiles()
        if not shipped:
            raise InputError("--profile", None, "no reference profile is shipped", "Calibrate one and name it.")
        profile = open_profile(REFERENCE if REFERENCE in shipped else next(iter(shipped)))
    else:
        profile = open_profile(str(profile_folder.resolve() if profile_folder.exists() else profile_folder))
    made = systems(*pair_of(profile))
    names = {"workload.jsonl", *(_file_name(name) for name in (*made, "fleet"))}
    written = []
    with new_folder(out, FolderKind("the example", "helios.yaml", frozenset(names)), overwrite=overwrite) as folder:
        workload = _text_workload(profile, folder, out) or drawn_workload(profile)
        alone = [scenario_for(name, controller, profile, workload) for name, controller in made.items()]
        for scenario in (*alone, fleet_example(profile, workload)):
            file = folder / _file_name(scenario.name)
            if workload.trace is not None:  # beside the scenarios: the folder can be moved
                beside = workload.model_copy(update={"trace": "workload.jsonl"})
                scenario = scenario.model_copy(update={"workload": beside})
            scenario.save(file)
            written.append(out / file.name)
    return written
