"""Probes: a fleet under a load, simulated with several seeds until a verdict stands.

Replication k of every fleet and load sees the same requests (common random numbers): arrivals, lengths and exits come
from streams named by the replication's seed, and another load divides the same gaps. Looks are taken at prefixes of the
replications in their order, so the answer does not depend on how many run at once. Done replications are kept in a
folder, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from heliosim import __version__
from heliosim.arrivals import Closed
from heliosim.errors import InputError
from heliosim.executors import run_all
from heliosim.formats.files import Strict, read_json, write_json
from heliosim.formats.profile import Profile
from heliosim.formats.results import RunResults
from heliosim.metrics import request_latencies, summarise
from heliosim.plan_words import describe, spread
from heliosim.planfile import Candidate, PlanFile, Rules, latency_of
from heliosim.planner import Judgement, Limit, compare, deciding, overall
from heliosim.profile_view import open_profile
from heliosim.replicate import horizon_of
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.stats import delay_drift, is_saturated, t_interval
from heliosim.streams import replication_seed
from heliosim.sweep import profiles_digest

HOPELESS_DRIFT = 0.2
"""Seconds of waiting gained per second of arrivals from which two replications are enough to say that a fleet drowns.
One is not: by chance a stable queue near its limit looks like this in up to a fifth of runs of 50 requests.
"""
SCREEN = 4
"""The first look at a fleet takes one in so many requests; a whole replication of another seed must confirm it."""
FRESH = 1_000_000
"""Replications of a verification are numbered from here: no probe has seen their seeds."""
FIGURES = (
    "output_tokens_per_s",
    "energy_per_1000_j",
    "perplexity",
    "agreement",
    "low_confidence_share",
    "arrivals_s",
    "mean_e2el_s",
)
"""Said of every fleet, asked for or not."""


# --- one replication ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One replication to simulate. ``requests``: only so many of them (None: all). ``warm_up``: share left out."""

    scenario: Scenario
    latencies: tuple[str, ...]
    warm_up: float
    requests: int | None = None

    def key(self, profile_hash: str) -> str:
        """Names what is simulated and how it is measured."""
        said = [self.scenario.hash, profile_hash, sorted(self.latencies), self.warm_up, self.requests, __version__]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Sample:
    """What one replication gave. ``values``: by metric, None where there is none. ``drift``: seconds of waiting gained
    per second of arrivals.
    """

    values: dict[str, float | None]
    drift: float | None
    is_saturated: bool


class _SampleFile(Strict):
    """Schema of a kept replication."""

    values: dict[str, float | None]
    drift: float | None
    is_saturated: bool


def write_sample(path: Path, sample: Sample) -> None:
    """Keep a replication for the next call."""
    write_json(path, asdict(sample))


def read_sample(path: Path) -> Sample:
    """A kept replication. Raises InputError for a file that holds none."""
    try:
        return Sample(**_SampleFile.model_validate(read_json(path)).model_dump())
    except ValidationError:
        raise InputError(str(path), path.name, "not a kept probe", "Remove the file; it is made again.") from None


@lru_cache(maxsize=8)
def _profile(name: str) -> Profile:
    return open_profile(name)


def measure(work: Work) -> Sample:
    """Simulate one replication and take its figures. Raises InputError for a scenario that cannot run."""
    scenario = work.scenario
    if work.requests is not None:
        scenario = scenario.model_copy(
            update={"workload": scenario.workload.model_copy(update={"requests": work.requests})}
        )
    results = run_simulated(scenario, _profile(scenario.profile))
    arrival = results.requests["arrival_s"].to_numpy()
    after = _after(arrival, work.warm_up)
    summary = summarise(results, after, scenario.slo)
    values: dict[str, float | None] = {
        "attainment": summary.slo_attainment,
        "refused_share": summary.refused / summary.offered if summary.offered else None,
        "output_tokens_per_s": _token_rate(results, after),
        "energy_per_1000_j": _energy(results),
        "arrivals_s": float(np.ptp(arrival)) if len(arrival) else None,
        "mean_e2el_s": None if summary.mean_e2el_ms is None else summary.mean_e2el_ms / 1e3,
        "perplexity": summary.perplexity,
        "agreement": summary.agreement,
        "low_confidence_share": summary.low_confidence_share,
    }
    latencies = request_latencies(results, after)
    for name in work.latencies:
        percentile, family = latency_of(name)
        some = latencies[family]
        if not len(some):
            values[name] = None
        else:
            values[name] = float(some.mean() if percentile is None else np.percentile(some, percentile))
    drift, saturated = _waiting(results) if is_steady(scenario) else (None, False)
    return Sample(values, drift, saturated)


