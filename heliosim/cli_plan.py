"""``heliosim plan`` and ``heliosim max-rate``. Everything heavy is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliosim.cli_sweep import worker_count
from heliosim.errors import InputError, about

if TYPE_CHECKING:
    from heliosim.formats.profile import Profile
    from heliosim.planfile import PlanFile, Rules
    from heliosim.scenario import Scenario

Jobs = Annotated[
    int | None, typer.Option(min=1, help="Worker processes, default 1; the answer is the same for any number.")
]
ExecutorKind = Annotated[str, typer.Option("--executor", help="local, dask or ray.")]
Address = Annotated[str | None, typer.Option(help="Of a Dask or Ray cluster that is already there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Folder = Annotated[Path | None, typer.Option(help="Folder for the answer and the probes done so far.")]


def plan(
    file: Annotated[Path, typer.Argument(help="Plan file (YAML), see docs/planning.md.")],
    out: Folder = None,
    prices: Annotated[Path | None, typer.Option(help="Price table (YAML) instead of the shipped one.")] = None,
    provider: Annotated[str | None, typer.Option(help="Provider whose prices to take; default: the plan's.")] = None,
    region: Annotated[str | None, typer.Option(help="Region whose prices to take; default: the plan's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed instead of the plan's.")] = None,
    jobs: Jobs = None,
    executor: ExecutorKind = "local",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Find the least-cost fleet that keeps the SLO. Exit code 0: feasible, 1: infeasible, 3: undecided."""
    from heliosim.formats.files import require_own
    from heliosim.planfile import load_plan
    from heliosim.prices import load_prices

    workers = worker_count(jobs, executor, address)
    loaded = load_plan(file)
    given = {"provider": provider, "region": region, "seed": seed}
    loaded = loaded.model_copy(update={k: v for k, v in given.items() if v is not None})
    table = load_prices(prices)
    folder = out or Path("plans") / loaded.name.replace(" ", "-")
    require_own(folder, ("plan.json", "probes"), "plan")
    with about(file):
        result, prober = _search(loaded, table, folder, (executor, workers, address))
    from heliosim.plan_report import print_plan, save_plan

    saved = save_plan(folder, loaded, result, table)
    print_plan(loaded, result, table, saved, prober, as_json=as_json)
    from heliosim.planning import EXIT_CODES

    raise typer.Exit(EXIT_CODES[result.answer])


def _search(plan: PlanFile, table: Any, folder: Path, where: tuple[str, int, str | None]) -> tuple[Any, Any]:
    from functools import cache

    from heliosim.console import progress_bar
    from heliosim.executors import open_executor
    from heliosim.planfile import with_load
    from heliosim.planning import Planner
    from heliosim.probing import FleetJudge, Prober
    from heliosim.profile_view import open_profile
    from heliosim.streams import replication_seed
    from heliosim.workload import build_arrivals

    @cache
    def runs(load: float) -> Any:
        seeds = [replication_seed(plan.seed, k) for k in range(plan.replications.most)]
        return [build_arrivals(with_load(plan.workload, load), seed) for seed in seeds]

    profiles = {c.profile: open_profile(c.profile) for c in plan.candidates}
    _require_runnable(plan, profiles)
    with open_executor(*where) as executor, progress_bar("Planning") as progress:
        report = _steps(progress)
        prober = Prober(plan.rules, executor, folder / "probes", report)
        planner = Planner(plan, table, profiles, runs, FleetJudge(plan, prober))
        return planner.run(), prober


def _require_runnable(plan: PlanFile, profiles: dict[str, Profile]) -> None:
    """Refuse candidates that could run at no count, before the search; too little memory is an answer of its own."""
    from heliosim.errors import MemoryBudgetError
    from heliosim.vary import check_against

    for candidate in plan.candidates:
        scenario = plan.scenario(candidate, profiles[candidate.profile], 1)
        try:
            check_against(scenario, profiles.__getitem__, f"candidates {candidate.name!r}")
        except MemoryBudgetError:
            continue


def _steps(progress: Any) -> Any:
    """Progress of a search whose length nobody knows: each probe brings it a fortieth nearer to the end."""
    share = 0.0

    def report(what: str) -> None:
        nonlocal share
        share += (0.99 - share) / 40
        progress(what, share)

    return report


