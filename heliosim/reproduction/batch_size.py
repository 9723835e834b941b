"""Rows about batch size: how many more requests fit beside a partial model. Bytes are those of one rank."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from heliosim.composing import model_facts
from heliosim.formats.profile import ModelFacts
from heliosim.hardware.compose import Exits, compose_model
from heliosim.hardware.device import open_device
from heliosim.memory_model import STEP_TOKENS, largest_batch, needs_of
from heliosim.reproduction.inputs import (
    CONTEXT_TOKENS,
    DEVICE,
    ENGINE_ROWS,
    HBM_GIB,
    SOLVED_FROM,
    TENSOR_PARALLEL,
    USABLE_SHARE,
)
from heliosim.reproduction.rows import Answer, Row, Runs, Value
from heliosim.reproduction.shapes import GIB, architecture, layers

QUARTERS = (1, 2, 3)
BUDGET = round(HBM_GIB[DEVICE] * USABLE_SHARE * GIB)
"""Memory of one GPU, less what the driver keeps."""


@cache
def facts(model: str, dtype: str = "fp16") -> ModelFacts:
    """A rank of a model as composed profiles have it, cut anywhere, with what a step needs beside weights and KV."""
    a = architecture(model)
    exits = Exits(tuple(range(1, a.layers)), "anywhere")
    made = compose_model(a, open_device(DEVICE), dtype=dtype, tp=TENSOR_PARALLEL[model], exits=exits)
    return model_facts(made, 0)


@cache
def rows(model: str, depth: int, context: int, widths: float = 0.0, cap: int | None = None, dtype: str = "fp16") -> int:
    """Requests of ``context`` tokens beside ``depth`` layers. A request keeps ``widths`` hidden states of each of its
    tokens at any depth, split over the ranks (Megatron's sequence parallelism); ``cap``: most rows.
    """
    found, needs = facts(model, dtype), needs_of(facts(model, dtype), STEP_TOKENS)
    spec = replace(
        found.spec(model), request_bytes=round(widths * found.hidden_bytes * context / TENSOR_PARALLEL[model])
    )
    return largest_batch(spec, depth, context, BUDGET, replace(needs, cap=cap))


def gain(
    model: str, depth: int, context: int, widths: float = 0.0, cap: int | None = None, dtype: str = "fp16"
) -> float:
    """Requests beside ``depth`` layers over those beside all of them."""
    of = [rows(model, d, context, widths, cap, dtype) for d in (depth, layers(model))]
    return of[0] / of[1]


def kv_alone(model: str, depth: int, context: int) -> float:
    """The same with no blocks, as if any number of bytes could be a request's: the bound of KV alone."""
    s = facts(model).spec(model)
    left = [(BUDGET - s.weights_bytes(d)) / d for d in (depth, s.layers)]
    return left[0] / left[1]


@cache
def solved_widths() -> float:
    """Hidden states per token that come nearest to the one figure of ``SOLVED_FROM``: whole blocks make it a stair."""
    model, depth, wanted = SOLVED_FROM
    context = CONTEXT_TOKENS["HellaSwag"]
    tried = [k / 20 for k in range(1, 200)]
    return min(tried, key=lambda widths: abs(gain(model, depth, context, widths) - wanted))


def measured_widths() -> float:
    """What FasterTransformer's buffers hold per prompt token, fitted to its own memory figures."""
    return open_device(DEVICE).host("fastertransformer-cpp").activation_widths


def _depths(model: str) -> list[int]:
    return [layers(model) * q // 4 for q in QUARTERS]


def table(model: str, workload: str, widths: float, cap: int | None) -> Answer:
    """Gains at a quarter, half and three quarters of the layers."""
    context = CONTEXT_TOKENS[workload]
    buffers = measured_widths() * TENSOR_PARALLEL[model]  # FasterTransformer's are whole on every rank
    found = _depths(model)
    return Answer(
        tuple(Value(f"{model}@{d}", gain(model, d, context, widths, cap)) for d in found),
        beside=(
            *(Value(f"{model}@{d}, KV alone, not rounded", kv_alone(model, d, context)) for d in found),
            *(Value(f"{model}@{d}, buffers of FasterTransformer", gain(model, d, context, buffers)) for d in found),
            Value("hidden states per token beside KV", widths),
            Value("requests beside the full model", float(rows(model, layers(model), context, widths, cap))),
        ),
    )


def largest(widths: float) -> Answer:
    """The largest gain of the tables; other placements beside, since the paper names none."""
    context = CONTEXT_TOKENS["HellaSwag"]

    def of(model: str, depth: int, dtype: str = "fp16") -> float:
        return gain(model, depth, context, widths, dtype=dtype)

    gains = [of(m, d) for m in ("Llama3-8B", "Llama2-70B") for d in _depths(m)]
    others = (("CodeLlama-34B", 8), ("CodeLlama-34B", 16), ("Llama2-70B", 8), ("Llama2-70B", 16), ("Llama2-13B", 8))
    small = [of("OPT-1.3B", 6, "fp32"), of("OPT-6.7B", 9, "fp32")]
    return Answer(
        (Value("largest of the tables", max(gains)), Value("OPT pair (v1)", max(small))),
        beside=tuple(Value(f"{m}@{d}", of(m, d)) for m, d in others),
    )


_INPUTS = ("shapes", "memory sizes", "tensor parallel degrees")
_ASSUMED = ("usable memory", "per-request fixed cost", "row limit", "context lengths")
_SHAREGPT = (
    "Defaults have no limit on rows, so the gain is that of memory and the context cancels. The calibrated set-up has "
    "vLLM's default of 256 rows where requests are served: then the gain saturates for Llama3-8B. The paper's figures "
    "fall with depth where ours meet the same limit; a mean over a run with its start and end would do that, and the "
    "paper does not describe one."
)
_HELLASWAG = (
    "Defaults: the memory model of composed profiles (weights, KV blocks, what a step needs). "
    "Calibrated: one number, hidden states that a request keeps per token at any depth, is solved from {solved} alone; "
    "the other figures test it. A rank keeps its share of them, as in the sequence parallelism of Megatron-LM (EE-LLM, "
    "on which HELIOS builds, is made of it); whole on every rank, as was tried first, Llama2-70B comes to 9.5, 5.1 "
    "and 2.6 instead. FasterTransformer's own buffers "
    "(beside), measured independently, are larger and would lower every gain. No limit on rows: 256 would leave no "
    "gain, since the full model serves more. At a quarter of the layers the paper's gain is lower than any of these."
)


def _row(model: str, workload: str, remark: str, why: str, fitted: tuple[str, ...] = ()) -> Row:
    cap = ENGINE_ROWS if workload == "ShareGPT" else None
    return Row(
        f"batch-{model.split('-')[0].lower()}-{workload.lower()}",
        f"batch size against the full model, {model}, {workload}",
        "calibrated",
        "x",
        lambda _: table(model, workload, 0.0, None),
        inputs=(*_INPUTS, "one batch figure"),
        assumptions=_ASSUMED,
        remark=remark,
        why=why,
        fitted=fitted,
        compute_calibrated=lambda _: table(model, workload, solved_widths(), cap),
    )


def _largest(_: Runs) -> Answer:
    return largest(0.0)


def _largest_calibrated(_: Runs) -> Answer:
    return largest(solved_widths())


_SOLVED = f"{SOLVED_FROM[0]}@{SOLVED_FROM[1]}"
_HELLASWAG = _HELLASWAG.format(solved=_SOLVED)
_LIMIT = "without a limit on rows memory gives more than the paper's engine served"

ROWS = (
    _row("Llama3-8B", "ShareGPT", _SHAREGPT, _LIMIT),
    _row("Llama3-8B", "HellaSwag", _HELLASWAG, "a request costs more than KV", (_SOLVED,)),
    _row("Llama2-70B", "ShareGPT", _SHAREGPT, _LIMIT),
    _row("Llama2-70B", "HellaSwag", _HELLASWAG, "a request costs more than KV"),
    Row(
        "batch-largest",
        "largest gain in batch size",
        "calibrated",
        "x",
        _largest,
        inputs=(*_INPUTS, "one batch figure"),
        assumptions=_ASSUMED,
        remark="The paper does not say of which model and depth; candidates stand beside.",
        why="model and depth are not named",
        compute_calibrated=_largest_calibrated,
    ),
)
