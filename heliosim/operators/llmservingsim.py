"""Operator profiles of LLMServingSim (its profiler's ``tpN`` folder): CUDA kernel times of a vLLM model, microseconds.

``dense.csv``: layer, tokens, time_us; ``attention.csv``: prefill_chunk, kv_prefill, n_decode, kv_decode, time_us (one
chunk behind kv_prefill tokens beside n_decode rows of kv_decode tokens); ``per_sequence.csv``: layer, sequences,
time_us. They are times of kernels alone: gaps in which the host keeps the GPU waiting are in none of them.
"""

from __future__ import annotations

from pathlib import Path

from heliosim.operators.tables import AttentionTime, OperatorTables, Points, Rows, summed
from heliosim.types import Seconds

MICROSECOND: Seconds = 1e-6
FILES = ("dense.csv", "attention.csv", "per_sequence.csv")
LAYER = {"layernorm": 2, "qkv_proj": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1, "down_proj": 1}
"""Operators of one layer, and how often each runs in it."""
ONCE = {"embedding": 1, "final_layernorm": 1}
HEAD = {"lm_head": 1, "sampler": 1}


def read_llmservingsim(folder: Path) -> OperatorTables:
    """Read the three tables. Raises InputError naming file, row, column and remedy."""
    dense = _by_operator(folder / "dense.csv", "tokens")
    return OperatorTables(
        layer=summed(dense, LAYER, str(folder / "dense.csv")),
        head=_heads(folder / "per_sequence.csv"),
        once=summed(dense, ONCE, str(folder / "dense.csv")),
        attention=_attention(folder / "attention.csv"),
        source="LLMServingSim operator profile",
        licence="MIT (CASYS, KAIST)",
    )


def _heads(path: Path) -> Points:
    return summed(_by_operator(path, "sequences"), HEAD, str(path))


def _by_operator(path: Path, count: str) -> dict[str, dict[float, Seconds]]:
    rows = Rows(path, ("layer", count, "time_us"))
    found: dict[str, dict[float, Seconds]] = {}
    for k in range(len(rows)):
        times = found.setdefault(rows.text(k, "layer"), {})
        times[rows.number(k, count, 1)] = rows.seconds(k, "time_us", MICROSECOND)
    return found


def _attention(path: Path) -> tuple[AttentionTime, ...]:
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    rows = Rows(path, (*columns, "time_us"))
    found = []
    for k in range(len(rows)):
        chunk, before, decoding, context = (rows.number(k, name) for name in columns)
        found.append(AttentionTime(chunk, before, decoding, context, rows.seconds(k, "time_us", MICROSECOND)))
    return tuple(found)
