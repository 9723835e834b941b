"""Counts of replicas that cannot be enough, from the workload and the profile's costs alone, before anything is run.

Every bound here is a true one: no fleet below it can meet the targets in the simulation, whatever its router,
controller or luck. What is bounded is work. A step costs at least ``step`` seconds however full it is, and at least so
much more per token, row and KV token in it; it holds at most so many rows, tokens and KV. So the requests that must be
served take a least number of GPU-seconds. A target gives each of them a deadline. Requests that arrive from time a on
and must be done by time b need their work within b - a seconds of each replica (the processor demand criterion: Baruah,
Rosier and Howell 1990, Real-Time Systems 2, 301-324; it holds for any schedule), less what the targets let go.

Over a long stream of requests the largest window is the whole run and the bound is the utilisation law: arrivals per
second times least work per request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heliosim.costs import FEW_TOKENS, TERMS, StepCost
from heliosim.planfile import Candidate, PlanFile, Targets, latency_of
from heliosim.types import Arrival, ModelSpec, blocks_for

Floats = npt.NDArray[np.float64]
MEAN_FACTOR = 10.0
"""A mean below L means that nine tenths are below 10 L (Markov's inequality)."""
WINDOWS = 8
"""Windows are tried from this many starts to as many ends."""


@dataclass(frozen=True)
class StepFloor:
    """What no step of a candidate undercuts, seconds, and what no step exceeds.

    ``empty``: any step; ``step``: one that decodes; ``token``: each prompt token; ``row``: each decode row; ``kv``:
    each KV token a decode row reads; ``product``: each token-context pair of a prompt; ``request``: each request once.
    """

    empty: float
    step: float
    token: float
    row: float
    kv: float
    product: float
    request: float
    max_rows: int
    token_budget: int
    kv_tokens: int

    def prefill_s(self, prompt: Floats) -> Floats:
        """Marginal work of reading prompts; a chunk of t tokens up to e costs t e, so a prompt at least p^2 / 2."""
        return self.request + self.token * prompt + self.product * prompt**2 / 2

    def decode_s(self, prompt: Floats, output: Floats) -> Floats:
        """Marginal work of every token behind the first."""
        steps = output - 1
        return steps * self.row + self.kv * contexts(prompt, output)


def contexts(prompt: Floats, output: Floats) -> Floats:
    """KV tokens read by a request's decode steps, summed: prompt + 1, prompt + 2, ..."""
    steps = output - 1
    return steps * prompt + steps * (steps + 1) / 2


def step_floor(
    candidate: Candidate, specs: Mapping[str, ModelSpec], costs: Mapping[str, StepCost], budget_bytes: int
) -> StepFloor:
    """The floor over every placement the candidate's controller may choose: term by term the least of them."""
    floors, kv_tokens = [], 0
    for name, decode, prefill in _depths(candidate, specs):
        spec, c = specs[name], dict(zip(TERMS, costs[name].coefficients, strict=True))
        left = budget_bytes - spec.weights_bytes(min(decode, prefill))
        kv_tokens = max(kv_tokens, left // (spec.kv_bytes_per_token_layer * min(decode, prefill)))
        # t tokens, the first 16 at a each and the rest at b, cost at least b t - 16 (b - a): a rebate per step
        each = c["layer_token_more"]
        rebate = FEW_TOKENS * max(0.0, each - c["layer_token"])
        floors.append(
            (
                max(0.0, c["step"] + min(decode, prefill) * (c["layer"] - rebate)),
                max(0.0, c["step"] + decode * (c["layer"] + c["layer_decode"] - rebate) + c["check"]),
                c["token"] + prefill * each,
                c["row"] + c["token"] + decode * (each + c["layer_decode_row"]) + c["check_row"],
                c["gathered"] + decode * c["layer_decode_kv"],
                prefill * c["layer_prefill_kv"],
                c["started"] + c["ended"],
            )
        )
    least = [min(column) for column in zip(*floors, strict=True)]
    batcher = candidate.batcher
    empty, step, token, row, kv, product, request = least
    return StepFloor(
        empty, step, token, row, kv, product, request, batcher.max_batch, batcher.token_budget, max(1, kv_tokens)
    )


def _depths(candidate: Candidate, specs: Mapping[str, ModelSpec]) -> list[tuple[str, int, int]]:
    """(model, least layers of a decode step, of a prefill) a controller may choose; unknown kinds may choose any."""
    given, kind = candidate.controller, candidate.controller["kind"]
    model = str(given.get("model"))
    if kind in ("vanilla", "early-exit", "fixed") and model in specs:
        spec = specs[model]
        if kind == "fixed":
            return [(model, int(given["depth"]), int(given["depth"]))]
        runs_all = kind == "vanilla" or given.get("batching") == "full"
        return [(model, spec.layers if runs_all else min(spec.exits), spec.layers)]
    return [(name, min(spec.exits), min(spec.exits)) for name, spec in specs.items()]


def least_layers(candidate: Candidate, specs: Mapping[str, ModelSpec]) -> list[tuple[str, int]]:
    """What must fit into memory for the candidate to serve at all: (model, layers) of its most modest placement."""
    return [(name, prefill) for name, _, prefill in _depths(candidate, specs)]


# --- what the targets demand --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """At least ``share`` of requests have their first token ``first_s`` after arrival, and their last at most
    ``each_s`` per further token behind it, and ``all_s`` after arrival. inf: not asked.
    """

    share: float
    first_s: float
    each_s: float
    all_s: float


def demands(targets: Targets) -> list[Demand]:
    """Deadlines that any run within the targets keeps: one demand per limit, and for all of them together.

    If a share s keeps one limit and t another, at least s + t - 1 keep both.
    """
    found: list[Demand] = []
    for name, most_ms in targets.limits.items():
        percentile, family = latency_of(name)
        share = 0.9 if percentile is None else percentile / 100
        most = most_ms / 1e3 * (MEAN_FACTOR if percentile is None else 1.0)
        found.append(_demand(share, {family: most}))
    if (a := targets.attainment) is not None:
        limits = {"ttft": a.ttft_ms, "tpot": a.tpot_ms, "e2el": a.e2el_ms}
        found.append(_demand(a.share, {k: v / 1e3 for k, v in limits.items() if v is not None}))
    if len(found) > 1:
        share = 1 - sum(1 - d.share for d in found)
        least = [min(getattr(d, name) for d in found) for name in ("first_s", "each_s", "all_s")]
        if share > 0:
            found.append(Demand(share, *least))
    return found


def _demand(share: float, limits: Mapping[str, float]) -> Demand:
    first, each, all_of = (limits.get(k, math.inf) for k in ("ttft", "tpot", "e2el"))
    return Demand(share, first, each, all_of)


# --- bounds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountBound:
    """``least``: no smaller count can meet the targets; None: no count can. ``reason``: why.

    ``utilisation``: least work per second of arrivals, in replicas; None for a closed loop.
    """

    least: int | None
    reason: str
    utilisation: float | None


def count_bound(plan: PlanFile, floor: StepFloor, runs: Sequence[Sequence[Arrival]]) -> CountBound:
    """The bound over several replications' workloads. Meeting on average means meeting in one of them, so the least of
    their bounds holds.
    """
    found = [_one(plan, floor, arrivals) for arrivals in runs]
    return min(found, key=lambda b: math.inf if b.least is None else b.least)


def _one(plan: PlanFile, floor: StepFloor, arrivals: Sequence[Arrival]) -> CountBound:
    skipped = int(plan.warm_up * len(arrivals))
    counted = [a for a in arrivals[skipped:] if (a.content.output_tokens or 0) >= 1]
    if len(counted) < len(arrivals) - skipped or not counted:  # natural lengths: outputs may be a single token
        return CountBound(1, "output lengths are not known beforehand", None)
    at = np.array([a.request.arrival_s for a in counted])
    prompt = np.array([a.request.prompt_tokens for a in counted], dtype=float)
    output = np.array([a.content.output_tokens for a in counted], dtype=float)
    span = float(at[-1] - at[0])
    work = _least_work(floor, prompt, output, math.inf).sum(axis=1).max()
    utilisation = float(work) / span if span else None
    least, reason = 1, "one replica is the least there is"
    for demand in demands(plan.slo):
        allowed = _allowed(demand.share, len(at))
        if sum(_too_slow(floor, demand, prompt, output)) > allowed:
            return CountBound(None, "an empty replica is too slow for its own requests", utilisation)
        more = _windows(floor, demand, allowed, at, prompt, output)
        if more > least:
            least, reason = more, "work that is due within its deadlines"
    return CountBound(least, reason, utilisation)


def _allowed(share: float, count: int) -> int:
    """Most requests that may break a limit. A percentile interpolates between the two values beside it, of which only
    the lower one must keep the limit.
    """
    return count - (math.floor(share * (count - 1) + 1e-9) + 1)


def _too_slow(floor: StepFloor, demand: Demand, prompt: Floats, output: Floats) -> npt.NDArray[np.bool_]:
    """Requests that an otherwise empty replica cannot serve in time."""
    chunks = np.ceil(prompt / floor.token_budget)
    first = chunks * floor.empty + floor.prefill_s(prompt)
    steps = np.maximum(1, output - 1)
    each = np.where(output > 1, floor.step + floor.decode_s(prompt, output) / steps, 0.0)
    whole = first + (output - 1) * each
    late: npt.NDArray[np.bool_] = (first > demand.first_s) | (each > demand.each_s) | (whole > demand.all_s)
    return late


def _least_work(floor: StepFloor, prompt: Floats, output: Floats, each_s: float) -> Floats:
    """GPU-seconds a request takes at least, [4, requests]: its own work and its part of the steps, counted by rows, by
    tokens, by KV, or by what the time per token leaves room for. Each row sums to a bound for any set of requests.

    With a limit P on the time per token, steps of b rows that cost a + m b average at most P over tokens, so by
    Cauchy's inequality there are at least D m / (P - a) of them for D tokens.
    """
    own = floor.prefill_s(prompt) + floor.decode_s(prompt, output)
    steps = output - 1
    room = each_s - floor.step
    lightest = floor.row + floor.kv * float(prompt.min())
    by_pace = steps * lightest / room if 0 < room < math.inf else np.zeros_like(steps)
    by_kv = contexts(prompt, output) / floor.kv_tokens
    by_tokens = floor.empty * (prompt + steps) / floor.token_budget
    return np.asarray(own + np.stack([floor.step * steps / floor.max_rows, by_tokens, floor.step * by_kv,
                                      floor.step * by_pace]))  # fmt: skip


def _windows(floor: StepFloor, demand: Demand, allowed: int, at: Floats, prompt: Floats, output: Floats) -> int:
    """The largest count any window of arrivals demands."""
    reading = floor.prefill_s(prompt)[None, :]
    whole = _least_work(floor, prompt, output, demand.each_s)
    paced = demand.first_s + demand.each_s * (output - 1)
    finish = np.minimum(demand.all_s, np.where(output > 1, paced, demand.first_s))
    least = 0.0
    for slack, work in ((np.full_like(at, min(demand.first_s, demand.all_s)), reading), (finish, whole)):
        if not np.isfinite(slack).all():
            continue
        due = at + slack
        orders = [np.argsort(row, kind="stable") for row in work]  # lightest first
        for start in at[:: max(1, len(at) // WINDOWS)].tolist():
            for end in np.quantile(due[at >= start], np.linspace(1 / WINDOWS, 1, WINDOWS)).tolist():
                inside = (at >= start) & (due <= end)
                kept = int(inside.sum()) - allowed
                if kept <= 0 or end <= start:
                    continue
                needs = [float(row[o[inside[o]][:kept]].sum()) for row, o in zip(work, orders, strict=True)]
                least = max(least, max(needs) / (end - start))
    return max(1, math.ceil(least - 1e-9))


def fits(spec: ModelSpec, depth: int, budget_bytes: int, longest: int) -> bool:
    """Whether ``depth`` layers and the KV of one request of ``longest`` tokens fit the budget."""
    return spec.weights_bytes(depth) + spec.block_bytes(depth) * blocks_for(longest) <= budget_bytes
