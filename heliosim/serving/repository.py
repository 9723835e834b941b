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

from heliosim.types import Bytes, ModelSpec, Placement, Seconds, Served, Stride, Tokens

Objective = Literal["throughput", "ttft", "perplexity", "energy"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "ttft", "perplexity", "energy")


@dataclass(frozen=True, slots=True)
class Performance:
    """What one placement delivers. ``energy_j`` per request, None where nothing can measure it."""

    throughput_tok_per_s: float
    ttft_s: Seconds
    perplexity: float
    energy_j: float | None = None

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
class Repository:
    """Candidates by name, the memory they must fit, and what a change of placement is expected to cost."""

    candidates: Mapping[str, Candidate]
    budget_bytes: Bytes
    load_seconds: Callable[[Placement | None, Placement], Seconds]

    def shortlist(self, objective: Objective, count: int, names: tuple[str, ...] = ()) -> list[str]:
        """The ``count`` best by offline performance among those that fit, share a vocabulary with the best and meet
        ``names``.
        """
        fits = [
            c
            for c in self.candidates.values()
            if (not names or c.spec.name in names)
            and c.spec.weights_bytes(c.spec.layers) + c.spec.block_bytes(c.spec.layers) <= self.budget_bytes
        ]
        ranked = sorted(fits, key=lambda c: (c.offline[c.spec.layers].cost(objective), c.spec.name))
        best = [c.spec.name for c in ranked if c.spec.vocabulary == ranked[0].spec.vocabulary][:count]
        return [n for n in names if n in best] or best


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
        if record.first_token_s is not None and record.admitted_s is not None:
            self.ttft_sum_s += record.first_token_s - record.admitted_s

    def shares(self) -> dict[int, float]:
        return {e: n / self.tokens for e, n in sorted(self.exits.items())} if self.tokens else {}

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