def is_steady(scenario: Scenario) -> bool:
    """Whether it goes on alike, so that waiting which grows will go on growing: as ``horizon_of`` says. A trace's own
    times may hold a rush hour, tasks in blocks change on the way, a replica that fails comes back, and a closed loop
    waits for its answers, whatever the scenario says of it.
    """
    return horizon_of(scenario) == "steady" and not isinstance(scenario.workload.arrivals, Closed)


def _after(arrival: Any, warm_up: float) -> float:
    """When the first request that counts arrives."""
    order = np.sort(arrival)
    return float(order[int(warm_up * len(order))]) if len(order) and warm_up else 0.0


def _token_rate(results: RunResults, after: float) -> float | None:
    """Output tokens per second of arrivals: what a fleet that keeps up gives, whatever the end of the run adds."""
    arrival, tokens = (results.requests[c].to_numpy() for c in ("arrival_s", "output_tokens"))
    late = arrival >= after
    span = float(np.ptp(arrival[late])) if late.any() else 0.0
    return float(tokens[late].sum()) / span if span else None


def _energy(results: RunResults) -> float | None:
    """Joules per 1,000 finished requests over the whole run; None where any step has none."""
    energy, finished = results.steps["energy_j"], results.counts["finished"]
    if energy.null_count or not finished:
        return None
    return 1000 * float(energy.to_numpy().sum()) / finished


def _waiting(results: RunResults) -> tuple[float | None, bool]:
    """How the time to the first token grows over the run, and whether without end. Requests that never got one, as
    those refused, are left out.
    """
    arrival, first = (
        results.requests[c].to_numpy(zero_copy_only=False).astype(float) for c in ("arrival_s", "first_token_s")
    )
    known = ~np.isnan(first)
    delay = (first - arrival)[known]
    return delay_drift(arrival[known], delay), is_saturated(arrival[known], delay)


# --- verdicts -----------------------------------------------------------------------------------------------


def limits_of(rules: Rules) -> list[Limit]:
    """Everything a fleet must keep, as bounds on metrics of a replication."""
    targets, quality = rules.targets, rules.quality
    found = [Limit(name, "most", most) for name, most in targets.limits.items()]
    if targets.attainment is not None:
        found.append(Limit("attainment", "least", targets.attainment.share))
    found.append(Limit("refused_share", "most", targets.max_refused_share))
    if quality.max_perplexity is not None:
        found.append(Limit("perplexity", "most", quality.max_perplexity))
    if quality.min_agreement is not None:
        found.append(Limit("agreement", "least", quality.min_agreement))
    if quality.max_low_confidence_share is not None:
        found.append(Limit("low_confidence_share", "most", quality.max_low_confidence_share))
    return found


def verdict_of(samples: Sequence[Sample], limits: Sequence[Limit], confidence: float, least: int) -> Judgement | None:
    """The verdict these replications allow; None while they are too few. More of them may still decide *undecided*."""
    if len(samples) < least:
        return None
    if sum(s.is_saturated for s in samples) > len(samples) / 2:
        return _drowned(samples, confidence)
    margins = tuple(compare(limit, [s.values[limit.metric] for s in samples], confidence) for limit in limits)
    figures = {name: t_interval([s.values[name] for s in samples], confidence) for name in FIGURES}
    most_telling = deciding(margins)
    reason = describe(most_telling) if most_telling else ""
    return Judgement(overall(margins), reason, margins, len(samples), figures)


def is_hopeless(sample: Sample) -> bool:
    """Whether one more look like this is enough."""
    return sample.is_saturated and (sample.drift or 0.0) >= HOPELESS_DRIFT


def _drowned(samples: Sequence[Sample], confidence: float, *, is_quick: bool = False) -> Judgement:
    """Percentiles of such runs only tell how long they lasted, so none are given. ``is_quick``: a look or two, which
    tell that waiting grows, not how exactly.
    """
    drift = t_interval([s.drift for s in samples], confidence)
    grows = f"{drift.mean:.2f}" if is_quick else spread(drift)
    reason = f"saturated, waiting grows by {grows} s per second of arrivals"
    return Judgement("misses", reason, (), len(samples), {"waiting_drift": drift})


# --- the prober ---------------------------------------------------------------------------------------------


