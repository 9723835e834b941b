"""Replications beside the run they belong to: ``replications.parquet`` (a row for each) and ``replications.json`` (what
was asked, and the intervals). Both are optional parts of a run folder, and the same bytes every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from heliosim.errors import InputError
from heliosim.formats.files import Strict, read_json, sha256_of, validate, write_json
from heliosim.formats.whole import write_whole_table
from heliosim.metrics import SCALARS
from heliosim.replicated import Horizon, Replicated, Replication, WarmUp
from heliosim.stats import StoppingRule

TABLE, SUMMARY = "replications.parquet", "replications.json"
_REMEDY = "Run the scenario again, or remove both files of the replications; they are optional."
_FACTS = ("index", "seed", "requests", "after_s", "drift", "is_saturated")
_LATER = {
    "recomputed_tokens",
    "prediction_tau",
    "prediction_mae_tokens",
    "prefill_energy_j",
    "decode_energy_j",
    "load_energy_j",
    "probe_energy_j",
    "idle_energy_j",
    "joules_per_token",
    "joules_per_prompt",
    "wh_per_prompt",
    "joules_per_token_with_idle",
    "wh_per_prompt_with_idle",
}
"""Metrics that tables of older versions lack."""


class _WarmUp(Strict):
    requests: int
    source: Literal["mser-5", "given", "none"]
    is_settled: bool


class _Rule(Strict):
    least: int
    most: int
    relative_half_width: float
    confidence: float


class IntervalEntry(Strict):
    """One metric's mean over replications. ``half_width`` null: unavailable, for the ``reason``."""

    mean: float | None
    half_width: float | None
    reason: str


class ReplicationsFile(Strict):
    """Schema of replications.json."""

    schema_version: Literal[1] = 1
    name: str
    horizon: Horizon
    warm_up: _WarmUp
    rule: _Rule
    watched: tuple[str, ...]
    profile_uncertainty: bool
    count: int
    is_saturated: bool
    intervals: dict[str, IntervalEntry]
    table: str


def save_replications(folder: Path, replicated: Replicated) -> None:
    """Write both files into a run folder."""
    write_whole_table(folder / TABLE, _table(replicated))
    rule, warm_up = replicated.rule, replicated.warm_up
    intervals = {name: replicated.interval(name) for name in SCALARS}
    content = ReplicationsFile(
        name=replicated.name,
        horizon=replicated.horizon,
        warm_up=_WarmUp(requests=warm_up.requests, source=warm_up.source, is_settled=warm_up.is_settled),
        rule=_Rule(
            least=rule.least,
            most=rule.most,
            relative_half_width=rule.relative_half_width,
            confidence=rule.confidence,
        ),
        watched=replicated.watched,
        profile_uncertainty=replicated.profile_uncertainty,
        count=replicated.count,
        is_saturated=replicated.is_saturated,
        intervals={
            n: IntervalEntry(mean=i.mean, half_width=i.half_width, reason=i.reason) for n, i in intervals.items()
        },
        table=sha256_of(folder / TABLE),
    )
    write_json(folder / SUMMARY, content.model_dump(mode="json"))


def load_replications(folder: Path) -> Replicated | None:
    """The replications of a run folder; None if it has none. Raises InputError naming a damaged file."""
    path = folder / SUMMARY
    if not path.exists() and not (folder / TABLE).exists():
        return None
    content = validate(ReplicationsFile, read_json(path), str(path))
    return Replicated(
        name=content.name,
        horizon=content.horizon,
        warm_up=WarmUp(**content.warm_up.model_dump()),
        rule=StoppingRule(**content.rule.model_dump()),
        watched=content.watched,
        replications=tuple(_rows(folder / TABLE, content.table)),
        profile_uncertainty=content.profile_uncertainty,
    )


def _table(replicated: Replicated) -> Any:
    import pyarrow as pa

    rows = replicated.replications
    columns: dict[str, Any] = {
        "index": pa.array([r.index for r in rows], pa.int64()),
        "seed": pa.array([str(r.seed) for r in rows], pa.string()),  # a scenario's may be larger than 64 bits hold
        "requests": pa.array([r.requests for r in rows], pa.int64()),
        "after_s": pa.array([r.after_s for r in rows], pa.float64()),
        "drift": pa.array([r.drift for r in rows], pa.float64()),
        "is_saturated": pa.array([r.is_saturated for r in rows], pa.bool_()),
    }
    columns |= {name: pa.array(replicated.values(name), pa.float64()) for name in SCALARS}
    return pa.table(columns)


def _rows(path: Path, digest: str) -> list[Replication]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError(str(path), path.name, "the table of the replications is missing", _REMEDY)
    if sha256_of(path) != digest:
        raise InputError(str(path), path.name, "the file was changed or damaged since the run", _REMEDY)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(str(path), path.name, f"not a readable table: {reason}", _REMEDY) from None
    odd = sorted({*table.column_names} - {*_FACTS, *SCALARS}) or sorted(
        {*_FACTS, *SCALARS} - {*table.column_names, *_LATER}
    )
    if odd:
        raise InputError(f"{path}, columns", odd[0], "missing or unknown column", _REMEDY)
    return [
        Replication(
            index=row["index"],
            seed=int(row["seed"]),
            requests=row["requests"],
            after_s=row["after_s"],
            drift=row["drift"],
            is_saturated=row["is_saturated"],
            values={name: row.get(name) for name in SCALARS},
        )
        for row in table.to_pylist()
    ]
