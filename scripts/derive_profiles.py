"""Make the shipped derived profiles: step times of large models composed of published kernel times, not measured here.

For every grid point (decode rows, prefill chunks, context) the step's kernels are added up: matrix products and
attention from the tables of NVIDIA's aiconfigurator, norms, rotary embedding, activation and residuals from Vidur's.
The sums become the rows of ``steps.parquet``; the ordinary cost terms are fitted to them, every fifth point held out.
Exits have no published table, so they are made up (``synthetic``): see ``TASKS``.

    python scripts/derive_profiles.py DATA [--out heliosim/profiles]

DATA: a folder with ``aiconfigurator/``, ``vidur/`` and ``tensorrt_llm/`` as downloaded (see ``SOURCES``).
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heliosim_calibrate.behaviour import write_table
from heliosim_calibrate.fit import region_of, relative_nnls
from scipy.special import ndtr

from heliosim import __version__
from heliosim.costs import TERMS, StepShape
from heliosim.formats.files import new_folder, sha256_of
from heliosim.formats.profile import (
    BehaviourFacts,
    CostFit,
    Derivation,
    Energy,
    HoldOut,
    LargestBatch,
    LoadFit,
    ModelFacts,
    ProfileFile,
    Source,
    load_profile,
    write_profile,
)
from heliosim.premises import measure_premises
from heliosim.streams import stream
from heliosim.types import blocks_for

SEED = 0
MAX_ROWS, MAX_CONTEXT, MAX_TOKENS = 256, 4096, 8192
HOST_STEP_S = 1e-3
"""Scheduling, sampling and launch of one step: a choice (about what CUDA-graph engines show beside their kernels)."""


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
BUSY_SHARE = 0.60
"""Mean power over board power while serving: Splitwise's Llama-2-70B on A100-80GB, tensor parallel 4."""

