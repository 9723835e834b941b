"""Measures bytes: what weights and KV really take against the byte model, what a pass needs beside them, and how large
a batch may be before memory ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heliosim.engines.models.host import HostModel
from heliosim.engines.models.paged import PagedKV
from heliosim.memory_model import MemoryNeeds, largest_batch
from heliosim.types import BLOCK_TOKENS, ModelSpec, blocks_for

from .bench import Bench, Call, Shape, total_bytes
from .cell import AT_LEAST, Cell, Row, absent

UNSEEN = "a CPU library's scratch memory does not show in torch's books"


def measure_bytes(bench: Bench, cell: Cell) -> Row:
    """Bytes of a layer, of what is always resident, of exit heads, or of KV per token and layer; asserted against the
    byte model.
    """
    spec, host, part = bench.spec, bench.host, str(cell.where["part"])
    if part == "kv":
        held, formula = bench.kv.nbytes / (bench.blocks * BLOCK_TOKENS * bench.layers), spec.kv_bytes_per_token_layer
        values: tuple[float, ...] = (held,)
    elif part == "layer":
        values = tuple(float(host.flat("layer", i).data.nbytes) for i in range(spec.layers))
        formula = spec.layer_bytes
    elif part == "base":
        values, formula = (float(host.flat("base").data.nbytes),), spec.base_bytes
    else:
        heads = [float(host.flat("head", e).data.nbytes) for e in host.heads]
        if not heads:
            return absent(cell, "B", "its exits have no heads of their own")
        values, formula = (sum(heads),), sum(spec.exit_head_bytes.values())
    if any(v != formula for v in values):
        raise AssertionError(f"{spec.name}: {part} holds {sorted(set(values))} B, the byte model says {formula}")
    return Row(cell, "B", (values[0],), facts={"formula_bytes": formula, "seen": len(values)})


def measure_activations(bench: Bench, cell: Cell, most_tokens: int) -> Row:
    """Bytes per token of a chunk that a pass through all layers and the head holds at most, beside weights and KV; the
    slope between two chunks. ``formula_bytes``: the byte model's, by shapes.
    """
    low = max(16, min(most_tokens // 4, 64))
    high = max(2 * low, min(most_tokens, bench.host.info.positions, 512))
    sizes = (low, min(high, bench.blocks * BLOCK_TOKENS))
    if sizes[1] <= sizes[0]:
        return absent(cell, "B", "memory has no room for a chunk to measure")
    peaks = [[peak_bytes(bench, _whole_pass(bench, n)) for _ in range(AT_LEAST)] for n in sizes]
    slopes = tuple((b - a) / (sizes[1] - sizes[0]) for a, b in zip(*peaks, strict=True))
    fixed = peaks[0][0] - slopes[0] * sizes[0]
    facts = {"fixed_bytes": round(max(0.0, fixed)), "formula_bytes": activation_formula(bench.host, bench.spec)}
    return Row(cell, "B", slopes, facts=facts)


def activation_formula(host: HostModel, spec: ModelSpec) -> int:
    """Bytes per token by the shapes: residual and normed states, and either QKV with attention's output or the MLP's
    inner widths (``hardware.compose``).
    """
    info, shape = host.info, host.kv_shape
    item = torch.empty(0, dtype=host.dtype).element_size()
    inner = (3 if info.architecture == "llama" else 2) * info.ffn
    return item * (2 * info.hidden + max(2 * shape.query_width + shape.kv_width, inner))


def _whole_pass(bench: Bench, tokens: int) -> Call:
    h = bench.hidden(tokens)

    def call() -> Any:
        run = bench.pass_of(Shape(count=tokens))
        x, family = h, bench.resident.family
        for i in range(bench.layers):
            x = family.layer(bench.resident.layers[i], x, run, bench.kv.layers[i])
        return bench.resident.logits(x[-1:], bench.layers)

    return call


def peak_bytes(bench: Bench, call: Call) -> int:
    """The most that a call holds at a time beyond what was held before it."""
    if bench.timer.is_cuda:
        call()
        bench.timer.settle()
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        call()
        bench.timer.settle()
        return int(torch.cuda.max_memory_allocated(bench.device)) - before
    with _Held() as held:
        kept = call()
        del kept
    return held.most


class _Held(TorchDispatchMode):
    """Sums up the storages that operations made and that are still alive. ``most``: bytes, at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        self._alive = {at: held for at, held in self._alive.items() if not held[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (at := tensor.untyped_storage().data_ptr()) not in known:
                storage = tensor.untyped_storage()
                self._alive[at] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


def measure_workspace(bench: Bench, cell: Cell) -> Row:
    """Bytes that the matrix library keeps for itself. GPU only."""
    if not bench.timer.is_cuda:
        return absent(cell, "B", UNSEEN)
    a = torch.ones(64, 64, device=bench.device, dtype=bench.host.dtype)
    seen = []
    for _ in range(AT_LEAST):
        bench.timer.settle()
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated(bench.device)
        b = a @ a
        bench.timer.settle()
        seen.append(float(torch.cuda.memory_allocated(bench.device) - before - b.untyped_storage().nbytes()))
    return Row(cell, "B", tuple(max(0.0, s) for s in seen))


def measure_graph(bench: Bench, cell: Cell, most_context: int) -> Row:
    """Seconds to replay a decode step of all measured layers as a graph; how long the capture took, what it holds, and
    what the same takes launched one by one.
    """
    if not bench.timer.is_cuda:
        return absent(cell, "s", "a CPU has no graphs to capture")
    shape = Shape(decode=cell.number("rows"), context=min(256, most_context))
    if not bench.fits(shape):
        return absent(cell, "s", f"needs {shape.blocks} KV blocks, memory has room for {bench.blocks}")
    call = bench.through(shape, 0, bench.layers)
    eager = sorted(bench.timer.repeated(call, 10))[5]
    replay, seconds, held = bench.captured(call)
    values = bench.timer.repeated(replay, 30)
    facts = {"capture_s": seconds, "memory_bytes": held, "eager_s": eager, "layers": bench.layers}
    return Row(cell, "s", tuple(values), facts=facts)


# --- largest batch ---------------------------------------------------------------------------------------------------


def measure_largest_batch(host: HostModel, spec: ModelSpec, device: torch.device, cell: Cell) -> Row:
    """Rows of ``context`` tokens that fit beside ``depth`` layers in the budget, found by allocating: on a GPU up to
    out-of-memory, on a CPU up to the arena's budget. ``formula_rows``: what the byte model says.
    """
    depth, context, budget = (cell.number(name) for name in ("depth", "context", "budget_bytes"))
    said = largest_batch(spec, depth, context, budget, MemoryNeeds())
    limit = "out of memory" if device.type == "cuda" else "arena budget"
    if spec.weights_bytes(depth) > budget:
        return Row(cell, "rows", (0.0,), facts={"formula_rows": said, "limit": limit, "allocations": 0})
    count = 0
    with _limited(device, budget):
        resident = host.resident(depth, device)

        def fits(rows: int) -> bool:
            nonlocal count
            count += 1
            try:
                kv = PagedKV(rows * blocks_for(context), depth, host.kv_shape, device, host.dtype)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                    raise
                return False
            held = resident.nbytes + kv.nbytes
            del kv
            return held <= budget

        rows = most_that(fits, said)
    facts: dict[str, int | str] = {"formula_rows": said, "limit": limit, "allocations": count}
    return Row(cell, "rows", (float(rows),), facts=facts)


class _limited:
    """On a GPU: let this process have no more than ``budget`` bytes."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device, self.budget = device, budget

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            share = min(1.0, self.budget / total_bytes(self.device))
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def most_that(fits: Callable[[int], bool], guess: int) -> int:
    """The largest whole number >= 0 that fits, by bisection around a guess. What fits once must fit below."""
    low, high = 0, None
    probe = max(1, guess)
    while high is None:
        if fits(probe):
            low, probe = probe, probe + max(1, probe - guess) * (2 if probe > guess else 1)
        else:
            high = probe
    step = 1
    while low == 0 and high > 1:  # the guess was too high: widen downwards before halving
        at = max(1, high - step)
        if fits(at):
            low = at
        else:
            high, step = at, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
