"""Rows about weights: what depths of the models weigh, and their share of the memory of GPUs."""

from __future__ import annotations

from heliosim.reproduction.inputs import HBM_GIB, OVERHEAD_GIB
from heliosim.reproduction.rows import Answer, Row, Runs, Value
from heliosim.reproduction.shapes import GIB, weights_bytes, weights_gib


def saved(_: Runs) -> Answer:
    """Weights that are not resident at the depths HELIOS serves with, FP32."""
    pairs = (("OPT-1.3B", 6), ("OPT-6.7B", 9))
    return Answer(tuple(Value(f"{m}@{d}", weights_gib(m, dtype="fp32") - weights_gib(m, d, "fp32")) for m, d in pairs))


def large_pair(_: Runs) -> Answer:
    """Weights of the large pair, and of the partial model HELIOS serves with."""
    code, large, partial = weights_gib("CodeLlama-34B"), weights_gib("Llama2-70B"), weights_gib("CodeLlama-34B", 32)
    return Answer(
        (
            Value("CodeLlama-34B", code),
            Value("Llama2-70B", large),
            Value("HELIOS (CodeLlama-34B@32)", partial),
            Value("saving against Llama2-70B, %", 100 * (1 - partial / large)),
        )
    )


def llama_set(_: Runs) -> Answer:
    """Memory of a process that holds the model: its weights and what the CUDA runtime takes."""
    low, high = OVERHEAD_GIB
    models = ("Llama2-7B", "Llama3-8B", "Llama2-13B")
    found = [(m, weights_gib(m)) for m in models]
    return Answer(
        tuple(Value(m, w + (low + high) / 2, w + low, w + high) for m, w in found),
        beside=tuple(Value(f"{m}, weights alone", w) for m, w in found),
    )


def shares(_: Runs) -> Answer:
    """Weights over the memory of the GPUs, %. A model that was run is weighed in bytes against the binary size of the
    memory; one that is only cited, by its name's parameter count against the decimal size that is sold.
    """
    large, small_gpu, b100 = weights_gib("Llama2-70B"), HBM_GIB["A100-40GB"], HBM_GIB["B100"]
    cited = weights_bytes("Llama3.1-405B")
    return Answer(
        (
            Value("Llama2-70B on 4x 40 GB", 100 * large / (4 * small_gpu)),
            Value("Llama2-70B on a B100", 100 * large / b100),
            Value("Llama3.1-405B on 8x 192 GB", 100 * cited / (8 * b100 * 1e9)),
        ),
        beside=(
            Value("Llama2-70B on 4x 40 GB, both decimal", 100 * large * GIB / (4 * small_gpu * 1e9)),
            Value("Llama2-70B on a B100, both decimal", 100 * large * GIB / (b100 * 1e9)),
            Value("Llama3.1-405B on 8x 192 GB, both binary", 100 * cited / (8 * b100 * GIB)),
        ),
    )


ROWS = (
    Row(
        "weights-saved",
        "weight memory saved at the depths HELIOS serves with",
        "exact",
        "GiB",
        saved,
        inputs=("shapes", "opt exits"),
        assumptions=("opt runs are FP32",),
    ),
    Row(
        "weights-large-pair",
        "weights of the large pair and of HELIOS",
        "exact",
        "GiB",
        large_pair,
        inputs=("shapes", "helios depth of the large pair"),
        remark="The paper's GB are binary (GiB).",
    ),
    Row(
        "weights-llama-set",
        "memory of the Llama models, fully loaded",
        "exact",
        "GiB",
        llama_set,
        inputs=("shapes", "process overhead"),
        remark=(
            "The middle of the overhead's range is added; the interval is that range. The weights alone stand beside."
        ),
    ),
    Row(
        "hbm-shares",
        "share of GPU memory that weights take",
        "exact",
        "%",
        shares,
        inputs=("shapes", "memory sizes"),
        assumptions=("units of memory",),
        remark="No one unit gives all three within 2 %: what the other unit gives stands beside.",
    ),
)
