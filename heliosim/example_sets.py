"""Examples with real models on GPUs nobody needs to have: HELIOS's three candidate sets on A100-40GB.

Step times are composed (``heliosim/composing.py``), exits drawn from the shipped exit specs: nothing was measured.
Rates lie at about seven tenths of what the slowest system of a set sustains (docs/examples.md), so that queues end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from heliosim.composing import MEMORY_SHARE, Wanted, compose_profile
from heliosim.errors import UnknownNameError
from heliosim.formats.files import FolderKind, new_folder, write_text
from heliosim.formats.profile import Profile
from heliosim.metrics import Slo
from heliosim.scenario import BatcherSpec, Memory, Scenario
from heliosim.workload import WorkloadSpec

DEVICE = "A100-40GB"
REQUESTS = 1088
MAX_BATCH = 64
STEP_TOKENS = 1024
SLO = Slo(ttft_ms=1000.0, tpot_ms=50.0)
PROMPT_CV = 0.5
"""Assumed: standard deviation of prompt lengths over their mean."""
LONGEST = 4
"""Longest prompt and output, as a multiple of the task's mean; no more than 1,024 tokens each."""
OFFLINE = {"use_evaluation": False}


@dataclass(frozen=True)
class ExampleModel:
    """A model of a set: exits before the last layer, and GPUs that share each layer."""

    name: str
    exits: tuple[int, ...]
    tp: int = 1


@dataclass(frozen=True)
class ExampleSet:
    """One set. ``spec``: exit spec; ``helios``: what its HELIOS differs in from the defaults; ``more``: further systems
    by name, as controller sections without the kind.
    """

    name: str
    about: str
    spec: str
    models: tuple[ExampleModel, ...]
    dtype: str
    exit_kind: Literal["anywhere", "fixed"]
    rate_per_s: float
    helios: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def profile(self) -> str:
        """Name of the folder that holds the set's profile."""
        return f"{self.name}-{DEVICE.lower()}"

    @property
    def gpus(self) -> int:
        return max(m.tp for m in self.models)

    def systems(self) -> dict[str, dict[str, Any]]:
        """Controller sections by name: each model alone, all layers and early exit; HELIOS."""
        names = [m.name for m in self.models]
        helios = {"kind": "helios", "in_flight": "extend", **self.helios}
        return {
            **{f"vanilla {name}": {"kind": "vanilla", "model": name} for name in names},
            **{f"early exit {name}": {"kind": "early-exit", "model": name} for name in names},
            "HELIOS": helios,
            "HELIOS offline": {**helios, **OFFLINE},
            **{name: {**helios, **changes} for name, changes in self.more.items()},
        }


SETS: Mapping[str, ExampleSet] = {
    made.name: made
    for made in (
        ExampleSet(
            name="opt-pair",
            about="OPT-1.3B and OPT-6.7B in FP32 on one A100-40GB",
            spec="opt-pair",
            models=(ExampleModel("opt-1.3b", (6, 12)), ExampleModel("opt-6.7b", (9, 17))),
            dtype="fp32",
            exit_kind="fixed",
            rate_per_s=2.0,
        ),
        ExampleSet(
            name="llama-three",
            about="Llama2-7B, Llama2-13B and Llama3-8B in FP16 on one A100-40GB, taken for models of one tokenizer",
            spec="llama-three",
            models=(
                ExampleModel("llama2-7b", (8, 16, 24)),
                ExampleModel("llama2-13b", (8, 16, 24, 32)),
                ExampleModel("llama3-8b", (8, 16, 24)),
            ),
            dtype="fp16",
            exit_kind="anywhere",
            rate_per_s=3.5,
            helios={"use_tokenizer_rule": False},
            more={"HELIOS one tokenizer": {"use_tokenizer_rule": True}},
        ),
        ExampleSet(
            name="codellama-llama2",
            about="CodeLlama-34B on two and Llama2-70B on four of four A100-40GB, in FP16",
            spec="codellama-llama2",
            models=(
                ExampleModel("codellama-34b", (8, 16, 24, 28, 32, 40), tp=2),
                ExampleModel("llama2-70b", (20, 40, 60), tp=4),
            ),
            dtype="fp16",
            exit_kind="anywhere",
            rate_per_s=2.8,
        ),
    )
}


