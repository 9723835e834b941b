"""What a server tells about a run while it happens: steps, tokens, served requests, and events.

A recorder only listens: it never decides, and it may be left out (``NullRecorder``). ``TableRecorder``
appends to lists while the run lasts and makes tables afterwards, so a live run pays a few list operations per
step. It does not know what a request was about; the task is joined in when the tables are made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, repeat
from typing import TYPE_CHECKING, Any, Protocol

from heliosim.types import Load, Outcome, Placement, RequestId, Run, Seconds, Served, StepRecord, StrideRecord

if TYPE_CHECKING:
    import pyarrow as pa


class Recorder(Protocol):
    """Listens to a server. ``now`` is the time an action ended, in seconds on the driver's clock."""

    def step(self, record: StepRecord) -> None: ...
    def stride(self, record: StrideRecord) -> None: ...
    def tokens(self, now: Seconds, action: Run | Load, outcome: Outcome) -> None: ...
    def served(self, record: Served) -> None: ...
    def event(self, now: Seconds, kind: str, detail: dict[str, Any]) -> None: ...


class NullRecorder:
    """Keeps nothing."""

    def step(self, record: StepRecord) -> None: ...
    def stride(self, record: StrideRecord) -> None: ...
    def tokens(self, now: Seconds, action: Run | Load, outcome: Outcome) -> None: ...
    def served(self, record: Served) -> None: ...
    def event(self, now: Seconds, kind: str, detail: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Tables:
    """The four tables of a run; their columns are those of ``schemas``."""

    requests: pa.Table
    steps: pa.Table
    tokens: pa.Table
    events: pa.Table


class TableRecorder:
    """Keeps everything in memory, in the order it was told.

    ``keep_tokens``: whether to keep a row per token, which long simulations may not want. ``tokens`` of a step belong
    to the step recorded next: a server reports the tokens first; a stride brings its own. A step of kind
    ``load`` also becomes an event ``transition`` at the load's start, with the placements before and after
    it, the reason, and the seconds it took.
    """

    def __init__(self, keep_tokens: bool = True) -> None:
        self.keep_tokens = keep_tokens
        self._steps: list[StepRecord | StrideRecord] = []
        self._step_count = 0
        self._served: list[Served] = []
        self._events: list[tuple[Seconds, str, str]] = []
        self._placement: Placement | None = None
        # One entry per step that emitted: tokens, time, step, model, depth, is_probe. The columns below have
        # one per token.
        self._emitting: list[tuple[int, Seconds, int, str, int, bool]] = []
        self._request: list[RequestId] = []
        self._exit_layer: list[int] = []
        self._confidence: list[float] = []
        self._logprob: list[float] = []
        self._token_id: list[int | None] = []
        self._agrees: list[bool | None] = []

    def step(self, record: StepRecord) -> None:
        self._steps.append(record)
        self._step_count += 1
        if record.kind == "load":
            self._transition(record)

    def stride(self, record: StrideRecord) -> None:
        self._steps.append(record)
        stride, rows = record.stride, len(record.requests)
        if self.keep_tokens and stride.exit_layers is not None:
            assert stride.confidences is not None
            assert stride.logprobs is not None
            steps = len(stride)
            now = record.start_s
            for k, seconds in enumerate(stride.seconds):
                now += seconds
                self._emitting.append((rows, now, self._step_count + k, record.model, record.depth, record.is_probe))
            self._request.extend(record.requests * steps)
            self._exit_layer.extend(stride.exit_layers.ravel().tolist())
            self._confidence.extend(stride.confidences.ravel().tolist())
            self._logprob.extend(stride.logprobs.ravel().tolist())
            self._token_id.extend((None,) * (steps * rows))
            self._agrees.extend((None,) * (steps * rows) if stride.agrees is None else stride.agrees.ravel().tolist())
        self._step_count += len(stride)

    def tokens(self, now: Seconds, action: Run | Load, outcome: Outcome) -> None:
        tokens = outcome.tokens
        count = len(tokens.confidences)
        if not count or not self.keep_tokens:
            return
        placement = action.placement
        is_probe = isinstance(action, Run) and action.is_probe
        self._emitting.append((count, now, self._step_count, placement.model, placement.depth, is_probe))
        self._request.extend(tokens.requests)
        self._exit_layer.extend(tokens.exit_layers)
        self._confidence.extend(tokens.confidences)
        self._logprob.extend(tokens.logprobs)
        self._token_id.extend((None,) * count if tokens.ids is None else tokens.ids)
        self._agrees.extend((None,) * count if tokens.agrees is None else tokens.agrees)

    def served(self, record: Served) -> None:
        self._served.append(record)

    def event(self, now: Seconds, kind: str, detail: dict[str, Any]) -> None:
        self._events.append((now, kind, json.dumps(_plain(detail), sort_keys=True, allow_nan=False)))

    def tables(self, tasks: Mapping[RequestId, str] | None = None) -> Tables:
        """The run so far as pyarrow tables. ``tasks`` names the task of each request; '' where unknown."""
        schema = schemas()
        return Tables(
            requests=_table(self._request_columns(tasks or {}), schema.requests),
            steps=_table(self._step_columns(), schema.steps),
            tokens=_table(self._token_columns(), schema.tokens),
            events=_table(
                {name: [row[i] for row in self._events] for i, name in enumerate(("time_s", "kind", "detail"))},
                schema.events,
            ),
        )

    def _transition(self, record: StepRecord) -> None:
        old, new = self._placement, Placement(record.model, record.depth)
        self._placement = new
        detail = {
            "from": None if old is None else str(old),
            "to": str(new),
            "reason": record.reason,
            "seconds": record.seconds,
        }
        self.event(record.start_s, "transition", detail)

    def _step_columns(self) -> dict[str, Sequence[Any]]:
        rows: list[Iterable[tuple[Any, ...]]] = []
        single: list[StepRecord] = []
        for record in self._steps:
            if isinstance(record, StepRecord):
                single.append(record)
            else:
                rows += (single, _stride_rows(record))
                single = []
        columns = list(zip(*chain.from_iterable((*rows, single)), strict=True)) or [()] * len(StepRecord._fields)
        return {"step": range(self._step_count), **dict(zip(StepRecord._fields, columns, strict=True))}

    def _request_columns(self, tasks: Mapping[RequestId, str]) -> dict[str, list[Any]]:
        rows = self._served
        columns: dict[str, list[Any]] = {
            "request_id": [r.id for r in rows],
            "task": [tasks.get(r.id, "") for r in rows],
            "model": [None if r.placement is None else r.placement.model for r in rows],
            "depth": [None if r.placement is None else r.placement.depth for r in rows],
        }
        for name in schemas().requests.names:
            if name not in columns:
                columns[name] = [getattr(r, name) for r in rows]
        return columns

    def _token_columns(self) -> dict[str, Any]:
        import numpy as np

        counts = np.asarray([row[0] for row in self._emitting], dtype=np.int64)

        def spread(index: int, dtype: Any) -> Any:
            return np.repeat(np.asarray([row[index] for row in self._emitting], dtype=dtype), counts)

        seen: dict[RequestId, int] = {}
        position = []
        for request in self._request:
            at = seen.get(request, 0)
            position.append(at)
            seen[request] = at + 1
        return {
            "request_id": self._request,
            "position": position,
            "time_s": spread(1, np.float64),
            "step": spread(2, np.int64),
            "model": spread(3, object),
            "depth": spread(4, np.int32),
            "exit_layer": self._exit_layer,
            "confidence": self._confidence,
            "logprob": self._logprob,
            "token_id": self._token_id,
            "agrees": self._agrees,
            "is_probe": spread(5, np.bool_),
        }


def _stride_rows(record: StrideRecord) -> Iterator[tuple[Any, ...]]:
    """A stride's steps as they would have been recorded one by one: rows in the order of ``StepRecord``'s fields."""
    stride, steps, rows = record.stride, len(record.stride), len(record.requests)
    each: dict[str, Iterable[Any]] = {
        "start_s": accumulate(stride.seconds[:-1], initial=record.start_s),
        "seconds": stride.seconds,
        "layers_run": stride.layers_run,
        "running": record.running,
        "kv_used_bytes": record.kv_used_bytes,
        "breaches": record.breaches,
        "energy_j": repeat(None, steps) if stride.energy_j is None else stride.energy_j,
    }
    same: dict[str, Any] = {
        "kind": "run",
        "reason": "",
        "model": record.model,
        "depth": record.depth,
        "rows": rows,
        "decode_rows": rows,
        "prefill_tokens": 0,
        "tokens_out": rows,
        "waiting": record.waiting,
        "weights_bytes": record.weights_bytes,
        "kv_total_bytes": record.kv_total_bytes,
        "is_probe": record.is_probe,
    }
    columns = (each[name] if name in each else repeat(same[name], steps) for name in StepRecord._fields)
    return zip(*columns, strict=True)


@dataclass(frozen=True)
class Schemas:
    """Column names and types of the four tables. Times and durations are seconds, sizes bytes, ``logprob``
    natural logs.
    """

    requests: pa.Schema
    steps: pa.Schema
    tokens: pa.Schema
    events: pa.Schema


@cache
def schemas() -> Schemas:
    """The schemas; pyarrow is imported here, when the first table is made."""
    import pyarrow as pa

    f, i, n, s, b = pa.float64(), pa.int32(), pa.int64(), pa.string(), pa.bool_()

    def schema(columns: dict[str, Any], nullable: set[str]) -> pa.Schema:
        return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in columns.items()])

    return Schemas(
        requests=schema(
            {"request_id": n, "task": s, "arrival_s": f, "admitted_s": f, "first_token_s": f, "finish_s": f}
            | {
                "prompt_tokens": i,
                "max_tokens": i,
                "output_tokens": i,
                "status": s,
                "refusal": s,
                "preemptions": i,
            }
            | {"logprob_sum": f, "is_probe": b, "model": s, "depth": i},
            {"admitted_s", "first_token_s", "model", "depth"},
        ),
        steps=schema(
            {
                "step": n,
                "start_s": f,
                "seconds": f,
                "kind": s,
                "reason": s,
                "model": s,
                "depth": i,
                "layers_run": i,
            }
            | {"rows": i, "decode_rows": i, "prefill_tokens": i, "tokens_out": i, "waiting": i, "running": i}
            | {
                "weights_bytes": n,
                "kv_used_bytes": n,
                "kv_total_bytes": n,
                "breaches": i,
                "is_probe": b,
                "energy_j": f,
            },
            {"energy_j"},
        ),
        tokens=schema(
            {"request_id": n, "position": i, "time_s": f, "step": n, "model": s, "depth": i, "exit_layer": i}
            | {"confidence": f, "logprob": f, "token_id": i, "agrees": b, "is_probe": b},
            {"token_id", "agrees"},
        ),
        events=schema({"time_s": f, "kind": s, "detail": s}, set()),
    )


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns in the schema's order and types. Raises KeyError or an Arrow error if they do not match it."""
    import pyarrow as pa

    return pa.table([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def _plain(value: Any) -> Any:
    """A value JSON can hold: numbers without a finite value become their name, tuples lists, anything else
    its text.
    """
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if hasattr(value, "item"):
        return _plain(value.item())  # a numpy scalar
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
