"""What a behaviour table says of its models, as tables with intervals: agreement, perplexity and reliability by depth,
exits under every threshold, and two models on the same text. How exits follow each other is in ``behaviour_order``,
quality under policies in ``behaviour_quality``.

Works on measured, synthetic and imported tables alike; a statistic that needs a column which a table lacks says so.
Intervals: 95 %, bootstrap over requests (``bootstrap``). Nothing here reads files or draws pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from heliosim.behaviour_tokens import Bools, Floats, Ints, Tokens, exit_index
from heliosim.bootstrap import counts_by, estimates, sums_by
from heliosim.errors import InputError

Against = Literal["final", "target"]
"""What being right means: saying what the last layer says, or what the text really goes on with."""
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BINS = 10


def requests_of(tokens: Tokens) -> Ints:
    """The request each token belongs to, [tokens]."""
    return np.asarray(tokens.request[tokens.text], np.int64)


# --- exits under every threshold --------------------------------------------------------------------------------------


def threshold_table(
    tokens: Tokens, model: str, thresholds: Sequence[float] = THRESHOLDS, depth: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Open loop: by threshold, the share of tokens that leave at each exit up to ``depth``, with intervals.

    Columns threshold, exit_layer, share, low, high, tokens.
    """
    exits = [e for e in tokens.exits_of(model) if depth is None or e <= depth]
    request, rows = requests_of(tokens), []
    for threshold in thresholds:
        left = exit_index(tokens, model, threshold, depth)
        sums = counts_by(request, tokens.requests, left, len(exits))
        found = estimates(sums, lambda s: s / s.sum(axis=-1, keepdims=True), seed=seed, name="exits")
        rows += [
            (threshold, e, *values, tokens.size)
            for e, values in zip(exits, zip(found.value, found.low, found.high, strict=True), strict=True)
        ]
    return pd.DataFrame(rows, columns=["threshold", "exit_layer", "share", "low", "high", "tokens"])


def threshold_curve(tokens: Tokens, model: str, depth: int | None = None, points: int = 201) -> pd.DataFrame:
    """Open loop at every threshold of an even grid over [0, 1], exactly.

    Columns threshold, mean_depth (layers), agreement (share of tokens that say what the last layer says where they
    leave), breaches (share that reach the deepest exit below the threshold), and ``exit LAYER`` (share) for each.
    """
    exits = np.array([e for e in tokens.exits_of(model) if depth is None or e <= depth])
    confidence = tokens.fan("confidence", model, depth)
    agrees = tokens.fan("agrees", model, depth)
    grid = np.linspace(0, 1, points).astype(np.float32)
    # how many of the grid's thresholds the best confidence so far reaches: a token leaves at the first exit for these
    best = np.maximum.accumulate(confidence, axis=0)
    reached = np.searchsorted(grid, best, side="right")
    reached_before = np.vstack([np.zeros((1, tokens.size), reached.dtype), reached[:-1]])
    reached_last = reached[-1].copy()
    reached[-1] = points
    shares, agreeing = np.zeros((len(exits), points)), np.zeros(points)
    for i in range(len(exits)):
        shares[i] = _between(reached_before[i], reached[i], points)
        agreeing += _between(reached_before[i], reached[i], points, agrees[i])
    below = 1 - _between(np.zeros_like(reached_last), reached_last, points) / max(tokens.size, 1)
    total = max(tokens.size, 1)
    table = {"threshold": grid.astype(float).round(6), "mean_depth": exits @ shares / total}
    table |= {"agreement": agreeing / total, "breaches": np.clip(below, 0, 1)}
    return pd.DataFrame(table | {f"exit {e}": row / total for e, row in zip(exits, shares, strict=True)})


def _between(first: Ints, behind: Ints, points: int, kept: Bools | None = None) -> Floats:
    """How many intervals [first, behind) hold each of ``points`` places, of those ``kept``."""
    weights = None if kept is None else kept.astype(np.float64)
    edges = np.bincount(first, weights=weights, minlength=points + 1).astype(np.float64)
    edges -= np.bincount(behind, weights=weights, minlength=points + 1)
    return np.asarray(np.cumsum(edges)[:points], np.float64)


# --- by depth ---------------------------------------------------------------------------------------------------------


