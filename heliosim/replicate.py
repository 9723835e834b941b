"""Independent replications of a scenario, as many as an interval needs.

**What a replication varies.** Replication k runs the scenario under ``replication_seed(seed, k)``; the seed's named
streams draw arrivals, tasks, lengths, the recorded text each request stands for (hence its exits), and the starting
place of recorded step noise. Under a trace with its own times only what the trace leaves open is drawn: texts (exits,
natural lengths), tasks, noise. A metric on which none of this has any influence is the same every time, and its
interval is unavailable, not zero.

**Common random numbers.** The k-th replication of every scenario of one seed has the same seed, and every draw belongs
to a stream and a request, so two policies meet the same requests at the same times, standing for the same texts.

**Warm-up** of a steady system is found once, by MSER-5 over the delays of a pilot run that takes no part in any
interval; the same number of requests is then left out of every replication. Cutting each replication at its own best
place biases what remains (``stats.mser5``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from heliosim.arrivals import Closed, Replay
from heliosim.errors import InputError
from heliosim.executors import run_all
from heliosim.formats.profile import Profile
from heliosim.formats.results import RunResults
from heliosim.metrics import SCALARS, summarise
from heliosim.profile_view import open_profile
from heliosim.replicated import Horizon, Replicated, Replication, WarmUp
from heliosim.runs import run_simulated, sim_engine
from heliosim.scenario import Scenario, StatisticsSpec
from heliosim.stats import StoppingRule, delay_drift, is_saturated, mser5
from heliosim.streams import replication_seed, stream
from heliosim.uncertainty import require_steps, resampled_profile

__all__ = ["Horizon", "Replicated", "Replication", "WarmUp", "find_warm_up", "replicate", "replication_seed"]

Floats = npt.NDArray[np.float64]
WATCHED = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
"""Metrics whose intervals must become narrow unless the scenario names others; with an SLO also its attainment."""
PILOTS = 3
OnProgress = Callable[[str, float], None]


def horizon_of(scenario: Scenario) -> Horizon:
    """Whether the scenario is of a system that goes on, or of one day: as it says; else a trace's own times, a closed
    loop, tasks in blocks and failures at given times make a day, and other drawn arrivals a steady system.
    """
    said = scenario.statistics.horizon if scenario.statistics else None
    if said is not None:
        return said
    load = scenario.workload
    has_own_times = load.trace is not None and (load.arrivals is None or isinstance(load.arrivals, Replay))
    in_blocks = load.order == "blocks" and len(load.tasks) > 1
    has_failures = scenario.fleet is not None and bool(scenario.fleet.failures)
    is_day = has_own_times or in_blocks or has_failures or isinstance(load.arrivals, Closed)
    return "terminating" if is_day else "steady"


def watched_of(scenario: Scenario) -> tuple[str, ...]:
    """The metrics a scenario's replications wait for."""
    said = scenario.statistics.metrics if scenario.statistics else ()
    return said or (*WATCHED, *(("slo_attainment",) if scenario.slo is not None else ()))


def replicate(
    scenario: Scenario,
    rule: StoppingRule | None = None,
    *,
    executor: Executor | None = None,
    metrics: Sequence[str] = (),
    horizon: Horizon | None = None,
    warm_up: WarmUp | None = None,
    profile_uncertainty: bool | None = None,
    first: RunResults | None = None,
    on_progress: OnProgress | None = None,
) -> Replicated:
    """Run replications until the rule holds. What is not given is the scenario's: rule, watched metrics, horizon,
    warm-up, profile uncertainty. ``first``: replication 0, where somebody has run it already.

    The result does not depend on the executor. Raises InputError for what the scenario or its profile cannot do.
    """
    said = scenario.statistics or StatisticsSpec()
    horizon = horizon or horizon_of(scenario)
    uncertain = said.profile_uncertainty if profile_uncertainty is None else profile_uncertainty
    if uncertain:
        require_uncertain(scenario)
    warm_up = warm_up or find_warm_up(scenario, horizon)
    so_far = Replicated(
        name=scenario.name,
        horizon=horizon,
        warm_up=warm_up,
        rule=rule or said.replications.rule(),
        watched=tuple(metrics) or watched_of(scenario),
        replications=(),
        profile_uncertainty=uncertain,
    )
    if first is not None and not uncertain:
        so_far = replace(so_far, replications=(measure(first, scenario, 0, warm_up),))
    run_one = partial(run_replication, scenario, warm_up, uncertain)
    while not so_far.is_done:
        for one in _wave(run_one, so_far, executor):
            so_far = replace(so_far, replications=(*so_far.replications, one))
            if on_progress is not None:
                on_progress(*_progress(so_far))
            if so_far.is_done:
                break
    return so_far