SOURCES = (
    Source(name="aiconfigurator", used_for="matrix products (vLLM 0.14.0, bf16) and attention kernels",
           url="https://github.com/ai-dynamo/aiconfigurator/tree/095f58a51c4ca8e61b66ec108d86f223f8d559ce",
           licence="Apache-2.0 (NVIDIA)"),
    Source(name="Vidur", used_for="norms, rotary embedding, activation, residual additions of Llama-2-7B",
           url="https://github.com/microsoft/vidur/tree/7d47513363ec447a741ac5e47241580b47724fbf",
           licence="MIT (Microsoft)"),
    Source(name="Splitwise", used_for="mean power as a share of board power",
           url="https://github.com/Mutinifni/splitwise-sim/tree/8f99e7dc9b407f4ce2488d03dd44c0b8b946dab0",
           licence="MIT"),
    Source(name="TensorRT-LLM", used_for="cross-check of throughput and first-token latency on A100",
           url="https://github.com/NVIDIA/TensorRT-LLM/blob/138f96d45f90b9667426f7c47297d8c06bafac73/docs/source/performance.md",
           licence="Apache-2.0"),
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


# --- steps --------------------------------------------------------------------------------------------------


def step_shapes(model: Shape) -> list[StepShape]:
    """The grid: decode alone, prefill alone, both; at full depth and at each exit."""
    found = []
    for depth in model.exits:
        rows = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
        contexts = (64, 256, 512, 1024, 2048, 4096)
        for b in rows if depth == model.layers else rows[::3]:
            found += [_shape(depth, b, c, (), 0) for c in contexts if _fits(model, b * c)]
        chunks = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
        for t in chunks if depth == model.layers else chunks[::3]:
            found += [_shape(depth, 0, 0, ((t, t + before),), 0) for before in (0, 1024, 2048) if t + before <= 4096]
        for t, rows_of in ((2048, 2), (2048, 3), (2048, 4), (1024, 8), (512, 4), (256, 8), (128, 16)):
            if depth == model.layers:
                found.append(_shape(depth, 0, 0, ((t, t),) * rows_of, 0))
        for b in (1, 4, 16, 32, 64, 96, 128, 192, 256) if depth == model.layers else (8, 64):
            for c in (512, 1024, 2048):
                for t in (64, 128, 256, 384, 512, 1024, 2048) if _fits(model, b * c) else ():
                    found.append(_shape(depth, b, c, ((t, t),), 0))
                    if t <= 512:
                        found.append(_shape(depth, b, c, ((t, t + 512),), 0))
    return found


def _fits(model: Shape, tokens: int) -> bool:
    """Whether a server with 80 GB could hold the KV of so many tokens; steps it cannot do would only bend the fit."""
    return model.layers * (model.layer_bytes + tokens * 4 * model.hidden) < 80e9


def _shape(depth: int, rows: int, context: int, chunks: Sequence[tuple[int, int]], ended: int) -> StepShape:
    tokens = rows + sum(t for t, _ in chunks)
    emitting = rows + len(chunks)
    return StepShape(
        rows=rows + len(chunks), tokens=tokens, decode_rows=rows, gathered=rows * 16 * blocks_for(context),
        prefill_rows=len(chunks), prefill_products=sum(t * end for t, end in chunks), layers=depth, checks=1,
        checked_rows=emitting, filled_layers=0, started=0, ended=ended,
        longest=max([context, *(end for _, end in chunks)]),
    )  # fmt: skip


def seconds_of(shape: StepShape, chunks: Sequence[tuple[int, int]], model: Shape, kernels: Kernels) -> float:
    """The kernels of a step, added up, and the host's share."""
    h, t = model.hidden, shape.tokens
    layer = kernels.gemm(t, 3 * h, h) + kernels.gemm(t, h, h) + kernels.gemm(t, 2 * model.mlp, h)
    layer += kernels.gemm(t, h, model.mlp) + kernels.elementwise(t, h)
    if shape.decode_rows:
        layer += kernels.decode_attention(shape.decode_rows, shape.gathered // shape.decode_rows, model.heads)
    for count, end in chunks:
        layer += kernels.prefill_attention(count * end - count * count / 2, model.heads)
    head = kernels.gemm(shape.checked_rows, model.vocabulary, h)
    return HOST_STEP_S + shape.layers * layer + head


def chunks_of(shape: StepShape) -> tuple[tuple[int, int], ...]:
    """The chunks a grid point stands for: equal ones."""
    if not shape.prefill_rows:
        return ()
    count = (shape.tokens - shape.decode_rows) // shape.prefill_rows
    return ((count, shape.prefill_products // shape.prefill_rows // count),) * shape.prefill_rows


def is_held_out(shape: StepShape) -> bool:
    return hashlib.blake2b(repr(tuple(shape)).encode(), digest_size=4).digest()[0] % 5 == 0


OWN_FITS = ("check", "check_row", "fill_layer", "fill_layer_token")
"""Terms whose kernels are known apart, so that early exits are charged their own heads and fills."""
ABSENT = ("row", "token", "gathered")
"""Host work per row and token, which no kernel table holds."""


def fit(shapes: Sequence[StepShape], seconds: Any, model: Shape, kernels: Kernels) -> CostFit:
    """The cost terms fitted to the composed times; scored on points that a first fit did not see."""
    x = np.array([s.terms() for s in shapes], dtype=float)
    own = own_terms(model, kernels)
    apart = sum(own[t] * x[:, TERMS.index(t)] for t in OWN_FITS)
    x[:, [TERMS.index(t) for t in (*ABSENT, *OWN_FITS)]] = 0
    held = np.array([is_held_out(s) for s in shapes])
    predicted = x[held] @ relative_nnls(x[~held], (seconds - apart)[~held]) + apart[held]
    errors = predicted / seconds[held] - 1
    by: dict[str, list[float]] = {}
    for shape, error in zip([s for s, h in zip(shapes, held, strict=True) if h], errors, strict=True):
        by.setdefault(region_of(shape), []).append(abs(error))
    coefficients = relative_nnls(x, seconds - apart)
    return CostFit(
        seconds_per={t: float(c) for t, c in zip(TERMS, coefficients, strict=True)} | own,
        steps=len(shapes),
        cell_spread=0.0,
        max_rows=MAX_ROWS,
        max_context=MAX_CONTEXT,
        max_tokens=MAX_TOKENS,
        holdout=HoldOut(
            cells=int(held.sum()),
            median_abs_error=float(np.median(np.abs(errors))),
            p90_abs_error=float(np.percentile(np.abs(errors), 90)),
            mean_signed_error=float(errors.mean()),
            by_region={r: float(np.median(e)) for r, e in sorted(by.items())},
        ),
    )


def own_terms(model: Shape, kernels: Kernels) -> dict[str, float]:
    """A head (a check costs one), and filling a skipped layer's KV: its key and value projections."""
    rows = np.array([1, 8, 16, 32, 64, 96, 128, 192, 256], dtype=float)
    x = np.stack([np.ones_like(rows), rows], axis=1)
    head = relative_nnls(x, np.array([kernels.gemm(t, model.vocabulary, model.hidden) for t in rows]))
    fill = relative_nnls(x, np.array([kernels.gemm(t, 2 * model.hidden, model.hidden) for t in rows]))
    return dict(zip(OWN_FITS, [*map(float, head), *map(float, fill)], strict=True))


# --- behaviour ----------------------------------------------------------------------------------------------

TASKS: dict[str, tuple[int, tuple[float, ...]]] = {
    "chat": (512, (0.30, 0.48, 0.70, 0.92)),
    "summarisation": (1536, (0.38, 0.58, 0.78, 0.94)),
    "code": (768, (0.52, 0.70, 0.85, 0.96)),
}
"""Made up, for the larger model: prompt length, and the share of tokens that are confident (>= 0.8) at each exit."""
SMALLER = 0.94
"""The smaller model's shares over the larger one's."""
ALIKE = 0.5
"""Correlation of what is hard for one model and for the other."""
AGREES = (0.97, 0.62)
"""Share of confident tokens, and of the others, that the last layer agrees with."""
TEXTS, TEXT_TOKENS, THRESHOLD = 12, 96, 0.8
LEVELS = 64
"""Steps of a confidence: few enough that the table stays small."""


def behaviour_columns(models: Sequence[Shape]) -> tuple[dict[str, list[Any]], list[str]]:
    """Synthetic texts, the same under every policy. Drawn from streams named by task, text and model."""
    sources = [
        f"{m.name}:{kind}" for m in models for kind in ("full", "threshold", *(f"greedy@{e}" for e in m.exits[:-1]))
    ]
    names = ("sequence", "task", "source", "prompt_tokens", "position", "end", "token_id")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    n = TEXT_TOKENS
    drawn = {(task, k): _text(models, task, k) for task in TASKS for k in range(TEXTS)}
    for source in sources:
        for (task, k), values in drawn.items():
            columns["sequence"] += [f"{task}-{k:03d}"] * n
            columns["task"] += [task] * n
            columns["source"] += [source] * n
            columns["prompt_tokens"] += [TASKS[task][0]] * n
            columns["position"] += list(range(n))
            columns["end"] += [None] * n
            columns["token_id"] += [0] * n
            for name, column in values.items():
                columns.setdefault(name, []).extend(column.tolist())
    return columns, sources


def _text(models: Sequence[Shape], task: str, k: int) -> dict[str, Any]:
    """Confidence and agreement of every exit along one text: hard tokens are hard at every depth of a model."""
    shared = stream(SEED, "synthetic", task, k).standard_normal(TEXT_TOKENS)
    found = {}
    for model in models:
        rng = stream(SEED, "synthetic", task, k, model.name)
        own = rng.standard_normal(TEXT_TOKENS)
        hard = ndtr(np.sqrt(ALIKE) * shared + np.sqrt(1 - ALIKE) * own)
        for depth, share in zip(model.exits, TASKS[task][1], strict=True):
            sure = share * (SMALLER if model is SMALL else 1.0)
            above = 1 - (1 - THRESHOLD) * (hard / sure) ** 1.5
            below = THRESHOLD * (1 - (hard - sure) / (1 - sure)) ** 0.7 * 0.999 + 0.02
            value = np.where(hard < sure, above, np.minimum(below, THRESHOLD - 1e-3))
            confidence = np.ceil(value * LEVELS) / LEVELS
            confidence = np.where(hard < sure, np.maximum(confidence, THRESHOLD), np.floor(value * LEVELS) / LEVELS)
            right = rng.random(TEXT_TOKENS) < np.where(hard < sure, *AGREES)
            found[f"confidence:{model.name}@{depth}"] = np.clip(confidence, 1 / LEVELS, 1.0)
            found[f"agrees:{model.name}@{depth}"] = right | (depth == model.layers)
    return found


# --- the profile --------------------------------------------------------------------------------------------


def derive(data: Path, gpu: Gpu, out: Path) -> None:
    """Write one profile folder."""
    kernels = Kernels(data, gpu)
    models, fits, rows = (LARGE, SMALL), {}, []
    for model in models:
        shapes = step_shapes(model)
        seconds = np.array([seconds_of(s, chunks_of(s), model, kernels) for s in shapes])
        fits[model.name] = fit(shapes, seconds, model, kernels)
        rows += [
            {"model": model.name, "mode": "composed", "visit": 0, **s._asdict(), "wall_s": float(y)}
            for s, y in zip(shapes, seconds, strict=True)
        ]
    columns, sources = behaviour_columns(models)
    checks = cross_checks(gpu, kernels)
    with new_folder(out, overwrite=True) as folder:
        pq.write_table(pa.Table.from_pylist(rows), folder / "steps.parquet", compression="zstd", compression_level=15)
        write_table(columns, folder / "behaviour.parquet")
        facts = ProfileFile(
            schema_version=1,
            kind="derived",
            derivation=derivation(gpu, checks),
            device={"device": "cuda", "gpu": gpu.name, "gpu_memory_bytes": gpu.memory_bytes},
            versions={"heliosim": __version__},
            seed=SEED,
            models={m.name: model_facts(m, gpu, fits[m.name]) for m in models},
            energy=Energy(
                source="data-sheet",
                reason=f"{BUSY_SHARE:.0%} of the board's {gpu.watts:.0f} W while it steps; idle power is not known",
                busy_w=BUSY_SHARE * gpu.watts,
            ),
            behaviour=BehaviourFacts(
                tasks=dict.fromkeys(TASKS, TEXTS),
                split="synthetic",
                tokens_per_text=TEXT_TOKENS,
                threshold=THRESHOLD,
                sources=tuple(sources),
                rows=len(columns["position"]),
            ),
            files={name: sha256_of(folder / name) for name in ("behaviour.parquet", "steps.parquet")},
        )
        write_profile(folder, facts)
        premises = [p.row() for p in measure_premises(load_profile(folder).behaviour, THRESHOLD)]
        write_profile(folder, facts.model_copy(update={"premises": premises}))
    size = sum(p.stat().st_size for p in out.iterdir())
    print(f"{out}: {size / 1e3:.0f} kB")
    for name, found in fits.items():
        h = found.holdout
        print(f"  {name}: held out |error| median {h.median_abs_error:.1%}, p90 {h.p90_abs_error:.1%}", h.by_region)
    print("  " + "\n  ".join(checks))


def derivation(gpu: Gpu, checks: Sequence[str]) -> Derivation:
    return Derivation(
        method=(
            f"Step times on {gpu.name} composed of published kernel times (bf16, one GPU), the cost terms fitted to "
            f"{MAX_ROWS} rows, {MAX_CONTEXT} tokens of context and {MAX_TOKENS} tokens per step; hold-out errors are "
            "those of the fit against the composed times, not against a running engine."
        ),
        sources=SOURCES,
        assumptions=(
            f"{1e3 * HOST_STEP_S:g} ms per step for scheduling, sampling and launches",
            "decode attention of a batch costs what its longest context costs for every row, as the cost terms have it",
            f"loads move weights from host memory at {gpu.host_bytes_per_s / 1e9:g} GB/s ({gpu.host_source})",
            f"mean power while stepping is {BUSY_SHARE:.0%} of board power",
            "element-wise kernels of the smaller model scale with its width",
        ),
        synthetic=(
            "confidences and agreement at every exit: drawn, with chosen shares of confident tokens by task and depth",
            "Llama-2 has no trained exits; tokens that leave early are a supposition",
        ),
        cross_checks=tuple(checks),
    )


def cross_checks(gpu: Gpu, kernels: Kernels) -> list[str]:
    """Published end-to-end figures beside what the composed times say."""
    if gpu.name != "A100-80GB":
        return ["none: no published end-to-end figure of this model and GPU was at hand"]
    found = []
    for prompt, published in ((128, 16.0), (2048, 133.0)):
        ours = 1e3 * seconds_of(_shape(32, 0, 0, ((prompt, prompt),), 0), ((prompt, prompt),), LARGE, kernels)
        found.append(
            f"first token of {prompt} prompt tokens: {ours:.1f} ms, TensorRT-LLM v0.5 says {published:g} ms "
            f"({ours / published - 1:+.0%})"
        )
    for batch, prompt, output, published in ((60, 128, 2048, 1928), (52, 2048, 128, 591)):
        steps = [seconds_of(_shape(32, batch, c, (), 0), (), LARGE, kernels)
                 for c in np.linspace(prompt, prompt + output, 9).astype(int)]  # fmt: skip
        reading = batch * seconds_of(_shape(32, 0, 0, ((prompt, prompt),), 0), ((prompt, prompt),), LARGE, kernels)
        ours = batch * output / (reading + output * float(np.mean(steps)))
        found.append(
            f"{batch} requests of {prompt} + {output} tokens at once: {ours:.0f} tok/s, TensorRT-LLM v0.6.1 says "
            f"{published} tok/s ({ours / published - 1:+.0%})"
        )
    return found


def model_facts(model: Shape, gpu: Gpu, step: CostFit) -> ModelFacts:
    facts = ModelFacts(
        architecture="llama",
        checkpoint="none (derived)",
        weights_sha256="none",
        dtype="bfloat16",
        layers=model.layers,
        exits=model.exits,
        exit_kind="anywhere",
        layer_bytes=model.layer_bytes,
        base_bytes=model.base_bytes,
        exit_head_bytes={},
        kv_bytes_per_token_layer=4 * model.hidden,
        hidden_bytes=2 * model.hidden,
        max_context=4096,
        vocabulary="llama-2 (32,000)",
        step={"wall": step},
        load={
            "wall": LoadFit(
                seconds_per={
                    "load": 0.0,
                    "layer": 0.0,
                    "weights_byte": 1 / gpu.host_bytes_per_s,
                    "kv_byte": 0.0,
                    "extend_token_layer": step.seconds_per["layer_token_more"],
                },
                loads=0,
                median_abs_error=None,
            )
        },
        largest_batch=(),
    )
    spec, budget = facts.spec(model.name), int(0.9 * gpu.memory_bytes)
    batches = tuple(
        LargestBatch(
            depth=d,
            context_tokens=1024,
            budget_bytes=budget,
            rows=(budget - spec.weights_bytes(d)) // spec.block_bytes(d) // 64,
        )
        for d in model.exits
    )
    return facts.model_copy(update={"largest_batch": batches})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("heliosim/profiles"))
    given = parser.parse_args()
    for gpu in GPUS:
        derive(given.data, gpu, given.out / f"llama2-{gpu.name.lower()}")


if __name__ == "__main__":
    main()
