"""Attention of a device's curves as a table: what stands in where a source of operator times has none."""

from __future__ import annotations

from itertools import product

from heliosim.hardware.steps import StepTimes
from heliosim.operators.tables import AttentionTime

ROWS, CONTEXTS = (1, 4, 16, 64, 128, 256), (64, 256, 1024, 2048, 4096)
PROMPTS = (64, 256, 1024, 2048, 4096)

Times = tuple[AttentionTime, ...]


def attention_from_curves(kernels: StepTimes) -> tuple[Times, Times]:
    """Decode rows over contexts, and whole prompts."""
    decode = [(0.0, 0.0, float(r), float(c), kernels.decode_attention(r, c)) for r, c in product(ROWS, CONTEXTS)]
    prefill = [(float(n), 0.0, 0.0, 0.0, kernels.prefill_attention(1, n)) for n in PROMPTS]
    return tuple(AttentionTime(*point) for point in decode), tuple(AttentionTime(*point) for point in prefill)
