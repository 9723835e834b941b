"""Teacher-forced scoring: what every asked exit would have said at every position of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heliosim.engines.models.host import HostModel, Resident
from heliosim.engines.models.paged import KVLayer, Pass, Row
from heliosim.errors import InputError
from heliosim.types import blocks_for

_LOGITS_AT_ONCE = 1 << 24
"""Values of logits held at a time (64 MiB of float32)."""


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """Scores of one sequence of n tokens: arrays [exit layers, n-1]; column t is about token t+1, given those up to t.

    ``ids``: likeliest token; ``max_probs``: its probability; ``margins``: how far the second likeliest is below it;
    ``entropies`` in nats; ``logprobs``: natural-log probability of the token that really follows.
    """

    layers: tuple[int, ...]
    ids: NDArray[np.int32]
    max_probs: NDArray[np.float32]
    margins: NDArray[np.float32]
    entropies: NDArray[np.float32]
    logprobs: NDArray[np.float32]


def score(
    model: HostModel,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch: int = 16,
) -> list[SequenceScore]:
    """Score sequences at the exits behind ``layers``, ``batch`` sequences per pass; no row is padded.

    ``dtype``: to compute in, if not the one ``model`` was read for.
    """
    for layer in layers:
        model.require_exit(layer)
    for i, sequence in enumerate(sequences):
        if len(sequence) > model.info.positions:
            problem = f"longer than the {model.info.positions} positions of {model.info.spec.name}"
            raise InputError(f"sequences[{i}]", len(sequence), problem, "Cut it.")
        if sequence and not (min(sequence) >= 0 and max(sequence) < model.info.vocab):
            problem = f"holds ids outside a vocabulary of {model.info.vocab}"
            raise InputError(f"sequences[{i}]", max(sequence), problem, "Encode with the model's own tokenizer.")
    with torch.inference_mode():
        resident = model.resident(max(layers), device, dtype)
        scores: list[SequenceScore] = []
        for first in range(0, len(sequences), batch):
            scores += _score_pass(resident, sequences[first : first + batch], tuple(layers))
    return scores


def _score_pass(resident: Resident, sequences: Sequence[Sequence[int]], layers: tuple[int, ...]) -> list[SequenceScore]:
    """One pass over whole sequences, their last tokens left out: nothing follows them."""
    inputs = [list(sequence[:-1]) for sequence in sequences]
    targets = [token for sequence in sequences for token in sequence[1:]]
    filled = [ids for ids in inputs if ids]
    columns = np.zeros((5, len(layers), len(targets)), dtype=np.float64)
    if filled:
        for depth, h, order in states(resident, filled, frozenset(layers)):
            wanted = torch.tensor(targets, device=h.device)
            for i, layer in enumerate(layers):
                if layer == depth:
                    columns[:, i] = _columns(resident, h.index_select(0, order), depth, wanted)
    bounds = accumulate((len(ids) for ids in inputs), initial=0)
    return [_sequence_score(layers, columns[:, :, a:b]) for a, b in pairwise(bounds)]


def states(resident: Resident, inputs: Sequence[list[int]], wanted: frozenset[int]) -> list[tuple[int, Tensor, Tensor]]:
    """(depth, hidden states [T, d], index that brings tokens into the order of ``inputs``) for each wanted depth."""
    rows, blocks = [], 0
    for ids in inputs:
        rows.append(Row(range(blocks, blocks + blocks_for(len(ids))), 0, len(ids)))
        blocks += blocks_for(len(ids))
    shape = resident.host.kv_shape
    run = Pass(rows, shape, resident.device, resident.dtype, ids=inputs)
    scratch = KVLayer(blocks, shape, resident.device, resident.dtype)  # no layer reads another's KV: one will do
    resident.family.begin(run)
    h = resident.family.embed(resident.base, run.ids, run.positions)
    order = torch.tensor(_given_order(run.order, [len(ids) for ids in inputs]), device=resident.device)
    states = []
    for i in range(max(wanted)):
        h = resident.family.layer(resident.layers[i], h, run, scratch)
        if i + 1 in wanted:
            states.append((i + 1, h, order))
    return states


def _given_order(order: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Where in a pass the tokens lie, in the order its rows were given."""
    firsts, first = [0] * len(counts), 0
    for row in order:
        firsts[row] = first
        first += counts[row]
    return [firsts[row] + t for row, count in enumerate(counts) for t in range(count)]


def _columns(resident: Resident, h: Tensor, depth: int, targets: Tensor) -> NDArray[np.float64]:
    """[5, T]: top id, its probability, margin, entropy and target log-probability, a slice of tokens at a time."""
    step = max(1, _LOGITS_AT_ONCE // resident.host.info.vocab)
    pieces = [
        _facts(resident.logits(h[first : first + step], depth), targets[first : first + step])
        for first in range(0, h.shape[0], step)
    ]
    columns: NDArray[np.float64] = torch.cat(pieces, 1).cpu().numpy()
    return columns


def _facts(logits: Tensor, targets: Tensor) -> Tensor:
    logs = torch.log_softmax(logits, -1, dtype=torch.float32)
    probs = logs.exp()
    best, second = probs.topk(2).values.unbind(-1)
    # 0 * log 0 is 0 here: a probability that underflows has a finite logarithm
    entropy = -(probs * logs).sum(-1)
    target = logs.gather(1, targets[:, None]).squeeze(1)
    return torch.stack(
        (logits.argmax(-1).double(), best.double(), (best - second).double(), entropy.double(), target.double())
    )


def _sequence_score(layers: tuple[int, ...], columns: NDArray[np.float64]) -> SequenceScore:
    single = columns.astype(np.float32)
    return SequenceScore(layers, columns[0].astype(np.int32), single[1], single[2], single[3], single[4])
