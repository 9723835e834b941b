"""Measures single kernels in the shapes of a device file: matrix products, attention, element-wise kernels.

From these, other models can be composed for this device (``device_file.py``). Heads are 128 wide, as in all device
files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from heliosim.hardware.kernels import HEAD_DIM

from .bench import Bench, Call, free_bytes
from .cell import MACHINE, Cell, Row, absent
from .grid import Extent
from .passes import repeats_for

GQA_GROUP = 4
"""Query heads to a KV head where attention is grouped."""
CACHE_FLUSH = 4
"""Matrices taken in turn, so that none is found in a cache; fewer where they take more than ``FLUSH_BYTES``."""
FLUSH_BYTES = 256 << 20

Grid = dict[str, tuple[int, ...]]
GPU: dict[str, Grid] = {
    "gemm": {
        "m": (1, 16, 64, 256, 1024, 4096),
        "n": (1024, 4096, 12_288, 32_768),
        "k": (1024, 4096, 12_288),
    },
    "attention_decode": {"groups": (1, 8, 64, 512), "context": (64, 512, 2048, 8192)},
    "attention_prefill": {"prompts": (1, 4), "heads": (8, 32), "tokens": (64, 256, 1024, 4096)},
    "elementwise": {"bytes": (16_384, 1_048_576, 16_777_216, 268_435_456)},
}
CPU: dict[str, Grid] = {
    "gemm": {"m": (1, 16, 128), "n": (128, 768, 4096), "k": (128, 768, 4096)},
    "attention_decode": {"groups": (1, 16), "context": (32, 256)},
    "attention_prefill": {"prompts": (1, 2), "heads": (1, 4), "tokens": (16, 128)},
    "elementwise": {"bytes": (16_384, 1_048_576)},
}
KINDS = ("norm", "rope", "activation", "add")


def kernel_cells(extent: Extent, device: str) -> list[Cell]:
    """All cells that a device file needs, of the grid for this kind of device."""
    g = GPU if device.startswith("cuda") else CPU
    a, p = g["attention_decode"], g["attention_prefill"]
    cells = [Cell.of(MACHINE, "peak", "kernels", of=what) for what in ("bytes", "flops")]
    cells += [
        Cell.of(MACHINE, "gemm", "kernels", m=m, n=n, k=k)
        for n in g["gemm"]["n"]
        for k in g["gemm"]["k"]
        for m in g["gemm"]["m"]
    ]
    for form in ("mha", "gqa"):
        cells += [
            Cell.of(MACHINE, "attention_decode", "kernels", form=form, groups=x, context=c)
            for x in a["groups"]
            for c in a["context"]
        ]
        cells += [
            Cell.of(MACHINE, "attention_prefill", "kernels", form=form, prompts=b, heads=h, tokens=t)
            for b in p["prompts"]
            for h in p["heads"]
            for t in p["tokens"]
        ]
    return cells + [
        Cell.of(MACHINE, "elementwise", "kernels", kernel=kind, bytes=b)
        for kind in KINDS
        for b in g["elementwise"]["bytes"]
    ]


def measure_kernel(bench: Bench, cell: Cell, extent: Extent) -> Row:
    """Seconds of one kernel; of ``peak``, bytes/s or flop/s of the best that was seen."""
    item = torch.empty(0, dtype=bench.host.dtype).element_size()
    need = _bytes_of(cell, item)
    if need > free_bytes(bench.device) // 2:
        return absent(cell, "s", f"needs {need:,} B of memory")
    call, work = _MAKERS[cell.kind](bench, cell)
    call = bench.best(call)
    seconds = bench.timer.repeated(call, repeats_for(bench, (call,), extent))
    if cell.kind != "peak":
        return Row(cell, "s", tuple(s / work for s in seconds))
    return Row(cell, f"{cell.where['of']}/s", tuple(work / max(s, 1e-9) for s in seconds))


def _bytes_of(cell: Cell, item: int) -> int:
    n = cell.number
    if cell.kind == "gemm":
        weights = _matrices(n("n"), n("k"), item) * n("n") * n("k")
        return item * (weights + n("m") * (n("n") + n("k")))
    if cell.kind == "attention_decode":
        return item * 2 * n("groups") * n("context") * HEAD_DIM
    if cell.kind == "attention_prefill":
        return item * 8 * n("prompts") * n("heads") * n("tokens") * HEAD_DIM
    return 3 * n("bytes")


def _matrices(n: int, k: int, item: int) -> int:
    return max(1, min(CACHE_FLUSH, FLUSH_BYTES // (n * k * item)))


Made = tuple[Call, float]
"""A call, and how many kernels (or how much work) it does."""


def _random(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device, dtype=bench.host.dtype)


def _gemm(bench: Bench, cell: Cell) -> Made:
    m, n, k = (cell.number(x) for x in ("m", "n", "k"))
    a = _random(bench, m, k)
    count = _matrices(n, k, a.element_size())
    weights = [_random(bench, k, n) for _ in range(count)]
    out = torch.empty(m, n, device=bench.device, dtype=bench.host.dtype)

    def call() -> None:
        for w in weights:
            torch.mm(a, w, out=out)

    return call, count


def _decode(bench: Bench, cell: Cell) -> Made:
    """Each group one KV head's keys and values, one query token for each of its heads."""
    groups, context = cell.number("groups"), cell.number("context")
    heads = GQA_GROUP if cell.where["form"] == "gqa" else 1
    q = _random(bench, groups, 1, heads, HEAD_DIM)
    k, v = (_random(bench, groups, 1, context, HEAD_DIM) for _ in range(2))
    return lambda: scaled_dot_product_attention(q, k, v), 1


