"""Sweeps: the points of a sweep file, run once each wherever an executor runs them, and the tables of all.

A run is a scenario (seed included) and a profile; its folder is named by the digest of both. So a sweep that was
stopped, grown or run elsewhere finds what is already there, and nothing depends on who ran what when. A run's folder is
written by the worker that ran it: on a cluster the output folder must be one that all workers share.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from heliosim import __version__
from heliosim.errors import HelioSimError, InputError
from heliosim.executors import LostWorkError, run_all
from heliosim.formats.files import read_json, require_own, sole_writer, write_json
from heliosim.formats.profile import Profile, shared_hash
from heliosim.formats.results import RUN_FOLDER, RunResults, load_run, read_info, save_run
from heliosim.formats.sweep import load_sweep
from heliosim.metrics import SCALARS, Slo, summarise
from heliosim.scenario import Scenario, load_scenario
from heliosim.streams import replication_seed
from heliosim.vary import Changes, Plain, changed_at, check_against, checked, label, of_groups, plain_scenario, resolved

Keep = Literal["runs", "summary"]
Metrics = Mapping[str, float | None]

MARK = "sweep.json"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Point:
    """One variation: its fields by path, and the scenario they make. ``label`` says them for people."""

    index: int
    changes: Changes
    scenario: Scenario
    profile_hash: str

    @property
    def label(self) -> str:
        return label(self.changes) or self.scenario.name


@dataclass(frozen=True)
class Job:
    """One run to do; all a worker needs. ``folder``: where its run folder goes, None: nowhere."""

    point: int
    replication: int
    scenario: Scenario
    profile_hash: str
    name: str
    after_s: float
    slo: Slo | None
    folder: str | None = None
    keep: Keep = "runs"
    version: str = __version__


@dataclass(frozen=True)
class Done:
    """What came of a run: its metrics, or why it failed. ``grew``: whether waiting grew from beginning to end;
    ``saturated``: that, of a system that goes on: a day that ends is never saturated (``replicate.horizon_of``).
    """

    metrics: Metrics = field(default_factory=dict)
    saturated: bool = False
    error: str | None = None
    grew: bool = False


def most(runs: Sequence[bool]) -> bool:
    """Whether it is so in more than half of the runs of a point: then it is said of the point."""
    return 2 * sum(runs) > len(runs)


@dataclass(frozen=True)
class Sweep:
    """Points in order, each with its runs; ``fields``: the varied ones in the order they were named."""

    points: tuple[Point, ...]
    fields: tuple[str, ...]
    jobs: tuple[Job, ...]
    definition: Mapping[str, Any]
    metrics: tuple[str, ...]
    slo: Slo | None


@dataclass(frozen=True)
class Finished:
    """A sweep with what came of each of its jobs, in their order."""

    sweep: Sweep
    results: Sequence[Done]
    names: Sequence[str]


# --- points -------------------------------------------------------------------------------------------------


def plan_sweep(
    path: Path,
    sets: Sequence[tuple[str, list[Any]]] = (),
    *,
    replications: int | None = None,
    metrics: tuple[str, ...] = (),
    on_point: Callable[[int, int], None] | None = None,
) -> Sweep:
    """All points of a sweep file (or of a scenario file, which is a sweep of nothing) with ``sets`` as further axes.

    Every point is validated and checked against its profile. Raises InputError naming the point and the field.
    """
    file = load_sweep(path)
    base = load_scenario(path.parent / file.base)
    plain = plain_scenario(base)
    grid = {p: [resolved(p, v, path.parent) for v in values] for p, values in file.grid.items()}
    for name, values in sets:
        if any(name in entry for entry in file.list_):
            raise InputError("--set", name, "the sweep file's list sets this field", "Vary another field.")
        grid[name] = [resolved(name, v, Path.cwd()) for v in values]
    entries = [{p: resolved(p, v, path.parent) for p, v in entry.items()} for entry in file.list_] or [{}]
    fields = tuple(dict.fromkeys(itertools.chain(*entries, grid)))
    all_changes = [
        {**entry, **dict(zip(grid, values, strict=True))}
        for entry in entries
        for values in itertools.product(*grid.values())
    ]
    points = []
    for index, changes in enumerate(all_changes):
        points.append(_point(index, plain, changes, path))
        if on_point is not None:
            on_point(index + 1, len(all_changes))
    count = replications or file.replications
    slo = file.slo
    jobs = [_job(point, r, file.after_s, slo) for point in points for r in range(count)]
    _refuse_twins(path, points, jobs)
    definition = {
        "schema_version": 1,
        "base": file.base,
        "grid": {name: list(values) for name, values in grid.items()},
        "list": [dict(entry) for entry in file.list_],
        "replications": count,
        "after_s": file.after_s,
        "slo": None if slo is None else asdict(slo),
        "runs": [job.name for job in jobs],
    }
    return Sweep(tuple(points), fields, tuple(jobs), definition, metrics or file.metrics, slo or base.slo)


def _point(index: int, plain: Plain, changes: Changes, path: Path) -> Point:
    where = f"{path}, point {index}" + (f" ({label(changes)})" if changes else "")
    scenario = checked(changed_at(plain, changes, where), where)
    check_against(scenario, open_once, where)
    return Point(index, changes, scenario, profiles_digest(scenario))


def _job(point: Point, replication: int, after_s: float, slo: Slo | None) -> Job:
    seed = replication_seed(point.scenario.seed, replication)
    scenario = point.scenario.model_copy(update={"seed": seed})
    key = hashlib.blake2b(f"{scenario.hash} {point.profile_hash}".encode(), digest_size=5).hexdigest()
    readable = re.sub(r"[^\w.=-]+", "-", point.label).strip("-")[:60].rstrip("-")
    name = f"{key}-{readable}" + (f"-r{replication}" if replication else "")
    return Job(point.index, replication, scenario, point.profile_hash, name, after_s, slo or scenario.slo)


def _refuse_twins(path: Path, points: Sequence[Point], jobs: Sequence[Job]) -> None:
    seen: dict[str, int] = {}
    for job in jobs:
        first = seen.setdefault(job.name.partition("-")[0], job.point)
        if first != job.point:
            problem = f"points {first} and {job.point} are the same scenario"
            raise InputError(str(path), points[job.point].label, problem, "Leave one of them out.")


@lru_cache(maxsize=32)
def open_once(name: str) -> Profile:
    """A profile, read once per process."""
    from heliosim.profile_view import open_profile

    return open_profile(name)


def profiles_digest(scenario: Scenario) -> str:
    """The hash under which a run names its profile: that of the one all replicas share, or of those of a fleet's groups
    together.
    """
    return shared_hash([open_once(one.profile).hash for one in of_groups(scenario)])


# --- one run ------------------------------------------------------------------------------------------------


def run_job(job: Job, on_progress: Callable[[float], None] | None = None) -> Done:
    """Simulate one run and keep its folder; runs in a worker. Errors of the scenario are part of the answer."""
    from heliosim.runs import run_simulated

    try:
        _check_worker(job)
        results = run_simulated(job.scenario, open_once(job.scenario.profile), on_progress=on_progress)
        done = _measured(results, job)
    except HelioSimError as error:
        return Done(error=str(error))
    if job.folder is not None:
        beside = {SUMMARY: _summary_file(job, done)}
        tables = {} if job.keep == "runs" else {"tables": ()}
        _clear_damaged(Path(job.folder) / job.name)
        save_run(Path(job.folder) / job.name, results, overwrite=True, beside=beside, **tables)
    return done


def _clear_damaged(folder: Path) -> None:
    """Remove what is left of a run of this sweep that lost its run.json; nothing that is no part of a run."""
    if folder.is_dir() and not (folder / RUN_FOLDER.mark).is_file():
        for left in RUN_FOLDER.names:
            (folder / left).unlink(missing_ok=True)


def _check_worker(job: Job) -> None:
    if job.version != __version__:
        remedy = "Install the same version everywhere."
        raise InputError("heliosim", __version__, f"a worker has another version than {job.version}", remedy)
    if (found := profiles_digest(job.scenario)) != job.profile_hash:
        problem = "a worker found another profile under this name"
        raise InputError(f"profile {job.scenario.profile}", found[:12], problem, "Give workers the same files.")


def _measured(results: RunResults, job: Job) -> Done:
    from heliosim.replicate import grew, horizon_of

    summary, has_grown = summarise(results, job.after_s, job.slo), grew(results, job.scenario)
    is_saturated = has_grown and horizon_of(job.scenario) == "steady"
    return Done({name: summary.value(name) for name in SCALARS}, is_saturated, grew=has_grown)


def _summary_file(job: Job, done: Done) -> dict[str, Any]:
    slo = None if job.slo is None else asdict(job.slo)
    return {
        "schema_version": 2, "after_s": job.after_s, "slo": slo, "saturated": done.saturated, "grew": done.grew,
        "metrics": dict(done.metrics),
    }  # fmt: skip


def kept_result(folder: Path, job: Job) -> tuple[Done, bool] | None:
    """What a run folder of an earlier call says about this job, and whether its summary says so already; None if it is
    not this run or not complete.
    """
    if not (folder / "run.json").is_file():
        return None
    info = read_info(folder / "run.json")
    known = (info.scenario_hash, info.profile_hash, info.versions.get("heliosim"))
    if known != (job.scenario.hash, job.profile_hash, __version__):
        return None
    if (folder / SUMMARY).is_file():
        value = read_json(folder / SUMMARY)
        done = Done(value["metrics"], value["saturated"], grew=value.get("grew", False))
        if value == _summary_file(job, done) and set(done.metrics) == set(SCALARS):
            return done, True
    if (folder / "tokens.parquet").is_file():  # another SLO or warm-up: the run is the same
        return _measured(load_run(folder), job), False
    return None


# --- the whole ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a sweep folder holds before a call: results by job, and how the sweep changed since the last one. ``stale``:
    folders, by job, whose name or summary is still that of an earlier call.
    """

    done: Mapping[int, Done]
    added: int | None
    dropped: int | None
    stale: Mapping[int, Path] = field(default_factory=dict)

    @property
    def has_changed(self) -> bool:
        return bool(self.added or self.dropped)


