"""A scenario: everything one run depends on, frozen, validated and hashable, read from strict YAML.

Scenario + profile + seed determine a simulated run to the byte. The same file runs live.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from heliosim.errors import InputError, UnknownNameError, about
from heliosim.formats.files import Strict, read_yaml, refuse_true, sha256_of, validate, without_none, write_text
from heliosim.metrics import SCALARS, Slo
from heliosim.registry import CONTROLLERS, EXIT_BATCHING, ORDERS, ROUTERS, SKIPPED_KV, Registry
from heliosim.sampling import GREEDY, Sampling
from heliosim.serving.kinds import ControllerKind
from heliosim.serving.ordering import Order
from heliosim.serving.repository import Objective
from heliosim.serving.routing import MOST_REPLICAS
from heliosim.stats import StoppingRule
from heliosim.workload import WorkloadSpec

_LATEST_S = 2.0**22  # where a clock of ticks ends
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: int | str) -> int:
    """Bytes from a number or a text like ``24 MB`` or ``80 GiB``. Raises ValueError naming the units."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("give whole bytes or a size such as '24 MB' or '80 GiB'")
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", value)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"not a size; units are {', '.join(['B', 'kB', 'MB', 'GB', 'KiB', 'MiB', 'GiB'])}")
    return round(float(match[1]) * _UNITS[match[2].upper()])


