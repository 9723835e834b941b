"""One set of tables of a fleet's many: each life of each replica has a recorder of its own.

Rows come by time, then by replica, then as they were recorded, so that the order depends on the run alone. Steps are
numbered anew. A request is where it left; tokens of attempts that a failure ended are dropped, the steps that made them
are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from heliosim.recorder import TableRecorder, Tables
from heliosim.types import RequestId

if TYPE_CHECKING:
    import pyarrow as pa


def merged(
    recorders: Sequence[TableRecorder], retries: Mapping[RequestId, int], tasks: Mapping[RequestId, str] | None = None
) -> Tables:
    """Tables of all recorders, those of one replica one behind the other. ``retries``: of requests that had any."""
    import pyarrow as pa

    said = [recorder for recorder in recorders if not recorder.is_empty] or recorders[:1]
    parts = [recorder.tables(tasks) for recorder in said]
    if retries:
        parts = [_of_requests_that_left(part) for part in parts]
    requests = _by_time([part.requests for part in parts], "finish_s")[0]
    steps, numbers = _by_time([part.steps for part in parts], "start_s")
    if len(parts) > 1:
        offsets = np.cumsum([0, *(part.steps.num_rows for part in parts[:-1])])
        steps = _with(steps, "step", pa.array(np.arange(steps.num_rows)))
        parts = [
            _with_tokens(part, _with(part.tokens, "step", pa.array(numbers[offset + part.tokens["step"].to_numpy()])))
            for part, offset in zip(parts, offsets, strict=True)
        ]
    if retries:
        counts = [retries.get(request, 0) for request in requests["request_id"].to_pylist()]
        requests = _with(requests, "retries", pa.array(counts, pa.int32()))
    tokens = _by_time([part.tokens for part in parts], "time_s")[0]
    return Tables(requests, steps, tokens, _by_time([part.events for part in parts], "time_s")[0])


def _by_time(tables: Sequence[pa.Table], column: str) -> tuple[pa.Table, np.ndarray]:
    """The rows of all tables by time, equals in their old order; and the new place of each old row."""
    import pyarrow as pa

    if len(tables) == 1:
        return tables[0], np.arange(tables[0].num_rows)
    whole = pa.concat_tables(tables)
    order = np.argsort(whole[column].to_numpy(), kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return whole.take(pa.array(order)), places


def _of_requests_that_left(part: Tables) -> Tables:
    """Without tokens of requests that did not leave here."""
    import pyarrow.compute as pc

    here = part.requests["request_id"]
    return _with_tokens(part, part.tokens.filter(pc.is_in(part.tokens["request_id"], here.combine_chunks())))


def _with(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), values)


def _with_tokens(part: Tables, tokens: pa.Table) -> Tables:
    return Tables(part.requests, part.steps, tokens, part.events)
