"""OPT layers (pre-norm) on raw tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heliosim.engines.models.paged import KVLayer, Pass
from heliosim.engines.models.ranks import ALONE, Ranks
from heliosim.formats.checkpoint import CheckpointInfo

_POSITION_OFFSET = 2


@dataclass(slots=True)
class OptLayer:
    """One layer's tensors. Matrices are [in, out]. ``kv_*`` are the K and V part of ``qkv_*``."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    kv_weight: Tensor
    kv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


class Opt:
    """The architecture's functions; holds sizes and no weights."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.width, self.eps = (info.hidden,), info.norm_eps
        self.query_width = info.heads * info.head_dim
        self.share(ALONE)
        self.activate = {"relu": torch.relu_, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[
            info.activation
        ]

    def share(self, ranks: Ranks) -> None:
        """Be one rank's part of the layers."""
        self.beta, self.reduce, self.lookup = ranks.beta, ranks.reduce, ranks.lookup

    def arrange(self, name: str, weight: Tensor) -> Tensor:
        """Weights are used as stored."""
        return weight

    def bind(self, parts: dict[str, Tensor]) -> OptLayer:
        q = self.query_width
        return OptLayer(**parts, kv_weight=parts["qkv_weight"][:, q:], kv_bias=parts["qkv_bias"][q:])

    def begin(self, run: Pass) -> None:
        """Nothing depends on positions behind the embedding."""

    def turns(self, positions: Tensor) -> None:
        """Nor on rotations."""

    def embed(self, base: dict[str, Tensor], ids: Tensor, positions: Tensor) -> Tensor:
        return self.lookup(base["embed"], ids).add_(base["positions"].index_select(0, positions + _POSITION_OFFSET))

    def layer(self, w: OptLayer, h: Tensor, run: Pass, kv: KVLayer) -> Tensor:
        """One layer over hidden states [T, d]; stores their keys and values."""
        x = torch.layer_norm(h, self.width, w.norm1_weight, w.norm1_bias, self.eps)
        torch.addmm(w.qkv_bias, x, w.qkv_weight, out=run.qkv)
        h = self.reduce(torch.addmm(h, run.attend(kv), w.out_weight, beta=self.beta)).add_(w.out_bias)
        x = torch.layer_norm(h, self.width, w.norm2_weight, w.norm2_bias, self.eps)
        x = self.activate(torch.addmm(w.up_bias, x, w.up_weight))
        return self.reduce(torch.addmm(h, x, w.down_weight, beta=self.beta)).add_(w.down_bias)

    def fill(self, w: OptLayer, h: Tensor, run: Pass, kv: KVLayer) -> None:
        """Store the keys and values this layer would make of ``h``, without running it."""
        x = torch.layer_norm(h, self.width, w.norm1_weight, w.norm1_bias, self.eps)
        run.store(kv, torch.addmm(w.kv_bias, x, w.kv_weight))

    def normed(self, base: dict[str, Tensor], h: Tensor) -> Tensor:
        return torch.layer_norm(h, self.width, base["norm_weight"], base["norm_bias"], self.eps)
