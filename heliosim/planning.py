"""From a plan to an answer: bounds first, then the cheapest fleet by simulation, checked again with fresh seeds.

``Judge`` is all it knows of simulation: any callable that gives verdicts will do (the tests bring one with a formula).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from heliosim.bounds import CountBound, count_bound, fits, least_layers, longest_served, step_floor
from heliosim.errors import MemoryBudgetError, OutOfRangeError
from heliosim.formats.profile import Profile
from heliosim.memory_model import engine_needs
from heliosim.plan_words import describe
from heliosim.planfile import Candidate, PlanFile, default_memory, is_closed
from heliosim.planner import Capacity, Judgement, Margin, Verdict, find_capacity
from heliosim.prices import Price, PriceTable
from heliosim.types import Arrival

STATIC = ("vanilla", "early-exit", "fixed")
"""Controllers under which a token leaves where its own text says, whatever the load: their quality is the same at any
count."""
QUALITIES = ("perplexity", "agreement", "low_confidence_share")
LOADS = (0.8, 1.2)
"""Loads of the sensitivity."""
MOST_VERIFICATIONS = 6

Answer = Literal["feasible", "infeasible", "undecided"]
EXIT_CODES: Mapping[Answer, int] = {"feasible": 0, "infeasible": 1, "undecided": 3}


class Judge(Protocol):
    """What gives verdicts on ``count`` replicas of a candidate under ``load`` times the plan's load.

    ``fresh``: with seeds no search has seen. ``thorough``: with an interval even where two looks are enough.
    """

    def judge(
        self, candidate: Candidate, count: int, load: float = 1.0, *, fresh: bool = False, thorough: bool = False
    ) -> Judgement: ...


@dataclass(frozen=True)
class Option:
    """What is known of one candidate. ``count``: replicas that meet, None: none known; ``status``: why, in words.

    ``undecided``: counts below ``count`` (or at all) of which the replications did not tell. ``is_cut``: larger counts
    were left out, as dearer than two fleets that meet.
    """

    candidate: Candidate
    price: Price
    bound: CountBound
    capacity: Capacity | None = None
    count: int | None = None
    judgement: Judgement | None = None
    status: str = ""
    undecided: tuple[int, ...] = ()
    is_cut: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it may still hold a fleet that meets, for all that is known."""
        return self.count is not None or self.is_cut or bool(self.undecided)

    @property
    def price_per_replica(self) -> float:
        """Price of one replica per hour."""
        return self.price.price_per_gpu_hour * self.candidate.gpus_per_replica

    @property
    def price_per_hour(self) -> float | None:
        return None if self.count is None else self.count * self.price_per_replica

    @property
    def price_per_million_tokens(self) -> float | None:
        """Price of a million output tokens at the plan's load; None where the token rate is not known."""
        price = self.price_per_hour
        figure = self.judgement.figures.get("output_tokens_per_s") if self.judgement else None
        if price is None or figure is None or not figure.mean:
            return None
        return price / (3600 * figure.mean) * 1e6


@dataclass(frozen=True)
class Sensitivity:
    """What another load needs. ``count``: replicas that meet there, None: none known."""

    load: float
    judgement: Judgement
    count: int | None


@dataclass(frozen=True)
class PlanResult:
    """The answer. ``winner``, ``runner_up``: the cheapest fleets shown to meet, the first verified with fresh seeds.

    ``one_fewer``: the verdict on the winner with one replica less. ``notes``: what a reader should know.
    """

    answer: Answer
    options: tuple[Option, ...]
    winner: Option | None = None
    verified: Judgement | None = None
    one_fewer: Judgement | None = None
    runner_up: Option | None = None
    sensitivity: tuple[Sensitivity, ...] = ()
    notes: tuple[str, ...] = ()


class _NoCountHelpsError(Exception):
    """A search can stop: a floor of quality is broken that no count mends."""

    def __init__(self, judgement: Judgement, margin: Margin) -> None:
        super().__init__(judgement, margin)
        self.judgement, self.margin = judgement, margin


def broken_quality(judgement: Judgement) -> Margin | None:
    """A floor of quality that the replications showed to be broken."""
    return next((m for m in judgement.margins if m.verdict == "misses" and m.limit.metric in QUALITIES), None)