class Memory(Strict):
    """Device memory that weights and KV share, and how weights come to it.

    ``loads``: no step runs during a load (``blocking``), or what is resident serves on while weights come
    (``overlapped``). ``is_pipelined``: a load that nothing overlaps with lets steps begin while later layers arrive.
    ``host``: kind of the host memory in which weights wait; ``host_bytes``: how much of it there is, None: enough.
    """

    budget_bytes: int = Field(gt=0, description="bytes, or a text with a unit: '24 MB'")
    loads: Literal["blocking", "overlapped"] = "blocking"
    is_pipelined: bool = False
    host: Literal["pinned", "pageable"] = "pinned"
    host_bytes: int | None = Field(default=None, ge=0)

    @field_validator("budget_bytes", "host_bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> int | None:
        return None if value is None else parse_bytes(value)

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was added later is written where it says something, so that files and hashes of older scenarios stay."""
        content: dict[str, Any] = handler(self)
        for name in ("loads", "is_pipelined", "host", "host_bytes"):
            if content.get(name) == Memory.model_fields[name].default:
                content.pop(name, None)
        return content


class MemoryChange(Strict):
    """Another amount of device memory."""

    budget_bytes: int = Field(gt=0, description="bytes, or a text with a unit: '24 MB'")

    @field_validator("budget_bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> int:
        return parse_bytes(value)


class ChangeSpec(Strict):
    """What is different from ``at_s`` seconds on; what is left out stays. ``slo``: all limits, the ones left out being
    none. ``objective``, ``max_perplexity``: of a controller that has such a parameter.
    """

    at_s: float = Field(gt=0, le=_LATEST_S, allow_inf_nan=False)
    memory: MemoryChange | None = None
    slo: Slo | None = None
    objective: Objective | None = None
    max_perplexity: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(handler(self), "memory", "slo", "objective", "max_perplexity")

    @model_validator(mode="after")
    def _says_something(self) -> ChangeSpec:
        if not self.detail:
            raise ValueError("nothing changes: give memory, slo, objective or max_perplexity")
        return self

    @property
    def detail(self) -> dict[str, Any]:
        """What changes, for the record."""
        return {name: value for name, value in self.model_dump(mode="json").items() if name != "at_s"}


class BatcherSpec(Strict):
    """Continuous batching: rows per step, tokens per step (prefill chunks included), share of blocks kept free.

    ``order``: who goes first, a ``kind`` with its parameters (docs/scheduling.md); None: first come, first served.
    """

    kind: Literal["continuous"] = "continuous"
    max_batch: int = Field(default=16, ge=1)
    token_budget: int = Field(default=256, ge=1)
    watermark: float = Field(default=0.01, ge=0, lt=1)
    order: dict[str, Any] | None = None

    @field_validator("order", mode="before")
    @classmethod
    def _is_an_order(cls, value: Any) -> Any:
        section = {"kind": value} if isinstance(value, str) else value
        if isinstance(section, dict):
            parse_kind(ORDERS, section, "", "batcher.order")
        return section

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(handler(self), "order")

    def the_order(self) -> Order:
        """The order, as an object. Raises InputError."""
        order: Order = parse_kind(ORDERS, self.order or {"kind": "fcfs"}, "", "batcher.order")
        return order

    @model_validator(mode="after")
    def _budget_holds_batch(self) -> BatcherSpec:
        if self.token_budget < self.max_batch:
            raise ValueError(f"token_budget ({self.token_budget}) must be at least max_batch ({self.max_batch})")
        return self


class LiveSpec(Strict):
    """How a live run executes; a simulation does not look at it. ``engine``: ``plain`` goes step by step, ``fast`` in
    strides on the device, ``conditional`` also decides exits there (docs/engine.md); auto: fast on a GPU, else plain.
    ``attention``: backend of the last two. ``max_stride``: steps between two decisions of the server at most; None: 32,
    or 1 on the plain engine, which has no strides.
    """

    engine: Literal["auto", "plain", "fast", "conditional"] = "auto"
    attention: Literal["auto", "flash-infer", "triton", "varlen", "flex", "sdpa"] = "auto"
    max_stride: int | None = Field(default=None, ge=1, le=4096)

    @model_validator(mode="after")
    def _plain_has_no_strides(self) -> LiveSpec:
        if self.engine == "plain" and self.max_stride not in (None, 1):
            raise ValueError(f"max_stride ({self.max_stride}) needs the fast engine; the plain one goes step by step")
        return self


class ReplicationSpec(Strict):
    """How many replications: from ``least`` on until every watched interval's half-width is at most
    ``relative_half_width`` of its mean, ``most`` at most.
    """

    least: int = Field(default=5, ge=2)
    most: int = Field(default=30, ge=2)
    relative_half_width: float = Field(default=0.05, gt=0, lt=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)

    @model_validator(mode="after")
    def _most_is_more(self) -> ReplicationSpec:
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) must be at least least ({self.least})")
        return self

    def rule(self) -> StoppingRule:
        return StoppingRule(self.least, self.most, self.relative_half_width, self.confidence)


class StatisticsSpec(Strict):
    """What is said of a scenario beyond one run: intervals from replications.

    ``horizon``: ``steady`` (a system that goes on as it is: warm-up is left out) or ``terminating`` (this very day,
    from its empty start to its end); None: by the workload. ``warm_up_requests``: how many first arrivals to leave out;
    None: found by MSER-5. ``metrics``: those whose intervals must become narrow. ``profile_uncertainty``: fit step
    costs anew for each replication, to steps drawn from those measured.
    """

    horizon: Literal["steady", "terminating"] | None = None
    warm_up_requests: int | None = Field(default=None, ge=0)
    replications: ReplicationSpec = ReplicationSpec()
    metrics: tuple[str, ...] = ()
    profile_uncertainty: bool = False

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in SCALARS:
                near = difflib.get_close_matches(name, SCALARS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "; docs/metrics.md lists them"
                raise ValueError(f"unknown metric {name!r}{hint}")
        return value

    @model_validator(mode="after")
    def _warm_up_is_of_steady(self) -> StatisticsSpec:
        if self.horizon == "terminating" and self.warm_up_requests:
            raise ValueError("warm_up_requests: a terminating run has no warm-up; leave it out or say steady")
        return self


class ReplicaGroup(Strict):
    """``count`` equal replicas of a fleet, named ``NAME-0``, ``NAME-1``, ... What is left out is the scenario's own."""

    name: str
    count: int = Field(default=1, ge=1)
    profile: str | None = None
    models: tuple[str, ...] | None = Field(default=None, min_length=1)
    memory: Memory | None = None
    batcher: BatcherSpec | None = None
    controller: dict[str, Any] | None = None
    clock: Literal["cpu", "wall"] | None = None

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("a group's name has letters, digits, '.', '_' and '-', the first a letter or digit")
        return value

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else _each_once(value)

    @property
    def label(self) -> str:
        """How errors name it."""
        return f"fleet group {self.name!r}"

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{k}" for k in range(self.count))


class Failure(Strict):
    """A replica that stops at ``at_s`` seconds and comes back, cold, ``restart_after_s`` later; None: never."""

    replica: str
    at_s: float = Field(ge=0, le=_LATEST_S, allow_inf_nan=False)
    restart_after_s: float | None = Field(default=None, ge=1e-6, le=_LATEST_S, allow_inf_nan=False)


class Fleet(Strict):
    """Several replicas behind a router, with what befalls them."""

    router: str = "least-outstanding"
    replicas: tuple[ReplicaGroup, ...] = Field(min_length=1)
    failures: tuple[Failure, ...] = ()

    @field_validator("router")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in ROUTERS.names():
            raise ValueError(_unknown("router", value, ROUTERS.names()))
        return value

    @field_validator("replicas")
    @classmethod
    def _names_once(cls, value: tuple[ReplicaGroup, ...]) -> tuple[ReplicaGroup, ...]:
        names = [group.name for group in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the name {twice!r} stands at two groups")
        total = sum(group.count for group in value)
        if total > MOST_REPLICAS:
            raise ValueError(f"{total} replicas; a fleet has at most {MOST_REPLICAS}")
        return value

    @model_validator(mode="after")
    def _failures_can_happen(self) -> Fleet:
        for failure in self.failures:
            if failure.replica not in self.names:
                raise ValueError("failures: " + _unknown("replica", failure.replica, self.names))
        for name in {failure.replica for failure in self.failures}:
            windows = sorted((f for f in self.failures if f.replica == name), key=lambda f: f.at_s)
            for before, after in pairwise(windows):
                if before.restart_after_s is None or before.at_s + before.restart_after_s > after.at_s:
                    until = "for good" if before.restart_after_s is None else f"for {before.restart_after_s:g} s"
                    down = f"{name} is down {until} from {before.at_s:g} s on"
                    raise ValueError(f"failures: {down}, so it cannot fail at {after.at_s:g} s")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all replicas, in order."""
        return tuple(name for group in self.replicas for name in group.replicas)


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = known if len(known) <= 12 else (*known[:11], "...")
    return f"unknown {what} {name!r}; {hint}known: {', '.join(shown)}"


def _each_once(models: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(models)) != len(models):
        raise ValueError("a model is named twice")
    return models


BehaviourSource = Literal["replay", "iid", "markov", "markov-request"]
"""Where a simulated request's exits come from; all but the first are ``behaviour_chains.ChainKind``."""


class Scenario(Strict):
    """One run. ``controller``: ``kind`` and that kind's parameters. ``clock``: whose costs a simulation uses, which
    clock a live run keeps. ``step_noise``: None gives every simulated step its expected time; k >= 0 replays the
    step-time noise of the profile from its k-th random place. ``fleet``: replicas behind a router; None: one server.
    ``changes``: what becomes different during the run, in order of time. ``behaviour``: whether requests meet the exits
    of recorded texts (``replay``), or of texts drawn from a model fitted to them (``iid``, ``markov``,
    ``markov-request``; simulated runs only). ``sampling``: how a live engine takes tokens; a simulation's behaviour is
    that of its profile, whatever stands there. ``live``: how a live run executes.
    """

    schema_version: Literal[1] = 1
    name: str
    seed: int = Field(default=0, ge=0)
    profile: str
    models: tuple[str, ...] = Field(min_length=1)
    workload: WorkloadSpec
    memory: Memory
    batcher: BatcherSpec = BatcherSpec()
    controller: dict[str, Any]
    clock: Literal["cpu", "wall"] = "cpu"
    slo: Slo | None = None
    allow_extrapolation: bool = False
    step_noise: int | None = Field(default=None, ge=0)
    statistics: StatisticsSpec | None = None
    fleet: Fleet | None = None
    changes: tuple[ChangeSpec, ...] = ()
    behaviour: BehaviourSource = "replay"
    sampling: Sampling = GREEDY
    live: LiveSpec = LiveSpec()

    @field_validator("changes")
    @classmethod
    def _in_order(cls, value: tuple[ChangeSpec, ...]) -> tuple[ChangeSpec, ...]:
        for before, after in pairwise(value):
            if after.at_s <= before.at_s:
                raise ValueError(f"at_s must rise, but {after.at_s:g} s stands behind {before.at_s:g} s")
        return value

    @model_validator(mode="after")
    def _has_classes_to_order(self) -> Scenario:
        w = self.workload
        if (self.batcher.order or {}).get("kind") == "priority" and w.trace is None and w.priorities is None:
            raise ValueError("batcher.order priority: all requests are of one class; give workload.priorities")
        return self

    @model_validator(mode="after")
    def _changes_are_of_all(self) -> Scenario:
        groups = self.fleet.replicas if self.fleet is not None else ()
        own = next((group.label for group in groups if group.memory is not None), None)
        if own is not None and any(change.memory is not None for change in self.changes):
            raise ValueError(f"changes: memory changes for every replica alike, but {own} has memory of its own")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was added later is written where it says something, so that files and hashes of older scenarios stay."""
        content: dict[str, Any] = handler(self)
        if not self.changes:
            content.pop("changes", None)
        if self.behaviour == "replay":
            content.pop("behaviour", None)
        if self.sampling == GREEDY:
            content.pop("sampling", None)
        if self.live == LiveSpec():
            content.pop("live", None)
        return content

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not value or "/" in value or value.startswith("."):
            raise ValueError("a name must not be empty, hold '/' or start with '.': it names the run's folder")
        return value

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _each_once(value)

    @property
    def hash(self) -> str:
        """Digest of the canonical content: equal scenarios have equal hashes. A trace counts by its bytes, not by where
        it lies; what is said of many runs does not count, since one run does not depend on it.
        """
        content = self.model_dump(mode="json")
        trace = self.workload.trace
        if trace is not None and Path(trace).is_file():
            content["workload"]["trace"] = sha256_of(Path(trace))
        content.pop("statistics")
        content.pop("profile")  # a run names its profile by that profile's own digest
        if content["fleet"] is None:
            content.pop("fleet")
        else:
            for group in content["fleet"]["replicas"]:
                group.pop("profile")
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def controller_kind(self) -> ControllerKind:
        """The controller's parameters. Raises InputError naming an unknown kind, field or value."""
        return parse_controller(self.controller, f"scenario {self.name!r}")

    def of_group(self, group: ReplicaGroup) -> Scenario:
        """The scenario as one replica of a group meets it: without a fleet, the group's own sections in place."""
        own = ("profile", "models", "memory", "batcher", "controller", "clock")
        given = {name: getattr(group, name) for name in own if getattr(group, name) is not None}
        return self.model_copy(update={**given, "fleet": None})

    def behind(self, change: ChangeSpec) -> Scenario:
        """The scenario as it is from a change on, as far as memory and SLO go."""
        memory, slo = self.memory, change.slo or self.slo
        if change.memory is not None:
            memory = memory.model_copy(update={"budget_bytes": change.memory.budget_bytes})
        return self.model_copy(update={"memory": memory, "slo": slo})

    def to_yaml(self) -> str:
        content = self.model_dump(mode="json", exclude_defaults=False)
        if self.statistics is None:
            del content["statistics"]
        for group in content["fleet"]["replicas"] if content["fleet"] else ():
            for name in [name for name, value in group.items() if value is None]:
                del group[name]  # the scenario's own
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        write_text(path, self.to_yaml())


def parse_clock(name: str) -> Literal["cpu", "wall"]:
    """A clock's name from a command line. Raises UnknownNameError."""
    if name not in ("cpu", "wall"):
        raise UnknownNameError("--clock", name, ("cpu", "wall"))
    return name  # type: ignore[return-value]


def parse_controller(section: dict[str, Any], where: str) -> ControllerKind:
    """Build a controller's parameters from a scenario section, refusing what it does not know."""
    kind: ControllerKind = parse_kind(CONTROLLERS, section, f"{where}, field ", "controller")
    return kind


def parse_kind(registry: Registry, section: dict[str, Any], where: str, path: str) -> Any:
    """What a section's ``kind`` names, made with its other fields. Errors begin with ``where`` and the ``path``."""
    fields = dict(section)
    if "kind" not in fields:
        known_kinds = f"Known: {', '.join(registry.names())}."
        raise InputError(f"{where}{path}.kind", None, "missing field", known_kinds)
    if not isinstance(fields["kind"], str):
        raise UnknownNameError(f"{where}{path}.kind", str(fields["kind"]), registry.names())
    cls = registry.get(fields.pop("kind"))
    known = set(cls.__dataclass_fields__)
    for key, value in fields.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            remedy = f"{hint}Known: {', '.join(sorted(known)) or 'none'}."
            raise InputError(f"{where}{path}.{key}", value, "unknown field", remedy)
    for key, methods in (("batching", EXIT_BATCHING), ("skipped_kv", SKIPPED_KV)) if registry is CONTROLLERS else ():
        if isinstance(fields.get(key), str) and fields[key] not in methods.names():
            raise UnknownNameError(f"{where}{path}.{key}", fields[key], methods.names())
    refuse_true(cls, fields, where.removesuffix(", field ") or "scenario", tuple(path.split(".")))
    try:
        return TypeAdapter(cls).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise InputError(f"{where}{path}.{place}", first.get("input"), first["msg"], "Correct the value.") from None


def load_scenario(path: Path) -> Scenario:
    """Read a scenario. Relative ``profile`` and ``workload.trace`` paths are taken from the file's folder."""
    raw = read_yaml(path, "a scenario")
    _from_beside(path, raw, "profile")
    _from_beside(path, raw.get("workload"), "trace")
    fleet = raw.get("fleet")
    groups = fleet.get("replicas") if isinstance(fleet, dict) else None
    for group in groups if isinstance(groups, list) else ():
        _from_beside(path, group, "profile")
    with about(path):
        scenario = validate(Scenario, raw, str(path))
        parse_controller(scenario.controller, str(path))
        for group in scenario.fleet.replicas if scenario.fleet else ():
            if group.controller is not None:
                with about(group.label):
                    parse_controller(group.controller, group.label)
    return scenario


def _from_beside(path: Path, holder: Any, key: str) -> None:
    """Have a relative path count from the scenario's folder, unless it is the name of a shipped profile."""
    if isinstance(holder, dict) and isinstance(holder.get(key), str) and not Path(holder[key]).is_absolute():
        beside = (path.parent / holder[key]).resolve()
        if beside.exists() or key == "trace" or "/" in holder[key]:
            holder[key] = str(beside)
