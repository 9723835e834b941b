"""Trains exit heads to say what the last layer says (Kullback-Leibler divergence), the backbone frozen.

Each head learns by itself: the best state of each on held-out text is kept, whenever it was. Training stops when none
of them got better for some evaluations, when its steps or minutes are over, or when it is interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from heliosim.engines.models.host import HostModel, Resident
from heliosim.engines.models.score import states
from heliosim.streams import stream

from .figures import ExitFigures, figures_of
from .heads import Heads
from .text import Texts, Windows

Progress = Callable[[str, float], None]
_LOGITS_AT_ONCE = 1 << 24
_WARM_UP_STEPS, _CONSTANT_SHARE, _LAST_RATE = 20, 0.4, 0.03
_BETTER = 0.002
"""Relative fall of the divergence that counts as progress."""


@dataclass(frozen=True)
class Recipe:
    """How to train. ``batch``: windows a step; ``every``: steps between evaluations, of which ``patience`` without
    progress end the training; ``minutes``: at most, None for no limit.
    """

    exits: tuple[int, ...]
    mlp: int
    has_norm: bool = True
    steps: int = 600
    batch: int = 8
    minutes: float | None = None
    every: int = 25
    patience: int = 6
    rate: float = 2e-3
    threshold: float = 0.8
    agreement: float = 0.95
    seed: int = 0


@dataclass
class Tuned:
    """Heads trained, with what they are worth. ``best_step`` by exit, 0: no better than untuned; ``why``: it ended."""

    heads: Heads
    before: dict[int, ExitFigures]
    after: dict[int, ExitFigures]
    best_step: dict[int, int]
    steps: int
    seconds: float
    why: str


@dataclass
class _Best:
    """The best state of each head so far, by divergence."""

    divergence: dict[int, float]
    figures: dict[int, ExitFigures]
    states: dict[int, dict[str, Tensor]]
    steps: dict[int, int] = field(default_factory=dict)
    since_progress: int = 0

    def see(self, heads: Heads, found: dict[int, ExitFigures], step: int) -> None:
        """Keep what got better."""
        has_progress = False
        for e, figures in found.items():
            has_progress |= figures.divergence < self.divergence[e] * (1 - _BETTER)
            if figures.divergence < self.divergence[e]:
                self.divergence[e], self.figures[e], self.steps[e] = figures.divergence, figures, step
                self.states[e] = _copied(heads, e)
        self.since_progress = 0 if has_progress else self.since_progress + 1


def train(host: HostModel, device: torch.device | str, texts: Texts, recipe: Recipe, progress: Progress) -> Tuned:
    """Train the heads of ``recipe.exits`` on a frozen model. An interruption keeps the best heads so far; before the
    first evaluation there are none, and it passes through.
    """
    torch.manual_seed(int(stream(recipe.seed, "tune-exits", "start").integers(2**31)))
    resident = host.resident(host.info.spec.layers, device)
    heads = Heads(resident, recipe.exits, recipe.mlp, has_norm=recipe.has_norm)
    optimizers = _optimizers(heads, recipe.rate)
    began, taken, why = time.monotonic(), 0, "all steps done"
    progress("held-out text, untuned", 0.0)
    before = evaluate(resident, heads, texts.held_out, recipe)
    best = _Best(
        {e: f.divergence for e, f in before.items()}, dict(before), {e: _copied(heads, e) for e in recipe.exits},
        dict.fromkeys(recipe.exits, 0),
    )  # fmt: skip
    batches = _batches(texts.train, recipe)
    try:
        for step in range(1, recipe.steps + 1):
            done = _done(recipe, step, time.monotonic() - began)
            loss = _learn(resident, heads, next(batches))
            _take_step(optimizers, heads, step, done, recipe.rate)
            taken = step
            progress(f"step {step} of {recipe.steps}, divergence {loss:.3f}", min(done, 0.99))
            if step % recipe.every == 0 or done >= 1:
                best.see(heads, evaluate(resident, heads, texts.held_out, recipe), step)
                if best.since_progress >= recipe.patience:
                    why = f"no progress in {recipe.patience} evaluations"
                    break
            if done >= 1:
                why = why if step == recipe.steps else "the minutes are over"
                break
    except KeyboardInterrupt:
        if not any(best.steps.values()):
            raise
        why = "interrupted"
    for e, state in best.states.items():
        heads[e].load_state_dict(state)
    return Tuned(heads, before, best.figures, best.steps, taken, time.monotonic() - began, why)


@torch.no_grad()
def evaluate(resident: Resident, heads: Heads, windows: Windows, recipe: Recipe) -> dict[int, ExitFigures]:
    """What each head is worth on windows of text."""
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {e: [] for e in heads.exits}
    for first in range(0, len(windows), recipe.batch):
        for hidden in _hidden(resident, windows[first : first + recipe.batch], heads.exits):
            wanted = _wanted(resident, hidden)
            top = wanted.argmax(-1)
            for e in heads.exits:
                logs = heads[e](hidden[e]).log_softmax(-1)
                apart = (wanted.exp() * (wanted - logs)).sum(-1)
                likeliest = logs.max(-1)
                seen[e].append((likeliest.values.exp().cpu(), (likeliest.indices == top).cpu(), apart.cpu()))
    found = {}
    for e, pieces in seen.items():
        confidences, agrees, apart = (torch.cat(column) for column in zip(*pieces, strict=True))
        found[e] = figures_of(
            confidences.numpy().astype(np.float64),
            agrees.numpy(),
            float(apart.mean()),
            threshold=recipe.threshold,
            wanted_agreement=recipe.agreement,
        )
    return found


def _learn(resident: Resident, heads: Heads, windows: Windows) -> float:
    """Gradients of one step, a slice of tokens at a time; returns the mean divergence over the exits."""
    tokens = sum(len(window) for window in windows)
    total = 0.0
    for hidden in _hidden(resident, windows, heads.exits):
        wanted = _wanted(resident, hidden)
        for e in heads.exits:
            logs = heads[e](hidden[e]).log_softmax(-1)
            loss = (wanted.exp() * (wanted - logs)).sum() / tokens
            loss.backward()
            total += loss.item()
    return total / len(heads.exits)


@torch.no_grad()
def _hidden(resident: Resident, windows: Windows, exits: Sequence[int]) -> list[dict[int, Tensor]]:
    """Hidden states [n, d] behind each exit and the last layer, a slice of the windows' tokens each."""
    layers = resident.host.info.spec.layers
    found = {depth: h for depth, h, _ in states(resident, windows, frozenset((*exits, layers)))}
    step = max(1, _LOGITS_AT_ONCE // resident.host.info.vocab)
    return [{depth: h[i : i + step] for depth, h in found.items()} for i in range(0, len(found[layers]), step)]


@torch.no_grad()
def _wanted(resident: Resident, hidden: Mapping[int, Tensor]) -> Tensor:
    """Log-probabilities of the last layer [n, V], float32."""
    layers = resident.host.info.spec.layers
    return torch.log_softmax(resident.logits(hidden[layers], layers), -1, dtype=torch.float32)


def _batches(windows: Windows, recipe: Recipe) -> Iterator[Windows]:
    """Endless batches, every window once before any comes again, each time in another order."""
    draws = stream(recipe.seed, "tune-exits", "order")
    ready: list[int] = []
    while True:
        while len(ready) < recipe.batch:
            ready += draws.permutation(len(windows)).tolist()
        chosen, ready = ready[: recipe.batch], ready[recipe.batch :]
        yield [windows[i] for i in chosen]


def _optimizers(heads: Heads, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices where torch has it, AdamW for the rest."""
    parameters = list(heads.parameters())
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    made: list[torch.optim.Optimizer] = []
    if matrices and hasattr(torch.optim, "Muon"):
        muon = torch.optim.Muon(matrices, lr=3 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        made.append(muon)
    else:
        others = parameters
    if others:
        made.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _take_step(optimizers: Sequence[torch.optim.Optimizer], heads: Heads, step: int, done: float, rate: float) -> None:
    for e in heads.exits:  # each by itself: no head's step depends on another's
        torch.nn.utils.clip_grad_norm_(heads[e].parameters(), 1.0)
    fall = max(0.0, (done - _CONSTANT_SHARE) / (1 - _CONSTANT_SHARE))
    factor = min(1.0, step / _WARM_UP_STEPS) * (1 - (1 - _LAST_RATE) * min(fall, 1.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _done(recipe: Recipe, step: int, seconds: float) -> float:
    limit = math.inf if recipe.minutes is None else 60 * recipe.minutes
    return min(1.0, max(step / recipe.steps, seconds / limit))


def _copied(heads: Heads, exit_layer: int) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in heads[exit_layer].state_dict().items()}
