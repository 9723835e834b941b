"""What a run's numbers need to know of replicas: whose row is whose, what all hold together, how each one did.

A table of steps holds the rows of every replica, by time. Within one replica rows follow each other; a row of kind
``lost`` says that the replica failed there and holds nothing until its next row. All times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from heliosim.types import Seconds

if TYPE_CHECKING:
    import pyarrow as pa

    from heliosim.formats.results import RunResults

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Window = tuple[Seconds, Seconds]


def replica_codes(table: pa.Table) -> tuple[Ints, list[str]]:
    """The replica of each row as a place in a list of names in order of first mention; -1 where there is none."""
    import pyarrow.compute as pc

    names = pc.unique(table["replica"]).to_pylist()
    if len(names) == 1 and names[0] is not None:  # no need to look at every row of a long run
        return np.zeros(table.num_rows, dtype=np.int64), names
    encoded = table["replica"].combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary.to_pylist()


def by_owner(codes: Ints) -> Ints:
    """Places of rows, those of one replica one behind the other, in their old order."""
    if len(codes) and codes.min() >= -1 and codes.max() < 2**15:
        return np.argsort(codes.astype(np.int16), kind="stable")  # small numbers are sorted without comparing them
    return np.argsort(codes, kind="stable")


def held_until(start: Floats, end: Floats, codes: Ints, run_end: Seconds) -> Floats:
    """When the next row of the same replica starts; behind its last one: the end of the run, or its own if later."""
    if not codes.any():
        return np.append(start[1:], np.maximum(run_end, end[-1:]))
    order = by_owner(codes)
    until = np.empty_like(start)
    until[order[:-1]] = start[order[1:]]
    owners = codes[order]
    is_last = np.append(owners[1:] != owners[:-1], True)[: len(order)]
    last = order[is_last]
    until[last] = np.maximum(run_end, end[last])
    return until


def peak_together(start: Floats, end: Floats, value: Ints, is_over: Bools, codes: Ints, window: Window) -> int | None:
    """The most all replicas hold at one time. ``value`` of a row holds from its start to the next row of its replica,
    or to its end where ``is_over``. None: nothing is known of the window. Rows of one replica come in order of time.
    """
    value = np.where(is_over & (end <= start), 0, value)
    order = by_owner(codes)
    owners, left = codes[order], np.where(is_over, 0, value)[order]
    before = np.zeros(len(order), np.int64)  # what the replica held until its row starts
    before[order[1:]] = np.where(owners[1:] == owners[:-1], left[:-1], 0)
    time = np.concatenate((start, end[is_over]))
    change = np.concatenate((value - before, -value[is_over]))
    order = np.argsort(time, kind="stable")  # rows come by time: nearly sorted
    time, total = time[order], np.cumsum(change[order])
    settled = np.append(time[1:] != time[:-1], True)[: len(time)]  # rows of one moment count together
    time, total = time[settled], total[settled]
    lasting = np.minimum(np.append(time[1:], np.inf)[: len(time)], window[1]) - np.maximum(time, window[0])
    return int(total[lasting > 0].max()) if (lasting > 0).any() else None


def load_rows(steps: pa.Table) -> list[dict[str, Any]]:
    """Loads in order, with ``is_first`` (of its replica) and ``is_cold`` (first, or the first after a failure)."""
    import pyarrow.compute as pc

    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    cold: set[str] = set()
    for row in steps.filter(pc.not_equal(steps["kind"], "run")).to_pylist():
        name = row["replica"]
        if row["kind"] == "fetch":
            continue
        if row["kind"] == "lost":
            cold.add(name)
        else:
            is_first = name not in seen and name not in cold
            found.append({**row, "is_first": is_first, "is_cold": is_first or name in cold})
            cold.discard(name)
        seen.add(name)
    return found


@dataclass(frozen=True)
class ReplicaSummary:
    """How one replica did, over the window of the whole run. None: no data.

    ``requests``: finished there; ``share``: of all that finished. ``utilisation``: share of the window in which it did
    a step or a load, time down included in the window. ``lost_requests``: taken from it by failures.
    """

    name: str
    requests: int
    share: float | None
    utilisation: float | None
    output_throughput: float | None
    p99_ttft_ms: float | None
    failures: int
    lost_requests: int


def by_replica(results: RunResults, after_s: Seconds = 0.0) -> list[ReplicaSummary]:
    """One summary per replica that has steps, in order of first mention; requests are those of ``summarise``."""
    arrival, first, finish = (_floats(results.requests, c) for c in ("arrival_s", "first_token_s", "finish_s"))
    output = _floats(results.requests, "output_tokens")
    is_finished = np.asarray(results.requests["status"].to_pylist(), dtype=object) == "finished"
    kept = (arrival >= after_s) & is_finished
    window = (float(arrival[arrival >= after_s].min()), float(finish[kept].max())) if kept.any() else None
    owner, owners = replica_codes(results.requests)
    codes, names = replica_codes(results.steps)
    busy = _busy(results.steps, window)
    failures, lost = _failures(results)
    found = []
    for k, name in enumerate(names):
        own = kept & (owner == (owners.index(name) if name in owners else -2))
        length = None if window is None or window[1] <= window[0] else window[1] - window[0]
        ttft = 1e3 * (first - arrival)[own]
        found.append(
            ReplicaSummary(
                name=name,
                requests=int(own.sum()),
                share=float(own.sum() / kept.sum()) if kept.any() else None,
                utilisation=None if length is None else float(busy[codes == k].sum()) / length,
                output_throughput=None if length is None else float(output[own].sum()) / length,
                p99_ttft_ms=float(np.percentile(ttft, 99)) if len(ttft) else None,
                failures=failures.get(name, 0),
                lost_requests=lost.get(name, 0),
            )
        )
    return found


def _busy(steps: pa.Table, window: Window | None) -> Floats:
    """Seconds of each row inside the window."""
    start, seconds = _floats(steps, "start_s"), _floats(steps, "seconds")
    if window is None:
        return np.zeros(len(start))
    inside: Floats = np.clip(np.minimum(start + seconds, window[1]) - np.maximum(start, window[0]), 0, None)
    return inside


def _failures(results: RunResults) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Failures of each replica, and requests taken from it."""
    import json

    failures: dict[str, int] = {}
    lost: dict[str, int] = {}
    columns = (results.events[c].to_pylist() for c in ("replica", "kind", "detail"))
    for name, kind, detail in zip(*columns, strict=True):
        if kind == "failed":
            failures[name] = failures.get(name, 0) + 1
        elif kind == "rerouted":
            lost[name] = lost.get(name, 0) + int(json.loads(detail)["requests"])
    return failures, lost


def _floats(table: pa.Table, name: str) -> Floats:
    values: Floats = table[name].cast("double").to_numpy()
    return values
