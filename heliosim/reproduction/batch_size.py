"""Rows about batch size: how many more requests fit beside a partial model."""

from __future__ import annotations

from dataclasses import dataclass

from heliosim.reproduction.inputs import ACTIVATION_COPIES, CAPS, CONTEXT_TOKENS, HBM_GIB, TENSOR_PARALLEL, USABLE_SHARE
from heliosim.reproduction.rows import Answer, Row, Runs, Value
from heliosim.reproduction.shapes import GIB, hidden_bytes, kv_bytes, layers, weights_bytes

QUARTERS = (1, 2, 3)


@dataclass(frozen=True)
class MemoryModel:
    """A pool of bytes beside weights. A request takes KV over the resident layers and, at any depth, ``copies`` hidden
    states (FP16) of each of its tokens; no batch has more than ``cap`` requests (None: no limit).
    """

    budget_bytes: float
    copies: float = 0.0
    cap: int | None = None

    def rows(self, model: str, depth: int, context: int, dtype: str = "fp16") -> float:
        """Requests of ``context`` tokens that fit beside ``depth`` layers; not rounded, and 0 if the weights do not."""
        left = self.budget_bytes - weights_bytes(model, depth, dtype)
        each = context * (kv_bytes(model, depth, dtype) + self.copies * hidden_bytes(model))
        fitting = max(0.0, left / each)
        return fitting if self.cap is None else min(fitting, float(self.cap))

    def gain(self, model: str, depth: int, context: int, dtype: str = "fp16") -> float:
        """Batch beside ``depth`` layers over the batch beside all of them."""
        return self.rows(model, depth, context, dtype) / self.rows(model, layers(model), context, dtype)


def budget_bytes(model: str) -> float:
    """Memory of the GPUs a model was run on, less what the runtime keeps."""
    return TENSOR_PARALLEL[model] * HBM_GIB["A100-40GB"] * USABLE_SHARE * GIB


def table(model: str, workload: str) -> Answer:
    """Gains at a quarter, half and three quarters of the layers."""
    budget, context = budget_bytes(model), CONTEXT_TOKENS[workload]
    whole = MemoryModel(budget, ACTIVATION_COPIES, CAPS[workload])
    depths = [layers(model) * q // 4 for q in QUARTERS]
    return Answer(
        tuple(Value(f"{model}@{d}", whole.gain(model, d, context)) for d in depths),
        beside=(
            *(Value(f"{model}@{d}, KV alone", MemoryModel(budget).gain(model, d, context)) for d in depths),
            *(
                Value(f"{model}@{d}, without the cap", MemoryModel(budget, ACTIVATION_COPIES).gain(model, d, context))
                for d in depths
            ),
            Value(f"{model}, requests beside the full model", whole.rows(model, layers(model), context)),
        ),
    )


def llama3_sharegpt(_: Runs) -> Answer:
    return table("Llama3-8B", "ShareGPT")


def llama3_hellaswag(_: Runs) -> Answer:
    return table("Llama3-8B", "HellaSwag")


def llama2_sharegpt(_: Runs) -> Answer:
    return table("Llama2-70B", "ShareGPT")


def llama2_hellaswag(_: Runs) -> Answer:
    return table("Llama2-70B", "HellaSwag")


def largest(_: Runs) -> Answer:
    """The largest gain of the tables above without a cap; other placements beside, since the paper names none."""
    context = CONTEXT_TOKENS["HellaSwag"]

    def gain(model: str, depth: int, dtype: str = "fp16") -> float:
        return MemoryModel(budget_bytes(model), ACTIVATION_COPIES).gain(model, depth, context, dtype)

    gains = [gain(m, layers(m) * q // 4) for m in ("Llama3-8B", "Llama2-70B") for q in QUARTERS]
    others = (("CodeLlama-34B", 8), ("CodeLlama-34B", 16), ("Llama2-70B", 8), ("Llama2-70B", 16), ("Llama2-13B", 8))
    small = [gain("OPT-1.3B", 6, "fp32"), gain("OPT-6.7B", 9, "fp32")]
    return Answer(
        (Value("largest of the tables", max(gains)), Value("OPT pair (v1)", max(small))),
        beside=tuple(Value(f"{m}@{d}", gain(m, d)) for m, d in others),
    )


_INPUTS = ("shapes", "memory sizes", "tensor parallel degrees")
_ASSUMED = ("usable memory", "per-request fixed cost", "batch cap", "context lengths")


def _row(name: str, claim: str, compute: object, remark: str) -> Row:
    assert callable(compute)
    return Row(name, claim, "calibrated", "x", compute, inputs=_INPUTS, assumptions=_ASSUMED, remark=remark, digits=3)


_SHAREGPT = (
    "Under vLLM's default of 256 rows the gain saturates. The paper's figures fall with depth where ours meet the same "
    "limit: a mean over a run with its start and end, which the paper does not describe, would do that."
)
_HELLASWAG = (
    "Half and three quarters follow from the fixed cost alone. At a quarter the limit on rows decides; the limit is "
    "one "
    "number for both models, whose product with the unpublished context length is what counts."
)

ROWS = (
    _row("batch-llama3-sharegpt", "batch size against the full model, Llama3-8B, ShareGPT", llama3_sharegpt, _SHAREGPT),
    _row(
        "batch-llama3-hellaswag",
        "batch size against the full model, Llama3-8B, HellaSwag",
        llama3_hellaswag,
        _HELLASWAG,
    ),
    _row(
        "batch-llama2-sharegpt", "batch size against the full model, Llama2-70B, ShareGPT", llama2_sharegpt, _SHAREGPT
    ),
    _row(
        "batch-llama2-hellaswag",
        "batch size against the full model, Llama2-70B, HellaSwag",
        llama2_hellaswag,
        _HELLASWAG,
    ),
    _row(
        "batch-largest",
        "largest gain in batch size",
        largest,
        "The paper does not say of which model and depth; candidates stand beside.",
    ),
)
