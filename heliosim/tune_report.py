"""What a search found: tables for people, ``trials.parquet``, and the best scenario as a file that runs as is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliosim.formats.files import write_json
from heliosim.formats.whole import write_whole_table
from heliosim.metrics import SCALARS, MetricSpec, metric_spec
from heliosim.statistics_view import signed
from heliosim.sweep_tables import width_text
from heliosim.tables import counted, percent
from heliosim.tune import SATURATED, Problem, Verified, base_values, broken_by, is_feasible, ranked, values_of
from heliosim.vary import short_names, value_text

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 5


def trials_table(problem: Problem, study: Any) -> Table:
    """The best trials side by side, feasible ones first: what was searched, the objective and the limited metrics."""
    from rich.table import Table

    complete = ranked(problem, study)
    feasible = sum(is_feasible(t) for t in complete)
    failed = sum(t.state.name == "FAIL" for t in study.get_trials(deepcopy=False))
    parts = [f"{feasible} feasible", f"{len(complete) - feasible} infeasible", f"{failed} failed"]
    table = Table(title=f"Best trials ({', '.join(parts)})", title_justify="left")
    table.add_column("")
    shown = complete[:_SHOWN]
    has_base = len(base_values(problem)) == len(problem.file.search)  # then trial 0 is the scenario as it is
    shown += [t for t in complete if has_base and t.number == 0 and t not in shown]
    for trial in shown:
        as_is = "\n[dim](as is)[/]" if has_base and trial.number == 0 else ""
        table.add_column(f"trial {trial.number}{as_is}", justify="right", overflow="fold")
    for name, short in short_names(list(problem.file.search)).items():
        table.add_row(short, *(_cell(values_of(problem, t)[name]) for t in shown))
    table.add_section()
    spec = metric_spec(problem.file.objective.metric)
    row = [spec.text(t.value) for t in shown]
    table.add_row(f"[bold]{spec.label}[/] [dim]{spec.unit}[/]", *(f"[bold]{text}[/]" for text in row))
    for name, limit in problem.file.constraints.items():
        limited = metric_spec(name)
        cells = [(limited.text(t.user_attrs[name]), broken_by(problem, t)[name] <= 0) for t in shown]
        label = f"{limited.label} [dim]{limited.unit}[/] {_limit_text(name, str(limit))}"
        table.add_row(label, *(text if kept else f"[red]{text}[/]" for text, kept in cells))
    saturated = [broken_by(problem, t).get(SATURATED, 0.0) for t in shown]
    if any(saturated):
        table.add_row("saturated runs", *(f"{count:.0f}" for count in saturated))
    table.add_row("keeps every limit", *("yes" if is_feasible(t) else "[red]no[/]" for t in shown))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "\n".join(value_text(v) for v in value)
    return value_text(value)


def _limit_text(metric: str, text: str) -> str:
    sign, value = text.split(" ")
    return f"{sign} {float(value) * metric_spec(metric).scale:g}"


def failure_lines(study: Any) -> list[str]:
    """Why trials failed, the commonest reasons."""
    from rich.markup import escape

    reasons = Counter(t.user_attrs.get("error", "") for t in study.get_trials(deepcopy=False) if t.state.name == "FAIL")
    return [
        f"[yellow]{counted(count, 'trial')} failed[/]: {escape(reason)}" for reason, count in reasons.most_common(3)
    ]


def verified_lines(problem: Problem, found: Sequence[Verified]) -> list[str]:
    """What the fresh seeds said, a line per trial, and the gain over the base scenario."""
    if not found:
        return ["[yellow]No trial keeps every limit.[/] The table shows the least broken ones."]
    lines = []
    for one in found:
        seeds = counted(problem.file.fresh_seeds, "fresh seed")
        if one.broken:
            why = f": {one.measured.error}" if one.measured.error else ""
            lines.append(f"Trial {one.number} breaks {', '.join(_broken(one))} with {seeds}{why}.")
            continue
        objective = problem.file.objective.metric
        lines.append(f"[bold]Trial {one.number} holds[/] with {seeds}: {_shown(one, objective)}")
        for name, limit in problem.file.constraints.items():
            lines.append(f"  {_shown(one, name)} (limit {_limit_text(name, str(limit))})")
        lines.append(_gain(one, metric_spec(objective)))
    if found[-1].broken:
        lines.append("[yellow]None of the best trials keeps every limit with fresh seeds.[/] Use more seeds per trial.")
    return [line for line in lines if line]


def _shown(one: Verified, metric: str) -> str:
    spec, value = metric_spec(metric), one.measured.interval(metric)
    return f"{spec.label} {spec.text(value.mean)}{width_text(value, spec)} {spec.unit}".rstrip()


def _broken(one: Verified) -> list[str]:
    has_none = [one.measured.error is None and n in SCALARS and one.measured.mean(n) is None for n in one.broken]
    return [f"{name} (no value)" if none else name for name, none in zip(one.broken, has_none, strict=True)]


def _gain(one: Verified, spec: MetricSpec) -> str:
    if one.gain is None or one.gain.interval.mean is None or one.base is None:
        return ""
    if one.base.mean(spec.name) is None:  # the mean of what is left would favour the seeds that went well
        return f"  against the scenario as it is: unavailable, {one.gain.interval.reason}"
    base = one.base.interval(spec.name).mean or 0.0
    mean, half = one.gain.interval.mean, one.gain.interval.half_width
    shown = signed(mean, spec) + (f" ± {spec.width_text(half, mean)}" if half is not None else "")
    share = f", {percent(mean / abs(base))}" if base else ""
    return f"  against the scenario as it is, same seeds: {shown} {spec.unit}{share}"


def importance_table(shares: dict[str, float]) -> Table:
    """Which parameters mattered, as bars."""
    from rich.table import Table

    table = Table(title="What mattered (PED-ANOVA, best fifth of the trials)", title_justify="left")
    table.add_column("parameter")
    table.add_column("share", justify="right")
    table.add_column("")
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.0f} %", "█" * round(30 * share))
    return table


def write_results(problem: Problem, study: Any, found: Sequence[Verified], out: Path) -> Path | None:
    """Write trials.parquet and result.json, and best.yaml if a trial held; returns its path."""
    import pyarrow as pa

    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    columns: dict[str, Any] = {
        "number": pa.array([t.number for t in trials], pa.int64()),
        "state": pa.array([t.state.name.lower() for t in trials], pa.string()),
        "is_feasible": pa.array([is_feasible(t) if t.state.name == "COMPLETE" else None for t in trials], pa.bool_()),
        "objective": pa.array([t.value for t in trials], pa.float64()),
        "error": pa.array([t.user_attrs.get("error") for t in trials], pa.string()),
    }
    for name in problem.file.search:
        values = [t.params.get(name) for t in trials]
        kinds = {type(v) for v in values}
        if len(kinds) > 1 or not kinds <= {int, float, str, bool}:
            values = [json.dumps(v) for v in values]
        columns[name] = pa.array(values)
    for name in SCALARS:
        columns[name] = pa.array([t.user_attrs.get("metrics", {}).get(name) for t in trials], pa.float64())
    write_whole_table(out / "trials.parquet", pa.table(columns))
    holds = bool(found) and not found[-1].broken
    write_json(out / "result.json", {
        "schema_version": 1,
        "objective": problem.file.objective.metric,
        "trials": len(trials),
        "verified": [
            {"trial": v.number, "values": dict(v.values), "holds": not v.broken, "broken": list(v.broken),
             "metrics": {n: v.measured.mean(n) for n in SCALARS}}
            for v in found
        ],
    })  # fmt: skip
    if not holds:
        (out / "best.yaml").unlink(missing_ok=True)  # of an earlier search
        return None
    found[-1].scenario.save(out / "best.yaml")
    return out / "best.yaml"