def look(sweep: Sweep, out: Path, keep: Keep = "runs") -> State:
    """Which runs are complete, and what changed; writes nothing. Raises InputError for a folder of something else."""
    if not out.exists():
        return State({}, None, None)
    require_own(out, (MARK,), "sweep")
    if not (out / MARK).is_file():
        return State({}, None, None)
    before, now = set(read_json(out / MARK).get("runs", [])), {job.name for job in sweep.jobs}
    by_key = {p.name.partition("-")[0]: p for p in (out / "runs").glob("[!.]*")} if (out / "runs").is_dir() else {}
    done, stale = {}, {}
    for number, job in enumerate(sweep.jobs):
        folder = out / "runs" / job.name
        folder = folder if folder.is_dir() else by_key.get(job.name.partition("-")[0], folder)
        if (found := kept_result(folder, job)) is not None:
            if keep == "runs" and not (folder / "tokens.parquet").is_file():
                continue
            done[number], is_current = found
            if not is_current or folder.name != job.name:
                stale[number] = folder
    keys_before, keys_now = ({n.partition("-")[0] for n in names} for names in (before, now))
    return State(done, len(keys_now - keys_before), len(keys_before - keys_now), stale)


def _bring_up(sweep: Sweep, state: State) -> None:
    """Give the run folders that are kept the summaries and names of this sweep."""
    for number, folder in state.stale.items():
        job = sweep.jobs[number]
        write_json(folder / SUMMARY, _summary_file(job, state.done[number]))
        if folder.name != job.name:  # the readable part tells the fields that vary, and they changed
            os.replace(folder, folder.with_name(job.name))


