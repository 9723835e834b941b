"""Made-up confidences of early exits, for derived profiles: no published table has them for these models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from kernel_times import SMALL, Shape
from scipy.special import ndtr

from heliosim.streams import stream

SEED = 0

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