def set_of(name: str) -> ExampleSet:
    """A set by name. Raises UnknownNameError."""
    if name not in SETS:
        raise UnknownNameError("--set", name, SETS)
    return SETS[name]


def workload(chosen: ExampleSet) -> WorkloadSpec:
    """The exit spec's tasks in equal parts, mixed, lengths drawn about the spec's, Poisson arrivals."""
    from heliosim.synthetic.spec import load_spec

    tasks = [
        {
            "task": name,
            "prompt_tokens": _lengths(task.prompt_tokens, PROMPT_CV),
            "output_tokens": _lengths(task.output_tokens, task.output_cv),
        }
        for name, task in load_spec(chosen.spec).tasks.items()
    ]
    return WorkloadSpec.model_validate(
        {
            "requests": REQUESTS,
            "arrivals": {"kind": "poisson", "rate_per_s": chosen.rate_per_s},
            "tasks": tasks,
            "order": "mix",
        }
    )


def _lengths(mean: float, cv: float) -> dict[str, Any]:
    high = min(1024, round(LONGEST * mean))
    return {"kind": "lognormal", "mean": mean, "cv": cv, "low": 4, "high": high}


def compose_set(chosen: ExampleSet, out: Path) -> Profile:
    """Compose the set's profile into a folder that does not exist yet."""
    from heliosim.cli_profile import digests
    from heliosim.hardware.architecture import open_architecture
    from heliosim.hardware.device import open_device

    wanted = [Wanted(m.name, open_architecture(m.name), m.tp, m.exits, chosen.exit_kind) for m in chosen.models]
    return compose_profile(
        out,
        wanted,
        open_device(DEVICE),
        dtype=chosen.dtype,
        host="graph",
        behaviour=chosen.spec,
        files=digests(*(m.name for m in chosen.models), DEVICE),
    )


def budget_bytes(profile: Profile) -> int:
    """One GPU's memory for weights and KV: nine tenths; the rest is for activations, workspace and graphs."""
    return int(MEMORY_SHARE * float(profile.facts.device["gpu_memory_bytes"] or 0))


def scenarios(chosen: ExampleSet, profile: Profile) -> dict[str, Scenario]:
    """Every system of a set by file name, over its profile, which lies beside the files."""
    tokens, memory = workload(chosen), Memory(budget_bytes=budget_bytes(profile), loads="overlapped")
    return {
        f"{name.replace(' ', '-').lower()}.yaml": Scenario(
            name=name.replace(" ", "-"),
            profile=chosen.profile,
            models=tuple(m.name for m in chosen.models),
            workload=tokens,
            memory=memory,
            batcher=BatcherSpec(max_batch=MAX_BATCH, token_budget=STEP_TOKENS),
            controller=controller,
            clock=profile.clock(),
            slo=SLO,
        )
        for name, controller in chosen.systems().items()
    }


def write_set(out: Path, name: str, *, overwrite: bool = False) -> list[Path]:
    """Compose a set's profile and write its scenarios beside it into ``out``. Raises InputError if it exists."""
    chosen = set_of(name)
    names = {"README.md", *(f"{system.replace(' ', '-').lower()}.yaml" for system in chosen.systems())}
    held = {chosen.profile: frozenset(("profile.json", "behaviour.parquet"))}
    kind = FolderKind(f"the example {name}", "helios.yaml", frozenset(names), held)
    with new_folder(out, kind, overwrite=overwrite) as folder:
        made = scenarios(chosen, compose_set(chosen, folder / chosen.profile))
        for file, scenario in made.items():
            scenario.save(folder / file)
        write_text(folder / "README.md", _readme(chosen))
    return [out / file for file in made]


def _readme(chosen: ExampleSet) -> str:
    return (
        f"{chosen.about}; {chosen.rate_per_s:g} requests per second.\n"
        "Composed step times and synthetic exits: nothing here was measured, and what is assumed is in the profile.\n"
        f"Try `heliosim run helios.yaml` and `heliosim profile show {chosen.profile}`; docs/examples.md has results.\n"
    )
