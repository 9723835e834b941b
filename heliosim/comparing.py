"""Systems side by side under one workload: a load sweep of each, and a fleet's attainment over load and replicas.

Every cell (system, rate, replicas) is run in the same replications, so systems meet the same requests and are compared
pair by pair. A study is a list of independent cells: it runs through any executor, says how far it is, may be
interrupted, and what comes of it does not depend on who ran what when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field

from heliosim.arrivals import Gaps
from heliosim.costing import token_cost
from heliosim.errors import InputError, UnknownNameError
from heliosim.executors import InlineExecutor, run_all
from heliosim.formats.results import RunResults
from heliosim.max_rate import base_rate, scaled
from heliosim.metrics import SCALARS, request_latencies, summarise
from heliosim.replicate import drift_of, grew
from heliosim.replicated import SATURATED, is_refused
from heliosim.runs import run_simulated
from heliosim.scenario import Fleet, ReplicaGroup, Scenario
from heliosim.stats import Interval, t_interval
from heliosim.streams import replication_seed
from heliosim.sweep import open_once
from heliosim.what_if import SETTLING, quantiles_of

OnProgress = Callable[[str, float], None]
EXTRA = ("tokens_per_s_per_gpu", "tokens_per_s_per_user", "cost_per_million_tokens")
"""What a cell knows beyond the metrics of a run: output tokens per second and GPU; per second and user (one over the
mean TPOT); money per million output tokens (the shipped prices).
"""
MOST_CELLS = 2000
LEAST_DRIFT = 0.02
"""Seconds of waiting gained per second of arrivals from which on a system is called overloaded."""


@dataclass(frozen=True)
class Plan:
    """What to run. ``systems``: scenarios of one server by name, all under the same arrivals; ``rates_per_s``: the
    sweep; ``focus_per_s``: the rate at which systems are looked at closely (it joins the sweep). ``fleet_of``: the
    system whose attainment is mapped over ``fleet_rates_per_s`` (of the whole fleet) and ``replicas``; None: no map.
    ``settling``: share of first requests left out.
    """

    systems: Mapping[str, Scenario]
    rates_per_s: tuple[float, ...]
    focus_per_s: float
    replications: int = 3
    fleet_of: str | None = None
    fleet_rates_per_s: tuple[float, ...] = ()
    replicas: tuple[int, ...] = ()
    settling: float = SETTLING

    def __post_init__(self) -> None:
        if not self.systems:
            raise InputError("systems", [], "nothing to compare", "Choose at least one system.")
        if self.replications < 2:
            raise InputError("replications", self.replications, "an interval needs two", "Give 2 or more.")
        for rate in (*self.rates_per_s, *self.fleet_rates_per_s, self.focus_per_s):
            if not 0 < rate < 1e6:
                raise InputError("rates", rate, "must be above 0 requests per second", "Correct the rate.")
        if any(count < 1 for count in self.replicas):
            raise InputError("replicas", min(self.replicas), "must be at least 1", "Correct the number.")
        if self.fleet_of is not None and self.fleet_of not in self.systems:
            raise UnknownNameError("fleet_of", self.fleet_of, self.systems)
        seeds = {s.seed for s in self.systems.values()}
        if len(seeds) > 1:
            remedy = "Give all systems one seed: they are compared pair by pair."
            raise InputError("seed", sorted(seeds), "systems have different seeds", remedy)
        if len(self.cells) > MOST_CELLS:
            problem = f"{len(self.cells):,} runs, at most {MOST_CELLS:,} are done at once"
            raise InputError("study", len(self.cells), problem, "Ask for fewer rates, systems or replications.")

    @property
    def rates(self) -> tuple[float, ...]:
        """The sweep with the rate in focus, in order."""
        return tuple(sorted({*self.rates_per_s, self.focus_per_s}))

    @property
    def cells(self) -> list[tuple[str, float, int, int]]:
        """System, rate, replicas and replication of every run, each once."""
        sweep = [(name, rate, 1) for name in self.systems for rate in self.rates]
        grid = [(self.fleet_of or "", rate, n) for n in self.replicas for rate in self.fleet_rates_per_s]
        wanted = dict.fromkeys([*sweep, *(grid if self.fleet_of else [])])
        return [(*cell, index) for cell in wanted for index in range(self.replications)]


@dataclass(frozen=True)
class Cell:
    """One run in numbers. ``values``: every scalar metric and ``EXTRA``; ``grew``: waiting grew without end;
    ``drift``: seconds of waiting gained per second of arrivals, None if too few to say.
    ``latencies``: quantiles, ms, by ``ttft``, ``tpot``, ``e2el``; ``finished``: requests behind them.
    """

    system: str
    rate_per_s: float
    replicas: int
    replication: int
    seed: int
    requests: int
    grew: bool
    drift: float | None
    values: Mapping[str, float | None]
    latencies: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A plan's cells, in its order. ``slo``: limits, ms, that attainment means; ``base_seed``: of the scenarios."""

    systems: tuple[str, ...]
    rates_per_s: tuple[float, ...]
    focus_per_s: float
    replications: int
    requests: int
    base_seed: int
    slo: Mapping[str, float]
    profile_kind: str
    settling: float
    fleet_of: str | None
    fleet_rates_per_s: tuple[float, ...]
    replicas: tuple[int, ...]
    cells: tuple[Cell, ...]
    currency: str = ""

    @property
    def caption(self) -> str:
        """Sample size, replications, seed and origin, in one line."""
        from heliosim.formats.profile import ORIGINS

        origin = "" if self.profile_kind == "measured" else f" · profile {ORIGINS[self.profile_kind]}"  # type: ignore[index]
        return (
            f"{self.requests:,} requests per server and run, first {100 * self.settling:g} % left out · "
            f"{self.replications} replications · seed {self.base_seed} · simulated{origin}"
        )

    def cells_of(self, system: str, rate_per_s: float, replicas: int = 1) -> list[Cell]:
        """The replications of one cell, in order."""
        wanted = (system, rate_per_s, replicas)
        found = [c for c in self.cells if (c.system, c.rate_per_s, c.replicas) == wanted]
        return sorted(found, key=lambda c: c.replication)


