"""Answers of the planner for people and programs: tables on the terminal, JSON, and scenario files that run as is."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliosim.formats.files import write_json
from heliosim.max_rate import MaxRate, scaled
from heliosim.metrics import significant
from heliosim.plan_words import bound_text, describe, number, spread
from heliosim.planfile import PlanFile
from heliosim.planner import Judgement
from heliosim.planning import Option, PlanResult
from heliosim.prices import PriceTable
from heliosim.probing import Prober, limits_of
from heliosim.profile_view import open_profile
from heliosim.scenario import Scenario
from heliosim.stats import Interval
from heliosim.tables import counted
from heliosim.vary import of_groups

if TYPE_CHECKING:
    from rich.console import Console

COLOURS: Mapping[str, str] = {
    "feasible": "green",
    "infeasible": "red",
    "undecided": "yellow",
    "meets": "green",
    "misses": "red",
}
SHORT_RUN = 5
"""Arrivals that last less than so many mean stays say little of a steady state."""


# --- files --------------------------------------------------------------------------------------------------


def save_plan(folder: Path, plan: PlanFile, result: PlanResult, table: PriceTable) -> list[Path]:
    """Write the answer as JSON and its fleets as scenarios; returns what was written. Old answers are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan_json(plan, result, table))
    written = [folder / "plan.json"]
    fleets = {"fleet": result.winner, "one-fewer": result.winner, "runner-up": result.runner_up}
    for name, option in fleets.items():
        path = folder / f"{name}.yaml"
        count = 0 if option is None or option.count is None else option.count - (name == "one-fewer")
        if option is None or count < 1:
            path.unlink(missing_ok=True)
            continue
        plan.scenario(option.candidate, open_profile(option.candidate.profile), count).save(path)
        written.append(path)
    return written


def save_rate(folder: Path, scenario: Scenario, answer: MaxRate) -> list[Path]:
    """Write the answer as JSON, and the scenario at the rate it sustains."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "max-rate.json", rate_json(scenario, answer))
    path = folder / "sustained.yaml"
    if answer.rate.sustained is None:
        path.unlink(missing_ok=True)
        return [folder / "max-rate.json"]
    scaled(scenario, answer.rate.sustained).save(path)
    return [folder / "max-rate.json", path]


# --- plain data ---------------------------------------------------------------------------------------------


def interval_json(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None or interval.mean is None:
        return None
    return {"mean": interval.mean, "half_width": interval.half_width, "confidence": interval.confidence}


def judgement_json(judgement: Judgement | None) -> dict[str, Any] | None:
    if judgement is None:
        return None
    return {
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "replications": judgement.replications,
        "limits": [
            {
                "metric": m.limit.metric,
                m.limit.sense: m.limit.bound,
                "interval": interval_json(m.interval),
                "verdict": m.verdict,
            }
            for m in judgement.margins
        ],
        "figures": {name: interval_json(value) for name, value in judgement.figures.items()},
    }


def option_json(option: Option) -> dict[str, Any]:
    return {
        "candidate": option.candidate.model_dump(mode="json"),
        "price": option.price.model_dump(mode="json"),
        "least_count": option.bound.least,
        "least_count_because": option.bound.reason,
        "least_utilisation": option.bound.utilisation,
        "count": option.count,
        "price_per_hour": option.price_per_hour,
        "price_per_million_output_tokens": option.price_per_million_tokens,
        "status": option.status,
        "asked": {str(n): v for n, v in (option.capacity.verdicts.items() if option.capacity else ())},
        "undecided_counts": list(option.undecided),
        "judgement": judgement_json(option.judgement),
    }


def plan_json(plan: PlanFile, result: PlanResult, table: PriceTable) -> dict[str, Any]:
    return {
        "plan": plan.name,
        "seed": plan.seed,
        "currency": table.currency,
        "answer": result.answer,
        "winner": option_json(result.winner) if result.winner else None,
        "verified_with_fresh_seeds": judgement_json(result.verified),
        "one_fewer": judgement_json(result.one_fewer),
        "runner_up": option_json(result.runner_up) if result.runner_up else None,
        "sensitivity": [
            {"load": s.load, "count": s.count, "same_count": judgement_json(s.judgement)} for s in result.sensitivity
        ],
        "candidates": [option_json(o) for o in result.options],
        "notes": [*result.notes, *_notes(plan, result, table)],
    }


def rate_json(scenario: Scenario, answer: MaxRate) -> dict[str, Any]:
    return {
        "scenario": scenario.name,
        "seed": scenario.seed,
        "answer": answer.verdict,
        "sustained_per_s": answer.sustained_per_s,
        "failed_per_s": answer.failed_per_s,
        "asked": {f"{answer.base_per_s * k:.6g}": v for k, v in answer.rate.verdicts.items()},
        "at_sustained": judgement_json(answer.sustained),
        "at_failed": judgement_json(answer.failed),
        "verified_with_fresh_seeds": judgement_json(answer.verified),
        "notes": [
            *answer.notes,
            *_derived_notes([one.profile for one in of_groups(scenario)]),
            *_short(answer.sustained),
        ],
    }


def _notes(plan: PlanFile, result: PlanResult, table: PriceTable) -> list[str]:
    """What must be said beside any answer: derived profiles, old prices, short runs."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    found = _derived_notes([o.candidate.profile for o in result.options])
    old = {f"{o.price.gpu}: {o.price.date}" for o in result.options if o.price.is_stale(today)}
    if old:
        found.append(f"prices older than half a year ({', '.join(sorted(old))}); bring your own with --prices")
    return [*found, *_short(result.winner.judgement if result.winner else None)]


