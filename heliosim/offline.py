"""The model repository's offline figures, worked out from a profile: what each depth of each model should deliver.

For a depth: the batch that fits beside it in the memory budget, one decode step of that batch at a typical context, one
prefill of a typical prompt. A partial model pays no failed checks; a full model pays for early exit, its batch waiting
for the deepest token. These figures rank candidates and scale live measurements of M to M'; they never replace a
measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from heliosim.behaviour import ANY_SOURCE, Behaviour, source_name
from heliosim.costs import StepCost, layers_run, load_seconds, load_terms, shape_of
from heliosim.formats.profile import ClockName, Profile
from heliosim.serving.repository import Candidate, Limits, Performance, Repository
from heliosim.types import (
    Batch,
    ExitBatching,
    ExitRule,
    Load,
    ModelSpec,
    Outcome,
    Placement,
    Run,
    StepPower,
    Tokens,
    blocks_for,
)


def build_repository(
    profile: Profile,
    names: Sequence[str],
    clock: ClockName,
    budget_bytes: int,
    max_batch: int,
    threshold: float,
    batching: ExitBatching = "wait-for-deepest",
    *,
    loads: Mapping[str, Mapping[str, float]] | None = None,
    overlaps: bool = False,
    limits: Limits | None = None,
) -> Repository:
    """Candidates with offline figures, and the expected cost of changing placement.

    ``loads``: load coefficients by model, those of the profile by default. ``overlaps``: a load costs only what of it
    is exposed where the weights of both placements fit; what is on disk is not foreseen.
    """
    specs = {name: profile.spec(name) for name in names}
    known = loads or {name: profile.load_cost(name, clock) for name in names}

    def expected_load(old: Placement | None, new: Placement) -> float:
        spec = specs[new.model]
        resident = old.depth if old is not None and old.model == new.model else 0
        kv = max(0, budget_bytes - spec.weights_bytes(new.depth))
        once, layers, moved, kv_bytes, extended = load_terms(Load(new, 0, ""), spec, resident, kv)
        if overlaps and old is not None:
            here = specs[old.model]
            if here.weights_bytes(old.depth) + moved + here.block_bytes(old.depth) <= budget_bytes:
                layers = moved = 0
        return load_seconds(known[new.model], (once, layers, moved, kv_bytes, extended))

    candidates = {
        name: _candidate(
            specs[name],
            profile.behaviour,
            profile.step_cost(name, clock),
            budget_bytes,
            max_batch,
            ExitRule("threshold", threshold, batching),
            profile.step_power(name),
        )
        for name in names
    }
    return Repository(candidates, budget_bytes, expected_load, limits or Limits())


def _candidate(
    spec: ModelSpec,
    behaviour: Behaviour,
    cost: StepCost,
    budget: int,
    max_batch: int,
    full_rule: ExitRule,
    power: StepPower | None,
) -> Candidate:
    threshold = full_rule.threshold
    full_source = source_name(Placement(spec.name, spec.layers), full_rule, spec.layers)
    shares = behaviour.exit_shares(spec.name, full_source, threshold)
    prompt = _mean([t.prompt_tokens for t in behaviour.texts.values()])
    output = _mean([t.end or t.tokens if s == ANY_SOURCE else t.tokens for (_, s), t in behaviour.texts.items()])
    context = prompt + output // 2
    offline: dict[int, Performance] = {}
    for depth in spec.exits:
        is_full = depth == spec.layers
        row_bytes = spec.block_bytes(depth) * (blocks_for(context) + spec.request_blocks(depth))
        if spec.weights_bytes(depth) + row_bytes > budget:
            rows = 1
        else:
            rows = (budget - spec.weights_bytes(depth)) // row_bytes
        rows = max(1, min(rows, max_batch, cost.max_rows))
        rule = full_rule if is_full else ExitRule("greedy", threshold)
        source = source_name(Placement(spec.name, depth), rule, spec.layers)
        decode = decode_seconds(spec, cost, depth, rule, shares, rows, context)
        prefill = prefill_seconds(spec, cost, depth, rule, prompt)
        offline[depth] = Performance(
            throughput_tok_per_s=rows / decode,
            ttft_s=prefill,
            perplexity=behaviour.perplexity(spec.name, depth, source, threshold if is_full else None),
            energy_j=None if power is None else request_j(power, prefill, output * decode / rows),
            tpot_s=decode,
        )
    return Candidate(spec, offline, shares)


def request_j(power: StepPower, prefill_s: float, decode_s: float) -> float:
    """Energy of a request that is read alone and decoded in a full batch, of which it bears its share."""
    return power.decode_w * (prefill_s + decode_s) + (power.prefill_w - power.decode_w) * prefill_s


def _mean(values: list[int]) -> int:
    return max(1, round(math.fsum(values) / max(1, len(values))))


def decode_seconds(
    spec: ModelSpec, cost: StepCost, depth: int, rule: ExitRule, shares: dict[int, float], rows: int, context: int
) -> float:
    """Expected seconds of one decode step; under a threshold, over the distribution of the batch's deepest exit."""
    if rule.kind == "greedy":
        return _step_seconds(spec, cost, depth, rule, [depth] * rows, [context] * rows, [1] * rows)
    total, below = 0.0, 0.0
    for deepest in spec.exits:
        cumulative = below + shares.get(deepest, 0.0)
        chance = cumulative**rows - below**rows
        if chance > 0:
            exits = _typical_exits(shares, deepest, rows)
            total += chance * _step_seconds(spec, cost, depth, rule, exits, [context] * rows, [1] * rows)
        below = cumulative
    return total or _step_seconds(spec, cost, depth, rule, [depth] * rows, [context] * rows, [1] * rows)


def _typical_exits(shares: dict[int, float], deepest: int, rows: int) -> list[int]:
    """``rows`` exits in their usual proportions, none beyond ``deepest``, at least one there."""
    usable = {e: s for e, s in shares.items() if e <= deepest and s > 0}
    total = sum(usable.values())
    exits = [e for e, s in sorted(usable.items()) for _ in range(round(rows * s / total))][: rows - 1]
    return exits + [deepest] * (rows - len(exits))


def prefill_seconds(spec: ModelSpec, cost: StepCost, depth: int, rule: ExitRule, prompt: int) -> float:
    return _step_seconds(spec, cost, depth, rule, [depth], [0], [prompt])


def _step_seconds(
    spec: ModelSpec, cost: StepCost, depth: int, rule: ExitRule, exits: list[int], starts: list[int], counts: list[int]
) -> float:
    ids = tuple(range(len(exits)))
    batch = Batch(ids, tuple(starts), tuple(counts), (True,) * len(ids))
    run = Run(Placement(spec.name, depth), rule, batch)
    ones = (1.0,) * len(ids)
    tokens = Tokens(ids, tuple(exits), ones, ones, (False,) * len(ids))
    return cost.seconds(shape_of(run, Outcome(0.0, tokens, layers_run(run, tokens)), spec))
