"""Taking tokens from logits on the device: greedy, or drawn by a counter, so that no draw depends on its batch.

A draw needs one uniform number. It is a hash of the request's seed and the position of the token drawn from, so the
same request draws the same numbers whoever runs beside it, however its steps are grouped and however often its KV is
computed again. (Logits themselves may differ in their last bits between batch shapes, as they do without sampling.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heliosim.sampling import GREEDY, Sampling

_MASK = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Chosen(NamedTuple):
    """Of each row [n]: ``tops``, the natural log of the highest probability (the confidence); ``ids`` of the tokens
    taken, and their natural-log probabilities ``logprobs`` (the same as ``tops`` when greedy).
    """

    tops: Tensor
    logprobs: Tensor
    ids: Tensor


class Sampler:
    """Takes a token per row of logits. Nothing here waits for the device."""

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self.sampling = sampling

    @property
    def is_greedy(self) -> bool:
        return self.sampling.is_greedy

    def choose(self, logits: Tensor, seeds: Tensor | None = None, positions: Tensor | None = None) -> Chosen:
        """logits [n, V]; seeds, positions [n] int64: of the requests, and of the tokens whose successors are drawn
        (not needed when greedy).
        """
        if self.is_greedy:
            best = torch.log_softmax(logits, -1, dtype=torch.float32).max(-1)
            return Chosen(best.values, best.values, best.indices)
        assert seeds is not None
        assert positions is not None
        logs = torch.log_softmax(logits, -1, dtype=torch.float32)
        ids = self._drawn(logits.float() / self.sampling.temperature, uniforms(seeds, positions))
        return Chosen(logs.amax(-1), logs.gather(1, ids[:, None])[:, 0], ids)

    def read(
        self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int]
    ) -> tuple[list[float], list[float], list[int]]:
        """``choose`` with one transfer each way: tops, logprobs, ids as lists (ids are whole numbers)."""
        numbers = torch.tensor((seeds, positions), dtype=torch.int64).to(logits.device)
        chosen = self.choose(logits, numbers[0], numbers[1])
        tops, logprobs, ids = torch.stack(
            (chosen.tops.double(), chosen.logprobs.double(), chosen.ids.double())
        ).tolist()
        return tops, logprobs, [int(i) for i in ids]

    def _drawn(self, scores: Tensor, numbers: Tensor) -> Tensor:
        """Ids [n] drawn from softmax(scores) as cut by top-k and top-p; ``numbers`` [n] in (0, 1)."""
        if self.sampling.top_k is not None and self.sampling.top_k < scores.shape[-1]:
            ranked, order = torch.topk(scores, self.sampling.top_k, -1)
        else:
            ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        shares = torch.softmax(ranked, -1)
        before = shares.cumsum(-1) - shares  # of likelier tokens
        kept = torch.where(before < self.sampling.top_p, shares, 0.0)
        reach = kept.cumsum(-1)
        place = (reach <= numbers[:, None] * reach[:, -1:]).sum(-1, keepdim=True)
        # rounding must not carry a draw behind the last token kept
        last = (kept > 0).sum(-1, keepdim=True) - 1
        return order.gather(1, torch.minimum(place, last))[:, 0]


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in (0, 1) [n], float32, from seeds and positions [n] int64: two rounds of the 64-bit finaliser known as
    SplitMix64, of which the upper 24 bits are used.
    """
    mixed = _mix(_mix(seeds) + positions * _signed(_GOLDEN))
    return (_shifted(mixed, 40).float() + 0.5) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_MIX1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX2)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical right shift; that of a signed tensor keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The signed number with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
