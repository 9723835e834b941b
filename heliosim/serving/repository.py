"""The model repository (MR) and the performance history table (PHT) of HELIOS (arXiv 2504.10724, section 4).

The repository holds what is known of each candidate before it serves: sizes, load times and offline performance per
depth. The table holds what live requests showed. Both are plain facts; ``helios.py`` decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from heliosim.types import Bytes, ModelSpec, Placement, Seconds, Served, Stride, Tokens, blocks_for

Objective = Literal["throughput", "ttft", "perplexity", "energy"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "ttft", "perplexity", "energy")


@dataclass(frozen=True, slots=True)
class Performance:
    """What one placement delivers. ``energy_j`` per request, None where nothing can measure it; ``tpot_s``: a decode
    step of its usual batch, known offline alone.
    """

    throughput_tok_per_s: float
    ttft_s: Seconds
    perplexity: float
    energy_j: float | None = None
    tpot_s: Seconds | None = None

    def cost(self, objective: Objective) -> float:
        """The objective as a cost, smaller is better. ``inf`` if it was not measured."""
        match objective:
            case "throughput":
                return 1.0 / self.throughput_tok_per_s if self.throughput_tok_per_s > 0 else math.inf
            case "ttft":
                return self.ttft_s
            case "perplexity":
                return self.perplexity
            case "energy":
                return math.inf if self.energy_j is None else self.energy_j


@dataclass(frozen=True, slots=True)
class Candidate:
    """One repository entry.

    ``offline``: performance by depth, the full depth under early exit (``M``), smaller depths greedy (``M'``).
    ``offline_exits``: share of tokens that leave at each exit of the full model, at the repository's threshold.
    """

    spec: ModelSpec
    offline: Mapping[int, Performance]
    offline_exits: Mapping[int, float]

    def greedy_depth(self, exits: Mapping[int, float], coverage: float) -> int:
        """Smallest exit that covers at least ``coverage`` of the tokens (HELIOS step 3)."""
        seen = 0.0
        for exit_layer in self.spec.exits:
            seen += exits.get(exit_layer, 0.0)
            if seen >= coverage - 1e-12:
                return exit_layer
        return self.spec.layers


@dataclass(frozen=True, slots=True)
class Limits:
    """What a candidate must be able to meet; None: no limit. ``longest_tokens``: prompt and output of the longest
    request that must find KV beside the full model (None: one block).
    """

    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    perplexity: float | None = None
    longest_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Candidates that were taken, in order, and why the others were not."""

    names: list[str]
    refused: Mapping[str, str]

    def explain(self) -> list[str]:
        """One sentence per model."""
        taken = [f"{name}: candidate {k + 1} of {len(self.names)}" for k, name in enumerate(self.names)]
        return taken + [f"{name}: left out, {reason}" for name, reason in self.refused.items()]


@dataclass(frozen=True, slots=True)
class Repository:
    """Candidates by name, the memory they must fit, and what a change of placement is expected to cost.

    ``limits``: what their users asked for.
    """

    candidates: Mapping[str, Candidate]
    budget_bytes: Bytes
    load_seconds: Callable[[Placement | None, Placement], Seconds]
    limits: Limits = Limits()

    def shortlist(
        self, objective: Objective, count: int, names: tuple[str, ...] = (), limits: Limits | None = None
    ) -> Shortlist:
        """The ``count`` best by offline performance among those that fit, can meet the limits (the repository's own by
        default), share a vocabulary with the best of them and are in ``names``, if any are.
        """
        limits = limits or self.limits
        refused: dict[str, str] = {}
        able: list[Candidate] = []
        for candidate in self.candidates.values():
            name = candidate.spec.name
            if names and name not in names:
                refused[name] = "not among the scenario's candidates"
            elif reason := self._lack_of_memory(candidate.spec, limits) or _missed(candidate, limits):
                refused[name] = reason
            else:
                able.append(candidate)
        ranked = sorted(able, key=lambda c: (c.offline[c.spec.layers].cost(objective), c.spec.name))
        best: list[str] = []
        for candidate in ranked:
            name = candidate.spec.name
            if candidate.spec.vocabulary != ranked[0].spec.vocabulary:
                refused[name] = f"another tokenizer or vocabulary than {ranked[0].spec.name}, the best by {objective}"
            elif len(best) == count:
                refused[name] = f"not among the {count} best by {objective}"
            else:
                best.append(name)
        return Shortlist([n for n in names if n in best] or best, refused)

    def _lack_of_memory(self, spec: ModelSpec, limits: Limits) -> str:
        """Why a model fully loaded does not fit with KV for the longest request; '' if it does."""
        weights = spec.weights_bytes(spec.layers)
        blocks = 1 if limits.longest_tokens is None else blocks_for(max(1, limits.longest_tokens - 1))
        blocks += spec.request_blocks(spec.layers)
        need = weights + blocks * spec.block_bytes(spec.layers)
        if need <= self.budget_bytes:
            return ""
        if weights + spec.block_bytes(spec.layers) > self.budget_bytes:
            return f"{weights:,} B of weights and a KV block do not fit {self.budget_bytes:,} B"
        return f"no KV for a request of {limits.longest_tokens} tokens beside {weights:,} B of weights"


def _missed(candidate: Candidate, limits: Limits) -> str:
    """Which limit a candidate cannot meet offline at any depth; '' if none."""
    rows = candidate.offline.values()
    if limits.ttft_s is not None and (best := min(row.ttft_s for row in rows)) > limits.ttft_s:
        return f"TTFT of {1e3 * best:.1f} ms at best, {1e3 * limits.ttft_s:.1f} ms asked for"
    known = [row.tpot_s for row in rows if row.tpot_s is not None]
    if limits.tpot_s is not None and known and min(known) > limits.tpot_s:
        return f"TPOT of {1e3 * min(known):.1f} ms at best, {1e3 * limits.tpot_s:.1f} ms asked for"
    if limits.perplexity is not None and (best := min(row.perplexity for row in rows)) > limits.perplexity:
        return f"perplexity of {best:.3f} at best, {limits.perplexity:.3f} asked for"
    return ""


@dataclass(slots=True)
class Evaluation:
    """What a candidate showed while it served its probe requests, fully loaded."""

    busy_s: Seconds = 0.0
    tokens: int = 0
    logprob_sum: float = 0.0
    ttft_sum_s: Seconds = 0.0
    energy_j: float | None = 0.0
    served: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    probes: list[tuple[float, float, float]] = field(default_factory=list)

    def add_step(self, seconds: Seconds, tokens: Tokens, energy_j: float | None) -> None:
        self.busy_s += seconds
        self.tokens += len(tokens)
        for logprob in tokens.logprobs:
            self.logprob_sum += logprob
        for exit_layer in tokens.exit_layers:
            self.exits[exit_layer] = self.exits.get(exit_layer, 0) + 1
        self.energy_j = None if energy_j is None or self.energy_j is None else self.energy_j + energy_j

    def add_stride(self, stride: Stride) -> None:
        """The same as its steps one by one; sums are made in the same order."""
        assert stride.tokens is not None
        logprobs = stride.tokens.logprobs
        self.tokens += len(logprobs)
        self.logprob_sum = float(np.add.accumulate(np.concatenate(([self.logprob_sum], logprobs)))[-1])
        for step in stride.steps:
            self.busy_s += step[0]
            energy_j = None if stride.watts is None else stride.watts.of(step)
            self.energy_j = None if energy_j is None or self.energy_j is None else self.energy_j + energy_j
        for exit_layer, count in enumerate(np.bincount(stride.tokens.exit_layers).tolist()):
            if count:
                self.exits[exit_layer] = self.exits.get(exit_layer, 0) + count

    def add_served(self, record: Served) -> None:
        """Response time counts from admission: a candidate is not blamed for the queue it met."""
        self.served += 1
        if record.first_token_s is not None and record.admitted_s is not None and record.output_tokens:
            per_token = (record.finish_s - record.admitted_s) / record.output_tokens
            ttft_s = record.first_token_s - record.admitted_s
            self.probes.append((per_token, ttft_s, -record.logprob_sum / record.output_tokens))
        if record.first_token_s is not None and record.admitted_s is not None:
            self.ttft_sum_s += record.first_token_s - record.admitted_s

    def shares(self) -> dict[int, float]:
        return {e: n / self.tokens for e, n in sorted(self.exits.items())} if self.tokens else {}

    def standard_errors(self) -> dict[str, float] | None:
        """Standard error of throughput, TTFT and perplexity over the probes, as if these were independent; None of
        fewer than two.

        Throughput and perplexity by the delta method, from seconds per token and mean negative log probability of each
        request. Requests of one batch share their steps, so the truth is rather more.
        """
        n = len(self.probes)
        if n < 2:
            return None
        values = np.array(self.probes)
        errors, means = values.std(axis=0, ddof=1) / math.sqrt(n), values.mean(axis=0)
        now = self.performance()
        return {
            "throughput_tok_per_s": float(now.throughput_tok_per_s * errors[0] / means[0]) if means[0] > 0 else 0.0,
            "ttft_s": float(errors[1]),
            "perplexity": float(now.perplexity * errors[2]),
        }

    def performance(self) -> Performance:
        return Performance(
            throughput_tok_per_s=self.tokens / self.busy_s if self.busy_s else 0.0,
            ttft_s=self.ttft_sum_s / max(1, self.served),
            perplexity=math.exp(-self.logprob_sum / max(1, self.tokens)),
            energy_j=None if self.energy_j is None else self.energy_j / max(1, self.served),
        )


@dataclass(frozen=True, slots=True)
class PhtRow:
    """One row of the performance history table: a placement and what it is expected to deliver now."""

    placement: Placement
    performance: Performance
    is_partial: bool
    weights_bytes: Bytes


def scaled(live: Performance, offline_full: Performance, offline_partial: Performance) -> Performance:
    """M' predicted from a live measurement of M: each quantity moves by the ratio the repository knows."""

    def ratio(partial: float, full: float) -> float:
        return partial / full if full > 0 else 1.0

    energy = None
    if live.energy_j is not None and offline_partial.energy_j is not None and offline_full.energy_j is not None:
        energy = live.energy_j * ratio(offline_partial.energy_j, offline_full.energy_j)
    return Performance(
        throughput_tok_per_s=live.throughput_tok_per_s
        * ratio(offline_partial.throughput_tok_per_s, offline_full.throughput_tok_per_s),
        ttft_s=live.ttft_s * ratio(offline_partial.ttft_s, offline_full.ttft_s),
        perplexity=live.perplexity * ratio(offline_partial.perplexity, offline_full.perplexity),
        energy_j=energy,
    )