@dataclass(frozen=True)
class _Job:
    scenario: Scenario
    system: str
    rate_per_s: float
    replicas: int
    replication: int
    settling: float
    is_focus: bool


def run_study(plan: Plan, *, executor: Executor | None = None, on_progress: OnProgress | None = None) -> Study:
    """Run every cell. ``on_progress`` may raise to stop: what has not started is then given up.

    Raises InputError naming the system for what a scenario or its profile cannot do.
    """
    jobs = [
        _Job(
            cell_scenario(plan.systems[name], rate, replicas),
            name,
            rate,
            replicas,
            index,
            plan.settling,
            replicas == 1 and rate == plan.focus_per_s,
        )
        for name, rate, replicas, index in plan.cells
    ]
    found: dict[int, tuple[Cell, str]] = {}

    def take(index: int, done: tuple[Cell, str]) -> None:
        found[index] = done
        if on_progress is not None:
            job = jobs[index]
            where = f"{job.rate_per_s:g} requests/s" + (f" on {job.replicas}" if job.replicas > 1 else "")
            on_progress(f"{job.system} at {where}", len(found) / len(jobs))

    run_all(executor or InlineExecutor(), _run_cell, jobs, take)
    first = next(iter(plan.systems.values()))
    cells = tuple(found[k][0] for k in range(len(jobs)))
    return Study(
        systems=tuple(plan.systems),
        rates_per_s=plan.rates,
        focus_per_s=plan.focus_per_s,
        replications=plan.replications,
        requests=max(cell.requests for cell in cells if cell.replicas == 1),
        base_seed=first.seed,
        slo={} if first.slo is None else {k: v for k, v in asdict(first.slo).items() if v is not None},
        profile_kind=open_once(first.profile).facts.kind,
        settling=plan.settling,
        fleet_of=plan.fleet_of,
        fleet_rates_per_s=tuple(sorted(set(plan.fleet_rates_per_s))) if plan.fleet_of else (),
        replicas=tuple(sorted(set(plan.replicas))) if plan.fleet_of else (),
        cells=cells,
        currency=next((money for _, money in found.values() if money), ""),
    )


