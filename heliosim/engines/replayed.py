"""Exits on record in place of the live engine's own: real layers, memory and transfers, replayed confidences.

Weights of the right shape (random ones, say) then show the times and the control of a model that was measured, or made
up, elsewhere: thresholds, greedy depth, breaches and output lengths follow the record. Each request stands for a
recorded prompt, and each of its tokens for the recorded one at its place, just as in the simulated engine
(``engines/sim.py``), so both meet the same exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heliosim.behaviour import Behaviour, Walk
from heliosim.engines.joint import Fan
from heliosim.engines.texts import Text
from heliosim.errors import InputError
from heliosim.exits.batching import exit_batcher
from heliosim.types import Arrival, ExitRule, ModelSpec, Placement, RequestId


@dataclass(slots=True)
class _Followed:
    """What a request's tokens do under the present policy: a walk, or a fan where exits depend on the batch."""

    walk: Walk | None
    fan: Fan | None


@dataclass(slots=True)
class Said:
    """Of the emitting rows of a step: confidence, natural-log probability, agreement with the model's last layer."""

    confidences: tuple[float, ...]
    logprobs: tuple[float, ...]
    agrees: tuple[bool, ...]


class ReplayedExits:
    """``behaviour`` says what every exit of the models ``specs`` said; ``seed``: of the run, which draws who stands for
    which prompt.

    Raises InputError unless it knows these models with these very exits.
    """

    def __init__(self, behaviour: Behaviour, specs: Mapping[str, ModelSpec], seed: int) -> None:
        require_exits(behaviour, specs)
        self.behaviour, self.specs, self.seed = behaviour, specs, seed
        self._sequences: dict[RequestId, str] = {}
        self._followed: dict[RequestId, _Followed] = {}
        self._walks: dict[str, _Followed] = {}
        self._ends: dict[str, int | None] = {}
        self._policy: tuple[Placement, ExitRule] | None = None

    def accept(self, arrival: Arrival) -> None:
        """Give a request its prompt. Raises UnknownNameError for a task that is not on record."""
        request = arrival.request.id
        self._sequences[request] = self.behaviour.assign(request, arrival.content.task, self.seed)

    def forget(self, request: RequestId) -> None:
        """Drop a request."""
        self._sequences.pop(request, None)
        self._followed.pop(request, None)

    def clear(self) -> None:
        """Know no request."""
        self._sequences.clear()
        self._followed.clear()

    def follow(
        self, placement: Placement, exits: ExitRule, requests: Sequence[RequestId], texts: Mapping[RequestId, Text]
    ) -> None:
        """Let requests go on under this policy. A text that is new under it gets the length it has there."""
        if (placement, exits) != self._policy:
            self._policy = (placement, exits)
            self._walks, self._ends = {}, {}
            self._followed.clear()
        for request in requests:
            if request not in self._followed:
                self._followed[request] = self._follow(request, texts[request])

    def step(
        self, placement: Placement, exits: ExitRule, requests: Sequence[RequestId], texts: Mapping[RequestId, Text]
    ) -> ReplayStep:
        """What the next tokens of requests say, in their order."""
        self.follow(placement, exits, requests, texts)
        places = [len(texts[r].known) - texts[r].request.prompt_tokens for r in requests]
        layers = [e for e in self.specs[placement.model].exits if e < placement.depth] + [placement.depth]
        return ReplayStep([self._followed[r] for r in requests], places, layers, exits.threshold)

    def _follow(self, request: RequestId, text: Text) -> _Followed:
        """What a request does from now on; its text ends where the recorded one does, a token from now at least."""
        sequence = self._sequences[request]
        found = self._walks.get(sequence)
        if found is None:
            assert self._policy is not None
            placement, exits = self._policy
            source = self.behaviour.source(placement, exits, self.specs[placement.model].layers)
            recorded = self.behaviour.text(sequence, source)
            is_joint = exits.kind == "threshold" and exit_batcher(exits.batching).is_joint
            if is_joint and not self.behaviour.is_recorded_run:
                found = _Followed(None, Fan(*self.behaviour.fan(recorded, placement)))
            else:
                found = _Followed(self.behaviour.walk(recorded, placement, exits), None)
            self._walks[sequence], self._ends[sequence] = found, recorded.end
        end, done = self._ends[sequence], len(text.generated)
        most = text.output_tokens or text.request.max_tokens
        text.replayed_tokens = max(done + 1, most if text.output_tokens or end is None else min(most, end))
        return found


class ReplayStep:
    """One step's emitting rows, by place among them. ``places``: of their tokens in their texts, from 0; ``layers``:
    exits up to the placement's depth.
    """

    def __init__(
        self, followed: Sequence[_Followed], places: Sequence[int], layers: Sequence[int], threshold: float
    ) -> None:
        self._followed, self._places, self._layers, self._threshold = followed, places, layers, threshold

    def is_confident(self, row: int, layer: int) -> bool:
        """Whether a row leaves behind ``layer``, which is not the last, under a threshold."""
        walk, fan = self._followed[row].walk, self._followed[row].fan
        if walk is not None:
            return bool(walk.exit_layers[self._places[row] % len(walk.exit_layers)] <= layer)
        assert fan is not None
        return fan.at(self._places[row])[0][self._layers.index(layer)] >= self._threshold

    def leaving(self) -> list[int]:
        """Where the rows leave if every layer runs: at the first exit they are confident at, or the last."""
        rows, last = range(len(self._places)), self._layers[-1]
        return [next((e for e in self._layers[:-1] if self.is_confident(row, e)), last) for row in rows]

    def said(self, exit_layers: Sequence[int]) -> Said:
        """What the rows said where they left."""
        confidences, logprobs, agrees = [], [], []
        for followed, place, layer in zip(self._followed, self._places, exit_layers, strict=True):
            walk, fan = followed.walk, followed.fan
            if walk is not None:
                at = place % len(walk.exit_layers)
                assert walk.exit_layers[at] == layer, f"recorded to leave at {walk.exit_layers[at]}, left at {layer}"
                confidences.append(float(walk.confidences[at]))
                logprobs.append(float(walk.logprobs[at]))
                agrees.append(bool(walk.agrees[at]))
                continue
            assert fan is not None
            seen, agreeing = fan.at(place)
            at = self._layers.index(layer)
            confidences.append(seen[at])
            logprobs.append(float(np.log(max(seen[at], 1e-12))))
            agrees.append(agreeing[at])
        return Said(tuple(confidences), tuple(logprobs), tuple(agrees))


def require_exits(behaviour: Behaviour, specs: Mapping[str, ModelSpec]) -> None:
    """Raise InputError unless the behaviour knows these models with these very exits."""
    for name, spec in specs.items():
        known = behaviour.exits.get(name)
        if known is None:
            remedy = f"Replay a behaviour of it. This one has {', '.join(behaviour.exits)}."
            raise InputError("--replay-exits", name, "the behaviour does not know this model", remedy)
        if tuple(known) != tuple(spec.exits):
            problem = f"{name} exits at {list(known)} there, and at {list(spec.exits)} in the profile"
            listed = ",".join(map(str, known))
            remedy = f"Calibrate with these exits (random weights: NAME@exits={listed}), or replay another behaviour."
            raise InputError("--replay-exits", name, problem, remedy)
