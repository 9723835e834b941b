"""Runs the experiments that rows need, remembers each result, and computes the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heliosim.executors import open_executor, run_all
from heliosim.formats.files import read_json, write_json
from heliosim.reproduction.book import experiments_of
from heliosim.reproduction.rows import Answer, Experiment, Metrics, Row
from heliosim.reproduction.settings import key_of, perform
from heliosim.reproduction.setups import is_choosing
from heliosim.streams import replication_seed

OnProgress = Callable[[str, float], None]
CACHE = "runs"
QUICK_SHARE = 0.1
"""Of the requests, in a quick reproduction."""


@dataclass(frozen=True)
class Plan:
    """What is to be run: ``jobs`` as (experiment, replication), those already in ``known`` left out."""

    rows: Sequence[Row]
    replications: int
    share: float
    known: Mapping[tuple[Experiment, int], Metrics]
    jobs: Sequence[tuple[Experiment, int]]

    @property
    def experiments(self) -> list[Experiment]:
        return experiments_of(list(self.rows))


CHOOSING_SEED, REPORTED_SEED = 0, 1
"""Replications that a set-up was chosen by have other seeds than those that are reported."""


def seed_of(experiment: Experiment, replication: int) -> int:
    return replication_seed(CHOOSING_SEED if is_choosing(experiment.setup) else REPORTED_SEED, replication + 1)


def plan(rows: Sequence[Row], folder: Path, replications: int, share: float = 1.0) -> Plan:
    """Look what the folder knows already."""
    known: dict[tuple[Experiment, int], Metrics] = {}
    jobs = []
    experiments = experiments_of(list(rows))
    for k in range(replications):  # replication by replication: exits are drawn once for all systems
        for experiment in experiments:
            path = _path(folder, experiment, k, share)
            if path.is_file():
                known[experiment, k] = read_json(path)["metrics"]
            else:
                jobs.append((experiment, k))
    return Plan(rows, replications, share, known, jobs)


def _path(folder: Path, experiment: Experiment, replication: int, share: float) -> Path:
    return folder / CACHE / f"{key_of(experiment, seed_of(experiment, replication), share)}.json"


def seconds_per_run(planned: Plan) -> dict[str, float]:
    """Seconds of one run by setting: one of each that has jobs is run (not kept) and timed."""
    found: dict[str, float] = {}
    for experiment, replication in planned.jobs:
        if experiment.setting not in found:
            task = (experiment, seed_of(experiment, replication), planned.share)
            perform(task)  # what is drawn once per replication
            start = time.perf_counter()
            perform(task)
            found[experiment.setting] = time.perf_counter() - start
    return found


def run(
    planned: Plan,
    folder: Path,
    where: tuple[str, int, str | None] = ("local", 1, None),
    report: OnProgress | None = None,
) -> dict[str, tuple[Answer, Answer | None]]:
    """Answers by row id, under the defaults and under the calibrated set-up.

    Every finished run is kept in ``folder`` at once.
    """
    known = dict(planned.known)
    total = max(1, len(known) + len(planned.jobs))

    def keep(index: int, metrics: dict[str, float]) -> None:
        experiment, replication = planned.jobs[index]
        value = {"experiment": experiment.name, "replication": replication, "metrics": metrics}
        write_json(_path(folder, experiment, replication, planned.share), value)
        known[experiment, replication] = metrics
        if report is not None:
            report(f"{len(known)} of {total} runs: {experiment.system}", len(known) / total)

    tasks = [(experiment, seed_of(experiment, k), planned.share) for experiment, k in planned.jobs]
    with open_executor(*where) as executor:
        run_all(executor, perform, tasks, keep)
    found = {}
    for row in planned.rows:
        wanted = experiments_of([row])
        runs = {x: [known[x, k] for k in range(planned.replications)] for x in wanted}
        found[row.id] = (row.compute(runs), row.calibrated(runs))
    return found
