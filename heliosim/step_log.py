"""The steps of a run as columns: kept as they come while the run lasts, turned into arrays a few thousand at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from heliosim.types import Bytes, Seconds, Setting, StrideStep

if TYPE_CHECKING:
    import pyarrow as pa

STEPS_AT_ONCE = 8192


class StepLog:
    """Steps, action by action. ``count``: how many steps there are."""

    def __init__(self) -> None:
        self.count = self._unsettled = 0
        self._pending: list[tuple[Any, ...]] = []
        self._codes: dict[tuple[Any, ...], int] = {}
        self._done: list[dict[str, Any]] = []

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
        watts: float | None = None,
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

    def columns(self) -> dict[str, Any]:
        """Every column of steps.parquet, in any order."""
        import numpy as np
        import pyarrow as pa

        self._settle()
        names = list(self._done[0]) if self._done else []
        columns = {name: np.concatenate([part[name] for part in self._done]) for name in names}
        codes = columns.pop("code")
        energy = columns["energy_j"]
        known = [(kind, reason, *setting) for kind, reason, setting in self._codes]
        spread_over = spread(("kind", "reason", *Setting._fields), known, codes)
        return columns | spread_over | {
            "step": np.arange(len(codes)),
            "energy_j": pa.array(energy, mask=np.isnan(energy)),
        }  # fmt: skip

    def _settle(self) -> None:
        """Turn what is pending into arrays."""
        import numpy as np

        pending, self._pending, self._unsettled = self._pending, [], 0
        if not pending and self._done:
            return
        starts, steps, what, waiting, running, blocks, block_bytes, breaches, watts, energies = (
            zip(*pending, strict=True) if pending else ((),) * 10
        )
        counts = np.fromiter(map(len, steps), np.int64, len(steps))
        total, width = int(counts.sum()), len(StrideStep._fields)

        def flat(lists: Any, dtype: Any, size: int = total) -> Any:
            return np.fromiter(chain.from_iterable(lists), dtype, size)

        def each(values: Any, dtype: Any) -> Any:
            return np.repeat(np.fromiter(values, dtype, len(counts)), counts)

        facts = flat(chain.from_iterable(steps), np.float64, total * width).reshape(-1, width)
        seconds = facts[:, 0].copy()
        ends = np.cumsum(seconds)  # exact: times are multiples of a tick, as are the differences below
        firsts = np.cumsum(counts) - counts
        part: dict[str, Any] = {name: facts[:, k].astype(np.int64) for k, name in enumerate(StrideStep._fields) if k}
        before = ends - seconds
        known = self._codes
        power = each((math.nan if w is None else w for w in watts), np.float64) * seconds
        given = each((math.nan if e is None else e for e in energies), np.float64)
        self._done.append(
            part
            | {
                "seconds": seconds,
                "start_s": each(starts, np.float64) + (before - np.repeat(before[firsts], counts)),
                "waiting": flat(waiting, np.int64),
                "running": flat(running, np.int64),
                "kv_used_bytes": flat(blocks, np.int64) * each(block_bytes, np.int64),
                "breaches": flat(breaches, np.int64),
                "energy_j": np.where(np.isnan(given), power, given),
                "code": each((known.setdefault(w, len(known)) for w in what), np.int32),
            }
        )


def spread(names: tuple[str, ...], known: list[tuple[Any, ...]], codes: Any) -> dict[str, pa.Array]:
    """Columns whose values repeat: the known combinations, by code."""
    import pyarrow as pa

    at = pa.array(codes)
    return {name: pa.array([values[i] for values in known]).take(at) for i, name in enumerate(names)}
