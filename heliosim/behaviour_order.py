"""How exits follow each other along a text: autocorrelation, run lengths, and breaches in windows of tokens.

An engine of batch 1 meets exactly these; in a batch, windows mix the rows' tokens. Intervals as in
``behaviour_stats``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from heliosim.behaviour_stats import requests_of
from heliosim.behaviour_tokens import Bools, Floats, Ints, Tokens, breaches_at, exit_index, exit_layers
from heliosim.bootstrap import LEVEL, estimates, sums_by
from heliosim.streams import stream

LAGS = 10
WINDOW_TOKENS = 100
BREACH_LIMIT = 50
"""Breaches per window above which HELIOS acts, in its paper's setting."""
_WINDOW_DRAWS = 100


def correlation_table(
    tokens: Tokens, model: str, threshold: float, depth: int | None = None, lags: int = LAGS, seed: int = 0
) -> pd.DataFrame:
    """Autocorrelation of exit depth: of tokens ``lag`` apart in one text, the correlation of where they leave.

    Columns lag, value, low, high, within, pairs. ``value`` is around the mean of all tokens, so texts that are easier
    as a whole count as correlation; ``within`` is around each text's own mean (and so leans below 0 by about 1 /
    length). NaN where exit depth never varies.
    """
    x = exit_layers(tokens, model, threshold, depth).astype(np.float64)
    centred, within = x - x.mean() if len(x) else x, x - _text_means(tokens, x)[tokens.text]
    request, rows = requests_of(tokens), []
    for lag in range(1, lags + 1):
        pair = np.flatnonzero(tokens.position >= lag)
        if not len(pair):
            break
        products = (centred[pair] * centred[pair - lag], np.ones(len(pair)))
        paired = sums_by(request[pair], tokens.requests, np.array(products))
        alone = sums_by(request, tokens.requests, np.array((centred, centred * centred, np.ones(len(x)))))
        found = estimates(np.concatenate([paired, alone], axis=1), _correlation, seed=seed, name="order")
        spread = float(np.mean(within * within))
        own = float(np.mean(within[pair] * within[pair - lag])) / spread if spread > 1e-12 else np.nan
        rows.append((lag, *(float(v[0]) for v in (found.value, found.low, found.high)), own, len(pair)))
    return pd.DataFrame(rows, columns=["lag", "value", "low", "high", "within", "pairs"])


def _text_means(tokens: Tokens, x: Floats) -> Floats:
    sums = np.bincount(tokens.text, weights=x, minlength=len(tokens.counts))
    return np.asarray(sums / np.maximum(tokens.counts, 1), np.float64)


def _correlation(s: Floats) -> Floats:
    """From sums of products, pairs, x, x squared, tokens; a resample's own mean is taken off again."""
    mean = s[..., 2] / s[..., 4]
    variance = s[..., 3] / s[..., 4] - mean * mean
    covariance = s[..., 0] / s[..., 1] - mean * mean
    usable = variance > 1e-12
    return np.asarray(np.where(usable, covariance / np.where(usable, variance, 1), np.nan), np.float64)[..., None]


def request_share(tokens: Tokens, model: str, threshold: float, depth: int | None = None) -> float:
    """Share of the variance of exit depth that lies between texts (intraclass correlation, one-way analysis of
    variance, at least 0): how much a text's first tokens say about the rest. NaN where depth never varies.
    """
    return request_share_of(tokens, exit_layers(tokens, model, threshold, depth).astype(np.float64))


def request_share_of(tokens: Tokens, x: Floats) -> float:
    """The same of any value per token, [tokens]."""
    n, k = len(x), len(tokens.counts)
    if k < 2 or n <= k or x.std() < 1e-9:
        return float("nan")
    means = _text_means(tokens, x)
    between = float(tokens.counts @ (means - x.mean()) ** 2) / (k - 1)
    within = float(((x - means[tokens.text]) ** 2).sum()) / (n - k)
    typical = (n - float((tokens.counts.astype(float) ** 2).sum()) / n) / (k - 1)
    return max(0.0, (between - within) / (between + (typical - 1) * within))


def runs(tokens: Tokens, states: Ints) -> tuple[Ints, Ints, Ints]:
    """Runs of equal states within texts: state, length and text of each, in order. ``states`` [tokens]."""
    if not len(states):
        return (np.zeros(0, np.int64),) * 3
    starts = np.flatnonzero(tokens.is_first | np.concatenate(([True], states[1:] != states[:-1])))
    return states[starts], np.diff(np.append(starts, len(states))), tokens.text[starts]


