"""The answer to a question: how many replicas keep the limits, how sure that is, what one fewer would miss.

``find`` runs in a worker; what it gives is plain data (``ANSWER_FIELDS``), so that it can be shipped and kept on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from heliosim_app.jobs import Report
from heliosim_app.question import Question

from heliosim.planfile import PlanFile, with_load
from heliosim.planning import Planner, PlanResult
from heliosim.prices import Price, PriceTable, load_prices
from heliosim.profile_view import open_profile

UNPRICED = "no price known"
"""Source of the price that stands in where the table has none; it is never shown as a price."""


def find(question: Question, *, report: Report) -> dict[str, Any]:
    """Search the smallest fleet of the question's system, verify it with fresh seeds, and look one replica below."""
    return search(question.plan(), load_prices(), report)


def repriced(answer: Mapping[str, Any], price: Price | None) -> dict[str, Any]:
    """The answer to a question about one candidate at another price of its GPU (None: none is known): what is cheapest
    does not depend on it.
    """
    winner = answer["winner"]
    if winner is None:
        return dict(answer)
    used = price or Price(**{**winner["price"], "source": UNPRICED})
    per_hour = used.price_per_gpu_hour * winner["candidate"]["gpus_per_replica"] * winner["count"]
    tokens = winner["judgement"]["figures"].get("output_tokens_per_s")
    per_million = per_hour / (3600 * tokens["mean"]) * 1e6 if tokens and tokens["mean"] else None
    changed = {"price_per_hour": per_hour, "price_per_million_output_tokens": per_million}
    return {**answer, "winner": {**winner, "price": used.model_dump(mode="json"), **changed}}


def search(plan: PlanFile, prices: PriceTable, report: Report, folder: Path | None = None) -> dict[str, Any]:
    """The planner's answer as plain data, with the notes it gives. ``folder``: where probes are kept for the next call.

    Raises InputError for a plan that cannot be run at all.
    """
    from heliosim.executors import open_executor
    from heliosim.probing import FleetJudge, Prober
    from heliosim.streams import replication_seed
    from heliosim.workload import build_arrivals

    @cache
    def runs(load: float) -> Any:
        seeds = [replication_seed(plan.seed, k) for k in range(plan.replications.most)]
        return [build_arrivals(with_load(plan.workload, load), seed) for seed in seeds]

    share = 0.0

    def say(what: str) -> None:
        nonlocal share
        share += (0.99 - share) / 25  # nobody knows how many looks it takes
        report(what, share)

    table = with_all(prices, {c.gpu for c in plan.candidates})
    profiles = {c.profile: open_profile(c.profile) for c in plan.candidates}
    refuse_unrunnable(plan, profiles)
    with open_executor("local", 1) as executor, tempfile.TemporaryDirectory() as held:
        prober = Prober(plan.rules, executor, folder or Path(held), say)
        result = Planner(plan, table, profiles, runs, FleetJudge(plan, prober)).run()
    return answer_of(plan, result, table)


def refuse_unrunnable(plan: PlanFile, profiles: Mapping[str, Any]) -> None:
    """Raise InputError for candidates that could run at no count; too little memory is an answer of its own."""
    from heliosim.errors import MemoryBudgetError
    from heliosim.vary import check_against

    for candidate in plan.candidates:
        scenario = plan.scenario(candidate, dict(profiles)[candidate.profile], 1)
        try:
            check_against(scenario, profiles.__getitem__, f"candidates {candidate.name!r}")
        except MemoryBudgetError:
            continue


def with_all(table: PriceTable, gpus: set[str]) -> PriceTable:
    """The table with a stand-in for kinds it has no price of."""
    missing = sorted(gpus - {p.gpu for p in table.prices})
    more = [
        Price(gpu=g, provider="-", region="-", price_per_gpu_hour=1.0, date="2026-01", source=UNPRICED) for g in missing
    ]
    return table.model_copy(update={"prices": (*table.prices, *more)})


def answer_of(plan: PlanFile, result: PlanResult, table: PriceTable) -> dict[str, Any]:
    """The planner's JSON with the profile's kind beside it."""
    from heliosim.plan_report import plan_json

    return plan_json(plan, result, table)
