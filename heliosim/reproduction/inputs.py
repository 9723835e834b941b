"""What rows rest on: published figures taken as inputs, and assumptions where nothing is published.

Every constant here is named in ``INPUTS`` (published: P; derived from what is published: D) or in ``ASSUMPTIONS``
(ours: C), so that the report can say what a value follows from. A row never shows an input as its result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# --- memory -------------------------------------------------------------------------------------------------

HBM_GIB: Mapping[str, int] = {"A100-40GB": 40, "B100": 192}
"""Nominal memory: stacks are built in binary sizes, so "40 GB" are 5 x 8 GiB."""
OVERHEAD_GIB = (0.15, 0.6)
"""What a process that holds a model shows beyond its weights."""
TENSOR_PARALLEL: Mapping[str, int] = {
    "OPT-1.3B": 1, "OPT-6.7B": 1, "Llama2-7B": 1, "Llama2-13B": 1, "Llama3-8B": 1, "CodeLlama-34B": 2, "Llama2-70B": 4,
}  # fmt: skip
USABLE_SHARE = 39.49 / 40
"""The paper's KV-only bounds follow from 39.5 GiB a GPU: what the driver shows of 40."""
ACTIVATION_COPIES = 2.0
"""Hidden states a request keeps per token at any depth: the stream into a layer and the one out of it."""
CAPS: Mapping[str, int] = {"ShareGPT": 256, "HellaSwag": 6144}
CONTEXT_TOKENS: Mapping[str, int] = {"ShareGPT": 1024, "HellaSwag": 100}

# --- the OPT pair -------------------------------------------------------------------------------------------

SMALL, LARGE = "opt-1.3b", "opt-6.7b"
EXITS: Mapping[str, tuple[int, ...]] = {SMALL: (6, 12, 24), LARGE: (9, 17, 32)}
EXIT_SHARES: Mapping[str, tuple[float, ...]] = {SMALL: (0.730, 0.0470, 0.223), LARGE: (0.736, 0.0480, 0.216)}
"""Tokens by exit of each model alone, under early exit."""
RESCUED = 0.57
"""Of the tokens that OPT-1.3B's layer 6 is not sure of, the share that OPT-6.7B's layer 9 is sure of."""
LAYER_S: Mapping[str, float] = {SMALL: 0.971e-3, LARGE: 1.045e-3}
"""Seconds of one layer for one token: launch-bound, the same for any exit."""
REQUESTS = (272, 272, 272, 271)
REASSESS_INTERVAL, PROBES, MAX_BREACHES, WINDOW = 150, 5, 50, 100
STATE_SHARES: Mapping[tuple[str, int], float] = {
    (SMALL, 6): 0.48,
    (SMALL, 24): 0.30,
    (LARGE, 9): 0.19,
    (LARGE, 32): 0.029,
}
"""Share of tokens served by each placement, solved from the paper's tokens by exit."""

REQUEST_EFFECT = 0.10
COVERAGE = 0.60
EXPOSED_LOAD_S = 4e-3
PREFILL_FLOPS = 0.5 * 156e12
HOST_LINK_BYTES_PER_S = 24.8e9

# --- power --------------------------------------------------------------------------------------------------

TDP_W, IDLE_W, NODE_GPUS, HBM_BYTES_PER_S = 400.0, 55.0, 4, 1555e9
BUSY_SHARE, BUSY_AT_BANDWIDTH = 0.6, 34.5e9 / 44e-3 / 2039e9
"""Splitwise: Llama-2-70B at TP 4 on A100-80GB draws 60 % of its limit while it reads 38 % of its memory bandwidth."""


@dataclass(frozen=True)
class Basis:
    """A named input or assumption. ``mark``: P published, D derived from what is published, C our choice."""

    text: str
    mark: Literal["P", "D", "C"]


