"""Fitted models of exits, made from a table's own tokens: a chain says in which state the next token is, and a recorded
token of that state, with all its confidences for all models, stands there.

The state of a token is where it leaves every model at a threshold, and whether the last layer is confident. So the
joint of the models, and what each confidence is like, stay those of the record; only what follows what is modelled, by
task. Synthetic in that sense: no text ever went this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from heliosim.behaviour import Behaviour, Text
from heliosim.behaviour_chains import CHAIN_KINDS, Chain, ChainKind, Texts, fit_chain, text_means
from heliosim.behaviour_order import WINDOW_TOKENS, in_random_order, request_share_of, runs, windows
from heliosim.behaviour_tokens import Floats, Ints, Tokens, breaches_at, exit_index, tokens_of
from heliosim.bootstrap import LEVEL
from heliosim.streams import stream

CHECK_DRAWS = 100
CHECKED_LAGS = (1, 2, 5)
LONG_RUN = 8
TEXTS_PER_TASK = 256
"""Texts of each task that a simulation draws its requests from, at least."""


@dataclass(frozen=True)
class Fitted:
    """A chain of one task over ``codes``, the states that were met. ``rows``: the recorded tokens of each state."""

    chain: Chain
    codes: Ints
    rows: tuple[Ints, ...]


def state_codes(tokens: Tokens, models: Sequence[str], threshold: float) -> Ints:
    """One number per token: at which exit it leaves every model, and whether the last one is confident, [tokens]."""
    code = np.zeros(tokens.size, np.int64)
    for model in models:
        left = exit_index(tokens, model, threshold)
        unsure = (left == len(tokens.exits_of(model)) - 1) & (tokens.fan("confidence", model)[-1] < threshold)
        code = code * (len(tokens.exits_of(model)) + 1) + left + unsure
    return code


def fit_tasks(
    tokens: Tokens, kind: ChainKind, threshold: float, models: Sequence[str] | None = None
) -> dict[str, Fitted]:
    """A chain per task over texts of one source."""
    models = list(models or tokens.exits)
    codes, depth = state_codes(tokens, models, threshold), np.zeros(tokens.size)
    for model in models:
        depth += exit_index(tokens, model, threshold) / max(1, len(tokens.exits_of(model)) - 1)
    found = {}
    for task in tokens.tasks:
        mine = tokens.task == task
        rows = np.flatnonzero(mine[tokens.text])
        known, states = np.unique(codes[rows], return_inverse=True)
        text = (np.cumsum(mine) - 1)[tokens.text[rows]]
        texts = Texts(states.astype(np.int64), text, int(mine.sum()), len(known))
        order = text_means(depth[rows], text, texts.count)
        by_state = tuple(rows[states == s] for s in range(len(known)))
        found[task] = Fitted(fit_chain(kind, texts, order), known, by_state)
    return found


def draw_rows(fitted: Fitted, counts: Ints, classes: Floats, rng: np.random.Generator) -> list[Ints]:
    """Recorded tokens (rows of the table) for texts of these lengths."""
    states = fitted.chain.draw(int(counts.max(initial=0)), classes, rng)
    where = rng.random(states.shape)
    sizes = np.array([len(rows) for rows in fitted.rows])
    flat, first = np.concatenate(fitted.rows), np.concatenate(([0], np.cumsum(sizes)[:-1]))
    found = flat[first[states] + (where * sizes[states]).astype(np.int64)]
    return [row[:count] for row, count in zip(found, counts, strict=True)]


# --- for a simulation -------------------------------------------------------------------------------------------------


def fitted_behaviour(
    behaviour: Behaviour,
    models: Sequence[str],
    kind: ChainKind,
    threshold: float,
    seed: int,
    texts_per_task: int = TEXTS_PER_TASK,
) -> Behaviour:
    """Texts drawn from models fitted to a behaviour, source by source; lengths and ends are those of recorded texts.

    A prompt's class (how easy its text is as a whole) is the same under every source. Draws come from the streams
    ("behaviour", "fitted", kind, ...) of the seed.
    """
    every = tokens_of(behaviour)
    sequences, prototypes = _more_texts(behaviour, texts_per_task)
    texts: dict[tuple[str, str], Text] = {}
    for source in every.sources:
        tokens = every.of(sources=[source])
        for task, fitted in fit_tasks(tokens, kind, threshold, models).items():
            names = [name for name in sequences.get(task, ()) if (prototypes[name], source) in behaviour.texts]
            likes = [behaviour.texts[prototypes[name], source] for name in names]
            counts = np.array([like.tokens for like in likes], np.int64)
            classes = stream(seed, "behaviour", "fitted", kind, "class", task).random(len(names))
            rng = stream(seed, "behaviour", "fitted", kind, source, task)
            drawn = draw_rows(fitted, counts, classes, rng)
            texts |= _texts(tokens, names, source, likes, drawn)
    return Behaviour(texts, sequences, behaviour.exits)


def _more_texts(behaviour: Behaviour, least: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Names of texts by task, as many as asked for, and the recorded text whose lengths each has."""
    sequences: dict[str, list[str]] = {}
    prototypes: dict[str, str] = {}
    for task, names in behaviour.sequences.items():
        for k in range(max(least, len(names))):
            own, copy = names[k % len(names)], k // len(names)
            name = own if copy == 0 else f"{own}+{copy}"
            sequences.setdefault(task, []).append(name)
            prototypes[name] = own
    return sequences, prototypes