@dataclass
class Prober:
    """Judges scenarios by simulation. ``folder``: where done replications are kept; ``report``: told what goes on.

    ``simulated``, ``remembered``: replications run now, and found in the folder from an earlier call.
    """

    rules: Rules
    executor: Executor
    folder: Path | None = None
    report: Callable[[str], None] = lambda what: None
    simulated: int = 0
    remembered: int = 0
    _kept: set[Path] = field(default_factory=set)

    def judge_scenario(
        self, scenario: Scenario, what: str, *, fresh: bool = False, thorough: bool = False
    ) -> Judgement:
        """The verdict on a scenario. ``fresh``: seeds no search has seen, as many as there may be, one look.
        ``thorough``: an interval even of a fleet that two looks show to drown.
        """
        rule, limits = self.rules.replications, limits_of(self.rules)
        is_quick = not fresh and not thorough
        if is_quick and (short := self._screen(scenario)) is not None:
            return short
        first, least = (FRESH, rule.most) if fresh else (0, rule.least)
        width = max(1, getattr(self.executor, "width", 1))
        samples: list[Sample] = []
        judgement: Judgement | None = None
        while len(samples) < rule.most:
            before = len(samples)
            batch = range(before, min(rule.most, before + width))
            self.report(f"{'verifying ' if fresh else ''}{what}, replication {batch[0] + 1}")
            samples += self._measure([self._work(scenario, first + k) for k in batch])
            for count in range(before + 1, len(samples) + 1):
                if is_quick and count == 2 and all(is_hopeless(s) for s in samples[:2]):
                    return _drowned(samples[:2], rule.confidence, is_quick=True)
                judgement = verdict_of(samples[:count], limits, rule.confidence, least)
                if judgement is not None and judgement.verdict != "undecided":
                    return judgement
        assert judgement is not None
        return replace(judgement, reason=f"{judgement.reason}, after {rule.most} replications")

    def _screen(self, scenario: Scenario) -> Judgement | None:
        """A first look at fewer requests: a fleet that drowns in them, and in a replication of another seed, needs no
        other.
        """
        requests = scenario.workload.requests
        if requests is None or requests < 50 * SCREEN or not is_steady(scenario):
            return None
        for work in (replace(self._work(scenario, 0), requests=requests // SCREEN), self._work(scenario, 1)):
            sample = self._measure([work])[0]
            if not is_hopeless(sample):
                return None
        return _drowned([sample], self.rules.replications.confidence, is_quick=True)

    def _work(self, scenario: Scenario, index: int) -> Work:
        seed = replication_seed(scenario.seed, index)
        latencies = tuple(sorted(self.rules.targets.limits))
        return Work(scenario.model_copy(update={"seed": seed}), latencies, self.rules.warm_up)

    def _measure(self, works: Sequence[Work]) -> list[Sample]:
        found: dict[int, Sample] = {}
        paths = [self._path(work) for work in works]
        for k, path in enumerate(paths):
            if path is not None and path.is_file():
                found[k] = read_sample(path)
                self.remembered += path not in self._kept
        missing = [k for k in range(len(works)) if k not in found]

        def keep(i: int, sample: Sample) -> None:
            k = missing[i]
            found[k] = sample
            self.simulated += 1
            if (path := paths[k]) is not None:
                write_sample(path, sample)
                self._kept.add(path)

        run_all(self.executor, measure, [works[k] for k in missing], keep)
        return [found[k] for k in range(len(works))]

    def _path(self, work: Work) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{work.key(profiles_digest(work.scenario))}.json"


@dataclass
class FleetJudge:
    """Judges candidates of a plan at a count and a load, each once."""

    plan: PlanFile
    prober: Prober
    _known: dict[tuple[str, int, float, bool, bool], Judgement] = field(default_factory=dict)

    def judge(
        self, candidate: Candidate, count: int, load: float = 1.0, *, fresh: bool = False, thorough: bool = False
    ) -> Judgement:
        """The verdict on ``count`` replicas under ``load`` times the plan's load."""
        key = (candidate.name, count, load, fresh, thorough)
        if key not in self._known:
            scenario = self.plan.scenario(candidate, _profile(candidate.profile), count, load)
            what = f"{count} × {candidate.name}" + (f" at {load:.2f} × load" if load != 1 else "")
            self._known[key] = self.prober.judge_scenario(scenario, what, fresh=fresh, thorough=thorough)
        return self._known[key]
