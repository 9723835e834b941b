"""Texts drawn from a solved spec: for every token, what every exit of every model would say to it.

A text has one draw of everything, whatever policy serves it, so exits of several models stand side by side per token.
Every model's draws come from a stream named by task, text and model: leaving a model out moves no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from heliosim.behaviour import ANY_SOURCE
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.profile import BehaviourFacts
from heliosim.streams import stream
from heliosim.synthetic.family import Array
from heliosim.synthetic.solve import Solved, solve
from heliosim.synthetic.spec import ExitSpec
from heliosim.synthetic.table import BehaviourTable, table_of

COARSE, FINE, EDGE = 100, 1000, 0.9
"""Confidences are kept in cells of 1/100 below 0.9 and of 1/1000 above, each as the middle of its cell, so thresholds
at multiples of these split them exactly. Few
levels keep the table small."""


def behaviour_for(models: Mapping[str, Sequence[int]], spec: ExitSpec, seed: int) -> BehaviourTable:
    """Synthetic texts of these models (exits by name, the last being the full depth) in the form of a profile's table.

    Raises InputError for a model or an exit the spec says nothing of.
    """
    solved = solve(spec)
    _check(models, spec)
    lengths = {name: max(1, round(spec.text_factor * task.output_tokens)) for name, task in spec.tasks.items()}
    mean = sum(task.weight for task in spec.tasks.values()) / len(spec.tasks)
    texts = {name: max(1, round(spec.texts_per_task * task.weight / mean)) for name, task in spec.tasks.items()}
    parts: list[dict[str, npt.NDArray[Any]]] = []
    rows: list[dict[str, Any]] = []
    for task in sorted(spec.tasks):
        for k in range(texts[task]):
            parts.append(_text(solved, models, task, k, lengths[task], seed))
            rows.append(_identity(spec, task, k, lengths[task], seed))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    facts = BehaviourFacts(
        tasks=texts,
        split="synthetic",
        tokens_per_text=max(lengths.values()),
        threshold=spec.threshold.value,
        sources=(ANY_SOURCE,),
        rows=sum(row["tokens"] for row in rows),
    )
    return BehaviourTable(
        table=table_of(rows, columns),
        facts=facts,
        exits={name: tuple(exits) for name, exits in models.items()},
        origin="synthetic",
        about=synthetic_lines(solved, seed, list(models)),
        spec=spec,
        seed=seed,
    )


def _check(models: Mapping[str, Sequence[int]], spec: ExitSpec) -> None:
    for name, exits in models.items():
        if name not in spec.models:
            raise UnknownNameError(f"{spec.name}, field models", name, spec.models)
        known = spec.models[name].exits
        if odd := sorted(set(exits) - set(known)):
            raise InputError(
                f"{spec.name}, field models.{name}", odd[0], "nothing is said of this exit", f"Known: {known}."
            )
        if not exits or exits[-1] != known[-1] or list(exits) != sorted(set(exits)):
            raise InputError(
                f"{spec.name}, field models.{name}", tuple(exits), "exits must ascend to the last layer",
                f"Known: {known}.",
            )  # fmt: skip


def _identity(spec: ExitSpec, task: str, k: int, tokens: int, seed: int) -> dict[str, Any]:
    """What is true of a whole text; ``end``, its natural length, is lognormal about the task's mean."""
    found = spec.tasks[task]
    spread = np.sqrt(np.log1p(found.output_cv**2))
    drawn = stream(seed, "synthetic", task, k, "end").standard_normal()
    end = found.output_tokens * np.exp(spread * drawn - spread**2 / 2)
    return {
        "sequence": f"{task}-{k:04d}",
        "task": task,
        "prompt_tokens": found.prompt_tokens,
        "tokens": tokens,
        "end": int(np.clip(round(end), 1, tokens)),
    }


def _text(
    solved: Solved, models: Mapping[str, Sequence[int]], task: str, k: int, tokens: int, seed: int
) -> dict[str, npt.NDArray[Any]]:
    """Confidence and agreement of every exit along one text, [tokens] each."""
    spec = solved.spec
    eases = ease_along(solved, task, k, tokens, seed)
    r = spec.tokens.depth_correlation.value
    found: dict[str, npt.NDArray[Any]] = {}
    for model, family in solved.families.items():
        if model not in models:
            continue
        shift = spec.tasks[task].ease_of(model)
        kept = stream(seed, "synthetic", task, k, model, "agreement").random(tokens)
        for at, depth in enumerate(family.exits):
            if depth not in models[model]:
                continue
            noise = stream(seed, "synthetic", task, k, model, depth).standard_normal(tokens)
            confidence = quantised(family.score(at, np.sqrt(r) * eases[model] + np.sqrt(1 - r) * noise + shift))
            found[f"confidence:{model}@{depth}"] = confidence.astype(np.float32)
            low, high = (1.0, 1.0) if depth == family.exits[-1] else spec.models[model].agreement.at(depth)
            found[f"agrees:{model}@{depth}"] = kept < low + (high - low) * confidence
    return found


def ease_along(solved: Solved, task: str, k: int, tokens: int, seed: int) -> dict[str, Array]:
    """Latent ease of a text's tokens for every model, [tokens]: standard normal over texts, alike between models.

    ``ease = sqrt(v) text + sqrt(1 - v) own``, own an autoregression of order 1; correlated between models in both.
    """
    spec = solved.spec.tokens
    v, phi = spec.request_effect.value, spec.autocorrelation.value
    own, text = [], []
    for model in solved.families:
        rng = stream(seed, "synthetic", task, k, model)
        text.append(rng.standard_normal())
        steps = rng.standard_normal(tokens)
        steps[1:] *= np.sqrt(1 - phi**2)
        own.append(lfilter([1.0], [1.0, -phi], steps))
    mix = np.linalg.cholesky(solved.correlation)
    eases = np.sqrt(v) * (mix @ np.asarray(text))[:, None] + np.sqrt(1 - v) * (mix @ np.stack(own))
    return dict(zip(solved.families, eases, strict=True))


def quantised(confidence: Array) -> Array:
    """Confidences as the middles of their cells."""
    coarse = (np.floor(np.minimum(confidence, EDGE) * COARSE) + 0.5) / COARSE
    fine = (np.floor(np.minimum(confidence, 1 - 0.5 / FINE) * FINE) + 0.5) / FINE
    return np.asarray(np.where(confidence < EDGE, coarse, fine))


def synthetic_lines(solved: Solved, seed: int, models: Sequence[str]) -> tuple[str, ...]:
    """What a profile or a report must say of a table drawn from a spec."""
    spec = solved.spec
    lines = [f"confidences and agreement at every exit: drawn from exit spec {spec.name}, seed {seed}"]
    for name in models:
        left = spec.models[name].left
        said = left.source if left.is_assumed else f"from {left.source}"
        lines.append(f"{name}: shares of tokens by exit are {said}")
    return tuple(lines)
