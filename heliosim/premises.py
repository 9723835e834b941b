"""Whether the three premises of HELIOS hold for the models of a profile, measured on its behaviour table.

The verdicts come from the limits stated here, not from a reader's good will: a premise can be weak, and then says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from heliosim.behaviour import ANY_SOURCE, REFERENCE, Behaviour

Verdict = Literal["holds", "partly", "weak"]


@dataclass(frozen=True, slots=True)
class Premise:
    """One premise for one model or pair: what was measured, the limits, the verdict they give."""

    premise: str
    subject: str
    value: float
    holds_from: float
    partly_from: float
    verdict: Verdict
    detail: str
    tokens: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def _judge(
    premise: str, subject: str, value: float, holds_from: float, partly_from: float, detail: str, tokens: int
) -> Premise:
    verdict: Verdict = "holds" if value >= holds_from else "partly" if value >= partly_from else "weak"
    return Premise(premise, subject, round(value, 4), holds_from, partly_from, verdict, detail, tokens)


def measure_premises(behaviour: Behaviour, threshold: float = 0.8) -> list[Premise]:
    """All premises over texts each model generated at full depth.

    *Early exits differ by task*: largest difference between tasks in the share of tokens confident at the first exit.
    *Low confidence is usually not wrong*: among tokens below the threshold at the first exit, the share whose top-1 the
    last layer keeps (HELIOS reports at least 0.85). *Models complement each other*: among tokens below the threshold at
    one model's first exit, the share confident at the other's first exit (HELIOS reports 0.57).
    """
    found: list[Premise] = []
    for model, exits in behaviour.exits.items():
        first = f"{model}@{exits[0]}"
        confidence, agrees, tasks = _columns(behaviour, first, [f"{model}:full"])
        if not len(confidence):
            continue
        easy = confidence >= threshold
        by_task = {t: float(easy[tasks == t].mean()) for t in sorted(set(tasks.tolist()))}
        spread = max(by_task.values()) - min(by_task.values())
        detail = ", ".join(f"{t} {v:.2f}" for t, v in by_task.items())
        found.append(_judge("early exits differ by task", first, spread, 0.20, 0.10, detail, len(easy)))
        hard = ~easy
        if hard.any():
            kept = float(agrees[hard].mean())
            detail = f"of {int(hard.sum())} tokens below {threshold:g}"
            found.append(_judge("low confidence is mostly not wrong", first, kept, 0.85, 0.50, detail, int(hard.sum())))
    for one, exits_one in behaviour.exits.items():
        for other, exits_other in behaviour.exits.items():
            if one == other:
                continue
            sources = [f"{one}:full", f"{other}:full"]
            a, _, _ = _columns(behaviour, f"{one}@{exits_one[0]}", sources)
            b, _, _ = _columns(behaviour, f"{other}@{exits_other[0]}", sources)
            hard = a < threshold
            if hard.any():
                share = float((b[hard] >= threshold).mean())
                subject = f"{one}@{exits_one[0]} helped by {other}@{exits_other[0]}"
                detail = f"unconditionally {float((b >= threshold).mean()):.2f}"
                found.append(
                    _judge("models complement each other", subject, share, 0.40, 0.15, detail, int(hard.sum()))
                )
    return found


def _columns(
    behaviour: Behaviour, key: str, sources: list[str]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.str_]]:
    """Confidence, agreement and task of every token of the given sources at one exit."""
    texts = [t for (_, s), t in sorted(behaviour.texts.items()) if s in (*sources, ANY_SOURCE, REFERENCE)]
    if not texts:
        return np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, "<U1")
    confidence = np.concatenate([t.confidence[key] for t in texts])
    agrees = np.concatenate([t.agrees[key] for t in texts])
    return confidence, agrees, np.concatenate([np.full(t.tokens, t.task) for t in texts])