def run_table(
    tokens: Tokens, model: str, threshold: float, depth: int | None = None, seed: int = 0
) -> pd.DataFrame:  # fmt: skip
    """Runs of tokens that leave at the same exit, by exit. Runs are cut where a text ends.

    Columns exit_layer, runs, mean, low, high, median, p90, longest (tokens), and independent: the mean length there
    would be if tokens left independently of each other with the same share (1 / (1 - share), less what text ends cut
    off).
    """
    left = exit_index(tokens, model, threshold, depth)
    state, length, text = runs(tokens, left)
    request, rows = tokens.request[text] if len(text) else text, []
    for i, exit_layer in enumerate([e for e in tokens.exits_of(model) if depth is None or e <= depth]):
        mine = state == i
        if not mine.any():
            rows.append((exit_layer, 0, *[np.nan] * 7))
            continue
        sums = sums_by(request[mine], tokens.requests, np.array((length[mine], np.ones(int(mine.sum())))))
        found = estimates(sums, lambda s: s[..., :1] / s[..., 1:], seed=seed, name="order")
        spread = (np.median(length[mine]), np.quantile(length[mine], 0.9), length[mine].max())
        share = float((left == i).mean())
        mean = tuple(float(v[0]) for v in (found.value, found.low, found.high))
        rows.append((exit_layer, int(mine.sum()), *mean, *spread, _independent_run(share, tokens.counts)))
    names = ["exit_layer", "runs", "mean", "low", "high", "median", "p90", "longest", "independent"]
    return pd.DataFrame(rows, columns=names)


def _independent_run(share: float, counts: Ints) -> float:
    """Mean run length of independent tokens in texts of these lengths: expected tokens over expected runs."""
    total, runs_expected = float(counts.sum()), float((counts - 1).clip(0).sum()) * (1 - share) + len(counts)
    return total / runs_expected


def in_random_order(tokens: Tokens, seed: int) -> Tokens:
    """The texts in the order in which requests might have come; whoever wrote the table may have sorted them."""
    return tokens.arranged(stream(seed, "behaviour", "order").permutation(len(tokens.counts)))


def windows(tokens: Tokens, breaches: Bools, window: int = WINDOW_TOKENS) -> Ints:
    """Breaches in consecutive windows of tokens, texts one behind the other within a task; what does not fill a window
    is left over.
    """
    found = []
    for task in tokens.tasks:
        mine = breaches[(tokens.task == task)[tokens.text]]
        whole = len(mine) // window
        found.append(mine[: whole * window].reshape(whole, window).sum(axis=1))
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


def breach_table(
    tokens: Tokens,
    model: str,
    threshold: float,
    window: int = WINDOW_TOKENS,
    limit: int = BREACH_LIMIT,
    seed: int = 0,
) -> pd.DataFrame:
    """Breaches (tokens that reach the deepest loaded layer below the threshold) per window of tokens, by depth loaded.

    Columns depth, windows, mean, low, high, std, std_low, std_high, independent_std (of independent tokens with the
    same share), least, most, over_limit (share of windows above ``limit``). Windows run over the texts
    of one task in random order.
    """
    tokens = in_random_order(tokens, seed)
    request, rows = requests_of(tokens), []
    for depth in tokens.exits_of(model):
        breaches = breaches_at(tokens, model, threshold, depth)
        sums = sums_by(request, tokens.requests, np.array((breaches, np.ones(tokens.size)), np.float64))
        found = estimates(sums, lambda s: window * s[..., :1] / s[..., 1:], seed=seed, name="breaches")
        mean = tuple(float(v[0]) for v in (found.value, found.low, found.high))
        counts = windows(tokens, breaches, window)
        if len(counts) < 2:
            rows.append((depth, len(counts), *mean, *[np.nan] * 7))
            continue
        share = float(breaches.mean())
        spread = (float(counts.std()), *_std_interval(tokens, breaches, window, seed))
        independent = float(np.sqrt(window * share * (1 - share)))
        over = float((counts > limit).mean())
        rows.append((depth, len(counts), *mean, *spread, independent, counts.min(), counts.max(), over))
    names = [
        "depth",
        "windows",
        "mean",
        "low",
        "high",
        "std",
        "std_low",
        "std_high",
        "independent_std",
        "least",
        "most",
    ]
    return pd.DataFrame(rows, columns=[*names, "over_limit"])


def _std_interval(tokens: Tokens, breaches: Bools, window: int, seed: int) -> tuple[float, float]:
    """Interval of the windows' standard deviation: texts are drawn again within their task and laid in a row."""
    rng = stream(seed, "behaviour", "bootstrap", "windows")
    sums = np.concatenate(([0], np.cumsum(breaches)))
    tasks = [np.flatnonzero(tokens.task == task) for task in tokens.tasks]
    found = []
    for _ in range(_WINDOW_DRAWS):
        counts = []
        for texts in tasks:
            drawn = texts[rng.integers(0, len(texts), len(texts))]
            counts.append(_windows_of(sums, tokens.starts[drawn], tokens.counts[drawn], window))
        found.append(float(np.concatenate(counts).std()))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _windows_of(sums: Ints, starts: Ints, counts: Ints, window: int) -> Floats:
    """Windows over texts laid in a row, from running sums of all breaches."""
    ends = np.cumsum(counts)
    edges = np.arange(0, int(ends[-1]) + 1, window)
    text = np.minimum(np.searchsorted(ends, edges, side="right"), len(ends) - 1)
    before = np.concatenate(([0], np.cumsum(sums[starts + counts] - sums[starts])))
    inside = edges - (ends[text] - counts[text])
    return np.diff(before[text] + sums[starts[text] + inside] - sums[starts[text]]).astype(np.float64)
