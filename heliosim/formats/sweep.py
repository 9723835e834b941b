"""The sweep file: strict YAML that names a base scenario and what to vary. See docs/formats.md.

It knows no scenario: fields and values are checked where the points are made.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from heliosim.formats.files import Strict, read_yaml, validate
from heliosim.metrics import SCALARS, Slo

FIELD = re.compile(r"\w[\w-]*(\.[\w-]+)*")


class SweepFile(Strict):
    """``grid``: values by field, every combination. ``list``: settings of several fields at once, one after the other;
    with both, each entry of the list is combined with the whole grid. ``replications``: runs per point, with seeds of
    their own. ``after_s``: requests that arrived earlier count in no metric. ``metrics``: those the printed table
    shows; the written table has all.
    """

    schema_version: Literal[1] = 1
    base: str
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    list_: list[dict[str, Any]] = Field(default_factory=list, alias="list")
    replications: int = Field(default=1, ge=1, le=10_000)
    after_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    slo: Slo | None = None
    metrics: tuple[str, ...] = ()

    @field_validator("grid")
    @classmethod
    def _has_values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for path, values in value.items():
            if not FIELD.fullmatch(path):
                raise ValueError(f"{path!r} is not a dotted path to a field")
            if not values:
                raise ValueError(f"{path} has no values")
        return value

    @field_validator("list_")
    @classmethod
    def _names_fields(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, entry in enumerate(value):
            odd = next((path for path in entry if not FIELD.fullmatch(str(path))), None)
            if odd is not None:
                raise ValueError(f"entry {number}: {odd!r} is not a dotted path to a field")
        return value

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return known_metrics(value)

    @model_validator(mode="after")
    def _varies(self) -> SweepFile:
        both = sorted({path for entry in self.list_ for path in entry} & set(self.grid))
        if both:
            raise ValueError(f"{both[0]} is in both grid and list; give it in one")
        return self


def known_metrics(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, if all are metrics that are numbers. Raises ValueError naming the nearest known one."""
    import difflib

    for name in names:
        if name not in SCALARS:
            near = difflib.get_close_matches(name, SCALARS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; docs/metrics.md lists them"
            raise ValueError(f"{name!r} is not a metric{hint}")
    return names


def load_sweep(path: Path) -> SweepFile:
    """Read a sweep file. A plain scenario file is a sweep of that scenario that varies nothing yet."""
    raw = read_yaml(path)
    if "base" not in raw and "workload" in raw:
        return SweepFile(base=path.name)
    return validate(SweepFile, raw, str(path))