def _texts(
    tokens: Tokens, names: Sequence[str], source: str, likes: Sequence[Text], drawn: Sequence[Ints]
) -> dict[tuple[str, str], Text]:
    if not names:
        return {}
    rows = np.concatenate(drawn)
    bounds = np.concatenate(([0], np.cumsum([len(d) for d in drawn])))
    keys = [f"{model}@{e}" for model, exits in tokens.exits.items() for e in exits]
    confidence = {key: tokens.columns[f"confidence:{key}"][rows] for key in keys}
    agrees = {key: tokens.columns[f"agrees:{key}"][rows] for key in keys}
    return {
        (name, source): Text(
            task=like.task,
            prompt_tokens=like.prompt_tokens,
            tokens=like.tokens,
            end=like.end,
            confidence={key: values[a:b] for key, values in confidence.items()},
            agrees={key: values[a:b] for key, values in agrees.items()},
        )
        for name, like, (a, b) in zip(names, likes, pairwise(bounds.tolist()), strict=True)
    }


# --- checked against the record ---------------------------------------------------------------------------------------

TOLERANCES: Mapping[str, float] = {"share": 0.01, "lag": 0.03, "run": 0.1, "long": 0.05, "breach": 1.0, "between": 0.03}
"""Differences too small to matter, by kind of statistic, in its own unit."""


def order_statistics(tokens: Tokens, index: Ints, layers: Sequence[int], is_unsure: Ints) -> dict[str, float]:
    """What a model's exits are like, from the exit index of each token and whether the last layer is unsure.

    Shares by exit; autocorrelation of exit depth; mean run length and share of tokens in runs of ``LONG_RUN`` or more;
    standard deviation of breaches per 100-token window by depth; share of the variance that lies between requests.
    """
    x = np.asarray(layers, np.float64)[index]
    found = {f"share at {e}": float((index == i).mean()) for i, e in enumerate(layers)}
    centred = x - x.mean()
    spread = float(np.mean(centred * centred))
    for lag in CHECKED_LAGS:
        pair = np.flatnonzero(tokens.position >= lag)
        if len(pair) and spread > 1e-12:
            found[f"lag {lag} correlation"] = float(np.mean(centred[pair] * centred[pair - lag])) / spread
    _, length, _ = runs(tokens, index)
    found["run length, mean"] = float(length.mean())
    found[f"long runs ({LONG_RUN} or more), share of tokens"] = float(length[length >= LONG_RUN].sum()) / len(index)
    for i, e in enumerate(layers):
        breaches = index > i if i < len(layers) - 1 else is_unsure.astype(bool)
        if len(counts := windows(tokens, breaches)) > 1:
            found[f"breaches at {e}, std per {WINDOW_TOKENS} tokens"] = float(counts.std())
    between = request_share_of(tokens, x)
    if not np.isnan(between):
        found["between requests, share of variance"] = between
    return found


