"""Profiling tables of Vidur: ``mlp.csv`` and ``attention.csv`` of a model on a GPU, ``all_reduce.csv`` of a node; ms.

``mlp.csv`` has one row per number of tokens and tensor-parallel degree, with ``time_stats.OPERATOR.median``. Rows given
twice are averaged. It holds no output head; where ``attention.csv`` is absent there is no attention either. What is
missing comes from the curves of a device that is named for it (``kernels``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from heliosim.errors import InputError
from heliosim.hardware.architecture import ITEM_BYTES, Architecture
from heliosim.hardware.steps import StepTimes
from heliosim.operators.curves import attention_from_curves
from heliosim.operators.tables import AttentionTime, OperatorTables, Points, Rows
from heliosim.types import Seconds

MILLISECOND: Seconds = 1e-3
LAYER: Mapping[str, int] = {
    "input_layernorm": 1, "attn_pre_proj": 1, "attn_rope": 1, "attn_post_proj": 1, "post_attention_layernorm": 1,
    "mlp_up_proj": 1, "mlp_act": 1, "mlp_down_proj": 1, "add": 2,
}  # fmt: skip
"""Operators of a layer, and how often each runs in it: there are two residual additions."""
AROUND = ("attn_input_reshape", "attn_kv_cache_save", "attn_output_reshape")
"""What runs beside an attention kernel, where the table has it."""
HEAD_ROWS = (1, 8, 16, 32, 64, 128, 256, 512)


def read_vidur(folder: Path, kernels: StepTimes, all_reduce: Path | None = None) -> OperatorTables:
    """The model's tables at ``kernels.tp`` ranks. ``kernels``: what its own architecture takes on the device that
    stands in for what Vidur does not measure. ``all_reduce``: a table for more than one rank; None: that device's.
    """
    layer, once = _dense(folder / "mlp.csv", kernels)
    if kernels.tp > 1:
        layer = tuple((t, s + 2 * r) for (t, s), r in zip(layer, _reduced(layer, kernels, all_reduce), strict=True))
    attention = folder / "attention.csv"
    return OperatorTables(
        layer=layer,
        head=tuple((float(r), kernels.head(r)) for r in HEAD_ROWS),
        once=once,
        attention=_measured(attention, kernels) if attention.is_file() else sum(attention_from_curves(kernels), ()),
        source="Vidur profiling tables",
        licence="MIT (Microsoft)",
        assumptions=(f"what the tables lack (output head, and attention if absent) is that of {kernels.device.name}",),
    )


def _dense(path: Path, kernels: StepTimes) -> tuple[Points, Points]:
    names = {name: f"time_stats.{name}.median" for name in (*LAYER, "emb")}
    rows = Rows(path, ("num_tokens", "num_tensor_parallel_workers", *names.values()))
    _require_shapes(rows, kernels.architecture)
    found: dict[float, list[tuple[Seconds, Seconds]]] = {}
    degrees = set()
    for k in range(len(rows)):
        degrees.add(rows.number(k, "num_tensor_parallel_workers", 1))
        if rows.number(k, "num_tensor_parallel_workers", 1) == kernels.tp:
            layer = sum(often * rows.seconds(k, names[name], MILLISECOND) for name, often in LAYER.items())
            emb = rows.seconds(k, names["emb"], MILLISECOND)
            found.setdefault(rows.number(k, "num_tokens", 1), []).append((layer, emb))
    if len(found) < 2:
        known = ", ".join(f"{d:g}" for d in sorted(degrees))
        raise InputError(f"{path}, num_tensor_parallel_workers", kernels.tp, "has too few rows", f"It has: {known}.")
    counts = sorted(found)
    means = [[fmean(column) for column in zip(*found[t], strict=True)] for t in counts]
    layers, once = zip(*means, strict=True)
    return tuple(zip(counts, layers, strict=True)), tuple(zip(counts, once, strict=True))


def _require_shapes(rows: Rows, a: Architecture) -> None:
    """Raise InputError if the table is another model's."""
    shapes = {"n_head": a.heads, "n_kv_head": a.kv_heads, "n_embd": a.hidden, "n_expanded_embd": a.mlp}
    for column, size in shapes.items():
        if column in rows.rows[0] and rows.number(0, column) != size:
            problem = f"is not {a.name}'s, which has {size}"
            raise InputError(f"{rows.path}, row 2, {column}", rows.rows[0][column], problem, "Name the model profiled.")


def _reduced(layer: Points, kernels: StepTimes, path: Path | None) -> list[Seconds]:
    """Seconds of one all-reduce of the hidden states of each number of tokens."""
    width = kernels.architecture.hidden * ITEM_BYTES[kernels.dtype]
    if path is None:
        return [kernels.kernels.all_reduce(kernels.host.all_reduce, kernels.tp, t * width) for t, _ in layer]
    import numpy as np

    name = "time_stats.all_reduce.median"
    rows = Rows(path, ("size", "num_workers", "devices_per_node", name))
    known = {
        rows.number(k, "size"): rows.seconds(k, name, MILLISECOND)
        for k in range(len(rows))
        if rows.number(k, "num_workers") == kernels.tp <= rows.number(k, "devices_per_node")
    }
    if len(known) < 2:
        raise InputError(f"{path}, num_workers", kernels.tp, "has too few rows within one node", "Use another --tp.")
    sizes = sorted(known)
    return [float(np.interp(t * width, sizes, [known[s] for s in sizes])) for t, _ in layer]


def _measured(path: Path, kernels: StepTimes) -> tuple[AttentionTime, ...]:
    keys = ("batch_size", "prefill_chunk_size", "kv_cache_size")
    times = {True: "time_stats.attn_prefill.median", False: "time_stats.attn_decode.median"}
    rows = Rows(path, (*keys, "is_prefill", "num_tensor_parallel_workers", *times.values()))
    around = [name for name in (f"time_stats.{a}.median" for a in AROUND) if name in rows.rows[0]]
    found = []
    for k in range(len(rows)):
        if rows.number(k, "num_tensor_parallel_workers", 1) != kernels.tp:
            continue
        said = rows.text(k, "is_prefill").lower()
        if said not in ("true", "false"):
            raise InputError(f"{path}, row {k + 2}, is_prefill", said, "must be True or False", rows.remedy)
        batch, chunk, held = (rows.number(k, name) for name in keys)
        extra = sum(rows.number(k, name) * MILLISECOND for name in around)
        seconds = rows.seconds(k, times[said == "true"], MILLISECOND) + extra
        if said == "false":
            found.append(AttentionTime(0, 0, batch, held, seconds))
        elif batch == 1:
            found.append(AttentionTime(chunk, held, 0, 0, seconds))
    return tuple(found)
