"""Settings of the what-if page: a question with the controller's parameters, a fixed depth and a mix of tasks. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from heliosim_app.question import Question

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.profile import Profile
from heliosim.scenario import Scenario
from heliosim.workload import WorkloadSpec

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "helios": ("threshold", "coverage", "max_breaches", "reassess_interval"),
    "early-exit": ("threshold",),
    "fixed": ("threshold",),
    "vanilla": (),
}
"""Parameters that a kind of controller has, of those a setting knows."""
FREE = "free"
"""A depth that the system chooses itself."""
LEAST_REQUESTS = 20


@dataclass(frozen=True)
class Setting:
    """``threshold`` TH, ``coverage`` q, ``max_breaches`` CBCmax, ``reassess_interval`` RI (requests). ``depth``:
    ``free``, or ``MODEL@LAYERS``, which serves with that model and depth alone. ``mix``: ``TASK:WEIGHT,...``, empty:
    one task of the question. ``total``: requests of all ``replications`` together.
    """

    question: Question
    threshold: float = 0.8
    coverage: float = 0.7
    max_breaches: int = 50
    reassess_interval: int = 150
    depth: str = FREE
    mix: str = ""
    total: int = 2000
    replications: int = 5

    @property
    def kind(self) -> str:
        """The controller's kind; a fixed depth is one of its own."""
        return "fixed" if self.depth != FREE else str(self.question.controller_section()["kind"])

    @property
    def controller(self) -> dict[str, Any]:
        """The system's own section with what the setting says of it."""
        own = {name: getattr(self, name) for name in PARAMETERS.get(self.kind, ())}
        if self.depth == FREE:
            return {**self.question.controller_section(), **own}
        model, _, layers = self.depth.rpartition("@")
        return {"kind": "fixed", "model": model, "depth": int(layers), **own}

    def scenario(self) -> Scenario:
        """The setting as one replication's scenario. Raises InputError naming what cannot be so."""
        per_run = self.total // self.replications
        if per_run < LEAST_REQUESTS:
            remedy = f"Ask for at least {LEAST_REQUESTS * self.replications} requests, or for fewer replications."
            raise InputError("total", self.total, f"leaves {per_run} requests in each replication", remedy)
        made = replace(self.question, requests=per_run).scenario()
        changes: dict[str, Any] = {"controller": self.controller}
        if self.mix:
            changes["workload"] = self._mixed(made.workload)
        return made.model_copy(update=changes)

    def _mixed(self, workload: WorkloadSpec) -> WorkloadSpec:
        weights = parse_mix(self.mix, tasks_of(self.question.profile()))
        plain = workload.model_dump(mode="json", exclude_none=True)
        one = plain["tasks"][0]
        plain["tasks"] = [{**one, "task": name, "share": weight} for name, weight in weights.items()]
        return WorkloadSpec.model_validate({**plain, "order": "mix"} if len(weights) > 1 else plain)


def tasks_of(profile: Profile) -> tuple[str, ...]:
    """Tasks whose exits a profile knows, by name."""
    return tuple(sorted(profile.facts.behaviour.tasks)) if profile.has_behaviour else ()


def depths_of(profile: Profile, models: Sequence[str]) -> tuple[str, ...]:
    """Depths that can be fixed: every exit of every model, shallow ones first."""
    return (FREE, *(f"{name}@{layer}" for name in models for layer in profile.spec(name).exits))


def parse_mix(text: str, known: Sequence[str]) -> dict[str, float]:
    """Weights by task from ``TASK:WEIGHT,...``; tasks of weight 0 are left out. Raises InputError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w.-]+):(\d+(?:\.\d+)?)\s*", part)
        if match is None:
            raise InputError("mix", part, "is not of the form task:weight", "For instance chat:3,code:1.")
        if match[1] not in known:
            raise UnknownNameError("mix", match[1], known)
        weights[match[1]] = float(match[2])
    found = {name: weight for name, weight in weights.items() if weight > 0}
    if not found:
        raise InputError("mix", text, "no task has any weight", "Give one of them more than 0.")
    return found


def mix_text(weights: Mapping[str, float]) -> str:
    """Weights as they stand in a link; empty if nothing has any."""
    return ",".join(f"{name}:{weight:g}" for name, weight in weights.items() if weight > 0)
