"""Whether ``heliosim plan`` finds what trying every candidate at every count finds, on the shipped examples.

    python scripts/plan_exhaustively.py [--most 7] [--folder FOLDER] [chat summarisation code]

Verdicts of all counts are printed beside the planner's answer; exit code 1 if they disagree. Probes are kept in the
folder, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from heliosim.executors import open_executor
from heliosim.planfile import load_plan, with_load
from heliosim.planning import Planner
from heliosim.prices import load_prices
from heliosim.probing import FleetJudge, Prober
from heliosim.profile_view import open_profile
from heliosim.streams import replication_seed
from heliosim.workload import build_arrivals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plans", nargs="*", default=["chat", "summarisation", "code"])
    parser.add_argument("--most", type=int, default=7, help="largest count to try")
    parser.add_argument("--folder", type=Path, default=Path("plans/exhaustive"))
    given = parser.parse_args()
    with open_executor("local", 1) as executor:
        agree = [compare(name, given.most, given.folder / name, executor) for name in given.plans]
    sys.exit(0 if all(agree) else 1)


def compare(name, most, folder, executor) -> bool:  # type: ignore[no-untyped-def]
    plan = load_plan(Path(str(resources.files("heliosim.plans"))) / f"{name}.yaml")
    prices, counts = load_prices(), range(1, most + 1)
    judge = FleetJudge(plan, Prober(plan.rules, executor, folder))
    verdicts = {(c.name, n): judge.judge(c, n).verdict for c in plan.candidates for n in counts}

    def price(candidate, count):  # type: ignore[no-untyped-def]
        return count * prices.price(candidate.gpu, plan.provider).price_per_gpu_hour

    def runs(load):  # type: ignore[no-untyped-def]
        seeds = [replication_seed(plan.seed, k) for k in range(plan.replications.most)]
        return [build_arrivals(with_load(plan.workload, load), seed) for seed in seeds]

    profiles = {c.profile: open_profile(c.profile) for c in plan.candidates}
    found = Planner(plan, prices, profiles, runs, judge).run()
    meeting = sorted(
        (price(c, n), n, k) for k, c in enumerate(plan.candidates) for n in counts if verdicts[c.name, n] == "meets"
    )
    confirmed = (m for m in meeting if judge.judge(plan.candidates[m[2]], m[1], fresh=True).verdict == "meets")
    best = next(confirmed, None)
    print(f"{name}: every candidate at every count from 1 to {most}")
    for c in plan.candidates:
        print(f"  {c.name:14s} " + " ".join(verdicts[c.name, n] for n in counts))
    tried = None if best is None else (plan.candidates[best[2]].name, best[1])
    planned = None if found.winner is None else (found.winner.candidate.name, found.winner.count)
    print(f"  cheapest that meets, confirmed with fresh seeds: {tried}; heliosim plan: {planned}")
    return tried == planned


if __name__ == "__main__":
    main()
