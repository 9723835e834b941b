"""The dashboard's question: what is served, by whom, on what, how well. Pure; every page makes its scenarios from it.

A *models* choice stands for an example set (composed for the chosen device when asked), a shipped profile, or a profile
somebody uploaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from heliosim.errors import InputError, UnknownNameError
from heliosim.example_sets import MAX_BATCH, SETS, STEP_TOKENS, ExampleSet
from heliosim.examples import pair_of
from heliosim.formats.profile import Profile
from heliosim.planfile import Candidate, PlanFile
from heliosim.profile_view import open_profile
from heliosim.scenario import Memory, Scenario

GPUS = ("A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB")
"""Devices that example sets are composed for."""
MODELS: Mapping[str, str] = {
    "opt-pair": "OPT-1.3B + 6.7B",
    "llama-three": "Llama2-7B + 13B + Llama3-8B",
    "codellama-llama2": "CodeLlama-34B + Llama2-70B",
    "llama2-small": "Llama2-2.7B + 7B",
    "tiny-opt": "tiny OPT pair (measured on a CPU)",
}
SHIPPED: Mapping[str, Mapping[str, str]] = {
    "llama2-small": {"A100-80GB": "llama2-a100-80gb", "H100-80GB": "llama2-h100-80gb"},
    "tiny-opt": {"CPU": "tiny-opt-cpu"},
}
"""Shipped profiles by device."""
OWN = "own:"
"""Before the digest of an uploaded profile."""


@dataclass(frozen=True)
class Load:
    """A kind of work. ``tasks``: whose exits it takes, the first that a profile knows; lengths in tokens, means."""

    label: str
    tasks: tuple[str, ...]
    prompt: int
    output: int


LOADS: Mapping[str, Load] = {
    "chat": Load("Chat", ("chat", "sharegpt", "gsm8k", "dialogue", "story"), 220, 200),
    "code": Load("Code completion", ("code", "codexglue", "humaneval", "sharegpt"), 300, 64),
    "summarise": Load("Summarising", ("summarisation", "summary", "cnn-dailymail", "sharegpt"), 800, 80),
    "reason": Load("Short reasoning", ("gsm8k", "maths", "chat", "sharegpt"), 100, 128),
}
LONGEST = 4
"""Longest prompt or output over its mean."""


@dataclass(frozen=True)
class Question:
    """One question. Rates per second, lengths in tokens, limits in milliseconds (None: no limit).

    ``system``: a name of ``systems``. ``controller``: parameters that replace that system's own. ``memory_share``: of
    the device's memory, for weights and KV.
    """

    models: str = "llama2-small"
    device: str = "A100-80GB"
    system: str = "HELIOS offline"
    load: str = "chat"
    rate_per_s: float = 20.0
    prompt_tokens: int = 220
    output_tokens: int = 200
    requests: int = 800
    ttft_ms: float | None = 500.0
    tpot_ms: float | None = 50.0
    seed: int = 0
    max_batch: int = MAX_BATCH
    step_tokens: int = STEP_TOKENS
    memory_share: float = 0.9
    controller: tuple[tuple[str, Any], ...] = ()

    @property
    def profile_name(self) -> str:
        """What a scenario calls its profile: a shipped name, or a folder in the cache."""
        return profile_name(self.models, self.device)

    def profile(self) -> Profile:
        return open_profile(self.profile_name)

    def models_of(self) -> tuple[str, ...]:
        """Names of the models, smallest first as far as the set says."""
        return model_names(self.models, self.device)

    def controller_section(self) -> dict[str, Any]:
        known = systems(self.models, self.device)
        if self.system not in known:
            raise UnknownNameError("system", self.system, known)
        return {**known[self.system], **dict(self.controller)}

    def task(self) -> str:
        """The task whose exits are drawn. Raises InputError if the profile has none that will do."""
        known = self.profile().facts.behaviour.tasks
        for name in (*LOADS[self.load].tasks, *sorted(known)):
            if name in known:
                return name
        raise InputError("models", self.models, "the profile has no behaviour to draw exits from", "Choose others.")

    def workload(self) -> dict[str, Any]:
        """Poisson arrivals of one task, lognormal lengths about the means."""
        return {
            "requests": self.requests,
            "arrivals": {"kind": "poisson", "rate_per_s": self.rate_per_s},
            "tasks": [
                {
                    "task": self.task(),
                    "prompt_tokens": _lengths(self.prompt_tokens, 0.5, self.longest),
                    "output_tokens": _lengths(self.output_tokens, 0.8, self.longest),
                }
            ],
        }

    @property
    def longest(self) -> int:
        """Longest prompt and longest output: both together must lie in what the profile knows."""
        return 96 if self.models == "tiny-opt" else 1024

    def candidate(self, name: str = "answer", system: str | None = None) -> Candidate:
        profile = self.profile()
        asked = self if system is None else replace_system(self, system)
        total = profile.facts.device.get("gpu_memory_bytes")
        memory = None
        if total:
            memory = Memory(budget_bytes=int(self.memory_share * float(total)), loads="overlapped")
        else:
            largest = max(profile.spec(n).weights_bytes(profile.spec(n).layers) for n in profile.facts.models)
            memory = Memory(budget_bytes=2 * largest)
        return Candidate.model_validate(
            {
                "name": name,
                "gpu": self.device,
                "gpus_per_replica": gpus_of(self.models),
                "profile": self.profile_name,
                "models": self.models_of(),
                "memory": memory,
                "batcher": {"max_batch": self.max_batch, "token_budget": max(self.step_tokens, self.max_batch)},
                "controller": asked.controller_section(),
            }
        )

    def limits(self) -> dict[str, float]:
        known = {"p99_ttft_ms": self.ttft_ms, "p99_tpot_ms": self.tpot_ms}
        found = {name: most for name, most in known.items() if most is not None}
        if not found:
            raise InputError("limits", None, "nothing is asked of the fleet", "Give a limit on TTFT or TPOT.")
        return found

    def plan(self, candidates: Mapping[str, str] | None = None, **more: Any) -> PlanFile:
        """The question as a plan. ``candidates``: systems by candidate's name; None: the question's own system."""
        made = [self.candidate(n, s) for n, s in (candidates or {slug(self.system): self.system}).items()]
        content = {"name": slug(self.load), "seed": self.seed, "workload": self.workload(), **more}
        content = {
            "slo": {"limits": self.limits()},
            "max_count": 16,
            "replications": {"least": 6, "most": 10},
            **content,
        }
        return PlanFile.model_validate({**content, "candidates": made})

    def scenario(self, count: int = 1, load: float = 1.0) -> Scenario:
        """``count`` replicas under ``load`` times the question's load."""
        plan = self.plan()
        made = plan.scenario(plan.candidates[0], self.profile(), count, load)
        from heliosim.metrics import Slo

        return made.model_copy(update={"slo": Slo(self.ttft_ms, self.tpot_ms)})


