"""A small made-up profile through the real schema: two models, hand-made costs, a behaviour table of a few texts.

Needs no torch. Every number is a function of its name, so two calls write the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heliosim_calibrate.behaviour import Columns, sources_of, write_table

from heliosim.costs import TERMS, StepCost, StepShape
from heliosim.formats.files import sha256_of
from heliosim.formats.profile import (
    SCHEMA_VERSION,
    BehaviourFacts,
    ClockName,
    CostFit,
    Curves,
    Energy,
    HoldOut,
    LargestBatch,
    LoadFit,
    MemoryFacts,
    ModelFacts,
    Profile,
    ProfileFile,
    load_profile,
    write_profile,
)
from heliosim.premises import measure_premises
from heliosim.scenario import Scenario
from heliosim.streams import stream
from heliosim.types import ModelSpec, blocks_for
from tests.helpers import spec

SMALL = spec("small", 6, (2, 4, 6), max_context=256)
LARGE = spec("large", 12, (4, 8, 12), max_context=256)
MODELS: Mapping[str, ModelSpec] = {"small": SMALL, "large": LARGE}
TASKS: Mapping[str, float] = {"chat": 0.7, "code": 0.9, "qa": 0.3}
"""Share of a task's tokens that the first exit is confident about, nearly; every deeper exit adds 0.1."""
TEXTS_PER_TASK, TOKENS_PER_TEXT, PROMPT_TOKENS, THRESHOLD = 3, 20, 24, 0.8

STEP_SECONDS = {
    "step": 2e-4,
    "row": 1e-5,
    "token": 2e-6,
    "layer": 1e-4,
    "layer_many": 1.5e-5,
    "layer_token": 1e-6,
    "layer_token_more": 8e-7,
    "gathered": 2e-8,
    "layer_decode": 2e-5,
    "layer_decode_many": 1e-5,
    "layer_decode_row": 2e-6,
    "layer_decode_kv": 1e-8,
    "layer_decode_many_kv": 0.0,
    "layer_prefill_row": 2e-5,
    "layer_prefill_kv": 1e-9,
    "check": 5e-5,
    "check_row": 1e-6,
    "fill_layer": 1e-5,
    "fill_layer_token": 1e-7,
    "started": 1e-5,
    "ended": 1e-5,
    "layer_mixed_context": 0.0,
    "layer_decode_context": 0.0,
}
CURVES: Mapping[str, Any] = {
    "layer": [(1, 3e-5), (8, 3.3e-5), (64, 7e-5), (300, 5e-4)],
    "head": [(1, 4e-5), (5, 4.1e-5), (20, 9.7e-5)],
}
CURVED_SECONDS = {
    "step": 2e-4,
    "row": 1e-6,
    "layer_decode_row": 2e-6,
    "layer_mixed_context": 0.9e-8,
    "layer_decode_context": 1.37e-8,
    "layer_prefill_kv": 1.1e-9,
    "fill_layer": 1e-5,
    "started": 1e-5,
}
"""Of a profile whose layers and heads cost what ``CURVES`` say, and decoding what the rows really hold."""
LOAD_SECONDS = {"load": 1e-3, "layer": 1e-4, "weights_byte": 1e-8, "kv_byte": 1e-9, "extend_token_layer": 1e-7}
WALL_FACTOR = 1.5
"""Wall seconds for every CPU second."""


