"""Hand-made behaviour tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heliosim.behaviour_tokens import Tokens

EXITS = {"m": (2, 4, 6)}


def tokens_table(
    texts: Sequence[Sequence[Any]],
    columns: Mapping[str, Any],
    *,
    exits: Mapping[str, tuple[int, ...]] | None = None,
    names: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    ends: Sequence[int] | None = None,
    right: Sequence[float] | None = None,
) -> Tokens:
    """Texts as long as ``texts``; ``columns`` over all tokens."""
    n = len(texts)
    return Tokens(
        exits or EXITS,
        np.array(names or [f"q{i}" for i in range(n)]),
        np.array(tasks or ["t"] * n),
        np.array(sources or ["any"] * n),
        np.full(n, 5, np.int64),
        np.array([len(t) for t in texts], np.int64),
        np.array(ends or [0] * n, np.int64),
        np.array(right if right is not None else [np.nan] * n, float),
        {k: np.asarray(v) for k, v in columns.items()},
    )


def leaving(texts: Sequence[Sequence[int]], sure: float = 0.9, unsure: float = 0.1, **more: Any) -> Tokens:
    """Tokens of model ``m`` that leave at the given exits (0, 1, 2; 3: unsure even at the last) under a threshold
    between ``unsure`` and ``sure``; exits agree with the last layer where they are sure.
    """
    at = np.concatenate([np.asarray(t, int) for t in texts])
    columns = {}
    for i, e in enumerate(EXITS["m"]):
        columns[f"confidence:m@{e}"] = np.where(at <= i, sure, unsure).astype(np.float32)
        columns[f"agrees:m@{e}"] = (at <= i) | (i == len(EXITS["m"]) - 1)
    return tokens_table(texts, columns, **more)