def replace_system(question: Question, system: str) -> Question:
    from dataclasses import replace

    return replace(question, system=system)


def slug(text: str) -> str:
    """A name for files and candidates."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text.lower())


def _lengths(mean: float, cv: float, longest: int) -> dict[str, Any]:
    high = max(4, min(longest, round(LONGEST * mean)))
    return {"kind": "lognormal", "mean": min(mean, high), "cv": cv, "low": 4, "high": high}


# --- models, devices, systems ---------------------------------------------------------------------------------


def devices(models: str) -> tuple[str, ...]:
    """Devices a choice of models can be asked about."""
    if models in SETS:
        return GPUS
    if models in SHIPPED:
        return tuple(SHIPPED[models])
    profile = open_profile(str(own_folder(models)))
    return (str(profile.facts.device.get("gpu") or "CPU"),)


def gpus_of(models: str) -> int:
    """GPUs of one replica."""
    return SETS[models].gpus if models in SETS else 1


def model_names(models: str, device: str) -> tuple[str, ...]:
    if models in SETS:
        return tuple(m.name for m in SETS[models].models)
    profile = open_profile(profile_name(models, device))
    return pair_of(profile) if len(profile.facts.models) > 1 else tuple(profile.facts.models)


def systems(models: str, device: str) -> dict[str, dict[str, Any]]:
    """Controller sections by the name a page shows: HELIOS first, then early exit, then vanilla."""
    if models in SETS:
        found = SETS[models].systems()
    else:
        names = model_names(models, device)
        helios = {"kind": "helios", "in_flight": "extend"}
        found = {
            **{f"vanilla {n}": {"kind": "vanilla", "model": n} for n in names},
            **{f"early exit {n}": {"kind": "early-exit", "model": n} for n in names},
            **({"HELIOS": helios, "HELIOS offline": {**helios, "use_evaluation": False}} if len(names) > 1 else {}),
        }
    order = ("HELIOS offline", "HELIOS", "early exit", "vanilla")
    place = {name: next((k for k, o in enumerate(order) if name == o or name.startswith(o)), 9) for name in found}
    return {name: dict(found[name]) for name in sorted(found, key=lambda n: place[n])}


def profile_name(models: str, device: str) -> str:
    """What names the profile of models on a device. An example set's is composed into the cache when first asked."""
    if device not in devices(models):
        raise UnknownNameError("device", device, devices(models))
    if models in SHIPPED:
        return SHIPPED[models][device]
    if models in SETS:
        return str(composed(models, device))
    return str(own_folder(models))


def profiles_folder() -> Path:
    """Where composed and uploaded profiles are kept."""
    from heliosim_app.work import cache_folder

    return cache_folder() / "profiles"


@lru_cache(maxsize=64)
def composed(models: str, device: str) -> Path:
    """A set's profile on a device, composed if it is not there yet. Another version of HelioSim makes its own."""
    from heliosim import __version__
    from heliosim.cli_profile import digests
    from heliosim.composing import Wanted, compose_profile
    from heliosim.hardware.architecture import open_architecture
    from heliosim.hardware.device import open_device

    chosen = SETS[models]
    files = digests(*(m.name for m in chosen.models), device)
    stamp = slug(f"{__version__}-{_digest(files, chosen)}")
    folder = profiles_folder() / f"{chosen.name}-{device.lower()}-{stamp}"
    if (folder / "profile.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".composing-"))
    wanted = [Wanted(m.name, open_architecture(m.name), m.tp, m.exits, chosen.exit_kind) for m in chosen.models]
    try:
        compose_profile(
            made / "profile",
            wanted,
            open_device(device),
            dtype=chosen.dtype,
            host="graph",
            behaviour=chosen.spec,
            files=files,
        )
        if not folder.exists():
            os.replace(made / "profile", folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _digest(files: Any, chosen: ExampleSet) -> str:
    import hashlib

    from heliosim.synthetic.spec import load_spec

    said = repr((files, chosen.models, chosen.dtype, chosen.exit_kind, load_spec(chosen.spec)))
    return hashlib.blake2b(said.encode(), digest_size=6).hexdigest()


def own_folder(models: str) -> Path:
    """The folder of an uploaded profile. Raises InputError if this machine does not have it."""
    name = models.removeprefix(OWN)
    folder = profiles_folder() / f"own-{slug(name)}"
    if not models.startswith(OWN) or not (folder / "profile.json").is_file():
        raise InputError("models", models, "no such models here", "Choose others, or upload the profile again.")
    return folder
