"""The planner over a judge with a formula: it finds what trying everything finds, verifies, and says what it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from heliosim.planfile import Candidate, PlanFile
from heliosim.planner import Judgement, Limit, compare
from heliosim.planning import EXIT_CODES, Judge, Planner, PlanResult
from heliosim.prices import PriceTable
from heliosim.profile_view import open_profile
from heliosim.stats import Interval
from heliosim.workload import build_arrivals

PROFILES = {name: open_profile(name) for name in ("llama2-a100-80gb", "llama2-h100-80gb")}
PRICES = PriceTable.model_validate(
    {
        "schema_version": 1,
        "currency": "EUR",
        "prices": [
            {"gpu": g, "provider": "here", "region": "any", "price_per_gpu_hour": p, "date": "2026-11", "source": "me"}
            for g, p in (("A100-80GB", 2.0), ("H100-80GB", 3.5))
        ],
    }
)


def candidate(name: str, gpu: str = "A100-80GB", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "gpu": gpu,
        "profile": f"llama2-{gpu.lower()}",
        "models": ["llama2-7b"],
        "batcher": {"max_batch": 64, "token_budget": 512},
        "controller": {"kind": "vanilla", "model": "llama2-7b"},
    } | changes


def plan(candidates: list[dict[str, Any]], rate: float = 5.0, **changes: Any) -> PlanFile:
    values = {
        "name": "test",
        "workload": {
            "requests": 60,
            "arrivals": {"kind": "poisson", "rate_per_s": rate},
            "tasks": [{"task": "chat", "prompt_tokens": 200, "output_tokens": 40}],
        },
        "slo": {"limits": {"p99_ttft_ms": 1000}},
        "max_count": 12,
        "candidates": candidates,
    }
    return PlanFile.model_validate(values | changes)


@dataclass
class Formula:
    """One replica of a candidate carries ``rates[name]`` requests per second; within 2 % of that nobody can tell.

    ``optimism``: factor on it that only the search's seeds see. ``floors``: candidates whose quality is too low.
    """

    plan: PlanFile
    rates: dict[str, float]
    optimism: float = 1.0
    floors: tuple[str, ...] = ()
    asked: list[tuple[str, int, float, bool]] = field(default_factory=list)

    def judge(
        self, candidate: Candidate, count: int, load: float = 1.0, *, fresh: bool = False, thorough: bool = False
    ) -> Judgement:
        self.asked.append((candidate.name, count, load, fresh))
        if candidate.name in self.floors:
            broken = compare(Limit("agreement", "least", 0.9), [0.5, 0.5], 0.95)
            return Judgement("misses", "agreement", (broken,), 2)
        rate = self.plan.workload.arrivals.rate_per_s * load  # type: ignore[union-attr]
        spare = count * self.rates[candidate.name] * (1.0 if fresh else self.optimism) / rate
        verdict = "meets" if spare >= 1.02 else "misses" if spare <= 0.98 else "undecided"
        figures = {"output_tokens_per_s": Interval(40 * rate, 1.0, 4)}
        return Judgement(verdict, f"spare {spare:.2f}", (), 4, figures)  # type: ignore[arg-type]


@dataclass
class Overruled:
    """From so many replicas on a candidate meets: ``search`` says the search's seeds, ``fresh`` fresh ones."""

    search: Mapping[str, int]
    fresh: Mapping[str, int]

    def judge(
        self, candidate: Candidate, count: int, load: float = 1.0, *, fresh: bool = False, thorough: bool = False
    ) -> Judgement:
        least = (self.fresh if fresh else self.search)[candidate.name]
        return Judgement("meets" if count >= least else "misses", f"{least} needed", (), 4)


def solve(asked: PlanFile, judge: Judge) -> PlanResult:
    from heliosim.planfile import with_load

    def runs(load: float) -> Any:
        return [build_arrivals(with_load(asked.workload, load), 0)]

    return Planner(asked, PRICES, PROFILES, runs, judge).run()


def brute_force(asked: PlanFile, judge: Formula) -> list[tuple[float, int, int]]:
    """(price, count, place in the plan) of every fleet that meets, cheapest first."""
    found = []
    for place, c in enumerate(asked.candidates):
        for count in range(1, asked.most(c) + 1):
            if judge.judge(c, count).verdict == "meets":
                price = PRICES.price(c.gpu).price_per_gpu_hour * c.gpus_per_replica * count
                found.append((price, count, place))
    return sorted(found)


@pytest.mark.parametrize("a", [0.6, 1.0, 1.7, 2.4])
@pytest.mark.parametrize("h", [0.9, 1.8, 3.1, 5.2])
def test_winner_and_runner_up_are_those_of_trying_everything(a: float, h: float) -> None:
    asked = plan([candidate("a"), candidate("h", "H100-80GB"), candidate("two", "H100-80GB", gpus_per_replica=2)])
    judge = Formula(asked, {"a": a, "h": h, "two": 1.9 * h})
    result, every = solve(asked, judge), brute_force(asked, judge)
    assert result.winner is not None
    assert (
        result.winner.price_per_hour,
        result.winner.count,
        asked.candidates.index(result.winner.candidate),
    ) == every[0]
    others = [e for e in every if e[2] != every[0][2]]
    assert result.runner_up is not None
    assert result.runner_up.price_per_hour == others[0][0]
    if result.winner.count == 1:
        assert result.one_fewer is None
    else:
        assert result.one_fewer is not None
        assert result.one_fewer.verdict != "meets"
    assert result.answer == "feasible"


