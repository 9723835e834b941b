"""The tables of a sweep: ``results.parquet`` (a row per run), ``points.parquet`` (a row per point), what is printed.

Rows stand in the order of the points, and hold nothing of time or place: the same sweep gives the same bytes whoever
ran it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliosim.errors import HelioSimError
from heliosim.fitted import Column, broken, fitted, print_tables
from heliosim.formats.whole import write_whole_table
from heliosim.metrics import SCALARS, MetricSpec, Summary, metric_spec, significant
from heliosim.replicated import is_refused
from heliosim.stats import Interval, t_interval
from heliosim.sweep import Done, Finished, Point, most
from heliosim.tables import counted
from heliosim.vary import short_names, value_text

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

SHOWN = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "perplexity")
SHOWN_OF_ONE = (*SHOWN[:4], "p99_e2el_ms", "layers_per_token", "perplexity")
_WHOLE = {f.name for f in fields(Summary) if f.type in ("int", "int | None")}
_MOST_ROWS = 40
_LONGEST_NAME = 32


def write_tables(finished: Finished, out: Path) -> None:
    """Write both tables into the sweep's folder, each whole or not at all."""
    for name, table in (("results", results_table(finished)), ("points", points_table(finished))):
        write_whole_table(out / f"{name}.parquet", table)


def results_table(finished: Finished) -> pa.Table:
    """One row per run: which point, which replication and seed, the varied fields, whether it worked, every metric."""
    import pyarrow as pa

    sweep, results = finished.sweep, finished.results
    points = [sweep.points[job.point] for job in sweep.jobs]
    columns: dict[str, Any] = {
        "point": pa.array([job.point for job in sweep.jobs], pa.int64()),
        "replication": pa.array([job.replication for job in sweep.jobs], pa.int64()),
        "run": pa.array(finished.names, pa.string()),
        "seed": pa.array([job.scenario.seed for job in sweep.jobs], pa.uint64()),
    }
    columns |= _fields(finished, points)
    columns["scenario_hash"] = pa.array([job.scenario.hash for job in sweep.jobs], pa.string())
    columns["profile_hash"] = pa.array([job.profile_hash for job in sweep.jobs], pa.string())
    columns["error"] = pa.array([done.error for done in results], pa.string())
    columns["is_saturated"] = pa.array([None if done.error else done.saturated for done in results], pa.bool_())
    for name in SCALARS:
        values = [done.metrics.get(name) for done in results]
        if name in _WHOLE:
            columns[name] = pa.array([None if v is None else int(v) for v in values], pa.int64())
        else:
            columns[name] = pa.array(values, pa.float64())
    return pa.table(columns)


def points_table(finished: Finished) -> pa.Table:
    """One row per point: the varied fields, how many runs worked, and of every metric the mean over the replications
    and the half-width of its 95 % interval (null: unavailable).
    """
    import pyarrow as pa

    points = finished.sweep.points
    runs = runs_of_points(finished)
    columns: dict[str, Any] = {
        "point": pa.array([p.index for p in points], pa.int64()),
        "label": pa.array([p.label for p in points], pa.string()),
    }
    columns |= _fields(finished, points)
    columns["runs"] = pa.array([len(r) for r in runs], pa.int64())
    columns["failed"] = pa.array([sum(d.error is not None for d in r) for r in runs], pa.int64())
    columns["saturated"] = pa.array([sum(d.saturated for d in r) for r in runs], pa.int64())
    for name in SCALARS:
        found = [interval(r, name) for r in runs]
        columns[name] = pa.array([i.mean for i in found], pa.float64())
        columns[f"{name}_half_width"] = pa.array([i.half_width for i in found], pa.float64())
    return pa.table(columns)


def runs_of_points(finished: Finished) -> list[list[Done]]:
    """Results by point, in order of replication."""
    runs: list[list[Done]] = [[] for _ in finished.sweep.points]
    for job, done in zip(finished.sweep.jobs, finished.results, strict=True):
        runs[job.point].append(done)
    return runs


def interval(runs: Sequence[Done], metric: str) -> Interval:
    """Student-t interval of a metric over the replications of a point."""
    return t_interval([done.metrics.get(metric) for done in runs])


def _fields(finished: Finished, points: Sequence[Point]) -> dict[str, Any]:
    """Columns of the varied fields: numbers where all values are, else text."""
    own = {"seed"}  # has a column already
    return {
        path: _column([point.changes.get(path) for point in points])
        for path in finished.sweep.fields
        if path not in own
    }