def depth_table(tokens: Tokens, model: str, seed: int = 0) -> pd.DataFrame:
    """By exit: confidence, agreement with the last layer, and where the table knows them perplexity, margin, entropy.

    Columns exit_layer, tokens; ``NAME``, ``NAME_low``, ``NAME_high`` of confidence, agreement, perplexity (exp of the
    mean negative log-probability of the tokens that stand in the texts), and their plain means margin, entropy (nats).
    """
    request, count = requests_of(tokens), np.ones((1, tokens.size))
    facts = {"confidence": tokens.fan("confidence", model), "agreement": tokens.fan("agrees", model).astype(float)}
    if tokens.has("logprob"):
        facts["perplexity"] = tokens.fan("logprob", model).astype(float)
    table: dict[str, object] = {"exit_layer": tokens.exits_of(model), "tokens": tokens.size}
    for name, values in facts.items():
        sums = sums_by(request, tokens.requests, np.concatenate([values, count]))
        found = estimates(sums, _perplexity if name == "perplexity" else _mean, seed=seed, name="depth")
        table |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    for name in ("margin", "entropy"):
        if tokens.has(name):
            table[name] = tokens.fan(name, model).mean(axis=1) if tokens.size else np.nan
    return pd.DataFrame(table)


def _mean(sums: Floats) -> Floats:
    return np.asarray(sums[..., :-1] / sums[..., -1:], np.float64)


def _perplexity(sums: Floats) -> Floats:
    return np.asarray(np.exp(-_mean(sums)), np.float64)


# --- confidence and being right ---------------------------------------------------------------------------------------


def right(tokens: Tokens, model: str, against: Against = "final") -> Bools:
    """Whether each exit's top token is right, [exits, tokens]. ``target`` needs top-1 ids and token ids."""
    if against == "final":
        return np.asarray(tokens.fan("agrees", model), bool)
    if "token_id" not in tokens.columns or not tokens.has("top1"):
        raise InputError("against", against, "the table knows no token ids", "Compare with the final layer.")
    return np.asarray(tokens.fan("top1", model) == tokens.columns["token_id"], bool)


def confidence_table(
    tokens: Tokens, model: str, against: Against = "final", bins: int = BINS, seed: int = 0
) -> pd.DataFrame:
    """By exit and bin of confidence, how often the exit is right: the calibration curve. Bins are of equal width.

    Columns exit_layer, bin_low, bin_high, confidence (mean in the bin), right, low, high, tokens; empty bins are
    absent.
    """
    request, rows = requests_of(tokens), []
    confidence, hits = tokens.fan("confidence", model), right(tokens, model, against)
    for i, exit_layer in enumerate(tokens.exits_of(model)):
        sums = _binned(request, tokens.requests, confidence[i], hits[i], bins)
        found = estimates(sums, lambda s: s[..., 2 * bins :] / s[..., :bins], seed=seed, name="reliability")
        counts, mean = sums.sum(axis=0)[:bins], sums.sum(axis=0)[bins : 2 * bins]
        rows += [
            (exit_layer, b / bins, (b + 1) / bins, mean[b] / counts[b], found.value[b], found.low[b], found.high[b],
             int(counts[b]))
            for b in range(bins)
            if counts[b]
        ]  # fmt: skip
    names = ["exit_layer", "bin_low", "bin_high", "confidence", "right", "low", "high", "tokens"]
    return pd.DataFrame(rows, columns=names)


def reliability_table(
    tokens: Tokens, model: str, against: Against = "final", bins: int = BINS, seed: int = 0
) -> pd.DataFrame:
    """By exit: expected calibration error (tokens' mean distance between confidence and being right, bin by bin; Naeini
    et al. 2015) and the signed gap (mean confidence less share right: above 0 is over-confident).

    Columns exit_layer, ece, ece_low, ece_high, gap, gap_low, gap_high, right, tokens. The error cannot fall below 0 and
    so leans upward in small samples; with few requests read the interval.
    """
    request, rows = requests_of(tokens), []
    confidence, hits = tokens.fan("confidence", model), right(tokens, model, against)
    for i, exit_layer in enumerate(tokens.exits_of(model)):
        sums = _binned(request, tokens.requests, confidence[i], hits[i], bins)
        found = estimates(sums, lambda s: _ece_and_gap(s, bins), seed=seed, name="reliability")
        (ece, gap, share), low, high = found.value, found.low, found.high
        rows.append((exit_layer, ece, low[0], high[0], gap, low[1], high[1], share, tokens.size))
    names = ["exit_layer", "ece", "ece_low", "ece_high", "gap", "gap_low", "gap_high", "right", "tokens"]
    return pd.DataFrame(rows, columns=names)


