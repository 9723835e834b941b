"""``heliosim sweep``: the same scenario under many settings. Everything heavy is imported when the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliosim.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from heliosim.sweep import State, Sweep

Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at the same time: local processes or workers. Default 1.")]
ExecutorKind = Annotated[str, typer.Option("--executor", help="local, dask or ray.")]
Address = Annotated[str | None, typer.Option(help="Use the Dask or Ray cluster at this address.")]


def sweep(
    file: Annotated[Path, typer.Argument(help="Sweep file, or a scenario file to vary with --set.")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=V1,V2", help="Vary a scenario field by its dotted path. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; default sweeps/NAME.")] = None,
    replications: Annotated[
        int | None, typer.Option(min=1, help="Runs per point, each with a seed of its own.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Metrics to print, separated by commas.")] = None,
    jobs: Jobs = None,
    executor: ExecutorKind = "local",
    address: Address = None,
    keep: Annotated[str, typer.Option(help="runs: whole run folders; summary: without their tables.")] = "runs",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many runs and about how long, and stop.")] = False,
    sql: Annotated[
        str | None, typer.Option(help="Afterwards, print the answer of a query over results and points (DuckDB).")
    ] = None,
) -> None:
    """Run a scenario under many settings: grids and lists of any field, resumable, on processes, Dask or Ray.

    The scenario's statistics section is not used: replications and after_s of the sweep file say what it would.
    """
    from heliosim.console import console, progress_bar, say_derived
    from heliosim.executors import open_executor
    from heliosim.sweep import look, plan_sweep, run_sweep
    from heliosim.sweep_tables import need_duckdb, print_points, query, query_table
    from heliosim.vary import parse_set

    if keep not in ("runs", "summary"):
        raise UnknownNameError("--keep", keep, ("runs", "summary"))
    workers = worker_count(jobs, executor, address)
    if sql is not None:
        if dry_run:
            raise InputError("--sql", sql, "--dry-run has no results to query", "Leave one of them out.")
        need_duckdb()
    given = [parse_set(text) for text in sets or ()]
    for path in {path for path, _ in given}:
        if sum(p == path for p, _ in given) > 1:
            raise InputError("--set", path, "is given twice", "Give all values of a field together.")
    with progress_bar("Checking points") as report:
        planned = plan_sweep(
            file,
            given,
            replications=replications,
            metrics=metric_names(metrics),
            on_point=lambda done, count: report(f"{done} of {count}", done / count) if count > 100 else None,
        )
    target = out or Path("sweeps") / file.stem
    state = look(planned, target, keep)  # type: ignore[arg-type]
    _say_state(planned, state, target)
    if dry_run:
        _say_estimate(planned, state, workers)
        return
    try:
        with progress_bar("Sweeping") as report:

            def progress(done: int, count: int) -> None:
                report(f"{done} of {count} runs", done / count)

            kind = executor if len(state.done) < len(planned.jobs) else "local"  # nothing left: start nothing
            with open_executor(kind, workers if kind == executor else 1, address if kind == executor else None) as pool:
                finished = run_sweep(planned, target, pool, keep=keep, on_progress=progress)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        done = len(look(planned, target, keep).done)  # type: ignore[arg-type]
        sys.stderr.write(f"\n{done} of {len(planned.jobs)} runs are done and kept in {target}/runs.\n")
        raise
    print_points(finished)
    say_derived(point.scenario for point in planned.points)
    typer.echo(f"Tables written to {target}/results.parquet (runs) and {target}/points.parquet (points).")
    if sql is not None:
        console().print(query_table(*query(target, sql)))
    if any(done.error is not None for done in finished.results):
        raise typer.Exit(1)


def worker_count(jobs: int | None, executor: str, address: str | None) -> int:
    """How many workers; refuses what would be ignored."""
    from heliosim.executors import KINDS

    if executor not in KINDS:
        raise UnknownNameError("--executor", executor, KINDS)
    if address is not None and executor == "local":
        raise InputError("--address", address, "is of a cluster", "Add --executor dask or --executor ray.")
    if address is not None and jobs is not None:
        raise InputError("--jobs", jobs, "the cluster at --address has its own workers", "Leave one of them out.")
    return jobs or 1


def metric_names(text: str | None) -> tuple[str, ...]:
    """Names of metrics from an option. Raises InputError naming the nearest known one."""
    from heliosim.formats.sweep import known_metrics

    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    try:
        return known_metrics(names)
    except ValueError as error:
        raise InputError("--metrics", text, str(error), "Correct the name.") from None


def _say_state(planned: Sweep, state: State, target: Path) -> None:
    from heliosim.console import console

    out = console()
    if state.has_changed:
        gone = f", {state.dropped} are no longer part of it (kept in {target}/runs)" if state.dropped else ""
        out.print(f"The sweep changed since it last ran in {target}: {state.added} runs are new{gone}.")
    if state.done:
        out.print(f"{len(state.done)} of {len(planned.jobs)} runs are already there.")


def _say_estimate(planned: Sweep, state: State, workers: int) -> None:
    from heliosim.console import console
    from heliosim.sweep import estimate_s

    left = [job for number, job in enumerate(planned.jobs) if number not in state.done]
    per_point = len(planned.jobs) // max(1, len(planned.points))
    out = console()
    out.print(f"{len(planned.points)} points, {per_point} runs each: {len(planned.jobs)} runs, {len(left)} to do.")
    seconds = estimate_s(left, workers)
    if seconds is not None:
        said = (
            f"{seconds:.1f} s"
            if seconds < 120
            else f"{seconds / 60:.0f} min"
            if seconds < 7200
            else (f"{seconds / 3600:.1f} h")
        )
        out.print(f"Estimate: about {said} with {workers} job(s), from the beginnings of up to three runs.")
