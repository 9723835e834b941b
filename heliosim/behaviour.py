"""How models behave, token by token: recorded confidences that a simulated engine replays.

A behaviour table holds texts that were really generated, each by one **source** (a model under one exit policy), and
for every token and every exit of every model what that exit would have said: its confidence and whether it agrees with
the model's last layer. All models were scored on the same text, so their rows are aligned, and exit depths keep their
true correlation along a request and between models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from heliosim.errors import UnknownNameError
from heliosim.streams import stream
from heliosim.types import ExitRule, Placement

ANY_SOURCE = "any"
"""Source of texts that stand for every policy: synthetic ones, which no policy wrote."""

REFERENCE = "reference"
"""Source of given texts that every model was scored on and none wrote. Where a table has texts of policies, they are
not replayed; where it has none, they stand for every policy.
"""


def source_name(placement: Placement, exits: ExitRule, layers: int, *, is_exact: bool = False) -> str:
    """Name of the policy a text was generated under; a full model without exits and at greedy depth are the same.

    Of a threshold, this is the one calibrated everywhere: ``wait-for-deepest``, KV propagated. ``is_exact``: the name
    of the rule's own exit batching and skipped-KV method.
    """
    if exits.kind == "threshold":
        method = f"/{exits.batching}+{exits.skipped_kv}" if is_exact and not is_usual_method(exits) else ""
        return f"{placement.model}:threshold{method}"
    if placement.depth == layers:
        return f"{placement.model}:full"
    return f"{placement.model}:greedy@{placement.depth}"


def is_usual_method(exits: ExitRule) -> bool:
    """Whether texts calibrated under a threshold speak for this rule: all rows walk together, KV is propagated."""
    return exits.kind != "threshold" or (
        exits.batching in ("full", "wait-for-deepest") and exits.skipped_kv == "propagate"
    )


@dataclass(frozen=True, slots=True)
class Text:
    """One generated text. ``confidence`` and ``agrees`` by ``model@exit``, each of shape [tokens]; ``end``: natural
    length or None.
    """

    task: str
    prompt_tokens: int
    tokens: int
    end: int | None
    confidence: Mapping[str, npt.NDArray[np.float32]]
    agrees: Mapping[str, npt.NDArray[np.bool_]]
    observed: Mapping[int, tuple[Placement, int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Walk:
    """How the tokens of a text leave under one placement and rule, by position modulo the text's length, [tokens] each.

    What a recorded run observed stands at its position; a run that goes on behind its own text would meet it again.

    ``exit_layers``, ``confidences``, natural-log ``logprobs``, and ``agrees`` with the model's last layer.
    """

    exit_layers: npt.NDArray[np.int64]
    confidences: npt.NDArray[np.float64]
    logprobs: npt.NDArray[np.float64]
    agrees: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Behaviour:
    """Texts by sequence and source. ``sequences``: by task, the prompts there are; ``exits``: exits of each model.

    ``is_recorded_run``: the texts are a run's own, one per request, and each request meets its own again.
    """

    texts: Mapping[tuple[str, str], Text]
    sequences: Mapping[str, Sequence[str]]
    exits: Mapping[str, tuple[int, ...]]
    is_recorded_run: bool = False
    _drawn: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def assign(self, request_id: int, task: str, seed: int) -> str:
        """The prompt a request stands for: drawn by seed and request only, so every system meets the same one."""
        if self.is_recorded_run:
            return f"request-{request_id}"
        names = self.sequences.get(task)
        if names is None:
            if task:
                raise UnknownNameError("workload task", task, self.sequences)
            names = [name for group in self.sequences.values() for name in group]
        return names[int(self._uniforms(seed, request_id)[request_id] * len(names))]

    def _uniforms(self, seed: int, request_id: int) -> npt.NDArray[np.float64]:
        """One number in [0, 1) per request, at least up to ``request_id``; the k-th depends on the seed and k alone."""
        known = self._drawn.get(seed)
        if known is None or request_id >= len(known):
            self._drawn.clear()
            self._drawn[seed] = known = stream(seed, "behaviour").random(max(1024, 2 * request_id))
        return known

    @cached_property
    def sources(self) -> frozenset[str]:
        """Policies there are texts of."""
        return frozenset(source for _, source in self.texts)

    def source(self, placement: Placement, exits: ExitRule, layers: int) -> str:
        """Whose texts stand for a policy: its own where there are any, else those of the usual exit methods."""
        own = source_name(placement, exits, layers, is_exact=True)
        return own if own in self.sources else source_name(placement, exits, layers)

    def text(self, sequence: str, source: str) -> Text:
        """The text this sequence has under a source; texts of recorded runs have the source ``live`` only, synthetic
        ones ``any``, given ones ``reference``.
        """
        found = self.texts.get((sequence, source)) or self.texts.get((sequence, "live"))
        found = found or self.texts.get((sequence, ANY_SOURCE)) or self.texts.get((sequence, REFERENCE))
        if found is None:
            known = {s for q, s in self.texts if q == sequence}
            raise UnknownNameError("profile behaviour source", source, known)
        return found

    def walk(self, text: Text, placement: Placement, rule: ExitRule) -> Walk:
        """Exit layer, confidence and agreement of every token. Positions beyond the recorded text wrap around."""
        model = placement.model
        exits = [placement.depth]
        if rule.kind == "threshold":
            exits = [e for e in self.exits[model] if e < placement.depth] + exits
        seen = np.stack([text.confidence[f"{model}@{e}"] for e in exits])
        is_enough = seen >= rule.threshold
        is_enough[-1] = True
        first = is_enough.argmax(axis=0)
        at = np.arange(seen.shape[1])
        layers, confidences = np.asarray(exits)[first], seen[first, at].astype(np.float64)
        agrees = np.stack([text.agrees[f"{model}@{e}"] for e in exits])[first, at]
        for position, (where, layer, confidence) in text.observed.items():
            if where == placement and position < len(at):
                layers[position], confidences[position] = layer, confidence
                agrees[position] = text.agrees[f"{model}@{layer}"][position]
        return Walk(layers, confidences, np.log(np.maximum(confidences, 1e-12)), agrees)

    def fan(self, text: Text, placement: Placement) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Confidence and agreement of every token at every exit up to a depth, [exits, tokens] each."""
        keys = [f"{placement.model}@{e}" for e in self.exits[placement.model] if e < placement.depth]
        keys.append(f"{placement.model}@{placement.depth}")
        seen = np.stack([text.confidence[key] for key in keys])
        return seen.astype(np.float64), np.stack([text.agrees[key] for key in keys])

    def exit_shares(self, model: str, source: str, threshold: float) -> dict[int, float]:
        """Share of tokens by exit of the full model under a threshold, over all texts of a source."""
        left, _ = self._leave(model, self.exits[model], source, threshold)
        return {e: float((left == e).mean()) for e in self.exits[model]} if len(left) else {}

    def perplexity(self, model: str, depth: int, source: str, threshold: float | None) -> float:
        """exp of the mean negative log probability of emitted tokens at a depth, all of them leaving there (threshold
        None) or at the first confident exit. Greedy decoding emits the top token: its probability is the confidence.
        """
        exits = (depth,) if threshold is None else tuple(e for e in self.exits[model] if e <= depth)
        _, confidence = self._leave(model, exits, source, 2.0 if threshold is None else threshold)
        if not len(confidence):
            return float("nan")
        return float(np.exp(-np.log(np.maximum(confidence, 1e-12)).mean()))

    def _leave(
        self, model: str, exits: Sequence[int], source: str, threshold: float
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Exit layer and confidence of every token of a source: first of ``exits`` at the threshold, else the last."""
        texts = [text for (_, name), text in self.texts.items() if name in (source, ANY_SOURCE, REFERENCE)]
        if not texts:
            return np.zeros(0, np.int64), np.zeros(0)
        seen = np.stack([np.concatenate([t.confidence[f"{model}@{e}"] for t in texts]) for e in exits]).astype(float)
        is_enough = seen >= threshold
        is_enough[-1] = True
        first = is_enough.argmax(axis=0)
        return np.asarray(exits)[first], seen[first, np.arange(seen.shape[1])]
