"""Llama layers on raw tensors: RMS norm, rotary positions, grouped-query attention, gated feed-forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heliosim.engines.models.paged import KVLayer, Pass
from heliosim.engines.models.ranks import ALONE, Ranks
from heliosim.formats.checkpoint import CheckpointInfo, Rope


@dataclass(slots=True)
class LlamaLayer:
    """One layer's tensors. Matrices are [in, out]. ``kv_weight`` is the K and V part of ``qkv_weight``."""

    norm1_weight: Tensor
    qkv_weight: Tensor
    kv_weight: Tensor
    out_weight: Tensor
    norm2_weight: Tensor
    up_weight: Tensor
    down_weight: Tensor


class Llama:
    """The architecture's functions; holds sizes, the rotary frequencies and no weights.

    Rows of the query and key projections are reordered when weights are read, so that the two values a rotation mixes
    lie side by side and one complex product rotates all heads. Scores do not change: both sides share the order.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        assert info.rope is not None
        self.hidden, self.eps, self.ffn, self.head_dim = info.hidden, info.norm_eps, info.ffn, info.head_dim
        self.query_width, self.rotated = info.heads * info.head_dim, info.heads + info.kv_heads
        self.kv_heads = info.kv_heads
        self.activate = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[
            info.activation
        ]
        self.frequencies = rope_frequencies(info.rope, info.head_dim)
        self.root_eps = torch.tensor(math.sqrt(info.norm_eps))
        self.share(ALONE)

    def share(self, ranks: Ranks) -> None:
        """Be one rank's part of the layers."""
        self.beta, self.reduce, self.lookup = ranks.beta, ranks.reduce, ranks.lookup

    def arrange(self, name: str, weight: Tensor) -> Tensor:
        """Interleave the two halves of each query and key head (rows of the fused projection)."""
        if name != "qkv_weight":
            return weight
        rows = self.rotated * self.head_dim
        halves = weight[:rows].view(self.rotated, 2, self.head_dim // 2, -1)
        return torch.cat((halves.transpose(1, 2).reshape(rows, -1), weight[rows:]))

    def bind(self, parts: dict[str, Tensor]) -> LlamaLayer:
        return LlamaLayer(**parts, kv_weight=parts["qkv_weight"][:, self.query_width :])

    def begin(self, run: Pass) -> None:
        """Prepare the rotations of a pass, and the view they multiply."""
        run.turns = self.turns(run.positions)
        pairs = run.qkv.view(run.tokens, -1, self.head_dim // 2, 2)[:, : self.rotated]
        run.rotating = torch.view_as_complex(pairs) if pairs.dtype == torch.float32 else pairs

    def turns(self, positions: Tensor) -> Tensor:
        """Rotations of tokens at ``positions`` [T]: unit complex numbers [T, 1, E/2]."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
            self.root_eps = self.root_eps.to(positions.device)
        angles = positions[:, None, None] * self.frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def embed(self, base: dict[str, Tensor], ids: Tensor, positions: Tensor) -> Tensor:
        return self.lookup(base["embed"], ids)

    def layer(self, w: LlamaLayer, h: Tensor, run: Pass, kv: KVLayer) -> Tensor:
        """One layer over hidden states [T, d]; stores their keys and values."""
        torch.mm(self._norm(h, w.norm1_weight), w.qkv_weight, out=run.qkv)
        if run.rotating.is_complex():
            run.rotating.mul_(run.turns)
        else:
            run.rotating.copy_(rotated(run.rotating, run.turns))
        h = self.reduce(torch.addmm(h, run.attend(kv), w.out_weight, beta=self.beta))
        both = torch.mm(self._norm(h, w.norm2_weight), w.up_weight)
        x = self.activate(both[:, : self.ffn]).mul_(both[:, self.ffn :])
        return self.reduce(torch.addmm(h, x, w.down_weight, beta=self.beta))

    def fill(self, w: LlamaLayer, h: Tensor, run: Pass, kv: KVLayer) -> None:
        """Store the keys and values this layer would make of ``h``, without running it."""
        made = torch.mm(self._norm(h, w.norm1_weight), w.kv_weight)
        keys = made.view(run.tokens, 2, self.kv_heads, self.head_dim // 2, 2)[:, 0]
        keys.copy_(rotated(keys, run.turns))
        run.store(kv, made)

    def normed(self, base: dict[str, Tensor], h: Tensor) -> Tensor:
        return self._norm(h, base["norm_weight"])

    def _norm(self, h: Tensor, weight: Tensor) -> Tensor:
        if h.dtype != torch.float32 or h.is_cuda:
            return torch.rms_norm(h, (self.hidden,), weight, self.eps)
        # sqrt(mean(h^2) + eps) in three small calls: torch.rms_norm costs four times as much on a CPU (2.13)
        size = torch.linalg.vector_norm(h, dim=-1, keepdim=True).mul_(self.hidden**-0.5)
        return torch.div(h, torch.hypot(size, self.root_eps)).mul_(weight)


def rotated(pairs: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs [T, heads, E/2, 2] by unit complex numbers [T, 1, E/2], in float32."""
    return torch.view_as_real(torch.view_as_complex(pairs.float()) * turns)


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angle per position of each pair, [E/2], float32."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "default":
        return plain
    slow = plain / rope.factor
    if rope.kind == "linear":
        return slow
    # llama3: long waves are slowed by the factor, short ones kept, those between blended by turns per context
    turns = rope.original_positions * plain / (2 * math.pi)
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * slow + share * plain