def check_fits(
    tokens: Tokens,
    model: str,
    threshold: float,
    *,
    models: Sequence[str] | None = None,
    kinds: Sequence[ChainKind] = CHAIN_KINDS,
    draws: int = CHECK_DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Each fitted model beside the record: texts of one source, drawn again ``draws`` times with their lengths.

    Columns model (iid, markov, markov-request), classes, statistic, recorded, fitted (mean of draws), low, high (where
    95 % of draws lie, all statistics of a model together: Bonferroni, normal), is_met: the record lies there, or the
    difference is below ``TOLERANCES``.
    """
    tokens = in_random_order(tokens, seed)
    layers, rows = tokens.exits_of(model), []
    index, unsure = _index_and_unsure(tokens, model, threshold)
    recorded = order_statistics(tokens, index, layers, unsure)
    for kind in kinds:
        fitted = fit_tasks(tokens, kind, threshold, models)
        drawn = [_drawn(tokens, fitted, (index, unsure), layers, (seed, kind, k)) for k in range(draws)]
        classes = max(f.chain.classes for f in fitted.values())
        rows += _beside(kind, classes, recorded, drawn)
    names = ["model", "classes", "statistic", "recorded", "fitted", "low", "high", "is_met"]
    return pd.DataFrame(rows, columns=names)


def _index_and_unsure(tokens: Tokens, model: str, threshold: float) -> tuple[Ints, Ints]:
    index = exit_index(tokens, model, threshold)
    return index, breaches_at(tokens, model, threshold).astype(np.int64)


def _drawn(
    tokens: Tokens,
    fitted: Mapping[str, Fitted],
    known: tuple[Ints, Ints],
    layers: Sequence[int],
    which: tuple[int, str, int],
) -> dict[str, float]:
    """The statistics of one corpus drawn from fitted models, text for text of the recorded lengths."""
    seed, kind, k = which
    rows: list[Ints] = [np.zeros(0, np.int64)] * len(tokens.counts)
    for task, model in fitted.items():
        mine = np.flatnonzero(tokens.task == task)
        rng = stream(seed, "behaviour", "check", kind, task, k)
        for text, drawn in zip(
            mine, draw_rows(model, tokens.counts[mine], rng.random(len(mine)), rng), strict=True
        ):  # fmt: skip
            rows[int(text)] = drawn
    flat = np.concatenate(rows)
    return order_statistics(tokens, known[0][flat], layers, known[1][flat])


def _beside(
    kind: str, classes: int, recorded: Mapping[str, float], drawn: Sequence[Mapping[str, float]]
) -> list[tuple[object, ...]]:
    from statistics import NormalDist

    rows: list[tuple[object, ...]] = []
    z = NormalDist().inv_cdf(1 - (1 - LEVEL) / (2 * len(recorded)))
    for name, value in recorded.items():
        values = np.array([d.get(name, np.nan) for d in drawn])
        mean, half = float(values.mean()), z * float(values.std(ddof=1)) * np.sqrt(1 + 1 / len(values))
        tolerance = TOLERANCES[name.partition(" ")[0].rstrip(",").removesuffix("es")]
        is_met = bool(abs(value - mean) <= max(half, tolerance))
        rows.append((kind, classes, name, value, mean, mean - half, mean + half, is_met))
    return rows


def sufficient(checked: pd.DataFrame) -> str | None:
    """The simplest model that meets every statistic; None if none does."""
    for kind in CHAIN_KINDS:
        part = checked[checked["model"] == kind]
        if len(part) and part["is_met"].all():
            return str(kind)
    return None
