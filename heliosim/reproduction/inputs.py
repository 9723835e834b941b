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
SOLVED_FROM = ("Llama3-8B", 16, 2.29)
"""The one figure of the batch tables that the per-request cost of the calibrated set-up is solved from."""
ENGINE_ROWS = 256
"""Most rows that vLLM serves at once by default; the calibrated set-up has it where the data set was served."""
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

DEFAULT_SETUP = (0.70, 0.03, True)
"""q, request effect, whether probes count towards RI: as fixed before any result (q, probes: the project's table of
defaults; request effect: the shipped exit spec).
"""
CALIBRATED_SETUP = (0.60, 0.10, True)
"""The same, chosen from the grid by the state shares."""
GRID_COVERAGE, GRID_EFFECT = (0.60, 0.65, 0.70), (0.03, 0.06, 0.10)
PREFILL_FLOPS = 0.5 * 156e12
DEVICE = "A100-40GB"
NODE_GPUS = 4


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
    "one batch figure": Basis("2.29 (Llama3-8B@16, HellaSwag): calibrated set-up only, and marked fitted there", "P"),
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
        "defaults: none beside what a step needs. Calibrated: hidden states (FP16) per token of a request "
        "at any depth, split over the ranks, as many as give one figure of the HellaSwag table, which is marked fitted",
        "C",
    ),
    "row limit": Basis(
        "defaults: none. Calibrated: 256 rows with ShareGPT, vLLM's default; none with HellaSwag, which is no serving",
        "C",
    ),
    "threshold": Basis("TH 0.8: the paper is silent; client default of EE-LLM, on which it builds", "C"),
    "coverage": Basis("defaults: q 0.70, which gives layers 6 and 9 on average. Calibrated: q 0.60", "C"),
    "probes": Basis("evaluation requests count towards RI, in both set-ups; that they do not was tried too", "C"),
    "request effect": Basis(
        "share of the variance of a token's difficulty that is its request's. Defaults: 0.03, as the exit spec has it "
        "(measured exits: 0 to 0.1). Calibrated: 0.10",
        "C",
    ),
    "exit spec": Basis(
        "everything else about exits: spec opt-pair of heliosim/synthetic (tasks, lengths, confidences)", "C"
    ),
    "back to back": Basis("one request behind the other (closed loop of one user): the paper gives no arrivals", "C"),
    "overlapped loads": Basis("what is resident serves on while weights come; the change itself takes nothing", "C"),
    "prefill rate": Basis("prompts are read at half the TF32 peak of an A100 (78 TFLOP/s) beside the launches", "C"),
    "host link": Basis("weights wait in pinned host memory and come at the device file's 24.8 GB/s for each rank", "C"),
    "power of the node": Basis(
        "four GPUs; the one that works draws the device file's power while kernels run (composed FP32 times) and idle "
        "power while it waits for launches; the other three idle",
        "C",
    ),
    "composed OPT pair under load": Basis(
        "OPT-1.3B and OPT-6.7B composed in FP16 on A100-40GB, host preset graph, exits of the spec opt-pair, "
        "39.49 GiB, batch up to 256, overlapped loads, Poisson arrivals, prompts of 300 and answers of 150 "
        "tokens on average",
        "C",
    ),
    "composed large pair": Basis(
        "CodeLlama-34B at TP 2 and Llama2-70B at TP 4 composed in FP16 on A100-40GB, host preset graph, exits of the "
        "spec codellama-llama2, overlapped loads, requests in flight extended, a closed loop of users",
        "C",
    ),
    "sharegpt lengths": Basis(
        "prompts of 220 and answers of 200 tokens on average, lognormal, as the exit spec has", "C"
    ),
    "agreement by depth": Basis(
        "exit specs codellama-llama2 and llama-three of heliosim/synthetic: assumed levels", "C"
    ),
    "context lengths": Basis("1024 tokens with ShareGPT, 100 with HellaSwag; unpublished", "C"),
}