def max_rate(
    file: Annotated[Path, typer.Argument(help="Scenario file (YAML), one replica or a fleet.")],
    limit: Annotated[
        list[str] | None, typer.Option(help="Limit on a latency, such as p99_ttft_ms=500. Repeatable.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Least share of requests within every limit of the scenario's slo.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Relative width of the answer's bracket.")] = 0.02,
    least: Annotated[int, typer.Option(min=2, help="Replications from which a verdict is looked for.")] = 4,
    most: Annotated[int, typer.Option(min=2, help="Replications after which it stays undecided.")] = 10,
    warm_up: Annotated[float, typer.Option(help="Share of the requests, the first ones, left out.")] = 0.1,
    out: Folder = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed instead of the scenario's.")] = None,
    jobs: Jobs = None,
    executor: ExecutorKind = "local",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Find the highest rate a scenario sustains within its limits. Exit code 0: found, 1: none, 3: undecided.

    The scenario's statistics section is not used: --least, --most and --warm-up say what it would.
    """
    from heliosim.formats.files import require_own
    from heliosim.planfile import Replications, Rules, is_closed
    from heliosim.scenario import load_scenario

    workers = worker_count(jobs, executor, address)
    scenario = load_scenario(file)
    if seed is not None:
        scenario = scenario.model_copy(update={"seed": seed})
    if is_closed(scenario.workload):
        remedy = "Use an open arrival process."
        raise InputError(f"{file}, workload.arrivals.kind", "closed", "a closed loop has no rate of its own", remedy)
    if not 0 < tolerance < 1:
        raise InputError("--tolerance", tolerance, "not between 0 and 1", "Give a share such as 0.02.")
    if not 0 <= warm_up < 0.9:
        raise InputError("--warm-up", warm_up, "not between 0 and 0.9", "Give a share such as 0.1.")
    if most < least:
        raise InputError("--most", most, f"less than --least ({least})", "Raise it.")
    targets = _targets(scenario, limit or [], share)
    rules = Rules(targets, replications=Replications(least=least, most=most), warm_up=warm_up)
    folder = out or Path("plans") / f"max-rate-{scenario.name}"
    require_own(folder, ("max-rate.json", "probes"), "answer of max-rate")
    if file.resolve() == (folder / "sustained.yaml").resolve():
        raise InputError(str(folder), str(file), "the answer would replace this scenario", "Choose another with --out.")
    from heliosim.plan_report import print_rate, save_rate
    from heliosim.planning import EXIT_CODES

    with about(file):
        answer = _rate(scenario, rules, tolerance, folder, (executor, workers, address))
    saved = save_rate(folder, scenario, answer)
    print_rate(scenario, answer, saved, as_json=as_json)
    raise typer.Exit(EXIT_CODES[answer.verdict])


def _targets(scenario: Scenario, limits: list[str], share: float | None) -> Any:
    """Targets from the options; with none, the scenario's slo for 95 % of requests."""
    from heliosim.formats.files import validate
    from heliosim.planfile import Targets

    pairs = [_limit(text) for text in limits]
    twice = next((name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1), None)
    if twice is not None:
        raise InputError("--limit", twice, "is given twice", "Keep one of them.")
    found: dict[str, Any] = {"limits": dict(pairs)}
    slo = scenario.slo
    if share is not None or not limits:
        if slo is None:
            remedy = "Give --limit p99_ttft_ms=500, or an slo in the scenario."
            raise InputError("--limit" if share is None else "--share", share, "the scenario has no slo", remedy)
        each = {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms, "e2el_ms": slo.e2el_ms}
        found["attainment"] = {"share": 0.95 if share is None else share, **each}
    try:
        return validate(Targets, found, "options")
    except InputError as error:
        error.where = "--limit" if "field limits" in error.where else "--share"
        raise


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise InputError("--limit", text, "not NAME=MILLISECONDS", "Write p99_ttft_ms=500.") from None


def _rate(scenario: Scenario, rules: Rules, tolerance: float, folder: Path, where: tuple[str, int, str | None]) -> Any:
    from heliosim.console import progress_bar
    from heliosim.executors import open_executor
    from heliosim.max_rate import find_max_rate
    from heliosim.probing import Prober

    with open_executor(*where) as executor, progress_bar("Searching") as progress:
        prober = Prober(rules, executor, folder / "probes", _steps(progress))
        return find_max_rate(scenario, prober, tolerance)
