"""The plan file: what must be served, how well, and the fleets that may do it. Strict YAML, like a scenario.

It knows what a candidate's scenario looks like at a given count, load and seed; it does not search.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from heliosim.arrivals import Closed, Gaps, Replay
from heliosim.errors import InputError, about
from heliosim.formats.files import Strict, read_yaml, validate
from heliosim.formats.profile import Profile
from heliosim.metrics import Slo
from heliosim.profile_view import open_profile
from heliosim.registry import ROUTERS
from heliosim.scenario import BatcherSpec, Fleet, Memory, ReplicaGroup, Scenario, parse_controller
from heliosim.workload import WorkloadSpec

LATENCY = re.compile(r"(mean|p\d{1,2}(?:\.\d+)?)_(ttft|tpot|e2el)_ms")
"""Names of latency limits: p99_ttft_ms, p95_tpot_ms, mean_e2el_ms, p99.9_ttft_ms."""
MEMORY_SHARE = 0.9
"""Share of the device's memory that weights and KV get where a candidate does not say."""


def latency_of(name: str) -> tuple[float | None, str]:
    """Percentile (None: the mean) and family of a latency limit. Raises ValueError for other names."""
    match = LATENCY.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no latency; say pNN or mean, then _ttft_ms, _tpot_ms or _e2el_ms: p99_ttft_ms")
    return (None if match[1] == "mean" else float(match[1][1:])), match[2]


class Attainment(Strict):
    """At least ``share`` of all offered requests meet every limit at once."""

    share: float = Field(gt=0, le=1)
    ttft_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tpot_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    e2el_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _limits_something(self) -> Attainment:
        if self.ttft_ms is self.tpot_ms is self.e2el_ms is None:
            raise ValueError("give at least one of ttft_ms, tpot_ms, e2el_ms")
        return self

    @property
    def slo(self) -> Slo:
        return Slo(self.ttft_ms, self.tpot_ms, self.e2el_ms)


class Targets(Strict):
    """What a fleet must keep: ``limits``, most milliseconds by latency (p99_ttft_ms); ``attainment``; no more than
    ``max_refused_share`` of requests refused.
    """

    limits: dict[str, float] = Field(default_factory=dict)
    attainment: Attainment | None = None
    max_refused_share: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("limits")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name, most in value.items():
            latency_of(name)
            if not 0 < most < float("inf"):
                raise ValueError(f"{name} must be a positive number of milliseconds, not {most}")
        return value

    @model_validator(mode="after")
    def _asks_something(self) -> Targets:
        if not self.limits and self.attainment is None:
            raise ValueError("give limits or an attainment")
        return self


class Quality(Strict):
    """Floors of quality; each optional, as the profile's recorded behaviour has them."""

    max_perplexity: float | None = Field(default=None, gt=0)
    min_agreement: float | None = Field(default=None, gt=0, le=1)
    max_low_confidence_share: float | None = Field(default=None, ge=0, le=1)


class Replications(Strict):
    """How many seeds a verdict may take: from ``least`` on it is looked at after each, up to ``most``."""

    least: int = Field(default=4, ge=2)
    most: int = Field(default=10, ge=2)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> Replications:
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) must be at least least ({self.least})")
        return self


@dataclass(frozen=True)
class Rules:
    """What makes a verdict: targets, floors of quality, how many replications, what is left out as warm-up."""

    targets: Targets
    quality: Quality = field(default_factory=Quality)
    replications: Replications = field(default_factory=Replications)
    warm_up: float = 0.1