@dataclass
class Planner:
    """One planning. ``profiles``: of each candidate, by name of the profile; ``runs``: arrivals of each replication at
    a load, for the bounds.
    """

    plan: PlanFile
    prices: PriceTable
    profiles: Mapping[str, Profile]
    runs: Callable[[float], Sequence[Sequence[Arrival]]]
    judge: Judge
    report: Callable[[str], None] = lambda what: None
    notes: list[str] = field(default_factory=list)

    def run(self) -> PlanResult:
        """Search, verify, and look around the winner."""
        winner, verified, options = self._verify([self._option(c) for c in self.plan.candidates])
        options.sort(key=lambda o: self._place(o))
        if winner is None or verified is None:
            is_open = any(o.is_open for o in options)
            return PlanResult("undecided" if is_open else "infeasible", tuple(options), notes=tuple(self.notes))
        assert winner.count is not None
        others = [o for o in options if o.count is not None and o.candidate.name != winner.candidate.name]
        fewer = self._one_fewer(winner)
        if fewer is not None and fewer.verdict == "undecided":
            self.notes.append(f"{winner.count - 1} × {winner.candidate.name} may do too: undecided, {fewer.reason}")
        return PlanResult(
            "feasible",
            tuple(options),
            winner,
            verified,
            fewer,
            min(others, key=self._rank, default=None),
            tuple(self._sensitivity(winner, load) for load in LOADS),
            tuple(self.notes),
        )

    # -- bounds -------------------------------------------------------------------------------------------------

    def _option(self, candidate: Candidate) -> Option:
        price = self.prices.price(candidate.gpu, self.plan.provider, self.plan.region)
        bound = self.bound(candidate, 1.0)
        if bound.least is None or bound.least > self.plan.most(candidate):
            said = bound.reason if bound.least is None else f"at least {bound.least} needed: {bound.reason}"
            return Option(candidate, price, bound, status=said)
        return Option(candidate, price, bound)

    def bound(self, candidate: Candidate, load: float) -> CountBound:
        """What memory and work alone demand of a candidate at a load."""
        plan, profile = self.plan, self.profiles[candidate.profile]
        specs = {name: profile.spec(name) for name in candidate.models}
        budget = (candidate.memory or default_memory(profile, candidate)).budget_bytes
        facts = [profile.facts.models[name] for name in candidate.models]
        budget -= engine_needs(facts, candidate.batcher.token_budget).fixed
        if is_closed(plan.workload):
            return CountBound(1, "a closed loop waits for its answers", None)
        runs = self.runs(load)
        longest = longest_served(plan, runs)
        if not any(fits(specs[name], depth, budget, longest) for name, depth in least_layers(candidate, specs)):
            return CountBound(None, "weights and the longest request do not fit into its memory", None)
        costs = {name: profile.step_cost(name, profile.clock()) for name in candidate.models}
        return count_bound(plan, step_floor(candidate, specs, costs, budget), runs)

    def _place(self, option: Option) -> int:
        """Where the candidate stands in the plan."""
        return self.plan.candidates.index(option.candidate)

    def _rank(self, option: Option) -> tuple[float, int, int]:
        """Cheapest first; of equal prices the fewer replicas, then the plan's order."""
        price = option.price_per_hour
        return (math.inf if price is None else price, option.count or 0, self._place(option))

    # -- search -------------------------------------------------------------------------------------------------

    def _search(self, options: Sequence[Option]) -> list[Option]:
        """Each option's smallest count, cheapest bounds first; none is looked for where two cheaper ones are known.

        Options that an earlier search cut are searched as far as the two cheapest fleets cost now.
        """
        done = [o for o in options if o.status and not o.is_cut]
        open_ = sorted((o for o in options if o not in done), key=lambda o: (o.bound.least or 0) * o.price_per_replica)
        for option in open_:
            prices = sorted(p for p in (o.price_per_hour for o in done) if p is not None)
            ceiling = prices[1] if len(prices) > 1 else math.inf
            most = self.plan.most(option.candidate)
            if math.isfinite(ceiling):
                most = min(most, math.floor(ceiling / option.price_per_replica + 1e-9))
            done.append(self._capacity(option, most))
        return done

    def _capacity(self, option: Option, most: int) -> Option:
        least = option.bound.least or 1
        if most < least:
            return _with(option, status="dearer than two fleets that meet", is_cut=True)
        option = _with(option, is_cut=False)

        def judge(count: int) -> Verdict:
            judgement = self.judge.judge(option.candidate, count)
            if option.candidate.controller["kind"] in STATIC and (margin := broken_quality(judgement)):
                raise _NoCountHelpsError(judgement, margin)
            return judgement.verdict

        try:
            found = find_capacity(judge, least, most)
        except _NoCountHelpsError as stop:
            said = f"no count helps: {describe(stop.margin)}"
            return _with(option, status=said, judgement=stop.judgement)
        except (OutOfRangeError, MemoryBudgetError) as error:
            return _with(option, status=f"cannot run: {error.problem}")
        unknown = {*option.undecided, *(n for n, v in found.verdicts.items() if v == "undecided")}
        open_ = tuple(sorted(n for n in unknown if n < (found.count or math.inf)))
        if not found.is_monotone:
            self.notes.append(
                f"{option.candidate.name}: a larger fleet missed where a smaller one met; every count was asked"
            )
        if found.count is None:
            last = self.judge.judge(option.candidate, most)
            dearer = most < self.plan.most(option.candidate)
            limited = f"; {most + 1} would be dearer than two fleets that meet" if dearer else ""
            said = f"{most}: {last.verdict}, {last.reason}{limited}"
            return _with(option, capacity=found, undecided=open_, status=said, judgement=last, is_cut=dearer)
        judgement = self.judge.judge(option.candidate, found.count)
        return _with(
            option, capacity=found, count=found.count, judgement=judgement, undecided=open_, status=judgement.reason
        )

    def _verify(self, options: Sequence[Option]) -> tuple[Option | None, Judgement | None, list[Option]]:
        """The cheapest option that also meets with fresh seeds. One that does not gets a replica more, and what was cut
        because of its price is searched further.
        """
        left = list(options)
        for _ in range(MOST_VERIFICATIONS):
            left = self._search(left)
            known = [o for o in left if o.count is not None]
            if not known:
                return None, None, left
            best = min(known, key=self._rank)
            assert best.count is not None
            verdict = self.judge.judge(best.candidate, best.count, fresh=True)
            if verdict.verdict == "meets":
                return best, verdict, left
            said = f"{best.count} × {best.candidate.name}: {verdict.verdict} with fresh seeds, {verdict.reason}"
            self.notes.append(said)
            left[left.index(best)] = self._one_more(best, verdict)
        if any(o.is_open for o in left):
            self.notes.append(f"fresh seeds confirmed none of {MOST_VERIFICATIONS} fleets; the search ended there")
        return None, None, left

    def _one_fewer(self, winner: Option) -> Judgement | None:
        """The verdict on one replica less; where the search took it for enough, the one that fresh seeds gave."""
        count = (winner.count or 0) - 1
        if count < 1:
            return None
        judgement = self.judge.judge(winner.candidate, count, thorough=True)
        return self.judge.judge(winner.candidate, count, fresh=True) if judgement.verdict == "meets" else judgement

    def _one_more(self, option: Option, verdict: Judgement) -> Option:
        assert option.count is not None
        undecided = (*option.undecided, option.count) if verdict.verdict == "undecided" else option.undecided
        count = option.count + 1
        while count <= self.plan.most(option.candidate):
            judgement = self.judge.judge(option.candidate, count)
            if judgement.verdict == "meets":
                return _with(option, count=count, judgement=judgement, undecided=undecided, status=judgement.reason)
            undecided = (*undecided, count) if judgement.verdict == "undecided" else undecided
            count += 1
        return _with(option, count=None, judgement=verdict, undecided=undecided, status=verdict.reason)

    # -- around the winner --------------------------------------------------------------------------------------

    def _sensitivity(self, winner: Option, load: float) -> Sensitivity:
        """What the winner's candidate needs at another load; less load never needs more replicas (assumed)."""
        count, candidate = winner.count, winner.candidate
        assert count is not None
        here = self.judge.judge(candidate, count, load)
        bound = self.bound(candidate, load)
        low, high = (bound.least or 1), self.plan.most(candidate)
        low, high = (min(low, count), count) if load < 1 else (max(low, count), high)
        if low > high or bound.least is None:
            return Sensitivity(load, here, None)
        found = find_capacity(lambda n: self.judge.judge(candidate, n, load).verdict, low, high)
        return Sensitivity(load, here, found.count)


def _with(option: Option, **changes: Any) -> Option:
    return replace(option, **changes)
