"""Which attention backend an engine uses: the one asked for, or the best that proves itself on this device.

Kernels that were never run here are not trusted: ``auto`` takes a backend only if it gives what the plain one gives on
a small case, and says why it passed over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from heliosim.engines.attention import flashinfer, flex, triton, varlen
from heliosim.engines.attention.base import Attention, HostPlanned, Paged
from heliosim.engines.attention.flashinfer import FlashInfer
from heliosim.engines.attention.flex import Flex
from heliosim.engines.attention.sdpa import Sdpa
from heliosim.engines.attention.triton import Triton
from heliosim.engines.attention.varlen import Varlen
from heliosim.engines.models.paged import KVShape, PagedKV
from heliosim.errors import InputError, UnknownNameError
from heliosim.types import BLOCK_TOKENS, blocks_for

_Why = Callable[[torch.device, torch.dtype], str]


def _never(device: torch.device, dtype: torch.dtype) -> str:
    return ""


BACKENDS: Mapping[str, tuple[Callable[[], Attention], _Why]] = {
    "flash-infer": (FlashInfer, flashinfer.unavailable),
    "triton": (Triton, triton.unavailable),
    "varlen": (Varlen, varlen.unavailable),
    "flex": (Flex, flex.unavailable),
    "sdpa": (Sdpa, _never),
}
"""By name, the best first: what makes one, and why it cannot be used on a device with a dtype (empty: it can)."""

NAMES = ("auto", *BACKENDS)
_LENGTHS = (37, 1, 64)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Choice:
    """``passed_over``: (name, reason) of backends that ``auto`` tried before."""

    attention: Attention
    passed_over: tuple[tuple[str, str], ...] = ()


def choose(name: str, shape: KVShape, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend of that name. Raises InputError, with the reason, for one that cannot be used here."""
    if name not in NAMES:
        raise UnknownNameError("attention", name, NAMES)
    if name == "auto" and device.type == "cpu":
        return Choice(Sdpa())
    passed_over: list[tuple[str, str]] = []
    for known in BACKENDS if name == "auto" else (name,):
        made, reason = _tried(known, shape, device, dtype)
        if made is not None:
            return Choice(made, tuple(passed_over))
        passed_over.append((known, reason))
    raise InputError("attention", name, passed_over[-1][1], "Use auto, or sdpa, which works everywhere.")


def _tried(name: str, shape: KVShape, device: torch.device, dtype: torch.dtype) -> tuple[Attention | None, str]:
    make, why_not = BACKENDS[name]
    reason = why_not(device, dtype)
    if reason:
        return None, reason
    made = make()
    if name == "sdpa":
        return made, ""
    reason = differs(made, shape, device, dtype)
    return (None, reason) if reason else (made, "")


def differs(attention: Attention, shape: KVShape, device: torch.device, dtype: torch.dtype) -> str:
    """How a backend's decoding differs from the plain one's on a small case; empty: it does not.

    Kernels of other packages fail in ways of their own, so whatever one raises is a reason.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = blocks_for(max(_LENGTHS)) + 1
    with torch.inference_mode():
        kv = PagedKV(len(_LENGTHS) * width, 1, shape, device, dtype)
        layer = kv.layers[0]
        layer.data.copy_(torch.randn(layer.data.shape, generator=generator).to(dtype))
        order = torch.randperm(kv.total_blocks, generator=generator).int().view(len(_LENGTHS), width)
        paged = Paged(
            order.to(device),
            torch.tensor(_LENGTHS, dtype=torch.int32, device=device),
            torch.arange(len(_LENGTHS), device=device),
        )
        query = torch.randn(len(_LENGTHS), shape.query_width, generator=generator).to(device, dtype)
        found = []
        for backend in (Sdpa(), attention):
            try:
                rows = backend.rows(kv, paged)
                if isinstance(rows, HostPlanned):
                    rows.plan(order.tolist(), _LENGTHS)
                rows.begin()
                found.append(rows.decode(query, layer).float().cpu())
            except Exception as error:  # whatever it is, the backend is of no use here
                return f"it fails on this device: {type(error).__name__}: {str(error).splitlines()[:1]}"
    worst = float((found[0] - found[1]).abs().max())
    if not worst <= _TOLERANCE[dtype]:  # not a number fails too
        return f"it differs from plain attention by {worst:.3g} on a small case"
    return ""


def table_width(tokens: int) -> int:
    """Blocks of a table that spans ``tokens`` tokens: a power of two, so that few widths occur."""
    return 1 << (blocks_for(max(1, tokens)) - 1).bit_length()


assert BLOCK_TOKENS == 16, "kernels here take blocks of 16 tokens"
