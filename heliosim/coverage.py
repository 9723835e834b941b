"""How often nominal 95 % intervals hold the truth: queues with closed forms, many seeds, the real serving code.

For every seed a queue is treated as ``heliosim run`` treats a scenario: a pilot run says by MSER-5 what to leave out as
warm-up, independent replications give one mean and one 95th percentile of the waiting time each, and Student's t makes
an interval of them. The study counts how many of these intervals hold the closed form (``heliosim.queueing``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from heliosim.errors import InputError
from heliosim.executors import run_all
from heliosim.formats.files import Strict, read_json, validate, write_json
from heliosim.queueing import QueueCase, Service, simulate_waits
from heliosim.replicate import warm_up_of
from heliosim.stats import Interval, t_interval

CONFIDENCE, SHARE = 0.95, 0.95
LEAST, MOST = 0.90, 0.99
"""Share of seeds whose interval must hold the truth, between these, for a study to pass."""
REPLICATIONS = 5
CUSTOMERS: dict[tuple[Service, int], dict[float, int]] = {
    ("exponential", 1): {0.5: 2000, 0.8: 6000, 0.9: 14_000},
    ("constant", 1): {0.5: 2000, 0.8: 4000, 0.9: 7000},
    ("exponential", 4): {0.5: 4000, 0.8: 6000, 0.9: 14_000},
    ("erlang-2", 1): {0.5: 2000, 0.8: 5000, 0.9: 10_000},
}
"""Customers of one replication, by queue and load: 20 or more relaxation times 1 / (1 - sqrt(load))^2 (Abate and Whitt
1987) of M/M/1, since an interval is as good as its replications are long: short ones are skewed."""


@dataclass(frozen=True)
class CoverageCase:
    """One queue of the study and how long a replication of it is."""

    queue: QueueCase
    customers: int

    @property
    def key(self) -> str:
        return f"{self.queue.name} at {self.queue.load:.0%}, {self.customers} customers"


def cases(length: float = 1.0) -> list[CoverageCase]:
    """The twelve queues; ``length`` scales their runs."""
    return [
        CoverageCase(QueueCase(service, load, servers), max(100, round(length * customers)))
        for (service, servers), by_load in CUSTOMERS.items()
        for load, customers in by_load.items()
    ]


class SeedResult(Strict):
    """What one seed gave: intervals as (mean, half-width), and customers left out as warm-up."""

    mean: tuple[float, float]
    p95: tuple[float, float]
    cut: int


class CoverageFile(Strict):
    """Schema of the study's JSON file: settings, and results by queue (with its run length) and seed."""

    schema_version: Literal[1] = 1
    first_seed: int
    seeds: int
    replications: int
    results: dict[str, dict[int, SeedResult]]


@dataclass(frozen=True)
class CoverageRow:
    """One line of the table. ``mean_estimate``, ``mean_half_width``: averages over seeds, in mean service times."""

    queue: str
    load: float
    statistic: Literal["mean", "p95"]
    truth: float
    customers: int
    seeds: int
    covered: int
    mean_estimate: float
    mean_half_width: float
    mean_cut: float

    @property
    def share(self) -> float:
        return self.covered / self.seeds

    @property
    def passes(self) -> bool:
        return LEAST <= self.share <= MOST


def study_seed(item: tuple[CoverageCase, int]) -> SeedResult:
    """One seed of one queue: pilot, replications, intervals."""
    case, seed = item
    queue, customers = case.queue, case.customers
    names = (queue.name, f"{queue.load:g}")
    pilot = simulate_waits(queue, customers, seed, *names, "pilot")
    cut = warm_up_of([pilot]).requests
    means, tops = [], []
    for k in range(REPLICATIONS):
        waits = simulate_waits(queue, customers, seed, *names, k)[cut:]
        means.append(float(waits.mean()))
        tops.append(float(np.percentile(waits, 100 * SHARE)))
    return SeedResult(mean=_pair(t_interval(means, CONFIDENCE)), p95=_pair(t_interval(tops, CONFIDENCE)), cut=cut)


def _pair(interval: Interval) -> tuple[float, float]:
    assert interval.mean is not None
    return interval.mean, interval.half_width or 0.0


def run_coverage(
    out: Path,
    *,
    seeds: int = 200,
    first_seed: int = 0,
    length: float = 1.0,
    executor: Executor,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[CoverageRow]:
    """Run the study, or what is left of it: ``out`` (JSON) is kept up to date, and a study of the same settings in it
    is continued. Raises InputError if it holds another.
    """
    chosen = cases(length)
    known = _open(out, first_seed, seeds)
    results = {case.key: dict(known.results.get(case.key, {})) for case in chosen}
    items = [
        (case, seed)
        for case in sorted(chosen, key=lambda c: -c.customers)
        for seed in range(first_seed, first_seed + seeds)
        if seed not in results[case.key]
    ]
    work, done = sum(c.customers for c, _ in items) or 1, 0
    unsaved = 0

    def save() -> None:
        content = known.model_copy(update={"results": results})
        write_json(out, content.model_dump(mode="json"))

    def keep(index: int, result: SeedResult) -> None:
        nonlocal done, unsaved
        case, seed = items[index]
        results[case.key][seed] = result
        done += case.customers
        unsaved += case.customers
        if unsaved > work / 100:
            save()
            unsaved = 0
        if on_progress is not None:
            on_progress(f"{case.key}, {len(results[case.key])} of {seeds} seeds", done / work)

    try:
        run_all(executor, study_seed, items, keep)
    finally:
        save()
    return [row for case in chosen for row in rows_of(case, list(results[case.key].values()))]


def _open(out: Path, first_seed: int, seeds: int) -> CoverageFile:
    wanted = CoverageFile(first_seed=first_seed, seeds=seeds, replications=REPLICATIONS, results={})
    if not out.exists():
        return wanted
    try:
        found = validate(CoverageFile, read_json(out), str(out))
    except InputError:
        raise InputError(str(out), out.name, "holds no study of coverage", "Choose another file with --out.") from None
    if found.model_copy(update={"results": {}}) != wanted:
        raise InputError(str(out), out.name, "holds a study of other settings", "Choose another file, or remove it.")
    return found


def rows_of(case: CoverageCase, results: Sequence[SeedResult]) -> list[CoverageRow]:
    """The two lines of a queue: mean and 95th percentile of the waiting time."""
    truths = {"mean": case.queue.mean_wait, "p95": case.queue.wait_quantile(SHARE)}
    rows = []
    for statistic, truth in truths.items():
        pairs = [r.mean if statistic == "mean" else r.p95 for r in results]
        rows.append(
            CoverageRow(
                queue=case.queue.name,
                load=case.queue.load,
                statistic="mean" if statistic == "mean" else "p95",
                truth=truth,
                customers=case.customers,
                seeds=len(pairs),
                covered=sum(abs(mean - truth) <= half for mean, half in pairs),
                mean_estimate=float(np.mean([mean for mean, _ in pairs])),
                mean_half_width=float(np.mean([half for _, half in pairs])),
                mean_cut=float(np.mean([r.cut for r in results])),
            )
        )
    return rows


def to_dict(row: CoverageRow) -> dict[str, object]:
    """A line as plain data, with its share."""
    return {**asdict(row), "share": row.share, "passes": row.passes}