def _binned(request: Ints, requests: int, confidence: Floats, hits: Bools, bins: int) -> Floats:
    """Per request: tokens, summed confidence and right ones of each bin, [requests, 3 bins]."""
    slot = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    parts = (None, confidence.astype(np.float64), hits.astype(np.float64))
    return np.concatenate([counts_by(request, requests, slot, bins, weights) for weights in parts], axis=1)


def _ece_and_gap(sums: Floats, bins: int) -> Floats:
    counts, confidence, hits = sums[..., :bins], sums[..., bins : 2 * bins], sums[..., 2 * bins :]
    total = counts.sum(axis=-1)
    ece = np.abs(confidence - hits).sum(axis=-1) / total
    gap = (confidence - hits).sum(axis=-1) / total
    return np.stack([ece, gap, hits.sum(axis=-1) / total], axis=-1)


# --- two models on the same text --------------------------------------------------------------------------------------


def joint_table(tokens: Tokens, one: str, other: str, threshold: float, seed: int = 0) -> pd.DataFrame:
    """Where two models leave the same token: by exit of the one and exit of the other, share of all tokens.

    Columns ONE (exit layer), OTHER (exit layer), share, low, high, given_one (of the tokens that leave the one there,
    the share that leaves the other there), tokens.
    """
    first, second = tokens.exits_of(one), tokens.exits_of(other)
    a, b = exit_index(tokens, one, threshold), exit_index(tokens, other, threshold)
    cells = len(first) * len(second)
    sums = counts_by(requests_of(tokens), tokens.requests, a * len(second) + b, cells)
    found = estimates(sums, lambda s: s / s.sum(axis=-1, keepdims=True), seed=seed, name="joint")
    total = sums.sum(axis=0).reshape(len(first), len(second))
    with np.errstate(invalid="ignore"):
        given = (total / total.sum(axis=1, keepdims=True)).ravel()
    table = {one: np.repeat(first, len(second)), other: np.tile(second, len(first))}
    rest = {"share": found.value, "low": found.low, "high": found.high, "given_one": given}
    return pd.DataFrame({**table, **rest, "tokens": total.ravel().astype(int)})


def complement_table(tokens: Tokens, one: str, other: str, threshold: float, seed: int = 0) -> pd.DataFrame:
    """How two models help each other, as measure, value, low, high.

    *helped*: of the tokens below the threshold at the one's first exit, the share confident at the other's first;
    *helped anyway*: that share of all tokens; *depth correlation*: of where they leave, as shares of their layers;
    *same last word*: tokens of which both last layers say the same (where top-1 ids are known).
    """
    request = requests_of(tokens)
    hard = tokens.fan("confidence", one)[0] < threshold
    easy = tokens.fan("confidence", other)[0] >= threshold
    x = np.asarray(tokens.exits_of(one), float)[exit_index(tokens, one, threshold)]
    y = np.asarray(tokens.exits_of(other), float)[exit_index(tokens, other, threshold)]
    columns = [np.ones(tokens.size), hard, hard & easy, easy, x, y, x * x, y * y, x * y]
    names = ["helped", "helped anyway", "depth correlation"]
    if tokens.has("top1"):
        columns.append(tokens.fan("top1", one)[-1] == tokens.fan("top1", other)[-1])
        names.append("same last word")
    sums = sums_by(request, tokens.requests, np.array(columns, np.float64))
    found = estimates(sums, _complement, seed=seed, name="joint")
    return pd.DataFrame({"measure": names, "value": found.value, "low": found.low, "high": found.high})


def _complement(s: Floats) -> Floats:
    n, mx, my = s[..., 0], s[..., 4] / s[..., 0], s[..., 5] / s[..., 0]
    vx, vy, cov = s[..., 6] / n - mx * mx, s[..., 7] / n - my * my, s[..., 8] / n - mx * my
    spread = np.sqrt(np.maximum(vx, 0) * np.maximum(vy, 0))
    correlation = np.where(spread > 1e-12, cov / np.where(spread > 1e-12, spread, 1), np.nan)
    more = [s[..., 9] / n] if s.shape[-1] > 9 else []
    return np.stack([s[..., 2] / s[..., 1], s[..., 3] / n, correlation, *more], axis=-1)