def cell_interval(cells: Sequence[Cell], metric: str) -> Interval:
    """Interval of a metric over the replications of one cell; a figure that a system in which waiting grows without
    end does not have is refused. Raises KeyError for an unknown metric.
    """
    if is_overloaded(cells) and is_refused(metric):
        return Interval(None, None, len(cells), reason=SATURATED)
    return t_interval([cell.values[metric] for cell in cells])


def is_overloaded(cells: Sequence[Cell]) -> bool:
    """Whether waiting grew from beginning to end in more than half of the runs, or is known to grow by more than
    ``LEAST_DRIFT`` (95 % confidence): short runs of a system that changes its placement rarely rise all the way.
    """
    if 2 * sum(cell.grew for cell in cells) > len(cells):
        return True
    low = t_interval([cell.drift for cell in cells]).low
    return low is not None and low > LEAST_DRIFT


def cell_scenario(scenario: Scenario, rate_per_s: float, replicas: int) -> Scenario:
    """A scenario at another mean rate on so many equal replicas, with as many times the requests if they are drawn, so
    that every server sees as many.
    """
    process = scenario.workload.arrivals
    if isinstance(process, Gaps):
        workload = scenario.workload.model_copy(
            update={"arrivals": process.model_copy(update={"rate_per_s": rate_per_s})}
        )
        there = scenario.model_copy(update={"workload": workload})
    else:
        there = scaled(scenario, rate_per_s / base_rate(scenario))
    if replicas == 1:
        return there
    if there.workload.trace is None and there.workload.requests is not None:
        more = {"requests": there.workload.requests * replicas}
        there = there.model_copy(update={"workload": there.workload.model_copy(update=more)})
    return there.model_copy(update={"fleet": Fleet(replicas=(ReplicaGroup(name="replica", count=replicas),))})


def _run_cell(job: _Job) -> tuple[Cell, str]:
    """One run in numbers, and the currency of its cost."""
    seed = replication_seed(job.scenario.seed, job.replication)
    scenario = job.scenario.model_copy(update={"seed": seed})
    try:
        results = run_simulated(scenario, None if scenario.fleet is not None else open_once(scenario.profile))
    except InputError as error:
        error.where = f"{job.system} at {job.rate_per_s:g} requests/s: {error.where}"
        raise
    arrival = sorted(results.requests["arrival_s"].to_pylist())
    after_s = float(arrival[int(job.settling * len(arrival))]) if job.settling and arrival else 0.0
    summary = summarise(results, after_s, scenario.slo)
    cost = token_cost(results, summary)
    values = {name: summary.value(name) for name in SCALARS}
    tpot = values["mean_tpot_ms"]
    values["tokens_per_s_per_gpu"] = _per(values["output_throughput"], gpus_of(results))
    values["tokens_per_s_per_user"] = 1e3 / tpot if tpot else None
    values["cost_per_million_tokens"] = cost.per_million
    latencies = {}
    if job.is_focus:
        latencies = {name: quantiles_of(found) for name, found in request_latencies(results, after_s).items()}
    cell = Cell(
        job.system,
        job.rate_per_s,
        job.replicas,
        job.replication,
        seed,
        results.requests.num_rows,
        grew(results, scenario),
        drift_of(results, scenario),
        values,
        latencies,
    )
    return cell, cost.currency


def gpus_of(results: RunResults) -> int:
    """GPUs of all servers of a run; a server that names none counts as one device."""
    return sum(server.count * max(1, server.gpus) for server in results.info.deployed.values()) or 1


def _per(value: float | None, count: int) -> float | None:
    return None if value is None else value / count
