"""Exit heads to train: an optional residual MLP and an optional norm before the model's own output head.

Both start as what the model does without them (the MLP adds nothing, the norm is the model's last one), so an untrained
head is the untuned exit. Parameters are float32 whatever the backbone runs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heliosim.engines.models.host import Resident


class TunedHead(nn.Module):
    """Hidden states [n, d] behind an exit's layer to logits [n, V]. ``mlp``: inner width, 0 for none; ``base``: the
    model's embeddings, norm and output head, as tensors that gradients may pass through.
    """

    def __init__(self, resident: Resident, base: Mapping[str, Tensor], mlp: int, *, has_norm: bool) -> None:
        super().__init__()
        info = resident.host.info
        self.eps, self.has_bias = info.norm_eps, info.architecture == "opt"
        self._output = base.get("head", base["embed"]).t()
        self._base_norm = {k: base[k].float() for k in ("norm_weight", "norm_bias") if k in base}
        self.norm_weight: Any = None
        self.norm_bias: Any = None
        if has_norm:
            self.norm_weight = nn.Parameter(self._base_norm["norm_weight"].clone())
            self.norm_bias = nn.Parameter(self._base_norm["norm_bias"].clone()) if self.has_bias else None
        self.fc1 = self.fc2 = None
        if mlp:
            self.fc1, self.fc2 = nn.Linear(info.hidden, mlp), nn.Linear(mlp, info.hidden)
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)
        self.to(resident.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, float32."""
        h = hidden.float()
        if self.fc1 is not None and self.fc2 is not None:
            h = h + self.fc2(nn.functional.gelu(self.fc1(h)))
        weight = self._base_norm["norm_weight"] if self.norm_weight is None else self.norm_weight
        if self.has_bias:
            bias = self._base_norm["norm_bias"] if self.norm_bias is None else self.norm_bias
            h = nn.functional.layer_norm(h, weight.shape, weight, bias, self.eps)
        else:
            h = nn.functional.rms_norm(h, weight.shape, weight, self.eps)
        return torch.mm(h.to(self._output.dtype), self._output).float()

    def tensors(self, exit_layer: int) -> dict[str, Tensor]:
        """Its parameters under the names of ``exit_heads.py``."""
        prefix = f"exits.{exit_layer}."
        names = {k: k.replace("norm_", "norm.") for k, _ in self.named_parameters()}
        return {prefix + names[k]: p.detach().float().cpu().contiguous().clone() for k, p in self.named_parameters()}


class Heads(nn.Module):
    """A head per exit layer."""

    def __init__(self, resident: Resident, exits: tuple[int, ...], mlp: int, *, has_norm: bool) -> None:
        super().__init__()
        self.exits = exits
        # what was loaded for inference alone cannot be saved for a backward pass
        base = {k: v.clone() if v.is_inference() else v for k, v in resident.base.items() if k != "positions"}
        self.by_layer = nn.ModuleDict({str(e): TunedHead(resident, base, mlp, has_norm=has_norm) for e in exits})

    def __getitem__(self, exit_layer: int) -> TunedHead:
        head = self.by_layer[str(exit_layer)]
        assert isinstance(head, TunedHead)
        return head

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {name: value for e in self.exits for name, value in self[e].tensors(e).items()}
