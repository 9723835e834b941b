"""Random weights, drawn tensor by tensor: the same for the same name, whatever else is drawn, on any machine.

They are scaled so that a model of them stays finite in float16 and its logits are spread: every layer adds about the
same to the residual stream, which so stays near one, and logits have a standard deviation of sqrt(2 ln V), where the
likeliest of V tokens has neither no probability nor all of it.

Large tensors repeat a block of draws whose length is prime, so no two rows of a matrix are alike and time goes into
writing memory, not into drawing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heliosim.formats.checkpoint import CheckpointInfo, Part
from heliosim.streams import stream

_BLOCK = 1_048_573
"""Draws before they repeat; a prime."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_part(info: CheckpointInfo, piece: str, part: Part) -> Tensor:
    """A part of a model of random weights in its dtype, matrices [out, in]. ``piece``: ``layer 3``, ``base 0``, ..."""
    assert info.random is not None
    mean, spread = _scale(info, piece, part)
    draws = stream(info.random.seed, "weights", piece, part.name)
    block = torch.from_numpy(draws.standard_normal(min(part.elements, _BLOCK), dtype="float32"))
    block = block.mul_(spread).add_(mean).to(_DTYPES[info.dtype])
    if part.elements > _BLOCK:
        block = _repeated(block, part.elements)
    if len(part.shape) < 2 or piece.startswith("base"):
        return block.view(part.shape)
    return block.view(part.shape[::-1]).t()  # as an engine holds it, so that arranging it copies rows whole


def _repeated(block: Tensor, count: int) -> Tensor:
    """``block`` again and again, ``count`` values in all."""
    made = torch.empty(count, dtype=block.dtype)
    made[: len(block)] = block
    filled = len(block)
    while filled < count:
        more = min(filled, count - filled)
        made[filled : filled + more] = made[:more]
        filled += more
    return made


def _scale(info: CheckpointInfo, piece: str, part: Part) -> tuple[float, float]:
    """Mean and standard deviation of a part's values."""
    name = part.name
    if name.startswith("norm") and name.endswith("weight"):
        return 1.0, 0.02
    if name.endswith("bias"):
        return 0.0, 0.02
    if name in ("embed", "positions", "head"):
        return 0.0, math.sqrt(2 * math.log(info.vocab) / info.hidden)
    spread = 1 / math.sqrt(part.shape[1])
    if piece.startswith("head"):
        return 0.0, spread * (1.0 if name == "up_weight" else 0.1)
    if name in ("out_weight", "down_weight"):  # what a layer adds to the residual stream
        return 0.0, 2 * spread / math.sqrt(2 * info.spec.layers)
    return 0.0, spread
