"""The tune file: strict YAML that names a base scenario, what to search, for what, and within which limits.

See docs/formats.md. It knows no scenario: fields and values are checked where trials are made.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from heliosim.errors import InputError
from heliosim.formats.files import Strict, read_yaml, validate
from heliosim.formats.sweep import FIELD, known_metrics
from heliosim.metrics import Slo, metric_spec


class Range(Strict):
    """Where a parameter may lie: ``low`` to ``high`` (whole numbers if both are), by ``step`` or on a ``log`` scale; or
    one of ``choices``, which may be lists or mappings.
    """

    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = Field(default=None, gt=0)
    log: bool = False
    choices: tuple[Any, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        if self.choices:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError("give choices, or low and high")
            if len({json.dumps(c, sort_keys=True) for c in self.choices}) < len(self.choices):
                raise ValueError("a choice is given twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        if self.log and (self.step is not None or self.low <= 0):
            raise ValueError("log needs low above 0, and no step")
        if self.is_whole and isinstance(self.step, float):
            raise ValueError("the step of whole numbers is a whole number")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it."""
        if self.choices:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or (self.is_whole and value != int(value)):
            return False
        assert self.low is not None
        assert self.high is not None
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-9


class Limit(Strict):
    """A bound a metric must keep; exactly one of the two."""

    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Limit:
        given = [v for v in (self.at_most, self.at_least) if v is not None]
        if len(given) != 1 or not math.isfinite(given[0]):
            raise ValueError("give at_most or at_least, a number")
        return self

    def excess(self, value: float) -> float:
        """How far a value lies outside, relative to the limit; 0 or less: it keeps it."""
        limit = self.at_most if self.at_most is not None else self.at_least
        assert limit is not None
        over = value - limit if self.at_most is not None else limit - value
        return over / (abs(limit) or 1.0)

    def __str__(self) -> str:
        return f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"


class Objective(Strict):
    """A metric and whether more or less of it is wanted; ``goal`` may be left out where the metric says."""

    metric: str
    goal: Literal["maximise", "minimise"] | None = None

    @model_validator(mode="after")
    def _known(self) -> Objective:
        known_metrics((self.metric,))
        if self.goal is None and metric_spec(self.metric).better == "neither":
            raise ValueError(f"goal: say maximise or minimise, {self.metric} alone does not tell")
        return self

    @property
    def is_maximised(self) -> bool:
        return self.goal == "maximise" or (self.goal is None and metric_spec(self.metric).better == "higher")


class TuneFile(Strict):
    """``search``: ranges by field. ``constraints``: limits by metric. ``trials`` in batches of ``batch``; each trial is
    the mean over ``seeds`` runs, the best ones are measured again with ``fresh_seeds`` others. ``after_s``: requests
    that arrived earlier count in no metric.
    """

    schema_version: Literal[1] = 1
    base: str
    search: dict[str, Range] = Field(min_length=1)
    objective: Objective
    constraints: dict[str, Limit] = Field(default_factory=dict)
    trials: int = Field(default=50, ge=1)
    batch: int = Field(default=4, ge=1, le=1000)
    seeds: int = Field(default=3, ge=1)
    fresh_seeds: int = Field(default=5, ge=1)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = Field(default=0, ge=0)
    after_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    slo: Slo | None = None

    @field_validator("search")
    @classmethod
    def _names_fields(cls, value: dict[str, Range]) -> dict[str, Range]:
        odd = next((path for path in value if not FIELD.fullmatch(path)), None)
        if odd is not None:
            raise ValueError(f"{odd!r} is not a dotted path to a field")
        if "seed" in value:
            raise ValueError("seed is not searched: every trial sees the same seeds")
        return value

    @field_validator("constraints")
    @classmethod
    def _known(cls, value: dict[str, Limit]) -> dict[str, Limit]:
        known_metrics(tuple(value))
        return value


def load_tune(path: Path) -> TuneFile:
    """Read a tune file. Raises InputError naming the field."""
    raw = read_yaml(path)
    if "search" not in raw and "workload" in raw:
        remedy = "Write a tune file that names it as base; see docs/tuning.md."
        raise InputError(str(path), path.name, "this is a scenario", remedy)
    return validate(TuneFile, raw, str(path))
