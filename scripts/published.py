"""Published end-to-end measurements beside which composed profiles are held: rows to fit hosts on, rows to test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from heliosim.hardware.architecture import Architecture, open_architecture, parse_architecture
from heliosim.hardware.compose import ComposedModel

FT_FITTED = ("gpt-20b", 8, 1, 20, 8)
"""FasterTransformer's row that fits the waiting of ranks: model, ranks, batch, prompt, output tokens."""
SPLITWISE_FITTED = (8, 512, 1)
"""Splitwise's rows that fit launches and a starting request: ranks, prompt, batch (on A100; on H100 their ratio)."""
DISTSERVE_FITTED_TP = 1
DISTSERVE_GRID = [(b, c) for b in (1, 4, 16, 32, 64, 96, 128, 192) for c in (128, 256, 512, 1024)]
DISTSERVE_PROMPTS = [(1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (2, 512), (4, 128), (4, 256), (8, 128)]
VLLM_2023_BATCHED_TOKENS = 2560
"""Prompt tokens a vLLM of 2023 reads in one step, by default."""


class Row(NamedTuple):
    """One published figure: where it is from, what it measures, and in what unit."""

    source: str
    group: str
    device: str
    model: str
    tp: int
    what: str
    unit: str
    measured: float
    conditions: dict[str, Any]


def gpt(heads: int, layers: int, head_dim: int = 128, vocabulary: int = 51_200) -> Architecture:
    """A GPT of FasterTransformer's tables: layers as OPT's have them."""
    hidden = heads * head_dim
    values = {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }
    return parse_architecture(values, f"gpt-{layers}x{hidden}")


def static_batch(model: ComposedModel, batch: int, prompt: int, output: int) -> float:
    """Seconds of a batch that reads its prompts in one step and decodes in lockstep."""
    contexts = np.linspace(prompt + 1, max(prompt + 1, prompt + output - 1), 7)
    steps = [model.step_seconds(decode_rows=batch, context=float(c), allow_extrapolation=True) for c in contexts]
    return prompts_read(model, batch, prompt) + (output - 1) * float(np.mean(steps))


def prompts_read(model: ComposedModel, batch: int, prompt: int, per_step: int | None = None) -> float:
    """Seconds until ``batch`` prompts are read, ``per_step`` tokens at most in one step (default: all at once)."""
    size = batch if per_step is None else max(1, per_step // prompt)
    full, rest = divmod(batch, size)
    return sum(
        count * model.step_seconds(prompts=[(prompt, prompt)] * rows, allow_extrapolation=True)
        for count, rows in ((full, size), (1, rest))
        if rows and count
    )


def fastertransformer(data: Path) -> list[Row]:
    table = pd.read_csv(data / "fastertransformer/gpt_a100_latency.csv")
    return [
        Row("FasterTransformer", r.model, "A100-80GB", r.model, r.tensor_parallel, "latency", "ms", r.latency_ms,
            {"batch": r.batch_size, "prompt": r.input_len, "output": r.output_len, "heads": r.num_heads,
             "layers": r.num_layers, "memory_gb": r.memory_gb})
        for r in table.itertuples()
    ]  # fmt: skip


def tensorrt(data: Path) -> list[Row]:
    """Throughputs are per GPU: see the note of the validation page."""
    table = pd.read_csv(data / "tensorrt_llm/a100_fp16_v0.6.1.csv")
    return [
        Row("TensorRT-LLM", r.metric, "A100-80GB", r.model.replace("llama-", "llama2-"), r.tensor_parallel, r.metric,
            "tok/s per GPU" if r.metric == "throughput" else "ms", r.value,
            {"batch": r.batch_size, "prompt": r.input_len, "output": r.output_len})
        for r in table.itertuples()
    ]  # fmt: skip


def splitwise(data: Path) -> list[Row]:
    """Medians of the repeats. Prompts whose answer leaves Llama-2's window of 4,096 tokens are a group of their own."""
    table = pd.read_csv(data / "splitwise/perf_model.csv").drop_duplicates()
    table = table[table.token_size == 128]
    keys = ["hardware", "tensor_parallel", "prompt_size", "batch_size"]
    found = []
    for (gpu, tp, prompt, batch), rows in table.groupby(keys):
        beyond = prompt + 128 > 4096
        for what, column in (("prompt", "prompt_time"), ("token", "token_time")):
            group = "beyond the window" if beyond else "token" if what == "token" else "prompt, batch 1"
            group = "prompt, batch over 1" if group == "prompt, batch 1" and batch > 1 else group
            device = "A100-80GB" if gpu.startswith("a100") else "H100-80GB"
            conditions = {"batch": int(batch), "prompt": int(prompt)}
            median = float(rows[column].median())
            found.append(Row("Splitwise", group, device, "llama2-70b", int(tp), what, "ms", median, conditions))
    return found


def distserve(data: Path, engine: str) -> list[Row]:
    """Points of the published step-time fits, inside the KV capacity of the deployment."""
    path = data / f"distserve/profiler-a100-80g.{engine}.json"
    fits = json.loads(path.read_text(encoding="utf-8"))["facebook/opt-13b"]
    capacity = pd.read_csv(data / "distserve/max_num_tokens.csv")
    found = []
    for text, fit in fits.items():
        tp = int(text)
        room = int(capacity[(capacity.tp == tp) & (capacity.pp == 1)].max_num_tokens.iloc[0])
        for rows, context in DISTSERVE_GRID:
            if rows * context <= room:
                large = rows >= fit["decoding_large_small_bs_threshold"]
                a, b, c = fit["decoding_largebs" if large else "decoding_smallbs"]
                found.append(Row(f"DistServe, {engine}", "decode", "A100-80GB", "opt-13b", tp, "decode", "ms",
                                 a + b * rows * context + c * rows, {"batch": rows, "context": context}))  # fmt: skip
        for count, tokens in DISTSERVE_PROMPTS:
            a, b, c = fit["prefill"]
            seconds = a + b * count * tokens + c * count * tokens**2
            found.append(Row(f"DistServe, {engine}", "prefill", "A100-80GB", "opt-13b", tp, "prefill", "ms", seconds,
                             {"batch": count, "prompt": tokens}))  # fmt: skip
    return found


def optimum(data: Path) -> list[Row]:
    """Seconds per decode step (511 after the first token, prompts of 256) and of the prompts' step."""
    table = pd.read_csv(data / "optimum_benchmark/llama2_7b_a100_eager.csv")
    found = []
    for _, r in table[table["Experiment Name"] == "fp16"].iterrows():
        batch = int(r["Per Process Batch Size"])
        for what, value in (("decode", r["Decode Latency (s)"] / 511), ("prefill", r["Prefill Latency (s)"])):
            found.append(Row("optimum-benchmark", what, "A100-80GB", "llama2-7b", 1, what, "ms", 1e3 * value,
                             {"batch": batch, "prompt": 256, "context": 512}))  # fmt: skip
    return sorted(found, key=lambda row: (row.group, row.conditions["batch"]))


def qwen3_32b() -> Architecture:
    """Qwen3-32B, whose layers are a Llama's but for the norms of queries and keys."""
    values = {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
    }
    return parse_architecture(values, "qwen3-32b")


SERVED_SHARE = 0.9
"""Share of a device's memory that vLLM uses by default; requests whose KV does not fit beside the weights queue."""


def served(data: Path) -> list[Row]:
    """Time per token of vLLM (unquantised) on H100 with so many requests always under way, where their KV fits."""
    table = pd.read_csv(data / "aiconfigurator/e2e/silicon_sample_subset.csv")
    table = table[table.precision.isna() & (table.backend == "vllm") & (table.system == "h100_sxm")]
    a, found = qwen3_32b(), []
    for r in table.itertuples():
        tp, batch = int(r.tp_size), int(r.batch_size)
        kv = batch * (r.isl + r.osl) * a.layers * a.kv_bytes("bf16", tp)
        if a.weights_bytes("bf16", tp=tp) + kv <= SERVED_SHARE * 80e9:
            conditions = {"batch": batch, "prompt": int(r.isl), "output": int(r.osl)}
            found.append(
                Row("vLLM served", "tpot", "H100-80GB", "qwen3-32b", tp, "tpot", "ms", r.silicon_tpot_ms, conditions)
            )
    return found


def tpot(model: ComposedModel, batch: int, prompt: int, output: int) -> float:
    """Seconds per token with ``batch`` requests always under way: a decode step, and a share of reading prompts (one
    of every other request while a request makes its ``output`` tokens).
    """
    step = model.step_seconds(decode_rows=batch, context=prompt + output / 2, allow_extrapolation=True)
    return step + (batch - 1) * prompts_read(model, 1, prompt) / output


def architecture_of(row: Row) -> Architecture:
    if row.source == "FasterTransformer":
        return gpt(row.conditions["heads"], row.conditions["layers"])
    return qwen3_32b() if row.model == "qwen3-32b" else open_architecture(row.model)
