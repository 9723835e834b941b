"""Everything a behaviour table says, computed once for whoever shows it: terminal, report, dashboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import pandas as pd

from heliosim.behaviour import REFERENCE
from heliosim.behaviour_fit import CHECK_DRAWS, check_fits, sufficient
from heliosim.behaviour_order import breach_table, correlation_table, request_share, run_table
from heliosim.behaviour_quality import length_table, quality_table
from heliosim.behaviour_stats import (
    THRESHOLDS,
    complement_table,
    confidence_table,
    depth_table,
    joint_table,
    reliability_table,
    threshold_curve,
    threshold_table,
)
from heliosim.behaviour_tokens import Tokens


@dataclass(frozen=True)
class ModelSummary:
    """One model's tables; see the functions of the same names. ``source``: whose texts open-loop figures rest on.

    ``targets``: calibration against the tokens of given texts (``target_source``); None where the table has none.
    ``by_task``: exit shares by task at the threshold. ``fits``: None unless asked for; ``sufficient``: the simplest
    fitted model that meets every statistic, over all tasks together and by task (None: none does).
    """

    model: str
    source: str
    target_source: str
    exits: tuple[int, ...]
    shares: pd.DataFrame
    curve: pd.DataFrame
    by_task: pd.DataFrame
    depths: pd.DataFrame
    depths_of_target: pd.DataFrame
    confidence: pd.DataFrame
    reliability: pd.DataFrame
    targets: pd.DataFrame | None
    correlation: pd.DataFrame
    request_share: float
    runs: pd.DataFrame
    breaches: pd.DataFrame
    quality: pd.DataFrame
    fits: pd.DataFrame | None
    sufficient: Mapping[str, str | None]


@dataclass(frozen=True)
class PairSummary:
    """Two models on the same text: where they leave it, and how the other helps the one."""

    one: str
    other: str
    joint: pd.DataFrame
    complement: pd.DataFrame


@dataclass(frozen=True)
class BehaviourSummary:
    """``threshold`` of everything that needs one; ``tokens`` and ``requests`` of the whole table."""

    threshold: float
    tokens: int
    requests: int
    tasks: Sequence[str]
    models: Mapping[str, ModelSummary]
    pairs: Sequence[PairSummary]
    lengths: pd.DataFrame


ALL_TASKS = "all tasks"
_DRAWN_TOKENS, _LEAST_DRAWS = 10_000_000, 20
"""Tokens drawn per fitted model at most, but at least so many tables: a large table needs fewer to be judged by."""


def summarise_behaviour(
    tokens: Tokens,
    threshold: float,
    *,
    models: Sequence[str] | None = None,
    source: str | None = None,
    task: str | None = None,
    fits: bool = False,
    draws: int = CHECK_DRAWS,
    seed: int = 0,
) -> BehaviourSummary:
    """All tables of some models (default: all). ``source``: whose texts open-loop figures rest on (default: each
    model's own at full depth). Raises UnknownNameError for a model, source or task the table lacks.
    """
    kept = tokens.of(task=task) if task is not None else tokens
    names = list(models or tokens.exits)
    found = {name: _of_model(kept, name, threshold, source, (fits, draws, seed)) for name in names}
    pairs = []
    for one, other in permutations(names, 2):
        part = kept.of(sources=[source or kept.source_of(one)])
        joint = joint_table(part, one, other, threshold, seed)
        pairs.append(PairSummary(one, other, joint, complement_table(part, one, other, threshold, seed)))
    return BehaviourSummary(threshold, kept.size, kept.requests, kept.tasks, found, pairs, length_table(kept))


def _of_model(
    tokens: Tokens, model: str, threshold: float, source: str | None, how: tuple[bool, int, int]
) -> ModelSummary:
    fits, draws, seed = how
    used = source or tokens.source_of(model)
    part = tokens.of(sources=[used])
    target = REFERENCE if REFERENCE in tokens.sources and source is None else used
    forced = tokens.of(sources=[target])
    has_targets = target == REFERENCE and "token_id" in forced.columns and forced.has("top1")
    thresholds = sorted({*THRESHOLDS, threshold})
    checked, enough = _fits(part, model, threshold, draws, seed) if fits else (None, {})
    return ModelSummary(
        model=model,
        source=used,
        target_source=target,
        exits=tokens.exits_of(model),
        shares=threshold_table(part, model, thresholds, seed=seed),
        curve=threshold_curve(part, model),
        by_task=shares_by_task(part, model, threshold, seed),
        depths=depth_table(part, model, seed),
        depths_of_target=depth_table(forced, model, seed),
        confidence=confidence_table(part, model, seed=seed),
        reliability=reliability_table(part, model, seed=seed),
        targets=reliability_table(forced, model, "target", seed=seed) if has_targets else None,
        correlation=correlation_table(part, model, threshold, seed=seed),
        request_share=request_share(part, model, threshold),
        runs=run_table(part, model, threshold, seed=seed),
        breaches=breach_table(part, model, threshold, seed=seed),
        quality=quality_table(tokens, model, threshold, seed),
        fits=checked,
        sufficient=enough,
    )


def shares_by_task(tokens: Tokens, model: str, threshold: float, seed: int = 0) -> pd.DataFrame:
    """Exit shares by task at one threshold: columns of ``threshold_table``, and task."""
    parts = [
        threshold_table(tokens.of(task=task), model, (threshold,), seed=seed).assign(task=task) for task in tokens.tasks
    ]
    return pd.concat(parts, ignore_index=True)


def _fits(
    tokens: Tokens, model: str, threshold: float, draws: int, seed: int
) -> tuple[pd.DataFrame, dict[str, str | None]]:
    """Fitted models over all tasks together, and which suffices there and in each task."""
    draws = min(draws, max(_LEAST_DRAWS, _DRAWN_TOKENS // max(1, tokens.size)))
    whole = check_fits(tokens, model, threshold, draws=draws, seed=seed)
    enough = {ALL_TASKS: sufficient(whole)}
    parts = [whole.assign(task=ALL_TASKS)]
    for task in tokens.tasks if len(tokens.tasks) > 1 else ():
        part = check_fits(tokens.of(task=task), model, threshold, draws=draws, seed=seed)
        enough[task] = sufficient(part)
        parts.append(part.assign(task=task))
    return pd.concat(parts, ignore_index=True), enough