def _wave(run_one: Callable[[int], Replication], so_far: Replicated, executor: Executor | None) -> list[Replication]:
    """The next replications: one in this process; else as many as are surely needed or keep every worker busy."""
    start, width = so_far.count, width_of(executor)
    if executor is None or width == 1:
        return [run_one(start)]
    found: dict[int, Replication] = {}
    indices = range(start, start + max(so_far.rule.least - start, width))
    run_all(executor, run_one, indices, lambda k, one: found.update({indices[k]: one}))
    return [found[index] for index in indices]


def width_of(executor: Executor | None) -> int:
    """Items an executor works on at the same time, as far as it says."""
    return int(getattr(executor, "width", None) or getattr(executor, "_max_workers", None) or 1)


def _progress(so_far: Replicated) -> tuple[str, float]:
    """What to say, and the share of the replications that seem to be needed: widths fall with the root of the count."""
    rule, count = so_far.rule, so_far.count
    if count < 2:
        return f"{count} replication", count / rule.least
    widest = rule.widest(so_far.samples)
    needed = min(rule.most, max(rule.least, count * widest**2))
    text = f"{count} replications, widest interval ± {100 * widest * rule.relative_half_width:.1f} %"
    return text, min(0.99, count / needed)


def find_warm_up(scenario: Scenario, horizon: Horizon | None = None) -> WarmUp:
    """How many first requests to leave out of every replication: none of a terminating run, what the scenario says, or
    what MSER-5 finds in a pilot run of its own seed. Where one run shows no steady state but is not saturated, the
    mean of up to ``PILOTS`` runs is looked at: it is less noisy.
    """
    given = scenario.statistics.warm_up_requests if scenario.statistics else None
    if (horizon or horizon_of(scenario)) == "terminating":
        return WarmUp(0, "none")
    if given is not None:
        return WarmUp(given, "given")
    delays: list[Floats] = []
    for k in range(PILOTS):
        seed = int(stream(scenario.seed, "pilot", k).integers(2**63))
        results = run_simulated(scenario.model_copy(update={"seed": seed}), _opened(scenario.profile))
        delays.append(pilot_delays(results))
        warm_up = warm_up_of(delays)
        if warm_up.is_settled or is_saturated(*_waits(results)):
            break
    return warm_up


