"""Published kernel times of large models on GPUs, interpolated: what ``derive_profiles.py`` composes steps of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama: hidden and MLP width, layers, heads of 128 (as many for keys as for queries)."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    exits: tuple[int, ...]
    vocabulary: int = 32_000

    @property
    def layer_bytes(self) -> int:
        return 2 * (4 * self.hidden**2 + 3 * self.hidden * self.mlp + 2 * self.hidden)

    @property
    def base_bytes(self) -> int:
        return 2 * (2 * self.vocabulary * self.hidden + self.hidden)


LARGE = Shape("llama2-7b", 4096, 11008, 32, 32, (8, 16, 24, 32))
SMALL = Shape("llama2-2.7b", 2560, 6912, 32, 20, (8, 16, 24, 32))
"""Llama-2-7B, and the shape of Sheared-LLaMA-2.7B, which was pruned from it and shares its tokenizer."""


@dataclass(frozen=True)
class Gpu:
    """A device: its folder in the tables, memory, board power, host-to-device bandwidth with its source."""

    name: str
    folder: str
    vidur: str
    attention: str
    memory_bytes: int
    watts: float
    host_bytes_per_s: float
    host_source: str


GPUS = (
    Gpu("A100-80GB", "a100_sxm", "a100", "vllm/0.14.0", 80 * 10**9, 400, 24.8e9,
        "nvbandwidth, NVIDIA developer forum topic 352186"),
    Gpu("H100-80GB", "h100_sxm", "h100", "vllm/0.14.0", 80 * 10**9, 700, 52.4e9,
        "ServerlessLLM, cached checkpoint to device, benchmarks/results/h100_2025"),
)  # fmt: skip


# --- kernel times -------------------------------------------------------------------------------------------


class Kernels:
    """Times of single kernels on one GPU, seconds, interpolated in logarithms between the points of the tables."""

    def __init__(self, data: Path, gpu: Gpu) -> None:
        from scipy.interpolate import RegularGridInterpolator

        root = data / "aiconfigurator" / gpu.folder
        gemm = pq.read_table(root / "gemm/vllm/0.14.0/gemm_perf.parquet").to_pylist()
        found: dict[tuple[int, int, int], list[float]] = {}
        for row in gemm:
            if row["gemm_dtype"] == "bfloat16":
                found.setdefault((row["m"], row["n"], row["k"]), []).append(1e-3 * row["latency"])
        m, n, k = (sorted({key[i] for key in found}) for i in range(3))
        n, k = ([v for v in axis if v <= 65_536] for axis in (n, k))
        grid = np.array([[[np.mean(found.get((a, b, c), [np.nan])) for c in k] for b in n] for a in m])
        _fill(grid)
        self._gemm = RegularGridInterpolator(tuple(np.log(v) for v in (m, n, k)), np.log(grid))
        attention = root / "attention" / gpu.attention
        self._decode = _table(attention / "generation_attention_perf.parquet", "step")
        self._prefill = _table(attention / "context_attention_perf.parquet", "isl")
        self._small, self._width = self._elementwise(data / f"vidur/profiling/compute/{gpu.vidur}")

    @staticmethod
    def _elementwise(folder: Path) -> tuple[tuple[Any, Any], int]:
        """Norms, rotary, activation and additions of one layer of Llama-2-7B, by tokens."""
        import pyarrow.csv

        table = pyarrow.csv.read_csv(folder / "meta-llama/Llama-2-7b-hf/mlp.csv")
        rows = [r for r in table.to_pylist() if r["num_tensor_parallel_workers"] == 1]
        names = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add", "add")
        by: dict[int, list[float]] = {}
        for row in rows:
            by.setdefault(row["num_tokens"], []).append(1e-3 * sum(row[f"time_stats.{n}.median"] for n in names))
        tokens = sorted(by)
        return (np.array(tokens), np.array([np.mean(by[t]) for t in tokens])), 4096

    def gemm(self, m: float, n: int, k: int) -> float:
        return float(np.exp(self._gemm((np.log(max(1.0, m)), np.log(n), np.log(k)))))

    def elementwise(self, tokens: float, hidden: int) -> float:
        """Memory-bound: a narrower model takes what fewer tokens of the recorded width take."""
        at, seconds = self._small
        equal = max(1.0, tokens * hidden / self._width)
        if equal > at[-1]:
            return float(seconds[-1] * equal / at[-1])
        return float(np.interp(equal, at, seconds))

    def decode_attention(self, rows: int, context: int, heads: int) -> float:
        """One layer. Rows of 32 heads are as much work as 4 times as many of 8; key heads = query heads."""
        return _read(self._decode, rows * heads / 8, context, 8)

    def prefill_attention(self, area: float, heads: int) -> float:
        """One layer; ``area``: token-context pairs, as a whole prompt of sqrt(2 area) tokens has them."""
        return _read(self._prefill, 1, max(1.0, np.sqrt(2 * area)), heads)


def _fill(grid: Any) -> None:
    """Single gaps of a table, from their neighbours along tokens."""
    for b in range(grid.shape[1]):
        for c in range(grid.shape[2]):
            line = grid[:, b, c]
            bad = np.isnan(line)
            if bad.any() and not bad.all():
                line[bad] = np.interp(np.flatnonzero(bad), np.flatnonzero(~bad), line[~bad])


def _table(path: Path, length: str) -> dict[int, dict[tuple[int, int], float]]:
    """Attention seconds by (batch, length), for each number of heads with as many key heads."""
    found: dict[int, dict[tuple[int, int], list[float]]] = {}
    for row in pq.read_table(path).to_pylist():
        if row["num_heads"] == row["num_key_value_heads"] and row["kv_cache_dtype"] == "bfloat16":
            key = (row["batch_size"], row[length])
            found.setdefault(row["num_heads"], {}).setdefault(key, []).append(1e-3 * row["latency"])
    return {h: {key: float(np.mean(v)) for key, v in by.items()} for h, by in found.items()}


def _read(table: dict[int, dict[tuple[int, int], float]], batch: float, length: float, heads: int) -> float:
    """Linear in heads (between the two nearest), log-log in batch and length."""
    known = sorted(table)
    low = max((h for h in known if h <= heads), default=known[0])
    high = min((h for h in known if h >= heads), default=known[-1])
    one = _bilinear(table[low], batch, length)
    if low == high:
        return one
    return one + (_bilinear(table[high], batch, length) - one) * (heads - low) / (high - low)


def _bilinear(by: dict[tuple[int, int], float], batch: float, length: float) -> float:
    def along(b: int) -> float:
        at = sorted(n for k, n in by if k == b)
        values = np.log([by[b, n] for n in at])
        return float(np.interp(np.log(length), np.log(at), values))

    batches = sorted({b for b, n in by if sum(k == b for k, _ in by) > 4})
    low = max((b for b in batches if b <= batch), default=batches[0])
    high = min((b for b in batches if b >= batch), default=batches[-1])
    if low == high:
        return float(np.exp(along(low)))
    share = (np.log(batch) - np.log(low)) / (np.log(high) - np.log(low))
    return float(np.exp(along(low) + share * (along(high) - along(low))))
