"""Behaviour of one live run, so that a simulation meets the very same exits: by request, for any placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heliosim.behaviour import Behaviour, Text
from heliosim.formats.results import RunResults
from heliosim.types import Arrival, ModelSpec, Placement

from .behaviour import Prompt, table_of


def behaviour_of_run(
    engine: Any,
    specs: Mapping[str, ModelSpec],
    arrivals: Sequence[Arrival],
    outputs: Mapping[int, Sequence[int]],
    results: RunResults,
) -> Behaviour:
    """Texts of a live run scored by every model; where a token is asked for under the placement it really had, what the
    run observed is given back instead (they can differ by the KV that early exit filled in)."""
    by_id = {a.request.id: a for a in arrivals}
    ids = sorted(outputs)
    prompts = [Prompt(f"request-{i}", by_id[i].content.task, by_id[i].content.prompt_ids or ()) for i in ids]
    texts = [outputs[i] for i in ids]
    columns = table_of(engine, specs, prompts, texts, "live", frozenset())
    observed = _observed(results)
    arrays = {k: np.asarray(v) for k, v in columns.items() if k.startswith(("confidence:", "agrees:"))}
    found: dict[tuple[str, str], Text] = {}
    sequences: dict[str, list[str]] = {}
    at = 0
    for i, prompt, text in zip(ids, prompts, texts, strict=True):
        window = slice(at, at + len(text))
        at += len(text)
        found[prompt.sequence, "live"] = Text(
            task=prompt.task,
            prompt_tokens=len(prompt.ids),
            tokens=len(text),
            end=len(text),
            confidence={
                k.removeprefix("confidence:"): v[window] for k, v in arrays.items() if k.startswith("confidence:")
            },
            agrees={k.removeprefix("agrees:"): v[window] for k, v in arrays.items() if k.startswith("agrees:")},
            observed=observed.get(i, {}),
        )
        sequences.setdefault(prompt.task, []).append(prompt.sequence)
    return Behaviour(found, sequences, {n: s.exits for n, s in specs.items()}, is_recorded_run=True)


def _observed(results: RunResults) -> dict[int, dict[int, tuple[Placement, int, float]]]:
    tokens = results.tokens
    names = ("request_id", "position", "model", "depth", "exit_layer", "confidence")
    found: dict[int, dict[int, tuple[Placement, int, float]]] = {}
    for request, position, model, depth, exit_layer, confidence in zip(
        *(tokens[n].to_pylist() for n in names), strict=True
    ):
        found.setdefault(request, {})[position] = (Placement(model, depth), exit_layer, confidence)
    return found
