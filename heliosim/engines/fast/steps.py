"""A decode step as a function without arguments, over buffers that never move: what a CUDA graph can hold.

``FixedStep``: all resident layers, tokens taken at the last (mode F). ``CheckedStep``: all layers, tokens taken at the
first exit where they are confident. Both read the state, run, take tokens, count breaches and write the state for the
next step; the host hears of it from ``state.out``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from heliosim.engines.fast.state import BatchState
from heliosim.engines.models.host import Resident
from heliosim.engines.models.paged import PagedKV
from heliosim.engines.sampler import Chosen, Sampler


@dataclass(frozen=True, slots=True)
class Home:
    """What steps run on. ``eos_ids`` [n] int64 on the device."""

    resident: Resident
    kv: PagedKV
    state: BatchState
    sampler: Sampler
    eos_ids: Tensor

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers tokens can leave behind, the resident depth last."""
        depth = self.resident.depth
        return (*(e for e in self.resident.host.info.spec.exits if e < depth), depth)


class Rows(Protocol):
    """A pass, as layers see it: ``DecodePass`` or ``MixedPass``."""

    ids: Tensor
    positions: Tensor
    slots: Tensor


def run_layers(home: Home, run: Any, h: Tensor, first: int, last: int) -> Tensor:
    """Layers ``first`` up to ``last`` (counted from 0, the last not included)."""
    layer, layers, kv = home.resident.family.layer, home.resident.layers, home.kv.layers
    for i in range(first, last):
        h = layer(layers[i], h, run, kv[i])
    return h


def keep_hidden(kv: PagedKV, slots: Tensor, h: Tensor) -> None:
    """Store hidden states, where the placement keeps them."""
    if kv.hidden is not None:
        kv.hidden.keep(slots, h)


def begun(home: Home, run: Any) -> Tensor:
    """Prepare a pass; returns the embedded tokens."""
    family = home.resident.family
    run.begin()
    family.begin(run)
    embedded: Tensor = family.embed(home.resident.base, run.ids, run.positions)
    return embedded


def taken(home: Home, h: Tensor, layer: int, rows: int) -> Chosen:
    """Tokens of the first ``rows`` rows of the state, from their hidden states behind ``layer`` layers."""
    state = home.state
    logits = home.resident.logits(h, layer)
    if home.sampler.is_greedy:
        return home.sampler.choose(logits)
    return home.sampler.choose(logits, state.seeds[:rows], state.positions[:rows])


def settle(home: Home, chosen: Chosen, exit_layers: Tensor | int, layers: Tensor | int, rows: int) -> None:
    """Write what the first ``rows`` rows of the state said, and what they do next. ``exit_layers`` [rows] or one for
    all; ``layers``: the deepest that ran.
    """
    state = home.state
    numbers = torch.arange(rows, device=state.device)
    was_alive = (state.alive[:rows] > 0) & (numbers < state.count)
    out = state.out[:, :rows]
    out[0].copy_(chosen.ids)
    if isinstance(exit_layers, int):
        out[1].fill_(exit_layers)
    else:
        out[1].copy_(exit_layers)
    out[2].copy_(was_alive)
    out[3].copy_(chosen.tops)
    out[4].copy_(chosen.logprobs)
    state.breaches.add_(((chosen.tops.double().exp() < state.threshold) & was_alive).sum())
    state.layers.copy_(layers) if isinstance(layers, Tensor) else state.layers.fill_(layers)
    state.out[5, :1].copy_(state.breaches)
    state.out[5, 1:2].copy_(state.layers)
    left = state.left[:rows]
    left.sub_(was_alive.long())
    has_ended = (chosen.ids[:, None] == home.eos_ids).any(1) & (state.heeds_eos[:rows] > 0)
    goes_on = was_alive & (left > 0) & ~has_ended
    state.alive[:rows].copy_(torch.where(was_alive, goes_on.long(), state.alive[:rows]))
    state.ids[:rows].copy_(torch.where(goes_on, chosen.ids, state.ids[:rows]))
    state.positions[:rows].add_(goes_on.long())


class FixedStep:
    """All resident layers for all rows; tokens are taken behind the last."""

    def __init__(self, home: Home, run: Any, rows: int, ends: Tensor | None = None) -> None:
        """``ends``: places of the rows' last tokens in the pass; None: it has one of each, in order."""
        self.home, self.run, self.rows, self.ends = home, run, rows, ends

    def __call__(self) -> None:
        home, run = self.home, self.run
        depth = home.resident.depth
        h = run_layers(home, run, begun(home, run), 0, depth)
        keep_hidden(home.kv, run.slots, h)
        if self.rows:
            settle(home, taken(home, self._of_rows(h), depth, self.rows), depth, depth, self.rows)

    def _of_rows(self, h: Tensor) -> Tensor:
        return h if self.ends is None else h.index_select(0, self.ends)


class CheckedStep(FixedStep):
    """All layers for all rows; each token is taken at the first exit where its confidence reaches the threshold."""

    def __call__(self) -> None:
        home, run = self.home, self.run
        h, first, said = begun(home, run), 0, None
        for end in home.exits:
            h = run_layers(home, run, h, first, end)
            first = end
            if self.rows:
                said = first_confident(home, said, taken(home, self._of_rows(h), end, self.rows), end)
        keep_hidden(home.kv, run.slots, h)
        if said is not None:
            settle(home, said[0], said[1], home.resident.depth, self.rows)


Said = tuple[Chosen, Tensor]
"""What rows say so far, and behind which layers [rows] they said it."""


def first_confident(home: Home, said: Said | None, new: Chosen, layer: int) -> Said:
    """What rows say once they were asked behind ``layer`` too: who was confident before stays with it."""
    if said is None:
        return new, torch.full_like(new.ids, layer)
    old, layers = said
    has_left = old.tops.double().exp() >= home.state.threshold
    chosen = Chosen(*(torch.where(has_left, a, b) for a, b in zip(old, new, strict=True)))
    return chosen, torch.where(has_left, layers, layer)