def write_synthetic_profile(
    folder: Path,
    *,
    clocks: Sequence[ClockName] = ("cpu", "wall"),
    max_rows: int = 16,
    max_context: int = 256,
    max_tokens: int = 256,
    energy: Energy | None = None,
    checkpoints: Mapping[str, str] | None = None,
    curves: bool = False,
    memory: MemoryFacts | None = None,
) -> Profile:
    """Write the profile into ``folder`` and load it. ``max_*``: the range its costs claim to be calibrated for;
    ``curves``: of its costs, instead of straight lines alone; ``memory``: what models need beside weights and KV.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = behaviour_columns()
    write_table(columns, folder / "behaviour.parquet")
    pq.write_table(pa.Table.from_pylist(_steps()), folder / "steps.parquet")
    limits = {"max_rows": max_rows, "max_context": max_context, "max_tokens": max_tokens}
    facts = ProfileFile(
        schema_version=SCHEMA_VERSION,
        kind="measured",
        device={"device": "cpu", "host_cpu": "made up", "threads": 1},
        versions={"heliosim": "test"},
        seed=0,
        models={
            n: _facts(s, clocks, limits, (checkpoints or {}).get(n, f"elsewhere/{n}"), curves).model_copy(
                update={"memory": memory}
            )
            for n, s in MODELS.items()
        },
        energy=energy or Energy(source="unavailable", reason="made up"),
        behaviour=BehaviourFacts(
            tasks=dict.fromkeys(TASKS, TEXTS_PER_TASK),
            split="calibration",
            tokens_per_text=TOKENS_PER_TEXT,
            threshold=THRESHOLD,
            sources=tuple(name for s in MODELS.values() for name in sources_of(s, THRESHOLD)),
            rows=len(columns["position"]),
        ),
        files={name: sha256_of(folder / name) for name in ("behaviour.parquet", "steps.parquet")},
    )
    write_profile(folder, facts)
    premises = measure_premises(load_profile(folder).behaviour, THRESHOLD)
    write_profile(folder, facts.model_copy(update={"premises": [p.row() for p in premises]}))
    return load_profile(folder)


def behaviour_columns() -> Columns:
    """Texts of every task under every source; confidence rises with depth, by as much as the task is easy."""
    columns: Columns = {k: [] for k in ("sequence", "task", "source", "prompt_tokens", "position", "end", "token_id")}
    keys = [(s, rank, f"{s.name}@{e}") for s in MODELS.values() for rank, e in enumerate(s.exits)]
    n = TOKENS_PER_TEXT
    for source in (name for s in MODELS.values() for name in sources_of(s, THRESHOLD)):
        for task, easy in TASKS.items():
            for k in range(TEXTS_PER_TASK):
                sequence = f"{task}-{k:03d}"
                rng = stream(0, "synthetic", source, sequence)
                luck = {name: rng.random(n) for name in MODELS}  # one for all exits of a model: hard tokens stay hard
                columns["sequence"] += [sequence] * n
                columns["task"] += [task] * n
                columns["source"] += [source] * n
                columns["prompt_tokens"] += [PROMPT_TOKENS + k] * n
                columns["position"] += list(range(n))
                columns["end"] += [15 + k if k else None] * n
                columns["token_id"] += rng.integers(100, size=n).tolist()
                for model, rank, key in keys:
                    is_confident = luck[model.name] < easy + 0.1 * rank
                    low, high = 0.1 + 0.69 * rng.random(n), 0.81 + 0.18 * rng.random(n)
                    confidence = np.where(is_confident, high, low)
                    agrees = (rng.random(n) < 0.4 + 0.6 * confidence) | (rank == len(model.exits) - 1)
                    for name, values in (
                        ("confidence", confidence),
                        ("margin", confidence / 2),
                        ("entropy", 1 - confidence),
                    ):
                        columns.setdefault(f"{name}:{key}", []).extend(values.tolist())
                    columns.setdefault(f"agrees:{key}", []).extend(agrees.tolist())
    return columns


def scenario(profile: Profile, **changes: Any) -> Scenario:
    """A HELIOS run of 40 drawn requests in 40 kB; ``changes`` replace whole sections."""
    values: dict[str, Any] = {
        "name": "test",
        "profile": str(profile.folder),
        "models": ("small", "large"),
        "workload": workload(),
        "memory": {"budget_bytes": 40_000},
        "batcher": {"max_batch": 8, "token_budget": 64},
        "controller": {"kind": "helios", "probe_requests": 2, "reassess_interval": 15},
    }
    return Scenario.model_validate(values | changes)


def workload(
    requests: int = 40, rate_per_s: float = 200.0, prompt: Any = None, output: Any = None, max_tokens: int = 32
) -> dict[str, Any]:
    """A workload section over the profile's tasks; by default prompts of 4-40 and outputs of 1-24 tokens."""
    lengths = {
        "prompt_tokens": prompt or {"kind": "uniform", "low": 4, "high": 40},
        "output_tokens": output or {"kind": "uniform", "low": 1, "high": 24},
        "max_tokens": max_tokens,
    }
    return {
        "requests": requests,
        "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
        "tasks": [{"task": task, **lengths} for task in TASKS],
        "order": "mix",
    }


def _steps() -> list[dict[str, Any]]:
    """Decode steps of one to four rows; every third visit of five steps takes twice as long as the costs say."""
    cost = StepCost(tuple(STEP_SECONDS[t] for t in TERMS), 64, 256, 256)
    found = []
    for visit in range(24):
        model, rows = tuple(MODELS.values())[visit % 2], 1 + visit % 4
        shape = StepShape(rows, rows, rows, rows * 32, 0, 0, model.layers, 1, rows, 0, 0, 0, 32)
        seconds = cost.seconds(shape) * (2.0 if visit % 3 == 0 else 0.8)
        row = {"model": model.name, "mode": "vanilla", "visit": visit, **shape._asdict()}
        found += [row | {"cpu_s": seconds, "wall_s": WALL_FACTOR * seconds}] * 5
    return found


def _facts(
    model: ModelSpec, clocks: Sequence[ClockName], limits: Mapping[str, int], checkpoint: str, curves: bool
) -> ModelFacts:
    factor = {"cpu": 1.0, "wall": WALL_FACTOR}
    seconds = dict.fromkeys(STEP_SECONDS, 0.0) | CURVED_SECONDS if curves else STEP_SECONDS
    holdout = HoldOut(
        cells=4, median_abs_error=0.02, p90_abs_error=0.05, mean_signed_error=0.01, by_region={"decode 1": 0.02}
    )
    step: dict[ClockName, CostFit] = {
        clock: CostFit(
            seconds_per={k: v * factor[clock] for k, v in seconds.items()},
            curves=Curves(**CURVES) if curves else None,
            steps=100,
            cell_spread=0.03,
            holdout=holdout,
            **limits,
        )
        for clock in clocks
    }
    load: dict[ClockName, LoadFit] = {
        clock: LoadFit(
            seconds_per={k: v * factor[clock] for k, v in LOAD_SECONDS.items()}, loads=10, median_abs_error=0.05
        )
        for clock in clocks
    }
    return ModelFacts(
        architecture="opt",
        checkpoint=checkpoint,
        weights_sha256="0" * 64,
        dtype="float32",
        layers=model.layers,
        exits=model.exits,
        exit_kind=model.kind,
        layer_bytes=model.layer_bytes,
        base_bytes=model.base_bytes,
        exit_head_bytes=dict(model.exit_head_bytes),
        kv_bytes_per_token_layer=model.kv_bytes_per_token_layer,
        hidden_bytes=model.hidden_bytes,
        max_context=model.max_context,
        vocabulary=model.vocabulary,
        step=step,
        load=load,
        largest_batch=tuple(_largest(model, depth, 30_000, 128) for depth in model.exits),
    )


def _largest(model: ModelSpec, depth: int, budget: int, context: int) -> LargestBatch:
    blocks = (budget - model.weights_bytes(depth)) // model.block_bytes(depth)
    return LargestBatch(depth=depth, context_tokens=context, budget_bytes=budget, rows=blocks // blocks_for(context))