def run_sweep(
    sweep: Sweep,
    out: Path,
    executor: Executor,
    *,
    keep: Keep = "runs",
    on_progress: Callable[[int, int], None] | None = None,
) -> Finished:
    """Do what is not done yet, write the tables, return everything. ``on_progress(runs done, runs in all)``.

    Interrupted, it leaves complete run folders behind, and the next call goes on from them.
    """
    require_own(out, (MARK,), "sweep")
    with sole_writer(out, "sweep"):
        state = look(sweep, out, keep)
        _bring_up(sweep, state)
        write_json(out / MARK, dict(sweep.definition))
        runs = (out / "runs").resolve()
        runs.mkdir(exist_ok=True)
        _sweep_halves(runs)
        results = dict(state.done)
        todo = [number for number in range(len(sweep.jobs)) if number not in results]
        jobs = [_with_folder(sweep.jobs[number], runs, keep) for number in todo]

        def take(index: int, done: Done) -> None:
            if done.error is None and not (runs / jobs[index].name / "run.json").is_file():
                remedy = "Choose a folder that this machine and the workers share."
                raise InputError(str(runs / jobs[index].name), jobs[index].name, "a worker wrote it elsewhere", remedy)
            results[todo[index]] = done
            if on_progress is not None:
                on_progress(len(results), len(sweep.jobs))

        if on_progress is not None:
            on_progress(len(results), len(sweep.jobs))
        try:
            run_all(executor, run_job, jobs, take)
        except LostWorkError as lost:
            for index in lost.indices:
                results[todo[index]] = Done(error=f"the worker died {lost.tries} times (killed, or out of memory?)")
        _sweep_halves(runs)
        finished = Finished(sweep, [results[n] for n in range(len(sweep.jobs))], [job.name for job in sweep.jobs])
        from heliosim.sweep_tables import write_tables

        write_tables(finished, out)
    return finished


