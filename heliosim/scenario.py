"""A scenario: everything one run depends on, frozen, validated and hashable, read from strict YAML.

Scenario + profile + seed determine a simulated run to the byte. The same file runs live.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from heliosim.errors import InputError, UnknownNameError, about
from heliosim.formats.files import Strict, sha256_of, validate, write_text
from heliosim.metrics import SCALARS, Slo
from heliosim.registry import CONTROLLERS
from heliosim.serving.kinds import ControllerKind
from heliosim.stats import StoppingRule
from heliosim.workload import WorkloadSpec

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
    """Device memory that weights and KV share."""

    budget_bytes: int = Field(gt=0, description="bytes, or a text with a unit: '24 MB'")

    @field_validator("budget_bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> int:
        return parse_bytes(value)


class BatcherSpec(Strict):
    """Continuous batching: rows per step, tokens per step (prefill chunks included), share of blocks kept free."""

    kind: Literal["continuous"] = "continuous"
    max_batch: int = Field(default=16, ge=1)
    token_budget: int = Field(default=256, ge=1)
    watermark: float = Field(default=0.01, ge=0, lt=1)

    @model_validator(mode="after")
    def _budget_holds_batch(self) -> BatcherSpec:
        if self.token_budget < self.max_batch:
            raise ValueError(f"token_budget ({self.token_budget}) must be at least max_batch ({self.max_batch})")
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


class Scenario(Strict):
    """One run. ``controller``: ``kind`` and that kind's parameters. ``clock``: whose costs a simulation uses, which
    clock a live run keeps. ``step_noise``: None gives every simulated step its expected time; k >= 0 replays the
    step-time noise of the profile from its k-th random place.
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

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not value or "/" in value or value.startswith("."):
            raise ValueError("a name must not be empty, hold '/' or start with '.': it names the run's folder")
        return value

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a model is named twice")
        return value

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
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def controller_kind(self) -> ControllerKind:
        """The controller's parameters. Raises InputError naming an unknown kind, field or value."""
        return parse_controller(self.controller, f"scenario {self.name!r}")

    def to_yaml(self) -> str:
        content = self.model_dump(mode="json", exclude_defaults=False)
        if self.statistics is None:
            del content["statistics"]
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
    fields = dict(section)
    if "kind" not in fields:
        raise InputError(
            f"{where}, field controller.kind", None, "missing field", f"Known: {', '.join(CONTROLLERS.names())}."
        )
    if not isinstance(fields["kind"], str):
        raise UnknownNameError(f"{where}, field controller.kind", str(fields["kind"]), CONTROLLERS.names())
    cls = CONTROLLERS.get(fields.pop("kind"))
    known = set(cls.__dataclass_fields__)
    for key, value in fields.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"{where}, field controller.{key}", value, "unknown field", f"{hint}Known: {', '.join(sorted(known))}."
            )
    try:
        return TypeAdapter(cls).validate_python(fields)  # type: ignore[no-any-return]
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        raise InputError(
            f"{where}, field controller.{path}", first.get("input"), first["msg"], "Correct the value."
        ) from None


def load_scenario(path: Path) -> Scenario:
    """Read a scenario. Relative ``profile`` and ``workload.trace`` paths are taken from the file's folder."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), path.name, "no such file", "Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}", path.name, "not valid YAML", "Correct the syntax.") from None
    if not isinstance(raw, dict):
        raise InputError(str(path), type(raw).__name__, "a scenario is a mapping of fields", "See docs/formats.md.")
    for section, key in (("", "profile"), ("workload", "trace")):
        holder = raw.get(section) if section else raw
        if isinstance(holder, dict) and isinstance(holder.get(key), str) and not Path(holder[key]).is_absolute():
            beside = (path.parent / holder[key]).resolve()
            if beside.exists() or key == "trace" or "/" in holder[key]:  # else the name of a shipped profile
                holder[key] = str(beside)
    scenario = validate(Scenario, raw, str(path))
    with about(path):
        parse_controller(scenario.controller, str(path))
    return scenario
