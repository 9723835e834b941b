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
from collections.abc import Iterable, Mapping, Sequence
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
    each KV token a decode row reads; ``product``: each token-context pair of a prompt; ``started``, ``ended``: each
    request once, before its first token and with its last.
    """

    empty: float
    step: float
    token: float
    row: float
    kv: float
    product: float
    started: float
    ended: float
    max_rows: int
    token_budget: int
    kv_tokens: int

    def prefill_s(self, prompt: Floats) -> Floats:
        """Marginal work up to the first token. A chunk of t tokens up to e costs t e; the last token of a prompt may
        be alone in its chunk and cost what a decode row does, so it is left out.
        """
        read = prompt - 1
        return self.started + self.token * read + self.product * prompt * read / 2

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
        dense, check = 0.0, c["check"]
        if (curve := costs[name].layer_curve) is not None:
            rows, most = candidate.batcher.max_batch, candidate.batcher.token_budget
            dense, more = curve.line_below(max(rows, most), rows)
            each += more
        if (curve := costs[name].head_curve) is not None:
            check += min(curve.seconds)
        floors.append(
            (
                max(0.0, c["step"] + min(decode, prefill) * (c["layer"] + dense - rebate)),
                max(0.0, c["step"] + decode * (c["layer"] + dense + c["layer_decode"] - rebate) + check),
                c["token"] + prefill * each,
                c["row"] + c["token"] + decode * (each + c["layer_decode_row"]) + c["check_row"],
                c["gathered"] + decode * (c["layer_decode_kv"] + c["layer_decode_context"]),
                prefill * c["layer_prefill_kv"],
                c["started"],
                c["ended"],
            )
        )
    least = [min(column) for column in zip(*floors, strict=True)]
    batcher = candidate.batcher
    empty, step, token, row, kv, product, started, ended = least
    limits = (batcher.max_batch, batcher.token_budget, max(1, kv_tokens))
    return StepFloor(empty, step, token, row, kv, product, started, ended, *limits)


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
    """Most requests have their first token ``first_s`` after arrival, and their last at most ``each_s`` per further
    token behind it, and ``all_s`` after arrival. inf: not asked.

    ``shares``: of requests that keep each of the limits behind it; ``refused``: share of all that may be refused.
    """

    shares: tuple[float, ...]
    first_s: float
    each_s: float
    all_s: float
    refused: float = 0.0

    def allowed(self, count: int) -> int:
        """Most of ``count`` requests that need not be in time: those refused, and of the others those each limit lets
        go.
        """
        refused = min(count, math.floor(self.refused * count + 1e-9))
        served = count - refused
        return min(count, refused + sum(_allowed(share, served) for share in self.shares)) if served else count


def demands(targets: Targets) -> list[Demand]:
    """Deadlines that one replication or another keeps if all of them together meet the targets: one demand per limit,
    and one for all at once.

    A mean over replications below L is below L in one of them, but two limits may be kept by different ones. That less
    than one in m is above m L is true of each limit (Markov's inequality), so of m limits some replication keeps all,
    each m times as wide. A share of refusals is a limit like the others; none at all holds for every replication.
    """
    limits = [_of_latency(name, most_ms) for name, most_ms in targets.limits.items()]
    if (a := targets.attainment) is not None:
        given = {"ttft": a.ttft_ms, "tpot": a.tpot_ms, "e2el": a.e2el_ms}
        limits.append(_Kept(a.share, {k: v / 1e3 for k, v in given.items() if v is not None}, is_share=True))
    together = [limits] if len(limits) > 1 else []
    return [_demand(some, targets.max_refused_share) for some in [*([limit] for limit in limits), *together]]


@dataclass(frozen=True)
class _Kept:
    """A limit: ``share`` of requests within ``most_s`` seconds, by family. ``is_share``: what is averaged over
    replications is the share; else it is the time.
    """

    share: float
    most_s: Mapping[str, float]
    is_share: bool = False


def _of_latency(name: str, most_ms: float) -> _Kept:
    percentile, family = latency_of(name)
    if percentile is None:
        return _Kept(0.9, {family: most_ms / 1e3 * MEAN_FACTOR})
    return _Kept(percentile / 100, {family: most_ms / 1e3})


def _demand(limits: Sequence[_Kept], max_refused: float) -> Demand:
    """What some replication keeps of several limits at once."""
    wider = len(limits) + (max_refused > 0)
    shares = tuple(1 - wider * (1 - k.share) - 1e-12 if k.is_share else k.share for k in limits)
    most = {"ttft": math.inf, "tpot": math.inf, "e2el": math.inf}
    for kept in limits:
        for family, seconds in kept.most_s.items():
            most[family] = min(most[family], seconds * (1 if kept.is_share else wider))
    return Demand(shares, most["ttft"], most["tpot"], most["e2el"], wider * max_refused)


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
    """The bound over several replications' workloads. Each demand is kept in one of them at least, so the least of its
    bounds over them holds; all demands are made, so the largest of these does.
    """
    loads = [_load_of(counted(plan, arrivals)) for arrivals in runs]
    if not all(load.is_known and len(load.at) for load in loads):
        return CountBound(1, "output lengths are not known beforehand", None)
    utilisation = _least(_utilisation(floor, load) for load in loads)
    found = CountBound(1, "one replica is the least there is", utilisation)
    for demand in demands(plan.slo):
        least = min(_count(floor, demand, load) for load in loads)
        if math.isinf(least):
            return CountBound(None, "an empty replica is too slow for its own requests", utilisation)
        if least > (found.least or 1):
            found = CountBound(int(least), "work that is due within its deadlines", utilisation)
    return found


def counted(plan: PlanFile, arrivals: Sequence[Arrival]) -> Sequence[Arrival]:
    """Arrivals, in order, from the end of the warm-up on; those at the same time count too."""
    skipped = int(plan.warm_up * len(arrivals))
    while (
        0 < skipped < len(arrivals) and arrivals[skipped - 1].request.arrival_s == arrivals[skipped].request.arrival_s
    ):
        skipped -= 1
    return arrivals[skipped:]


@dataclass(frozen=True)
class _Load:
    """Requests of a replication. ``is_known``: whether output lengths are; natural ones may be a single token."""

    at: Floats
    prompt: Floats
    output: Floats
    is_known: bool


def _load_of(arrivals: Sequence[Arrival]) -> _Load:
    outputs = [a.content.output_tokens or 0 for a in arrivals]
    at = np.array([a.request.arrival_s for a in arrivals], dtype=float)
    prompt = np.array([a.request.prompt_tokens for a in arrivals], dtype=float)
    return _Load(at, prompt, np.array(outputs, dtype=float), all(n >= 1 for n in outputs))


def _utilisation(floor: StepFloor, load: _Load) -> float | None:
    span = float(load.at[-1] - load.at[0])
    work = _least_work(floor, load.prompt, load.output, math.inf).sum(axis=1).max()
    return float(work) / span if span else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def _count(floor: StepFloor, demand: Demand, load: _Load) -> float:
    """Fewest replicas that can keep a demand in a replication; inf: none can."""
    allowed = demand.allowed(len(load.at))
    if sum(_too_slow(floor, demand, load.prompt, load.output)) > allowed:
        return math.inf
    return _windows(floor, demand, allowed, load.at, load.prompt, load.output)


def _allowed(share: float, count: int) -> int:
    """Most requests that may break a limit. A percentile interpolates between the two values beside it, of which only
    the lower one must keep the limit. A share below 0 asks nothing.
    """
    if share < 0:
        return count
    return count - (math.floor(share * (count - 1) + 1e-9) + 1)


def _too_slow(floor: StepFloor, demand: Demand, prompt: Floats, output: Floats) -> npt.NDArray[np.bool_]:
    """Requests that an otherwise empty replica cannot serve in time."""
    chunks = np.ceil(prompt / floor.token_budget)
    first = chunks * floor.empty + floor.prefill_s(prompt)
    steps = np.maximum(1, output - 1)
    each = np.where(output > 1, floor.step + floor.decode_s(prompt, output) / steps, 0.0)
    whole = first + (output - 1) * each + floor.ended
    late: npt.NDArray[np.bool_] = (first > demand.first_s) | (each > demand.each_s) | (whole > demand.all_s)
    return late


def _least_work(floor: StepFloor, prompt: Floats, output: Floats, each_s: float) -> Floats:
    """GPU-seconds a request takes at least, [4, requests]: its own work and its part of the steps, counted by rows, by
    tokens, by KV, or by what the time per token leaves room for. Each row sums to a bound for any set of requests.

    With a limit P on the time per token, steps of b rows that cost a + m b average at most P over tokens, so by
    Cauchy's inequality there are at least D m / (P - a) of them for D tokens.
    """
    own = floor.prefill_s(prompt) + floor.decode_s(prompt, output) + floor.ended
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
    paced = np.full_like(at, demand.first_s)
    paced[output > 1] += demand.each_s * (output[output > 1] - 1)
    finish = np.minimum(demand.all_s, paced)
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
    blocks = blocks_for(longest) + spec.request_blocks(depth)
    return spec.weights_bytes(depth) + spec.block_bytes(depth) * blocks <= budget_bytes


def longest_served(plan: PlanFile, runs: Sequence[Sequence[Arrival]]) -> int:
    """KV tokens of the longest request a fleet must serve; the last token of an answer is never read, so has none.

    Where none may be refused, every replication a verdict takes is without refusals; where a share may, one is within
    the share.
    """
    share = plan.slo.max_refused_share
    lengths = [
        sorted(a.request.prompt_tokens + a.request.max_tokens - 1 for a in counted(plan, arrivals)) for arrivals in runs
    ]
    if not share:
        return max(some[-1] for some in lengths[: plan.replications.least])
    return min(some[len(some) - 1 - math.floor(share * len(some) + 1e-9)] for some in lengths)
