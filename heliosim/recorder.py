"""What a server tells about a run while it happens: steps, tokens, served requests, and events.

A recorder only listens: it never decides, and it may be left out (``NullRecorder``). ``TableRecorder``
appends to lists while the run lasts and makes tables afterwards, so a live run pays a few list operations per
step. It does not know what a request was about; the task is joined in when the tables are made.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

from heliosim.step_log import StepLog, as_array
from heliosim.types import (
    Load,
    Outcome,
    Placement,
    RequestId,
    Run,
    Seconds,
    Served,
    Setting,
    StepRecord,
    Stride,
    StrideRecord,
    StrideStep,
    StrideTokens,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from heliosim.types import Bools


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


ONLY_REPLICA = "replica-0"
"""What the one server of a scenario without a fleet is called."""
REQUESTS_AT_ONCE = 4096


class TableRecorder:
    """Keeps everything in memory, in the order it was told.

    ``keep_tokens``: whether to keep a row per token, which long simulations may not want. ``tokens`` of a step belong
    to the step recorded next: a server reports the tokens first; a stride brings its own. A step of kind
    ``load`` also becomes an event ``transition`` at the load's start, with the placements before and after
    it, the reason, and the seconds it took. ``replica``: who reports; None: nobody that serves.
    """

    def __init__(self, keep_tokens: bool = True, replica: str | None = ONLY_REPLICA) -> None:
        self.keep_tokens, self.replica = keep_tokens, replica
        self._events: list[tuple[Seconds, str, str]] = []
        self._placement: Placement | None = None
        self._log = StepLog(lambda: schemas().steps, replica)
        self._served: list[Served] = []
        self._requests: list[pa.RecordBatch] = []
        # One entry per token.
        self._token_request, self._token_step = array("q"), array("q")
        self._exit_layer, self._confidence, self._logprob = array("q"), array("d"), array("d")
        self._token_id, self._agrees = array("q"), array("b")

    def step(self, record: StepRecord) -> None:
        if record.kind == "load":
            self._transition(record)
        step = StrideStep(
            record.seconds,
            record.layers_run,
            record.rows,
            record.decode_rows,
            record.prefill_tokens,
            record.tokens_out,
        )
        setting = Setting(record.model, record.depth, record.weights_bytes, record.kv_total_bytes, record.is_probe)
        self._log.add(
            record.start_s,
            (step,),
            (record.kind, record.reason, setting),
            (record.waiting,),
            (record.running,),
            (record.kv_used_bytes,),
            1,
            (record.breaches,),
            energy_j=record.energy_j,
        )

    def stride(self, record: StrideRecord) -> None:
        start_s, stride, setting, waiting, running, kv_blocks, block_bytes, breaches, agrees = record
        if self.keep_tokens and stride.tokens is not None:
            self._stride_tokens(stride, stride.tokens, agrees)
        what = ("run", "", setting)
        self._log.add(start_s, stride.steps, what, waiting, running, kv_blocks, block_bytes, breaches, stride.watts)

    def tokens(self, now: Seconds, action: Run | Load, outcome: Outcome) -> None:
        tokens = outcome.tokens
        count = len(tokens.confidences)
        if not count or not self.keep_tokens:
            return
        self._token_request.extend(tokens.requests)
        self._token_step.extend(repeat(self._log.count, count))
        self._exit_layer.extend(tokens.exit_layers)
        self._confidence.extend(tokens.confidences)
        self._logprob.extend(tokens.logprobs)
        self._token_id.extend(repeat(-1, count) if tokens.ids is None else tokens.ids)
        self._agrees.extend(repeat(-1, count) if tokens.agrees is None else tokens.agrees)

    def served(self, record: Served) -> None:
        self._served.append(record)
        if len(self._served) >= REQUESTS_AT_ONCE:
            self._settle_requests()

    def event(self, now: Seconds, kind: str, detail: dict[str, Any]) -> None:
        self._events.append((now, kind, json.dumps(_plain(detail), sort_keys=True, allow_nan=False)))

    @property
    def is_empty(self) -> bool:
        """Whether it was told nothing."""
        return not (self._log.count or self._served or self._requests or self._events)

    def tables(self, tasks: Mapping[RequestId, str] | None = None) -> Tables:
        """The run so far as pyarrow tables. ``tasks`` names the task of each request; '' where unknown."""
        schema = schemas()
        steps = self._log.table()
        return Tables(
            requests=self._request_table(tasks or {}),
            steps=steps,
            tokens=_table(self._token_columns(steps), schema.tokens),
            events=_table(
                {name: [row[i] for row in self._events] for i, name in enumerate(("time_s", "kind", "detail"))}
                | {"replica": self._name(len(self._events))},
                schema.events,
            ),
        )

    def _stride_tokens(self, stride: Stride, tokens: StrideTokens, agrees: Callable[[], Bools] | None) -> None:
        import numpy as np

        steps = np.arange(self._log.count, self._log.count + len(stride))
        counts = [step.tokens_out for step in stride.steps]
        self._token_step.frombytes(np.repeat(steps, counts).tobytes())
        self._token_request.frombytes(tokens.requests.tobytes())
        self._exit_layer.frombytes(tokens.exit_layers.tobytes())
        self._confidence.frombytes(tokens.confidences.tobytes())
        self._logprob.frombytes(tokens.logprobs.tobytes())
        count = len(self._token_request) - len(self._token_id)
        ids = getattr(tokens, "ids", None)  # a live engine has them
        self._token_id.extend(repeat(-1, count)) if ids is None else self._token_id.frombytes(ids.tobytes())
        self._agrees.extend(repeat(-1, count)) if agrees is None else self._agrees.frombytes(agrees().tobytes())

    def _name(self, rows: int) -> pa.Array:
        """The column ``replica``."""
        import pyarrow as pa

        return pa.nulls(rows, pa.string()) if self.replica is None else pa.repeat(self.replica, rows)

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

    def _request_table(self, tasks: Mapping[RequestId, str]) -> pa.Table:
        import pyarrow as pa

        self._settle_requests()
        schema = schemas().requests
        whole = pa.Table.from_batches(self._requests, schema=schema)
        if not tasks:
            return whole
        names = [tasks.get(request, "") for request in whole["request_id"].to_pylist()]
        at = schema.get_field_index("task")
        return whole.set_column(at, schema.field(at), pa.array(names, pa.string()))

    def _settle_requests(self) -> None:
        """Turn requests that have left into columns; their tasks are yet to be named."""
        import pyarrow as pa

        rows, self._served = self._served, []
        if not rows:
            return
        columns: dict[str, Any] = {
            "replica": self._name(len(rows)),
            "retries": [0] * len(rows),
            "request_id": [r.id for r in rows],
            "task": [""] * len(rows),
            "model": [None if r.placement is None else r.placement.model for r in rows],
            "depth": [None if r.placement is None else r.placement.depth for r in rows],
        }
        schema = schemas().requests
        for name in schema.names:
            if name not in columns:
                columns[name] = list(map(attrgetter(name), rows))
        arrays = [as_array(columns[field.name], field.type) for field in schema]
        self._requests.append(pa.record_batch(arrays, schema=schema))

    def _token_columns(self, steps: pa.Table) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        def of_step(name: str) -> pa.Array:
            return steps[name].combine_chunks().take(at)

        step, ids, agrees = np.array(self._token_step), np.array(self._token_id), np.array(self._agrees)
        at = pa.array(step)
        ends = steps["start_s"].to_numpy() + steps["seconds"].to_numpy() if len(step) else np.zeros(0)
        request = np.array(self._token_request)
        return {
            "request_id": request,
            "position": _positions(request),
            "time_s": ends[step],
            "step": step,
            "model": of_step("model"),
            "depth": of_step("depth"),
            "exit_layer": np.array(self._exit_layer),
            "confidence": np.array(self._confidence),
            "logprob": np.array(self._logprob),
            "token_id": pa.array(ids, mask=ids < 0),
            "agrees": pa.array(agrees > 0, mask=agrees < 0),
            "is_probe": of_step("is_probe"),
        }


def _positions(request: Any) -> Any:
    """How many tokens of the same request stand before each token, [tokens]."""
    import numpy as np

    if not len(request):
        return request
    order = np.argsort(request, kind="stable")
    ordered = request[order]
    firsts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    counts = np.diff(firsts, append=len(ordered))
    position = np.empty(len(request), dtype=np.int64)
    position[order] = np.arange(len(ordered)) - np.repeat(firsts, counts)
    return position


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
            {"request_id": n, "task": s, "replica": s}
            | {"arrival_s": f, "admitted_s": f, "first_token_s": f, "finish_s": f}
            | {
                "prompt_tokens": i,
                "max_tokens": i,
                "output_tokens": i,
                "status": s,
                "refusal": s,
                "preemptions": i,
                "retries": i,
            }
            | {"logprob_sum": f, "is_probe": b, "model": s, "depth": i}
            | {"priority": i, "predicted_tokens": f, "recomputed_tokens": n},
            {"replica", "admitted_s", "first_token_s", "model", "depth", "predicted_tokens", "recomputed_tokens"},
        ),
        steps=schema(
            {
                "step": n,
                "replica": s,
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
        events=schema({"time_s": f, "replica": s, "kind": s, "detail": s}, set()),
    )


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns in the schema's order and types. Raises KeyError or an Arrow error if they do not match it."""
    import pyarrow as pa

    return pa.table([as_array(columns[field.name], field.type) for field in schema], schema=schema)


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