def _derived_notes(profiles: list[str]) -> list[str]:
    rests_on = {
        "derived": "published kernel times, synthetic exits; energy from data sheets",
        "composed": "shapes and a device's efficiency curves; energy from a power model; exits, if any, synthetic or taken over",
    }
    found = []
    for kind, what in rests_on.items():
        if of_kind := sorted({name for name in profiles if open_profile(name).facts.kind == kind}):
            shown = ", ".join(Path(name).name for name in of_kind)
            found.append(f"{kind}, not measured ({shown}): {what}")
    return found


def _short(judgement: Judgement | None) -> list[str]:
    if judgement is None:
        return []
    span, stay = (judgement.figures.get(k) for k in ("arrivals_s", "mean_e2el_s"))
    if span is None or stay is None or not span.mean or not stay.mean or span.mean >= SHORT_RUN * stay.mean:
        return []
    return [
        f"arrivals last {number(span.mean)} s and a request stays {number(stay.mean)} s: give the workload more "
        "requests for a steady state"
    ]


# --- the terminal -------------------------------------------------------------------------------------------


def print_plan(
    plan: PlanFile, result: PlanResult, table: PriceTable, saved: list[Path], prober: Prober, *, as_json: bool
) -> None:
    """The answer on standard output."""
    from heliosim.console import console

    if as_json:
        print(json.dumps(plan_json(plan, result, table), indent=2))
        return
    out = console()
    out.print(_options_table(plan, result, table))
    out.print(f"[bold {COLOURS[result.answer]}]{result.answer}[/]{_headline(result, table)}")
    if result.winner is not None:
        _print_winner(out, result, table)
    for note in (*result.notes, *_notes(plan, result, table)):
        out.print(f"[yellow]note[/] {note}")
    out.print(
        f"{counted(prober.simulated, 'replication')} simulated, {prober.remembered} remembered from an earlier call"
    )
    out.print("Written: " + ", ".join(str(p) for p in saved))
    if result.winner is not None:
        out.print(f"Run it with: heliosim run {saved[1]}")


def _headline(result: PlanResult, table: PriceTable) -> str:
    winner = result.winner
    if winner is None:
        return ": no fleet of these candidates was shown to keep the targets"
    price = f"{winner.price_per_hour:.2f} {table.currency}/h"
    return f": [bold]{winner.count} × {winner.candidate.name}[/] ({_gpus(winner)}), {price}"


def _gpus(option: Option) -> str:
    count = (option.count or 0) * option.candidate.gpus_per_replica
    return f"{count} {option.candidate.gpu}"


def _options_table(plan: PlanFile, result: PlanResult, table: PriceTable) -> Any:
    from rich.table import Table
    from rich.text import Text

    limits = ", ".join(bound_text(limit) for limit in limits_of(plan.rules))
    rule = plan.replications
    shown = Table(
        title=f"Plan {plan.name} · {_workload(plan)}",
        title_justify="left",
        title_style="bold",
        caption=f"{limits}\n{100 * rule.confidence:g} % intervals over {rule.least} to {rule.most} seeds "
        f"from {plan.seed}",
        caption_justify="left",
    )
    shown.add_column("candidate", overflow="fold")
    shown.add_column("GPU", overflow="fold")
    for name in ("bound", "replicas", f"{table.currency}/h", f"{table.currency}/M tokens"):
        shown.add_column(name, justify="right", no_wrap=name != f"{table.currency}/M tokens")
    shown.add_column("why", overflow="fold")
    for option in result.options:
        is_winner = result.winner is not None and option.candidate.name == result.winner.candidate.name
        shown.add_row(
            Text(option.candidate.name, style="bold green" if is_winner else ""),
            option.candidate.gpu,
            "–" if option.bound.least is None else str(option.bound.least),
            "–" if option.count is None else str(option.count),
            "–" if option.price_per_hour is None else f"{option.price_per_hour:.2f}",
            "–" if option.price_per_million_tokens is None else f"{option.price_per_million_tokens:.2f}",
            Text(option.status),
        )
    return shown