def _column(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    kinds = {type(v) for v in values if v is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int} and all(v is None or abs(v) < 2**63 for v in values):
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    if kinds <= {str}:
        return pa.array(values, pa.string())
    return pa.array([None if v is None else json.dumps(v, sort_keys=True) for v in values], pa.string())


# --- for people ---------------------------------------------------------------------------------------------


def chosen_specs(finished: Finished, metrics: Sequence[str] = ()) -> list[MetricSpec]:
    """The metrics to show: those given, or the file's, or the usual ones."""
    sweep = finished.sweep
    usual = SHOWN if _per_point(finished) > 1 else SHOWN_OF_ONE
    if sweep.slo is not None:
        usual = (usual[0], "slo_attainment", *usual[1:])
    return [metric_spec(name) for name in (metrics or sweep.metrics or usual)]


def _per_point(finished: Finished) -> int:
    return len(finished.sweep.jobs) // max(1, len(finished.sweep.points))


def summary_title(finished: Finished) -> str:
    """How many points, how many runs."""
    runs = _per_point(finished)
    ran = f"{counted(runs, 'run')} each, mean ± half-width of the 95 % interval" if runs > 1 else "one run each"
    return f"{counted(len(finished.sweep.points), 'point')}, {ran}"


def summary_tables(finished: Finished, width: int, metrics: Sequence[str] = ()) -> list[Table]:
    """One line per point: the varied fields, then the metrics with their intervals. Where ``width`` is too small for
    all metrics, further tables with the varied fields again.
    """
    from rich.markup import escape

    sweep, chosen = finished.sweep, chosen_specs(finished, metrics)
    names = short_names(sweep.fields)
    columns = [Column(broken(names[path]), is_name=True, wrap=_LONGEST_NAME) for path in sweep.fields]
    columns += [Column(heading(spec)) for spec in chosen]
    rows = []
    for point, done in list(zip(sweep.points, runs_of_points(finished), strict=True))[:_MOST_ROWS]:
        cells = [escape(value_text(point.changes[f])) if f in point.changes else "" for f in sweep.fields]
        rows.append([*cells, *(_cell(done, spec) for spec in chosen)])
    return fitted(columns, rows, width)


def print_points(finished: Finished) -> None:
    """The points and what their table leaves unsaid."""
    from heliosim.console import console

    out = console()
    out.print(f"[bold]{summary_title(finished)}[/]")
    print_tables(out, summary_tables(finished, out.width))
    for note in notes(finished):
        out.print(note)


def heading(spec: MetricSpec) -> str:
    """A metric's name over its unit, narrow enough for a table of many."""
    words = spec.label.replace(", ", " ").split(" ")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < 12:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join([*lines, f"[dim]{spec.unit}[/]" if spec.unit else ""]).rstrip()


def _cell(runs: Sequence[Done], spec: MetricSpec) -> str:
    if any(done.error is not None for done in runs):
        return "[red]failed[/]"
    if most([done.saturated for done in runs]) and is_refused(spec.name):
        return "[yellow]saturated[/]"
    found = interval(runs, spec.name)
    text = spec.text(found.mean)
    return text if len(runs) == 1 or found.mean is None else f"{text}{width_text(found, spec)}"


def width_text(interval: Interval, spec: MetricSpec) -> str:
    """`` ± `` and the half-width; nothing if all values are the same, a question mark if there is no interval."""
    half = interval.half_width
    if half is None:
        return "" if interval.is_constant else " ± ?"
    return " ± 0" if half < 1e-9 * abs(interval.mean or 0.0) else f" ± {spec.width_text(half, interval.mean)}"


def notes(finished: Finished) -> list[str]:
    """What the table leaves unsaid, a line each."""
    from rich.markup import escape

    said = []
    hidden = len(finished.sweep.points) - _MOST_ROWS
    if hidden > 0:
        said.append(f"{counted(hidden, 'more point')} in results.parquet.")
    runs = runs_of_points(finished)
    saturated = sum(most([d.saturated for d in done]) for done in runs)
    if saturated:
        said.append(
            f"[yellow]saturated[/]: at {saturated} of {counted(len(runs), 'point')} waiting grew to the end of most "
            "runs; such figures tell how long a run lasted, nothing else."
        )
    grew = sum(most([d.grew for d in done]) for done in runs) - saturated
    if grew:
        said.append(
            f"[yellow]at {grew} of {counted(len(runs), 'point')} waiting grew from beginning to end[/] of a day that "
            "ends: longer days would be worse."
        )
    errors: dict[str, int] = {}
    for done in finished.results:
        if done.error is not None:
            errors[done.error] = errors.get(done.error, 0) + 1
    for text, count in list(errors.items())[:5]:
        said.append(f"[red]{count} of {counted(len(finished.results), 'run')} failed[/]: {escape(text)}")
    return said


def query(out: Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names and rows of an SQL query over ``results`` and ``points``. Raises HelioSimError."""
    duckdb = need_duckdb()
    with duckdb.connect(config={"autoinstall_known_extensions": False}) as connection:
        for name in ("results", "points"):
            path = str(out / f"{name}.parquet").replace("'", "''")
            connection.execute(f"create view {name} as select * from read_parquet('{path}')")
        try:
            found = connection.execute(sql)
        except duckdb.Error as error:
            raise HelioSimError(f"--sql: {str(error).splitlines()[0]}") from None
        return [column[0] for column in found.description or ()], found.fetchall()


def need_duckdb() -> Any:
    """The module. Raises HelioSimError if it is not installed."""
    try:
        import duckdb
    except ModuleNotFoundError:
        raise HelioSimError("--sql needs the package duckdb: install it with  pip install 'heliosim[sql]'") from None
    return duckdb


def query_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """The answer of a query for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    numeric = [all(isinstance(row[k], int | float | None) for row in rows) for k in range(len(columns))]
    for name, is_number in zip(columns, numeric, strict=True):
        table.add_column(escape(name), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(
            *(significant(v, 4) if isinstance(v, float) else "" if v is None else escape(str(v)) for v in row)
        )
    return table
