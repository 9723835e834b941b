"""``heliosim reproduce``: the paper's numbers, computed again. Everything heavy is imported when the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliosim.cli_sweep import Address, ExecutorKind, Jobs, worker_count

if TYPE_CHECKING:
    from heliosim.reproduction.runner import Plan

DEFAULT_REPLICATIONS, QUICK_REPLICATIONS = 10, 2
COMMAND = "heliosim reproduce"


def reproduce(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for page, data, plots and finished runs.")] = Path(
        "reproduction"
    ),
    rows: Annotated[
        str | None, typer.Option(help="Rows by id, or beginnings of ids, separated by commas; default: all.")
    ] = None,
    replications: Annotated[
        int | None, typer.Option(min=2, help=f"Runs of each simulated system; default {DEFAULT_REPLICATIONS}.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the requests, two replications.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what each row costs, and stop.")] = False,
    jobs: Jobs = None,
    executor: ExecutorKind = "local",
    address: Address = None,
) -> None:
    """Compute every claim of the HELIOS paper from its inputs: our value with interval, error, class, assumptions.

    Finished runs are kept in the folder; the same command goes on from there.
    """
    from heliosim.formats.files import require_own, sole_writer
    from heliosim.reproduction.book import pick
    from heliosim.reproduction.runner import CACHE, QUICK_SHARE, plan

    workers = worker_count(jobs, executor, address)
    picked = pick(tuple(name.strip() for name in (rows or "").split(",") if name.strip()))
    count = replications or (QUICK_REPLICATIONS if quick else DEFAULT_REPLICATIONS)
    share = QUICK_SHARE if quick else 1.0
    require_own(out, (CACHE, "reproduction.json"), "reproduction")
    planned = plan(picked, out, count, share)
    if dry_run:
        _say_costs(planned, workers)
        return
    words = [COMMAND, *(["--quick"] if quick else []), *([f"--replications {count}"] if replications else [])]
    with sole_writer(out, "reproduction"):
        _reproduce(planned, out, (executor, workers, address), " ".join(words))


def _reproduce(planned: Plan, out: Path, where: tuple[str, int, str | None], command: str) -> None:
    from heliosim.console import progress_bar
    from heliosim.reproduction.compare import report_data
    from heliosim.reproduction.page import write
    from heliosim.reproduction.runner import run

    if planned.known:
        typer.echo(f"{len(planned.known)} of {len(planned.known) + len(planned.jobs)} runs are already there.")
    try:
        with progress_bar("Reproducing") as progress:
            answers = run(planned, out, where, progress)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nFinished runs are kept in {out}.\n")
        raise
    data = report_data(planned.rows, answers, planned.replications, planned.share, command)
    files = write(out, data)
    _print(data)
    typer.echo(f"Page: {files[0]}. Data: {files[1]}. Plots: {len(files) - 2}.")


def _print(data: dict[str, Any]) -> None:
    """One line per row, in 80 columns."""
    from rich.table import Table

    from heliosim.console import console

    table = Table(title="Claims of the paper", title_justify="left", box=None, pad_edge=False, width=80)
    for column in ("row", "class", "defaults", "calibrated"):
        table.add_column(column, overflow="fold")
    for line in data["summary"]:
        kind = "ours" if line["is_ours"] else line["class"]
        table.add_row(line["id"], kind, line["defaults"] or "shown", line["calibrated"] or "–")
    out = console()
    out.print(table)
    out.print("Percentages: relative errors where no tolerance is claimed. Exits are")
    out.print("synthetic and times derived: nothing here was measured on the paper's GPUs.")


def _say_costs(planned: Plan, workers: int) -> None:
    """What each row needs, and about how long the runs that are left take; a run of each set-up is timed for it."""
    from collections import Counter

    from rich.table import Table

    from heliosim.console import console
    from heliosim.reproduction.runner import seconds_per_run

    seconds = seconds_per_run(planned)
    left = Counter(experiment for experiment, _ in planned.jobs)
    table = Table(title="Rows and their runs", title_justify="left")
    for column in ("row", "class", "systems", "runs to do", "about, s"):
        table.add_column(column, justify="left" if column in ("row", "class") else "right")
    for row in planned.rows:
        jobs = sum(left[x] for x in row.needs)
        cost = sum(left[x] * seconds[x.setting] for x in row.needs if left[x])
        table.add_row(row.id, row.kind, str(len(row.needs)), str(jobs), f"{cost:.1f}")
    total = sum(seconds[experiment.setting] for experiment, _ in planned.jobs) / workers
    out = console()
    out.print(table)
    out.print(f"{len(planned.jobs)} runs to do (rows share some): about {total:.0f} s with {workers} job(s).")