class Candidate(Strict):
    """One kind of replica a fleet may be made of. ``gpu``: a name of the price table."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    gpu: str
    gpus_per_replica: int = Field(default=1, ge=1)
    profile: str
    models: tuple[str, ...] = Field(min_length=1)
    memory: Memory | None = None
    batcher: BatcherSpec = BatcherSpec()
    controller: dict[str, Any]
    max_count: int | None = Field(default=None, ge=1)


class PlanFile(Strict):
    """A planning question. ``warm_up``: share of the requests, the first ones, that count for nothing."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    seed: int = Field(default=0, ge=0)
    workload: WorkloadSpec
    slo: Targets
    quality: Quality = Quality()
    router: str = "least-outstanding"
    max_count: int = Field(default=16, ge=1, le=256)
    warm_up: float = Field(default=0.1, ge=0, lt=0.9)
    replications: Replications = Replications()
    provider: str | None = None
    region: str | None = None
    allow_extrapolation: bool = False
    candidates: tuple[Candidate, ...] = Field(min_length=1)

    @field_validator("router")
    @classmethod
    def _known_router(cls, value: str) -> str:
        if value not in ROUTERS.names():
            raise ValueError(f"unknown router; known: {', '.join(ROUTERS.names())}")
        return value

    @field_validator("candidates")
    @classmethod
    def _names_once(cls, value: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        names = [c.name for c in value]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ValueError(f"two candidates are called {twice!r}")
        return value

    @property
    def rules(self) -> Rules:
        return Rules(self.slo, self.quality, self.replications, self.warm_up)

    def most(self, candidate: Candidate) -> int:
        """The largest count looked at."""
        return candidate.max_count or self.max_count

    def scenario(self, candidate: Candidate, profile: Profile, count: int, load: float = 1.0) -> Scenario:
        """``count`` replicas of a candidate under ``load`` times the plan's load, as a scenario that runs as is."""
        memory = candidate.memory or default_memory(profile, candidate)
        fleet = None
        if count > 1:
            fleet = Fleet(router=self.router, replicas=(ReplicaGroup(name=candidate.name, count=count),))
        attainment = self.slo.attainment
        return Scenario(
            name=f"{self.name}-{count}x-{candidate.name}",
            seed=self.seed,
            profile=candidate.profile,
            models=candidate.models,
            workload=with_load(self.workload, load),
            memory=memory,
            batcher=candidate.batcher,
            controller=candidate.controller,
            clock=profile.clock(),
            slo=None if attainment is None else attainment.slo,
            allow_extrapolation=self.allow_extrapolation,
            fleet=fleet,
        )


def default_memory(profile: Profile, candidate: Candidate) -> Memory:
    """Nine tenths of the device's memory. Raises InputError for a profile that does not name it."""
    total = profile.facts.device.get("gpu_memory_bytes")
    if not isinstance(total, int | float) or total <= 0:
        where = f"candidates {candidate.name!r}, field memory"
        raise InputError(where, None, "the profile names no device memory", "Give memory: {budget_bytes: ...}.")
    return Memory(budget_bytes=int(MEMORY_SHARE * total))


def is_closed(workload: WorkloadSpec) -> bool:
    """Whether its arrivals answer to the server."""
    return isinstance(workload.arrivals, Closed)


def with_load(workload: WorkloadSpec, load: float) -> WorkloadSpec:
    """The same requests, ``load`` times as fast: every gap between arrivals divided by it, the same draws behind it. A
    closed loop gets ``load`` times the users, rounded.
    """
    if load == 1:
        return workload
    process = workload.arrivals or Replay()
    if isinstance(process, Gaps):
        changed: Any = process.model_copy(update={"rate_per_s": process.rate_per_s * load})
    elif isinstance(process, Replay):
        changed = process.model_copy(update={"speed": process.speed * load})
    elif isinstance(process, Closed):
        changed = process.model_copy(update={"users": max(1, round(process.users * load))})
    else:
        raise InputError("workload.arrivals.kind", process.kind, "its load cannot be scaled", "Use an open process.")
    return workload.model_copy(update={"arrivals": changed})


def load_plan(path: Path) -> PlanFile:
    """Read a plan. Relative profiles and traces count from its folder. Raises InputError naming field and remedy."""
    raw = read_yaml(path, "a plan", "docs/planning.md")
    _beside(raw.get("workload"), "trace", path)
    candidates = raw.get("candidates")
    for candidate in candidates if isinstance(candidates, list) else ():
        _beside(candidate, "profile", path)
    with about(path):
        plan = validate(PlanFile, raw, str(path))
        for candidate in plan.candidates:
            where = f"candidates {candidate.name!r}"
            parse_controller(candidate.controller, where)
            profile = open_profile(candidate.profile)
            for model in candidate.models:
                profile.model(model)
    return plan


def _beside(holder: Any, key: str, path: Path) -> None:
    """Make a relative path count from the plan's folder; names of shipped profiles stay."""
    value = holder.get(key) if isinstance(holder, dict) else None
    if isinstance(value, str) and not Path(value).is_absolute():
        there = (path.parent / value).resolve()
        if there.exists() or key == "trace" or "/" in value:
            holder[key] = str(there)