def _prefill(bench: Bench, cell: Cell) -> Made:
    prompts, heads, tokens = (cell.number(x) for x in ("prompts", "heads", "tokens"))
    kv_heads = max(1, heads // GQA_GROUP) if cell.where["form"] == "gqa" else heads
    q = _random(bench, prompts, heads, tokens, HEAD_DIM)
    k, v = (_random(bench, prompts, kv_heads, tokens, HEAD_DIM) for _ in range(2))
    is_grouped = kv_heads != heads
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped), 1


def _elementwise(bench: Bench, cell: Cell) -> Made:
    """Bytes are those read and written, as a device file counts them."""
    item = torch.empty(0, dtype=bench.host.dtype).element_size()
    kind = str(cell.where["kernel"])
    parts = {"norm": 2, "rope": 2, "activation": 2, "add": 3}[kind]
    width = 1024
    rows = max(1, cell.number("bytes") // (parts * item * width))
    x, weight = _random(bench, rows, width), _random(bench, width)
    calls: dict[str, Callable[[], object]] = {
        "norm": lambda: torch.nn.functional.rms_norm(x, (width,), weight),
        "activation": lambda: torch.nn.functional.silu(x),
        "add": lambda: torch.add(x, y),
        "rope": lambda: _rotate(x, turns),
    }
    y = torch.ones_like(x)
    turns = torch.polar(torch.ones(rows, width // 2), torch.ones(rows, width // 2)).to(bench.device)
    return calls[kind], 1


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().view(x.shape[0], -1, 2))
    return torch.view_as_real(pairs * turns).to(x.dtype)


def _peak(bench: Bench, cell: Cell) -> Made:
    """The fastest copy, or the fastest product, of a size that no launch matters for."""
    if cell.where["of"] == "bytes":
        size = 1 << (28 if bench.timer.is_cuda else 22)
        a = torch.ones(size, dtype=torch.uint8, device=bench.device)
        b = torch.empty_like(a)
        return lambda: b.copy_(a), 2.0 * size
    n = 8192 if bench.timer.is_cuda else 512
    x, y = _random(bench, n, n), _random(bench, n, n)
    return lambda: torch.mm(x, y), 2.0 * n**3


_MAKERS: dict[str, Callable[[Bench, Cell], Made]] = {
    "gemm": _gemm,
    "attention_decode": _decode,
    "attention_prefill": _prefill,
    "elementwise": _elementwise,
    "peak": _peak,
}
