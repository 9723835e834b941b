"""``heliosim tune``: search of scenario fields. Everything heavy is imported when the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliosim.cli_sweep import Address, ExecutorKind, Jobs, worker_count

if TYPE_CHECKING:
    from heliosim.tune import Problem


def tune(
    file: Annotated[Path, typer.Argument(help="Tune file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder of the study; default tunes/NAME.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all, instead of the file's.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage: a database URL or journal:PATH; default study.db in the folder.")
    ] = None,
    jobs: Jobs = None,
    executor: ExecutorKind = "local",
    address: Address = None,
) -> None:
    """Search scenario fields for the best objective within limits, and verify the winner with fresh seeds.

    The scenario's statistics section is not used: seeds, fresh_seeds and after_s of the tune file say what it would.
    """
    from heliosim.formats.files import require_own, sole_writer
    from heliosim.tune import MARK, need_optuna, open_problem

    need_optuna()
    workers = worker_count(jobs, executor, address)
    problem = open_problem(file)
    target = out or Path("tunes") / file.stem
    require_own(target, (MARK, "study.db", "result.json"), "study of tune")
    with sole_writer(target, "tune"):
        _tune(problem, target, storage, trials, (executor, workers, address))


def _tune(
    problem: Problem, target: Path, storage: str | None, trials: int | None, where: tuple[str, int, str | None]
) -> None:
    from heliosim.console import console, progress_bar, say_derived
    from heliosim.executors import open_executor
    from heliosim.formats.files import write_json
    from heliosim.tune import MARK, importance, open_study, search, verify, without_password
    from heliosim.tune_report import failure_lines, importance_table, trials_table, verified_lines, write_results

    study_at = storage or f"sqlite:///{target}/study.db"
    study = open_study(problem, storage or f"sqlite:///{target.resolve()}/study.db")
    write_json(target / MARK, {"schema_version": 1, "search": problem.digest})
    finished = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
    if finished > (trials or problem.file.trials):
        typer.echo(f"The study has {finished} trials already, more than the {trials or problem.file.trials} asked for.")
    try:
        with progress_bar("Searching") as report, open_executor(*where) as pool:

            def progress(done: int, count: int) -> None:
                report(f"{done} of {count} trials", done / count)

            search(problem, study, pool, trials=trials, on_progress=progress)
            report("verifying with fresh seeds", 1.0)
            found = verify(problem, study, pool)
    except KeyboardInterrupt:
        done = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
        sys.stderr.write(f"\n{done} of {trials or problem.file.trials} trials are in the study.\n")
        raise
    best = write_results(problem, study, found, target)
    out_console = console()
    out_console.print(trials_table(problem, study))
    shares = importance(study)
    if shares:
        out_console.print(importance_table(shares))
    for line in (*failure_lines(study), *verified_lines(problem, found)):
        out_console.print(line)
    say_derived((problem.base,))
    typer.echo(f"All trials: {target}/trials.parquet. Study: {without_password(study_at)}")
    if best is None:
        raise typer.Exit(1)
    typer.echo(f"Best scenario: {best}. Next: heliosim run {best} --out runs/tuned")
