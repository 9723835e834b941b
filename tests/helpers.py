"""Small real parts for tests: a model's sizes, a stub engine with known service times, a server around them."""

from __future__ import annotations

from collections.abc import Callable

from heliosim.recorder import NullRecorder, Recorder
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.controller import Controller, FixedPlacement
from heliosim.serving.memory import MemoryPool
from heliosim.serving.server import Server
from heliosim.types import Arrival, Content, ExitRule, Load, ModelSpec, Outcome, Request, Run, Tokens, tick


def spec(name: str = "m", layers: int = 6, exits: tuple[int, ...] = (2, 4, 6), **changes: object) -> ModelSpec:
    """A model with round sizes: 1,000 B per layer, 500 B base, 2 B of KV per token and layer."""
    values: dict[str, object] = {
        "name": name,
        "layers": layers,
        "exits": exits,
        "kind": "fixed",
        "layer_bytes": 1000,
        "base_bytes": 500,
        "kv_bytes_per_token_layer": 2,
        "hidden_bytes": 4,
        "max_context": 512,
        "vocabulary": "v",
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def arrival(k: int, at: float = 0.0, prompt: int = 20, output: int = 8, task: str = "") -> Arrival:
    return Arrival(Request(k, tick(at), prompt, output), Content(task, None, output))


class StubEngine:
    """Each step takes ``seconds(run)``; each emitting row leaves at ``exit_of(request, position)`` with that
    confidence.
    """

    def __init__(
        self,
        seconds: Callable[[Run], float] = lambda run: 0.01,
        exit_of: Callable[[int, int, Run], tuple[int, float]] | None = None,
        load_s: float = 0.0,
    ) -> None:
        self.seconds, self.load_s = seconds, load_s
        self.exit_of = exit_of or (lambda request, position, run: (run.placement.depth, 0.9))
        self.contents: dict[int, Arrival] = {}
        self.generated: dict[int, int] = {}
        self.actions: list[Run | Load] = []

    def accept(self, arrival: Arrival) -> None:
        self.contents[arrival.request.id] = arrival
        self.generated[arrival.request.id] = 0

    def forget(self, request_id: int) -> None:
        self.contents.pop(request_id, None)

    def perform(self, action: Run | Load) -> Outcome:
        self.actions.append(action)
        if isinstance(action, Load):
            return Outcome(tick(self.load_s))
        ids, exits, confidences, lasts = [], [], [], []
        for request, emits in zip(action.batch.requests, action.batch.emits, strict=True):
            if not emits:
                continue
            exit_layer, confidence = self.exit_of(request, self.generated[request], action)
            self.generated[request] += 1
            ids.append(request)
            exits.append(exit_layer)
            confidences.append(confidence)
            lasts.append(self.generated[request] >= (self.contents[request].content.output_tokens or 1))
        tokens = Tokens(tuple(ids), tuple(exits), tuple(confidences), (-0.1,) * len(ids), tuple(lasts))
        return Outcome(tick(self.seconds(action)), tokens, max(exits, default=action.placement.depth))


def server(
    controller: Controller | None = None,
    *specs: ModelSpec,
    budget: int = 100_000,
    max_batch: int = 8,
    token_budget: int = 64,
    recorder: Recorder | None = None,
) -> Server:
    models = {s.name: s for s in (specs or (spec(),))}
    first = next(iter(models.values()))
    return Server(
        controller or FixedPlacement(first, ExitRule("none")),
        ContinuousBatcher(max_batch, token_budget),
        MemoryPool(budget),
        models,
        recorder or NullRecorder(),
    )
