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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heliosim_calibrate.behaviour import write_table
from heliosim_calibrate.fit import region_of, relative_nnls
from kernel_times import GPUS, LARGE, SMALL, Gpu, Kernels, Shape
from synthetic_exits import SEED, TASKS, TEXT_TOKENS, TEXTS, THRESHOLD, behaviour_columns

from heliosim import __version__
from heliosim.costs import LATER_TERMS, TERMS, StepShape
from heliosim.formats.files import new_folder, sha256_of
from heliosim.formats.profile import (
    PROFILE_FOLDER,
    SCHEMA_VERSION,
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
from heliosim.types import blocks_for

MAX_ROWS, MAX_CONTEXT, MAX_TOKENS = 256, 4096, 8192
HOST_STEP_S = 1e-3
"""Scheduling, sampling and launch of one step: a choice (about what CUDA-graph engines show beside their kernels)."""


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
    return hashlib.blake2b(repr(tuple(shape[:-1])).encode(), digest_size=4).digest()[0] % 5 == 0


OWN_FITS = ("check", "check_row", "fill_layer", "fill_layer_token")
"""Terms whose kernels are known apart, so that early exits are charged their own heads and fills."""
ABSENT = ("row", "token", "gathered", *LATER_TERMS)
"""Host work per row and token, which no kernel table holds; KV really held, which these fits pad as an engine does."""


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
    with new_folder(out, PROFILE_FOLDER, overwrite=True) as folder:
        pq.write_table(pa.Table.from_pylist(rows), folder / "steps.parquet", compression="zstd", compression_level=15)
        write_table(columns, folder / "behaviour.parquet")
        facts = ProfileFile(
            schema_version=SCHEMA_VERSION,
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