def _workload(plan: PlanFile) -> str:
    process = plan.workload.arrivals
    rate = getattr(process, "rate_per_s", None)
    kind = process.kind if process is not None else "replay"
    arrivals = kind if rate is None else f"{kind}, {rate:g} requests/s"
    arrivals = f"{plan.workload.requests:,} requests, {arrivals}" if plan.workload.requests else arrivals
    tasks = ", ".join(t.task for t in plan.workload.tasks)
    return f"{arrivals}{f' ({tasks})' if tasks else ''}"


def _print_winner(out: Console, result: PlanResult, table: PriceTable) -> None:
    winner, verified = result.winner, result.verified
    assert winner is not None
    assert verified is not None
    tokens = winner.price_per_million_tokens
    if tokens is not None:
        out.print(f"  price      {tokens:.2f} {table.currency} per million output tokens; GPU price of "
                  f"{winner.price.date}, {winner.price.provider} ({winner.price.source})")  # fmt: skip
    energy = verified.figures.get("energy_per_1000_j")
    said = "unavailable" if energy is None or energy.mean is None else f"{spread(energy, 1e-3)} kJ while stepping"
    out.print(f"  energy     {said} per 1,000 requests")
    lines = [describe(m) for m in verified.margins]
    out.print(f"  verified   {counted(verified.replications, 'fresh seed')}: {lines[0]}")
    for line in lines[1:]:
        out.print(f"             {line}")
    if result.one_fewer is not None:
        word = {"misses": "one fewer fails", "undecided": "one fewer is undecided"}.get(
            result.one_fewer.verdict, "one fewer meets"
        )
        out.print(f"  {word}: {result.one_fewer.reason}")
    for s in result.sensitivity:
        need = (
            "no count known"
            if s.count is None
            else f"{s.count} × ({s.count * winner.price_per_replica:.2f} {table.currency}/h)"
        )
        verdict, change = s.judgement.verdict, f"{100 * (s.load - 1):+.0f} %".replace("-", "−")
        out.print(f"  load {change}  needs {need}; {winner.count} × [{COLOURS[verdict]}]{verdict}[/]: "
                  f"{s.judgement.reason}")  # fmt: skip
    if (other := result.runner_up) is not None:
        out.print(f"  runner-up  {other.count} × {other.candidate.name} ({_gpus(other)}), "
                  f"{other.price_per_hour:.2f} {table.currency}/h")  # fmt: skip


def _rate_line(low: float, high: float | None, *, has_missed: bool = False) -> str:
    """The rate that keeps the limits, and what is known above it. ``has_missed``: a rate did with fresh seeds."""
    if high is None and has_missed:
        return f"[bold green]{significant(low)} requests/s[/] keep the limits; what missed is in the notes"
    if high is None:
        return f"[bold green]at least {significant(low)} requests/s[/]: no rate tried missed"
    return f"[bold green]{significant(low)} requests/s[/] keep the limits, {significant(high)} is not shown to"


def print_rate(scenario: Scenario, answer: MaxRate, saved: list[Path], *, as_json: bool) -> None:
    """The highest rate on standard output."""
    from rich.table import Table
    from rich.text import Text

    from heliosim.console import console

    if as_json:
        print(json.dumps(rate_json(scenario, answer), indent=2))
        return
    out = console()
    shown = Table(title=f"Highest rate of {scenario.name}", title_justify="left", title_style="bold")
    for name in ("requests/s", "verdict", "why"):
        shown.add_column(name, justify="right" if name == "requests/s" else "left", overflow="fold")
    for per_s, judgement in ((answer.sustained_per_s, answer.sustained), (answer.failed_per_s, answer.failed)):
        if per_s is not None and judgement is not None:
            shown.add_row(
                significant(per_s), Text(judgement.verdict, style=COLOURS[judgement.verdict]), Text(judgement.reason)
            )
    out.print(shown)
    low, high = answer.sustained_per_s, answer.failed_per_s
    if low is None:
        out.print(f"[bold {COLOURS[answer.verdict]}]{answer.verdict}[/]: no rate was shown to keep the limits")
    else:
        out.print(_rate_line(low, high, has_missed=bool(answer.notes)))
        for margin in answer.sustained.margins if answer.sustained else ():
            out.print(f"  {describe(margin)}")
        if answer.verified is not None:
            out.print(f"  verified   {counted(answer.verified.replications, 'fresh seed')}: {answer.verified.reason}")
    for note in (
        *answer.notes,
        *_derived_notes([one.profile for one in of_groups(scenario)]),
        *_short(answer.sustained),
    ):
        out.print(f"[yellow]note[/] {note}")
    out.print("Written: " + ", ".join(str(p) for p in saved))
