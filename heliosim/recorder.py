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
from typing import TYPE_CHECKING, Any, Protocol

from heliosim.types import (
    Load,
    Outcome,
    Placement,
    RequestId,
    Run,
    Seconds,
    Served,
    StepRecord,
    Stride,
    StrideRecord,
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


class TableRecorder:
    """Keeps everything in memory, in the order it was told.

    ``keep_tokens``: whether to keep a row per token, which long simulations may not want. ``tokens`` of a step belong
    to the step recorded next: a server reports the tokens first; a stride brings its own. A step of kind
    ``load`` also becomes an event ``transition`` at the load's start, with the placements before and after
    it, the reason, and the seconds it took.
    """

    def __init__(self, keep_tokens: bool = True) -> None:
        self.keep_tokens = keep_tokens
        self._events: list[tuple[Seconds, str, str]] = []
        self._placement: Placement | None = None
        # One entry per step.
        self._seconds, self._energy_j = array("d"), array("d")
        self._layers_run, self._rows, self._decode_rows = array("q"), array("q"), array("q")
        self._prefill_tokens, self._tokens_out, self._running = array("q"), array("q"), array("q")
        self._kv_used, self._breaches = array("q"), array("q")
        # One entry per action: its first step, start, and what is the same for all of its steps.
        self._firsts, self._starts, self._waiting = array("q"), array("d"), array("q")
        self._settings = array("q")
        self._known_settings: dict[tuple[Any, ...], int] = {}
        # One entry per request.
        self._ids, self._prompts, self._limits, self._outputs = array("q"), array("q"), array("q"), array("q")
        self._arrivals, self._finishes = array("d"), array("d")
        self._admitted, self._first_tokens = array("d"), array("d")
        self._preemptions, self._logprob_sums = array("q"), array("d")
        self._ends = array("q")
        self._known_ends: dict[tuple[Any, ...], int] = {}
        # One entry per token.
        self._token_request, self._token_step = array("q"), array("q")
        self._exit_layer, self._confidence, self._logprob = array("q"), array("d"), array("d")
        self._token_id, self._agrees = array("q"), array("b")

    @property
    def _step_count(self) -> int:
        return len(self._seconds)

    def step(self, record: StepRecord) -> None:
        if record.kind == "load":
            self._transition(record)
        self._act(
            record.start_s,
            record.waiting,
            (
                record.kind,
                record.reason,
                record.model,
                record.depth,
                record.weights_bytes,
                record.kv_total_bytes,
                record.is_probe,
            ),
        )
        self._seconds.append(record.seconds)
        self._layers_run.append(record.layers_run)
        self._rows.append(record.rows)
        self._decode_rows.append(record.decode_rows)
        self._prefill_tokens.append(record.prefill_tokens)
        self._tokens_out.append(record.tokens_out)
        self._running.append(record.running)
        self._kv_used.append(record.kv_used_bytes)
        self._breaches.append(record.breaches)
        self._energy_j.append(math.nan if record.energy_j is None else record.energy_j)

    def stride(self, record: StrideRecord) -> None:
        stride = record.stride
        if self.keep_tokens and stride.tokens is not None:
            self._stride_tokens(stride, stride.tokens, record.agrees)
        self._act(
            record.start_s,
            record.waiting,
            (
                "run",
                "",
                record.model,
                record.depth,
                record.weights_bytes,
                record.kv_total_bytes,
                record.is_probe,
            ),
        )
        self._seconds.fromlist(stride.seconds)
        self._layers_run.fromlist(stride.layers_run)
        self._rows.fromlist(stride.rows)
        self._decode_rows.fromlist(stride.decode_rows)
        self._prefill_tokens.fromlist(stride.prefill_tokens)
        self._tokens_out.fromlist(stride.tokens_out)
        self._running.fromlist(record.running)
        self._kv_used.fromlist(record.kv_used_bytes)
        self._breaches.extend(record.breaches)
        self._energy_j.extend(repeat(math.nan, len(stride)) if stride.energy_j is None else stride.energy_j)

    def tokens(self, now: Seconds, action: Run | Load, outcome: Outcome) -> None:
        tokens = outcome.tokens
        count = len(tokens.confidences)
        if not count or not self.keep_tokens:
            return
        self._token_request.extend(tokens.requests)
        self._token_step.extend(repeat(self._step_count, count))
        self._exit_layer.extend(tokens.exit_layers)
        self._confidence.extend(tokens.confidences)
        self._logprob.extend(tokens.logprobs)
        self._token_id.extend(repeat(-1, count) if tokens.ids is None else tokens.ids)
        self._agrees.extend(repeat(-1, count) if tokens.agrees is None else tokens.agrees)

    def served(self, record: Served) -> None:
        self._ids.append(record.id)
        self._arrivals.append(record.arrival_s)
        self._admitted.append(math.nan if record.admitted_s is None else record.admitted_s)
        self._first_tokens.append(math.nan if record.first_token_s is None else record.first_token_s)
        self._finishes.append(record.finish_s)
        self._prompts.append(record.prompt_tokens)
        self._limits.append(record.max_tokens)
        self._outputs.append(record.output_tokens)
        self._preemptions.append(record.preemptions)
        self._logprob_sums.append(record.logprob_sum)
        placement = record.placement
        model, depth = (None, None) if placement is None else (placement.model, placement.depth)
        known = self._known_ends
        self._ends.append(known.setdefault((record.status, record.refusal, record.is_probe, model, depth), len(known)))

    def event(self, now: Seconds, kind: str, detail: dict[str, Any]) -> None:
        self._events.append((now, kind, json.dumps(_plain(detail), sort_keys=True, allow_nan=False)))

    def tables(self, tasks: Mapping[RequestId, str] | None = None) -> Tables:
        """The run so far as pyarrow tables. ``tasks`` names the task of each request; '' where unknown."""
        schema = schemas()
        steps = self._step_columns()
        return Tables(
            requests=_table(self._request_columns(tasks or {}), schema.requests),
            steps=_table(steps, schema.steps),
            tokens=_table(self._token_columns(steps), schema.tokens),
            events=_table(
                {name: [row[i] for row in self._events] for i, name in enumerate(("time_s", "kind", "detail"))},
                schema.events,
            ),
        )

    def _act(self, start_s: Seconds, waiting: int, setting: tuple[Any, ...]) -> None:
        self._firsts.append(len(self._seconds))
        self._starts.append(start_s)
        self._waiting.append(waiting)
        known = self._known_settings
        self._settings.append(known.setdefault(setting, len(known)))

    def _stride_tokens(self, stride: Stride, tokens: StrideTokens, agrees: Callable[[], Bools] | None) -> None:
        import numpy as np

        steps = np.arange(self._step_count, self._step_count + len(stride))
        self._token_step.frombytes(np.repeat(steps, stride.tokens_out).tobytes())
        self._token_request.frombytes(tokens.requests.tobytes())
        self._exit_layer.frombytes(tokens.exit_layers.tobytes())
        self._confidence.frombytes(tokens.confidences.tobytes())
        self._logprob.frombytes(tokens.logprobs.tobytes())
        count = len(self._token_request) - len(self._token_id)
        self._token_id.extend(repeat(-1, count))
        self._agrees.extend(repeat(-1, count)) if agrees is None else self._agrees.frombytes(agrees().tobytes())

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

    def _step_columns(self) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        seconds, firsts = np.array(self._seconds), np.array(self._firsts)
        counts = np.diff(firsts, append=len(seconds))
        before = np.cumsum(seconds) - seconds  # exact: times are multiples of a tick
        of_action = np.repeat(np.arange(len(firsts)), counts)
        settings = np.array(self._settings, dtype=np.int32)[of_action]
        energy = np.array(self._energy_j)
        columns: dict[str, Any] = {
            "step": np.arange(len(seconds)),
            "start_s": np.array(self._starts)[of_action] + (before - before[firsts[of_action]]),
            "seconds": seconds,
            "layers_run": np.array(self._layers_run),
            "rows": np.array(self._rows),
            "decode_rows": np.array(self._decode_rows),
            "prefill_tokens": np.array(self._prefill_tokens),
            "tokens_out": np.array(self._tokens_out),
            "waiting": np.array(self._waiting)[of_action],
            "running": np.array(self._running),
            "kv_used_bytes": np.array(self._kv_used),
            "breaches": np.array(self._breaches),
            "energy_j": pa.array(energy, mask=np.isnan(energy)),
        }
        names = ("kind", "reason", "model", "depth", "weights_bytes", "kv_total_bytes", "is_probe")
        return columns | _spread(names, list(self._known_settings), settings)

    def _request_columns(self, tasks: Mapping[RequestId, str]) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        admitted, first_tokens = np.array(self._admitted), np.array(self._first_tokens)
        columns: dict[str, Any] = {
            "request_id": np.array(self._ids),
            "task": [tasks.get(request, "") for request in self._ids],
            "arrival_s": np.array(self._arrivals),
            "admitted_s": pa.array(admitted, mask=np.isnan(admitted)),
            "first_token_s": pa.array(first_tokens, mask=np.isnan(first_tokens)),
            "finish_s": np.array(self._finishes),
            "prompt_tokens": np.array(self._prompts),
            "max_tokens": np.array(self._limits),
            "output_tokens": np.array(self._outputs),
            "preemptions": np.array(self._preemptions),
            "logprob_sum": np.array(self._logprob_sums),
        }
        names = ("status", "refusal", "is_probe", "model", "depth")
        return columns | _spread(names, list(self._known_ends), np.array(self._ends, dtype=np.int32))

    def _token_columns(self, steps: Mapping[str, Any]) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        step, ids, agrees = np.array(self._token_step), np.array(self._token_id), np.array(self._agrees)
        request = np.array(self._token_request)
        return {
            "request_id": request,
            "position": _positions(request),
            "time_s": (steps["start_s"] + steps["seconds"])[step],
            "step": step,
            "model": steps["model"].take(pa.array(step)),
            "depth": steps["depth"].take(pa.array(step)),
            "exit_layer": np.array(self._exit_layer),
            "confidence": np.array(self._confidence),
            "logprob": np.array(self._logprob),
            "token_id": pa.array(ids, mask=ids < 0),
            "agrees": pa.array(agrees > 0, mask=agrees < 0),
            "is_probe": steps["is_probe"].take(pa.array(step)),
        }


def _spread(names: tuple[str, ...], known: list[tuple[Any, ...]], codes: Any) -> dict[str, pa.Array]:
    """Columns whose values repeat: the known combinations, by code."""
    import pyarrow as pa

    at = pa.array(codes)
    return {name: pa.array([values[i] for values in known]).take(at) for i, name in enumerate(names)}


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

    def typed(values: Any, kind: pa.DataType) -> pa.Array:
        return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)

    return pa.table([typed(columns[field.name], field.type) for field in schema], schema=schema)


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