def _sweep_halves(runs: Path) -> None:
    """Remove what workers that were killed had begun to write."""
    for left in runs.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def _with_folder(job: Job, runs: Path, keep: Keep) -> Job:
    from dataclasses import replace

    return replace(job, folder=str(runs), keep=keep)


# --- how long it will take ----------------------------------------------------------------------------------

PROBE_S = 2.0


class _EnoughError(Exception):
    """Ends a probe; never leaves this module."""


def estimate_s(jobs: Sequence[Job], workers: int = 1) -> float | None:
    """Seconds the runs may take, from the beginnings of up to three of them (first, middle, last; two seconds each);
    None if there is nothing to do. A guess: busy points take longer than idle ones.
    """
    if not jobs:
        return None
    picked = sorted({0, len(jobs) // 2, len(jobs) - 1})
    probed = [_probe_s(jobs[index]) for index in picked]
    start = 1.0 if workers > 1 else 0.0
    return start + sum(probed) / len(probed) * len(jobs) / workers


def _probe_s(job: Job) -> float:
    """Seconds of one run, its folder included, extrapolated from where it stands after ``PROBE_S``."""
    import tempfile

    from heliosim.runs import last_arrival

    horizon = last_arrival(job.scenario)
    began, reached = time.perf_counter(), 0.0

    def watch(now: float) -> None:
        nonlocal reached
        reached = now
        if horizon and time.perf_counter() - began > PROBE_S:
            raise _EnoughError

    with tempfile.TemporaryDirectory() as folder:
        try:
            run_job(_with_folder(job, Path(folder), job.keep), watch)
        except _EnoughError:
            assert horizon is not None
            return (time.perf_counter() - began) * max(1.0, horizon / max(reached, 1e-9))
    return time.perf_counter() - began
