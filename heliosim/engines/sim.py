"""The simulated engine: a profile's costs and recorded behaviour in place of a device.

It predicts, for each step, which token leaves where (behaviour replay) and how long the step takes (cost model), from
the same shape a live step would have. It knows true lengths; the server does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from heliosim.behaviour import Behaviour, Text, source_name
from heliosim.costs import StepCost, layers_run, load_seconds, load_terms, shape_of
from heliosim.errors import OutOfRangeError
from heliosim.noise import NoisePlayer
from heliosim.types import Arrival, Content, Load, ModelSpec, Outcome, Placement, Request, Run, Tokens, tick


@dataclass(slots=True)
class _Going:
    """A request inside the engine: what it is, which recorded prompt it stands for, and how far it got."""

    request: Request
    content: Content
    sequence: str
    generated: int = 0
    source: str = ""
    text: Text | None = None


class SimEngine:
    """``costs``: step cost by model on the run's clock; ``loads``: load coefficients by model.

    ``allow_extrapolation``: answer outside the calibrated batch, context or chunk range instead of refusing;
    ``extrapolated_steps`` counts such steps. ``watts``: mean power while busy; None: energy is unavailable.
    ``noise``: scales each step's expected time; None: every step takes it exactly.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSpec],
        costs: Mapping[str, StepCost],
        loads: Mapping[str, Mapping[str, float]],
        behaviour: Behaviour,
        seed: int,
        allow_extrapolation: bool = False,
        watts: float | None = None,
        noise: NoisePlayer | None = None,
    ) -> None:
        self.models, self.costs, self.loads, self.behaviour, self.seed = models, costs, loads, behaviour, seed
        self.allow_extrapolation, self.watts, self.noise = allow_extrapolation, watts, noise
        self.extrapolated_steps = 0
        self._going: dict[int, _Going] = {}
        self._resident: Placement | None = None

    def accept(self, arrival: Arrival) -> None:
        request, content = arrival.request, arrival.content
        sequence = self.behaviour.assign(request.id, content.task, self.seed)
        self._going[request.id] = _Going(request, content, sequence)

    def forget(self, request_id: int) -> None:
        self._going.pop(request_id, None)

    def perform(self, action: Run | Load) -> Outcome:
        return self._load(action) if isinstance(action, Load) else self._step(action)

    def _load(self, load: Load) -> Outcome:
        spec = self.models[load.placement.model]
        same = self._resident is not None and self._resident.model == load.placement.model
        resident = self._resident.depth if same and self._resident else 0
        kv_bytes = load.kv_blocks * spec.block_bytes(load.placement.depth, load.stores_hidden)
        self._resident = load.placement
        seconds = load_seconds(self.loads[spec.name], load_terms(load, spec, resident, kv_bytes))
        return Outcome(seconds=tick(seconds), energy_j=self._energy_j(seconds))

    def _step(self, run: Run) -> Outcome:
        spec = self.models[run.placement.model]
        tokens = self._emit(run, spec)
        outcome = Outcome(seconds=0.0, tokens=tokens, layers_run=layers_run(run, tokens))
        shape = shape_of(run, outcome, spec)
        cost = self.costs[spec.name]
        if shape.rows > cost.max_rows or shape.longest > cost.max_context or shape.tokens > cost.max_tokens:
            self._out_of_range(spec.name, shape.rows, shape.longest, shape.tokens, cost)
        seconds = cost.seconds(shape)
        if self.noise is not None:
            seconds *= self.noise.factor(seconds)
        return Outcome(tick(seconds), tokens, outcome.layers_run, self._energy_j(seconds))

    def _emit(self, run: Run, spec: ModelSpec) -> Tokens:
        source = source_name(run.placement, run.exits, spec.layers)
        requests, exits, confidences, lasts, agrees = [], [], [], [], []
        for request_id, emits in zip(run.batch.requests, run.batch.emits, strict=True):
            if not emits:
                continue
            going = self._going[request_id]
            if going.source != source or going.text is None:
                going.source, going.text = source, self.behaviour.text(going.sequence, source)
            exit_layer, confidence, agree = self.behaviour.token(
                going.text, going.generated, run.placement, run.exits, spec.layers
            )
            going.generated += 1
            is_last = self._is_last(going)
            requests.append(request_id)
            exits.append(exit_layer)
            confidences.append(confidence)
            lasts.append(is_last)
            agrees.append(agree)
            if is_last:
                del self._going[request_id]
        return Tokens(
            requests=tuple(requests),
            exit_layers=tuple(exits),
            confidences=tuple(confidences),
            logprobs=tuple(math.log(max(c, 1e-12)) for c in confidences),
            lasts=tuple(lasts),
            agrees=tuple(agrees),
        )

    def _energy_j(self, seconds: float) -> float | None:
        return None if self.watts is None else self.watts * seconds

    @staticmethod
    def _is_last(going: _Going) -> bool:
        if going.content.output_tokens is not None:
            return going.generated >= going.content.output_tokens
        assert going.text is not None
        natural = going.text.end is not None and going.generated >= going.text.end
        return natural or going.generated >= going.request.max_tokens

    def _out_of_range(self, model: str, rows: int, context: int, tokens: int, cost: StepCost) -> None:
        self.extrapolated_steps += 1
        if not self.allow_extrapolation:
            raise OutOfRangeError(
                f"profile costs of {model}",
                {"batch": rows, "context": context, "tokens": tokens},
                f"a step lies outside the calibrated range (batch <= {cost.max_rows}, context <= {cost.max_context}, "
                f"tokens per step <= {cost.max_tokens})",
                "Calibrate a wider range, lower the batcher's limits, or pass --allow-extrapolation.",
            )