def test_the_price_of_a_million_tokens_is_price_over_tokens() -> None:
    asked = plan([candidate("a")])
    winner = solve(asked, Formula(asked, {"a": 1.0})).winner
    assert winner is not None
    assert winner.count == 6
    assert winner.price_per_million_tokens == pytest.approx(6 * 2.0 / (200 * 3600) * 1e6)


def test_a_fleet_that_fresh_seeds_do_not_confirm_gets_a_replica_more() -> None:
    asked = plan([candidate("a")])
    result = solve(asked, Formula(asked, {"a": 1.0}, optimism=1.1))  # the search believes in 5, the truth needs 6
    assert result.winner is not None
    assert result.winner.count == 6
    assert result.verified is not None
    assert result.verified.verdict == "meets"
    assert "fresh seeds" in result.notes[0]


def test_loads_around_the_plan_need_other_counts() -> None:
    asked = plan([candidate("a")], rate=10.0)
    result = solve(asked, Formula(asked, {"a": 1.3}))
    assert result.winner is not None
    assert result.winner.count == 8
    assert [(s.load, s.count, s.judgement.verdict) for s in result.sensitivity] == [
        (0.8, 7, "meets"),
        (1.2, 10, "misses"),
    ]


@pytest.mark.parametrize(("rate", "answer"), [(1.0, "infeasible"), (5.0 / 12, "undecided")])
def test_no_fleet_and_no_answer_are_told_apart(rate: float, answer: str) -> None:
    asked = plan([candidate("a")], rate=5.0 if answer == "undecided" else 30.0)
    result = solve(asked, Formula(asked, {"a": rate}))
    assert result.answer == answer
    assert result.winner is None
    assert EXIT_CODES[result.answer] == {"infeasible": 1, "undecided": 3}[answer]


def test_quality_that_no_count_mends_ends_the_search_at_once() -> None:
    asked = plan([candidate("a"), candidate("bad")])
    judge = Formula(asked, {"a": 1.0, "bad": 9.0}, floors=("bad",))
    result = solve(asked, judge)
    assert result.winner is not None
    assert result.winner.candidate.name == "a"
    assert len({count for name, count, *_ in judge.asked if name == "bad"}) == 1
    assert "no count helps" in next(o.status for o in result.options if o.candidate.name == "bad")


def test_models_that_do_not_fit_are_never_run() -> None:
    asked = plan([candidate("a"), candidate("tight", memory={"budget_bytes": "12 GB"})])
    judge = Formula(asked, {"a": 1.0, "tight": 99.0})
    result = solve(asked, judge)
    assert "do not fit" in next(o.status for o in result.options if o.candidate.name == "tight")
    assert "tight" not in {name for name, *_ in judge.asked}


def test_what_costs_more_than_two_fleets_that_meet_is_not_looked_for() -> None:
    asked = plan([candidate("a"), candidate("b"), candidate("dear", "H100-80GB", gpus_per_replica=8)])
    judge = Formula(asked, {"a": 2.6, "b": 2.6, "dear": 99.0})
    result = solve(asked, judge)
    assert "dear" not in {name for name, *_ in judge.asked}
    assert result.runner_up is not None
    assert result.runner_up.candidate.name == "b"


@pytest.mark.parametrize(
    ("most", "fresh", "winner"),
    [
        (2, 99, ("c", 3)),  # neither a nor b is confirmed at any count: c, cut at two of them, is all there is
        (12, 8, ("c", 3)),  # both need eight: c at 10.50 is cheaper
        (12, 4, ("a", 4)),  # both need four: c stays dearer
    ],
)
def test_what_was_cut_is_searched_once_fresh_seeds_overrule_the_cheaper(
    most: int, fresh: int, winner: tuple[str, int]
) -> None:
    asked = plan(
        [candidate("a", max_count=most), candidate("b", max_count=most), candidate("c", "H100-80GB")], rate=1.0
    )
    judge = Overruled({"a": min(most, 4) - 1, "b": min(most, 4) - 1, "c": 3}, {"a": fresh, "b": fresh, "c": 3})
    result = solve(asked, judge)
    assert result.answer == "feasible"
    assert result.winner is not None
    assert (result.winner.candidate.name, result.winner.count) == winner


def test_an_option_with_a_count_left_is_undecided_not_infeasible() -> None:
    asked = plan([candidate("a")], rate=1.0)
    result = solve(asked, Overruled({"a": 2}, {"a": 9}))  # verification gives up at 7
    assert result.winner is None
    assert result.answer == "undecided"
    assert "none of 6 fleets" in result.notes[-1]