INPUTS: Mapping[str, Basis] = {
    "shapes": Basis("layers, widths and vocabulary of the models' public configuration files", "P"),
    "opt exits": Basis("exits 6, 12, 24 of OPT-1.3B and 9, 17, 32 of OPT-6.7B; HELIOS serves at 6 and 9", "P"),
    "helios depth of the large pair": Basis("HELIOS serves with 32 of CodeLlama-34B's 48 layers", "P"),
    "process overhead": Basis("a process shows 0.15 to 0.6 GiB beyond the weights it holds", "D"),
    "memory sizes": Basis("40 GB of A100-40GB, 192 GB of B100 and of the 8-GPU node", "P"),
    "tensor parallel degrees": Basis("TP 4 for Llama2-70B, TP 2 for CodeLlama-34B, else 1", "P"),
    "tokens by exit alone": Basis("73.0 / 4.70 / 22.3 % of OPT-1.3B and 73.6 / 4.80 / 21.6 % of OPT-6.7B", "P"),
    "joint exits": Basis("57 % of tokens beyond layer 6 of OPT-1.3B leave by layer 9 of OPT-6.7B", "P"),
    "seconds per layer": Basis("0.971 ms (OPT-1.3B) and 1.045 ms (OPT-6.7B) a layer and token, launch-bound", "D"),
    "state shares": Basis(
        "48 % of tokens OPT-1.3B@6, 30 % full OPT-1.3B, 19 % OPT-6.7B@9, 2.9 % full OPT-6.7B, solved from tokens by "
        "exit",
        "D",
    ),
    "live perplexity": Basis("1.47 (OPT-1.3B) and 1.49 (OPT-6.7B) alone", "P"),
    "workload": Basis("1087 requests in four task blocks, batch 1", "P"),
    "HELIOS parameters": Basis("RI 150, 5 probes, CBCmax 50 in a window of 100 tokens", "P"),
}

ASSUMPTIONS: Mapping[str, Basis] = {
    "opt runs are FP32": Basis("the paper does not say; only FP32 gives its memory figures", "D"),
    "units of memory": Basis(
        "models that were run count in binary units, the one that is only cited in decimal ones", "C"
    ),
    "usable memory": Basis("39.49 of 40 GiB of each GPU; follows from the KV-only bounds", "D"),
    "per-request fixed cost": Basis(
        "two FP16 hidden states per token beside its KV, whatever the depth: the buffers into and out of a layer", "C"
    ),
    "batch cap": Basis("256 rows with ShareGPT (vLLM's default), 6144 with HellaSwag (free of it)", "C"),
    "threshold": Basis("TH 0.8: the paper is silent", "C"),
    "coverage": Basis(
        "q 0.60: with 0.70, three points under the 73 % of layer 6, five requests often choose layer 12, where no "
        "token of "
        "the paper's table left a partial model",
        "D",
    ),
    "hidden loads": Basis("every load exposes the 4 ms the paper reports for four layers, whatever its size", "C"),
    "probes do not count": Basis(
        "evaluation requests do not count towards RI: closer to the share of full OPT-6.7B", "D"
    ),
    "request effect": Basis(
        "10 % of the variance of a token's difficulty is its request's; calibrated to the state share of full "
        "OPT-1.3B, "
        "the top of the 0 to 10 % that measured exits show (GREEN-CODE)",
        "C",
    ),
    "exit spec": Basis(
        "everything else about exits: spec opt-pair of heliosim/synthetic (tasks, lengths, confidences)", "C"
    ),
    "back to back": Basis("one request behind the other (closed loop of one user): the paper gives no arrivals", "C"),
    "prefill rate": Basis("prompts are read at half the TF32 peak of an A100 (78 TFLOP/s) beside the launches", "C"),
    "host link": Basis("weights wait in pinned host memory and come at 24.8 GB/s", "C"),
    "power of the node": Basis(
        "four GPUs of 55 W idle; the one that works draws more in proportion to the memory bandwidth it uses, at the "
        "slope of Splitwise's Llama-2-70B (60 % of 400 W at 38 % of the bandwidth)",
        "C",
    ),
    "derived profile under load": Basis(
        "costs of the shipped profile llama2-a100-80gb (kernel times composed), synthetic exits, 40 GiB, Poisson "
        "arrivals",
        "C",
    ),
    "agreement by depth": Basis(
        "exit specs codellama-llama2 and llama-three of heliosim/synthetic: assumed levels", "C"
    ),
    "context lengths": Basis("1024 tokens with ShareGPT, 100 with HellaSwag; unpublished", "C"),
}
