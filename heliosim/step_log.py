"""The steps of a run as columns: kept as they come while the run lasts, turned into arrays a few thousand at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from heliosim.types import Bytes, Seconds, Setting, StepPower, StrideStep

if TYPE_CHECKING:
    import pyarrow as pa

STEPS_AT_ONCE = 8192


class StepLog:
    """Steps, action by action. ``count``: how many steps there are. ``schema``: that of steps.parquet, when needed.
    ``replica``: whose steps they are.
    """

    def __init__(self, schema: Callable[[], pa.Schema], replica: str | None) -> None:
        self._schema, self._replica = schema, replica
        self.count = self._unsettled = 0
        self._pending: list[tuple[Any, ...]] = []
        self._done: list[pa.RecordBatch] = []
        self._constants: dict[tuple[str, Any], pa.Array] = {}

    @property
    def schema(self) -> pa.Schema:
        return self._schema()

    def add(
        self,
        start_s: Seconds,
        steps: Sequence[StrideStep],
        what: tuple[str, str, Setting],
        waiting: Sequence[int],
        running: Sequence[int],
        kv_blocks: Sequence[int],
        block_bytes: Bytes,
        breaches: Sequence[int],
        watts: StepPower | None = None,
        energy_j: float | None = None,
    ) -> None:
        """An action: what is the same for all of its steps, and lists with an entry for each.

        ``what``: kind, reason, setting. ``watts`` during the steps, or ``energy_j`` of a single one; None: unknown.
        """
        self._pending.append(
            (start_s, steps, what, waiting, running, kv_blocks, block_bytes, breaches, watts, energy_j)
        )
        self.count += len(steps)
        self._unsettled += len(steps)
        if self._unsettled >= STEPS_AT_ONCE:
            self._settle()

    def table(self) -> pa.Table:
        """The steps so far, with the columns of steps.parquet."""
        import pyarrow as pa

        self._settle()
        return pa.Table.from_batches(self._done, schema=self.schema)

    def _settle(self) -> None:
        """Turn what is pending into columns."""
        import numpy as np
        import pyarrow as pa

        pending, self._pending, self._unsettled = self._pending, [], 0
        if not pending:
            return
        starts, steps, what, waiting, running, blocks, block_bytes, breaches, watts, energies = zip(
            *pending, strict=True
        )
        counts = np.fromiter(map(len, steps), np.int64, len(steps))
        total = int(counts.sum())

        def flat(lists: Any, dtype: Any) -> Any:
            return np.fromiter(chain.from_iterable(lists), dtype, total)

        def each(values: Any, dtype: Any) -> Any:
            return np.repeat(np.fromiter(values, dtype, len(counts)), counts)

        every = list(chain.from_iterable(steps))  # many of them are one object: look at each object once
        _, firsts, which = np.unique(
            np.fromiter(map(id, every), np.int64, total), return_index=True, return_inverse=True
        )
        shown, width = [every[k] for k in firsts.tolist()], len(StrideStep._fields)
        facts = np.fromiter(chain.from_iterable(shown), np.float64, width * len(shown)).reshape(-1, width)[which]
        seconds = facts[:, 0].copy()
        before = np.cumsum(seconds) - seconds  # exact: times are multiples of a tick, as are the differences below
        firsts = np.cumsum(counts) - counts
        decode_w = each((math.nan if w is None else w.decode_w for w in watts), np.float64)
        prefill_w = each((math.nan if w is None else w.prefill_w for w in watts), np.float64)
        read = facts[:, StrideStep._fields.index("prefill_tokens")]
        tokens = read + facts[:, StrideStep._fields.index("decode_rows")]
        share = read / np.maximum(tokens, 1)  # as StepPower.joules, to the last bit
        power = (decode_w + (prefill_w - decode_w) * share) * seconds
        given = each((math.nan if e is None else e for e in energies), np.float64)
        energy = np.where(np.isnan(given), power, given)
        columns: dict[str, Any] = {
            "step": np.arange(self.count - total, self.count),
            "seconds": seconds,
            "start_s": each(starts, np.float64) + (before - np.repeat(before[firsts], counts)),
            "waiting": flat(waiting, np.int32),
            "running": flat(running, np.int32),
            "kv_used_bytes": flat(blocks, np.int64) * each(block_bytes, np.int64),
            "breaches": flat(breaches, np.int32),
        }
        columns |= {name: facts[:, k].astype(np.int32) for k, name in enumerate(StrideStep._fields) if k}
        has_energy = not np.isnan(energy).all()
        if has_energy:
            columns["energy_j"] = pa.array(energy, mask=np.isnan(energy))
        arrays = {name: as_array(values, self.schema.field(name).type) for name, values in columns.items()}
        self._append(arrays, what, counts, total)

    def _append(self, columns: dict[str, pa.Array], what: Sequence[Any], counts: Any, total: int) -> None:
        """Batches of steps that share a setting, so that what is the same for all of them takes no memory."""
        import pyarrow as pa

        start = 0
        ends = [k + 1 for k in range(len(what)) if k + 1 == len(what) or what[k + 1] != what[k]]
        stops = counts.cumsum()[[end - 1 for end in ends]].tolist()
        for end, stop in zip(ends, stops, strict=True):
            kind, reason, setting = what[end - 1]
            same = {"kind": kind, "reason": reason, "replica": self._replica, "energy_j": None, **setting._asdict()}
            arrays = [
                columns[field.name].slice(start, stop - start)
                if field.name in columns
                else self._repeated(field, same[field.name], stop - start)
                for field in self.schema
            ]
            self._done.append(pa.record_batch(arrays, schema=self.schema))
            start = stop
        assert start == total

    def _repeated(self, field: pa.Field, value: Any, count: int) -> pa.Array:
        """A column of one value, a piece of one that is made once."""
        import pyarrow as pa

        known = self._constants.get((field.name, value))
        if known is None or len(known) < count:
            known = pa.repeat(pa.scalar(value, field.type), max(count, 1024))
            self._constants[field.name, value] = known
        return known.slice(0, count)


def as_array(values: Any, kind: pa.DataType) -> pa.Array:
    """Values as an array of a type. Raises KeyError or an Arrow error if they do not fit."""
    import pyarrow as pa

    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)