def warm_up_of(delays: Sequence[Floats]) -> WarmUp:
    """The warm-up that the delays of pilot runs show, each in order of arrival, NaN for requests that have none: MSER-5
    of their mean. Half of the requests if it finds none.
    """
    all_known = np.vstack(delays)
    known = np.flatnonzero(~np.isnan(all_known).any(axis=0))
    cut = mser5(all_known[:, known].mean(axis=0))
    if cut is None:
        return WarmUp(all_known.shape[1] // 2, "mser-5", is_settled=False)
    return WarmUp(int(known[cut]) if cut else 0, "mser-5")


def pilot_delays(results: RunResults) -> Floats:
    """Seconds from arrival to last token, per token, in order of arrival: waiting, reading and decoding are all in it.
    NaN for refused requests.
    """
    requests = results.requests
    arrival, finish = (requests[c].to_numpy() for c in ("arrival_s", "finish_s"))
    tokens = requests["output_tokens"].to_numpy()
    finished = np.array([s == "finished" for s in requests["status"].to_pylist()], dtype=bool) & (tokens > 0)
    delays = np.where(finished, (finish - arrival) / np.maximum(tokens, 1), np.nan)
    return np.asarray(delays[np.argsort(arrival, kind="stable")], dtype=np.float64)


def run_replication(scenario: Scenario, warm_up: WarmUp, profile_uncertainty: bool, index: int) -> Replication:
    """One replication, in numbers: what a worker process is asked to do."""
    seeded = scenario.model_copy(update={"seed": replication_seed(scenario.seed, index)})
    try:
        return measure(_run(seeded, profile_uncertainty), scenario, index, warm_up)
    except InputError as error:
        error.where = f"replication {index}: {error.where}"
        raise


def _run(seeded: Scenario, profile_uncertainty: bool) -> RunResults:
    profile = _opened(seeded.profile)
    if not profile_uncertainty:
        return run_simulated(seeded, profile)
    drawn = resampled_profile(profile, seeded.models, seeded.clock, seeded.seed)
    # The controller plans with the published costs, the steps take what was drawn: it cannot know better.
    return run_simulated(seeded, profile, engine=sim_engine(seeded, drawn, strides=True))


def measure(results: RunResults, scenario: Scenario, index: int, warm_up: WarmUp) -> Replication:
    """A run as a replication. Raises InputError if the warm-up leaves no request."""
    requests = results.requests
    arrival = requests["arrival_s"].to_numpy()
    order = np.argsort(arrival, kind="stable")
    if warm_up.requests >= len(order):
        where = f"scenario {scenario.name!r}, statistics.warm_up_requests"
        raise InputError(where, warm_up.requests, f"the run has only {len(order)} requests", "Leave out fewer.")
    after_s = float(arrival[order[warm_up.requests]]) if warm_up.requests else 0.0
    summary = summarise(results, after_s, scenario.slo)
    return Replication(
        index=index,
        seed=results.info.seed,
        requests=summary.offered,
        after_s=after_s,
        drift=drift_of(results, scenario),
        is_saturated=grew(results, scenario),
        values={name: summary.value(name) for name in SCALARS},
    )


def drift_of(results: RunResults, scenario: Scenario) -> float | None:
    """Seconds of waiting gained per second of arrivals; None of a closed loop, and where there are too few to say."""
    return None if isinstance(scenario.workload.arrivals, Closed) else delay_drift(*_waits(results))


def grew(results: RunResults, scenario: Scenario) -> bool:
    """Whether waiting grew from the beginning of a run to its end; in a closed loop it cannot."""
    return not isinstance(scenario.workload.arrivals, Closed) and is_saturated(*_waits(results))


def _waits(results: RunResults) -> tuple[Floats, Floats]:
    """Arrivals and waiting times of the requests that started, s."""
    arrival = results.requests["arrival_s"].to_numpy()
    admitted = results.requests["admitted_s"].cast("double").to_numpy()
    started = ~np.isnan(admitted)
    return arrival[started], (admitted - arrival)[started]


def require_uncertain(scenario: Scenario) -> None:
    """Raise InputError ("unavailable") if step costs cannot be drawn anew for this scenario."""
    if scenario.fleet is not None:
        remedy = "Leave profile uncertainty out, or study one replica."
        raise InputError(
            f"scenario {scenario.name!r}", "fleet", "profile uncertainty is unavailable for fleets", remedy
        )
    require_steps(_opened(scenario.profile), scenario.models, scenario.clock)


def _opened(name: str) -> Profile:
    """A profile, read once in each process."""
    file = Path(name) / "profile.json"
    return _open_once(name, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=4)
def _open_once(name: str, changed_ns: int) -> Profile:
    return open_profile(name)
