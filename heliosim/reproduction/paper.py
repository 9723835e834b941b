"""What the paper says, by row and part. Only the report and its tests read this: nothing that computes may see it.

Marks: P stated by the paper or its slides, D derived from its numbers. Source: arXiv 2504.10724 (v1, v2), slides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Said:
    """A figure of the paper. ``tolerance``: relative error up to which we say it is reproduced; None: only shown."""

    value: float
    mark: Literal["P", "D"] = "P"
    tolerance: float | None = None


EXACT, DERIVABLE = 0.02, 0.10


def _all(values: Mapping[str, float], tolerance: float | None = None, mark: Literal["P", "D"] = "P") -> dict[str, Said]:
    return {part: Said(v, mark, tolerance) for part, v in values.items()}


PAPER: Mapping[str, Mapping[str, Said]] = {
    "weights-saved": _all({"OPT-1.3B@6": 3.37, "OPT-6.7B@9": 17.25}, EXACT),
    "weights-large-pair": _all(
        {
            "CodeLlama-34B": 63.0,
            "Llama2-70B": 129.0,
            "HELIOS (CodeLlama-34B@32)": 42.0,
            "saving against Llama2-70B, %": 67.4,
        },
        EXACT,
    ),
    "weights-llama-set": _all({"Llama2-7B": 12.9, "Llama3-8B": 15.5, "Llama2-13B": 24.8}, EXACT),
    "hbm-shares": _all(
        {"Llama2-70B on 4x 40 GB": 81.6, "Llama2-70B on a B100": 68.0, "Llama3.1-405B on 8x 192 GB": 52.0}, EXACT
    ),
    "exits-helios": _all(
        {
            "opt-1.3b@6": 70.19,
            "opt-1.3b@12": 1.38,
            "opt-1.3b@24": 6.78,
            "opt-6.7b@9": 20.90,
            "opt-6.7b@17": 0.14,
            "opt-6.7b@32": 0.61,
        },
        DERIVABLE,
    ),
    "tpot": _all({"OPT-1.3B": 10.0, "OPT-6.7B": 15.0, "HELIOS": 8.0}, EXACT),
    "tpot-simulated": _all({"OPT-1.3B": 10.0, "OPT-6.7B": 15.0, "HELIOS": 8.0}, DERIVABLE),
    "throughput": _all({"vs OPT-1.3B": 1.48, "vs OPT-6.7B": 2.13}),
    "throughput-per-request": _all({"vs OPT-1.3B": 1.35, "vs OPT-6.7B": 2.0}, DERIVABLE, "D"),
    "throughput-token-weighted": _all({"vs OPT-1.3B": 1.25, "vs OPT-6.7B": 1.88}, DERIVABLE, "D"),
    "ttft": _all(
        {
            "OPT-1.3B": 42.0,
            "OPT-6.7B": 69.0,
            "HELIOS": 33.0,
            "OPT-1.3B / HELIOS (objective TTFT)": 1.39,
            "OPT-6.7B / HELIOS (objective TTFT)": 2.23,
        }
    ),
    "energy": {
        **_all({"OPT-1.3B, Wh": 0.50, "OPT-6.7B, Wh": 1.01, "HELIOS, Wh": 0.45}),
        **_all({"OPT-6.7B / OPT-1.3B": 2.02, "HELIOS / OPT-1.3B": 0.90}, mark="D"),
        **_all({"tokens served by partial models, %": 58.3, "loads over what is saved, %": 5.0}),
    },
    "perplexity": _all({"HELIOS less OPT-1.3B": 0.01, "OPT-6.7B / OPT-1.3B": 0.97}),
    "transitions": _all({"reactions (LD or SW)": 6.0, "transfers per evaluation, ms": 220.0}),
    "ld-exposed": _all({"overlapped": 4.0}),
    "batch-llama3-sharegpt": _all({"Llama3-8B@8": 1.30, "Llama3-8B@16": 1.30, "Llama3-8B@24": 1.25}),
    "batch-llama3-hellaswag": {
        **_all({"Llama3-8B@8": 3.26}),
        **_all({"Llama3-8B@16": 2.29, "Llama3-8B@24": 1.48}, DERIVABLE),
    },
    "batch-llama2-sharegpt": _all({"Llama2-70B@20": 2.53, "Llama2-70B@40": 2.03, "Llama2-70B@60": 1.67}),
    "batch-llama2-hellaswag": {
        **_all({"Llama2-70B@20": 7.31}),
        **_all({"Llama2-70B@40": 5.80, "Llama2-70B@60": 2.64}, DERIVABLE),
    },
    "large-pair": _all(
        {
            f"{name} / vanilla {model}, batch up to {users}": value
            for users in (1, 256)
            for model in ("CodeLlama-34B", "Llama2-70B")
            for name, value in ((f"early exit {model}", 1.16), ("HELIOS", 1.45))
        }
    ),
    "batch-largest": _all({"largest of the tables": 15.14, "OPT pair (v1)": 3.7}),
}

CONTRADICTIONS: tuple[str, ...] = (
    "The share of low-confidence tokens that stay unchanged appears as 85, 92.1 and 95 %.",
    '"Early" tokens are 74 % and 77 % in the text, 77.7 % and 78.4 % in the table.',
    '"Load all remaining layers" stands beside loading 4 layers.',
    "The text on sensitivity to RI contradicts itself: best at 50, yet 150 is said to be best.",
    "Llama2 and Llama3 do not share a tokenizer, although the repository's rule demands it.",
    "TPOT of 10 / 15 / 8 ms gives gains of 1.25x / 1.88x by tokens, not the 1.48x / 2.13x stated beside it.",
    "Algorithm 1 has no window and acts between prompts; the prose has a window of 100 tokens.",
)
"""Known contradictions in the sources, shown with every report."""
