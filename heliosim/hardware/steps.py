"""Steps composed of kernels: what one step of a model takes on a device, added up kernel by kernel.

This is the reference that a composed profile's curves and terms are made from (``compose.py``). Per layer: four matrix
products, two norms, two residual additions, activation and (Llama) rotary positions, attention, and, over several
ranks, two all-reduces of the tokens' hidden states. A layer takes no less than the host needs to launch it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from heliosim.errors import InputError
from heliosim.hardware.architecture import Architecture, Matrix, dtype_name
from heliosim.hardware.device import Device, Host
from heliosim.hardware.kernels import Kernels, on_curve
from heliosim.types import Seconds

SCORE_PASSES = 5
"""Times an attention that is not fused moves its matrix of scores: written, scaled and masked, read, written, read."""


UNFUSED_WIDTHS = 12
"""Hidden widths per token in kernels of their own: QKV bias and transpose 6, KV written 4, output transposed 2."""


@dataclass(frozen=True)
class StepTimes:
    """Kernel sums of one model on one device, on the fullest rank of ``tp``."""

    architecture: Architecture
    device: Device
    dtype: str
    tp: int
    host: Host
    kernels: Kernels

    @classmethod
    def of(
        cls, architecture: Architecture, device: Device, *, dtype: str, tp: int = 1, host: str = "graph"
    ) -> StepTimes:
        name = dtype_name(dtype)
        architecture.check_ranks(tp)
        return cls(architecture, device, name, tp, device.host(host), Kernels(device, name))

    # --- one layer ---

    def dense(self, tokens: float) -> Seconds:
        """A layer without its attention: products, element-wise kernels, all-reduces."""
        products = sum(self._product(tokens, m) for m in self.architecture.matrices(self.tp))
        reduced = self._all_reduce(tokens * self.architecture.hidden * self.kernels.item)
        return products + self.elementwise(tokens) + 2 * reduced

    def elementwise(self, tokens: float) -> Seconds:
        """A layer's norms, residual additions, activation and (Llama) rotary positions."""
        a, k, item = self.architecture, self.kernels, self.kernels.item
        width = tokens * a.hidden * item
        inner = tokens * (a.mlp // self.tp) * item
        small = 2 * k.elementwise("norm", 2 * width) + 2 * k.elementwise("add", 3 * width)
        small += k.elementwise("activation", (3 if a.is_gated else 2) * inner)
        if not self.host.is_fused:
            small += k.elementwise("add", UNFUSED_WIDTHS * width)
        if a.family == "llama":
            rotated = (a.rank_heads(self.tp) + a.rank_kv_heads(self.tp)) * a.head_dim
            small += k.elementwise("rope", 2 * tokens * rotated * item)
        return small

    def _product(self, tokens: float, matrix: Matrix) -> Seconds:
        seconds = self.kernels.gemm(tokens, matrix.n, matrix.k)
        if not self.host.has_older_gemm:
            return seconds
        stretch = self.device.gemm_2023.stretch
        return seconds * on_curve(stretch, min(tokens, stretch.at[-1]))

    def _all_reduce(self, moved_bytes: float) -> Seconds:
        waiting = self.host.sync_s * math.log2(self.tp)
        return self.kernels.all_reduce(self.host.all_reduce, self.tp, moved_bytes) + waiting

    def decode_attention(self, rows: float, context: float) -> Seconds:
        """``rows`` queries over ``context`` tokens each."""
        a = self.architecture
        heads, kv_heads = a.rank_heads(self.tp), a.rank_kv_heads(self.tp)
        attention = self.kernels.decode_attention(rows, context, heads, kv_heads, a.head_dim)
        if self.host.copies_kv:
            kv_bytes = rows * context * a.kv_bytes(self.dtype, self.tp)
            attention += self.kernels.elementwise("add", 2 * kv_bytes)
        return attention

    def prefill_attention(self, prompts: float, tokens: float) -> Seconds:
        """``prompts`` whole prompts of ``tokens`` each."""
        a = self.architecture
        heads, kv_heads = a.rank_heads(self.tp), a.rank_kv_heads(self.tp)
        fused = self.kernels.prefill_attention(prompts, tokens, heads, kv_heads, a.head_dim)
        if self.host.is_fused:
            return fused
        moved = SCORE_PASSES * prompts * heads * tokens**2 * self.kernels.item
        return fused + self.kernels.elementwise("add", moved)

    def layer(self, tokens: float, attention: Seconds) -> Seconds:
        return max(self.host.layer_s, self.dense(tokens) + attention)

    # --- outside the layers ---

    def head(self, rows: float) -> Seconds:
        """Norm, output head and, over several ranks, gathering the logits."""
        a, k = self.architecture, self.kernels
        matrix = a.head_matrix(self.tp)
        gathered = self._all_reduce(rows * matrix.n * k.item)
        return k.elementwise("norm", 2 * rows * a.hidden * k.item) + self._product(rows, matrix) + gathered

    def fill(self, tokens: float) -> Seconds:
        """Keys and values of one skipped layer by propagation: a norm and the two projections."""
        a, k = self.architecture, self.kernels
        width = 2 * a.rank_kv_heads(self.tp) * a.head_dim
        return k.elementwise("norm", 2 * tokens * a.hidden * k.item) + self._product(
            tokens, Matrix("kv", width, a.hidden)
        )

    # --- whole steps ---

    def decode_step(self, rows: float, context: float, depth: int | None = None) -> Seconds:
        """Every row emits one token at ``context`` tokens."""
        layer = self.layer(rows, self.decode_attention(rows, context))
        return self._step(rows, self._depth(depth) * layer)

    def prefill_step(self, prompts: float, tokens: float, depth: int | None = None) -> Seconds:
        """Whole prompts in one step; each emits its first token."""
        layer = self.layer(prompts * tokens, self.prefill_attention(prompts, tokens))
        return self.host.prompt_s * prompts + self._step(prompts, self._depth(depth) * layer)

    def _step(self, rows: float, layers: Seconds) -> Seconds:
        return self.host.step_s + self.host.row_s * rows + layers + self.head(rows)

    def _depth(self, depth: int | None) -> int:
        layers = self.architecture.layers
        if depth is not None and not 1 <= depth <= layers:
            raise InputError("depth", depth, f"{self.architecture.name} has {layers} layers", f"Give 1 to {layers}.")
        return layers if depth is None else depth
