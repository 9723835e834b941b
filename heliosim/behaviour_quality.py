"""Closed loop: what texts are like that were really generated under a policy, judged by the full model, and how long
texts are. Every policy wrote its own text for the same prompts, so policies are compared prompt by prompt.

Tokens behind the natural end of a text do not count. Intervals as in ``behaviour_stats``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from heliosim.behaviour_tokens import Floats, Ints, Tokens, exit_layers
from heliosim.bootstrap import estimates, sums_by

MEASURES = ("agreement", "perplexity", "same_prefix", "right", "ended", "length", "layers")


def policies_of(tokens: Tokens, model: str) -> list[str]:
    """Sources whose texts a model wrote, as recorded: vanilla first, then thresholds, then greedy depths."""
    return [source for source in tokens.sources if source.startswith(f"{model}:")]


def quality_table(tokens: Tokens, model: str, threshold: float, seed: int = 0) -> pd.DataFrame:
    """By policy of a model: quality and length of what it wrote, with intervals.

    Columns policy, texts, tokens; ``NAME``, ``NAME_low``, ``NAME_high`` of agreement (share of tokens the full model
    would have said to the same text), perplexity (of the full model about them), same_prefix (mean share of the full
    model's own text up to the first other token), right (mean share of right lines, where a task has right ones),
    ended (share of texts that came to an end), length (mean tokens up to the end, at most those recorded), layers
    (mean depth at which its tokens leave if no other row has a say); and length_change, with bounds: mean length less
    that of the full model, prompt by prompt. NaN: not known.
    """
    full = _of(tokens, f"{model}:full")
    rows = []
    for policy in policies_of(tokens, model):
        part = tokens.of(sources=[policy])
        sums = _sums(part, full, model, _depth(tokens, model, policy), threshold)
        found = estimates(sums, _quality, seed=seed, name="quality")
        row: dict[str, object] = {"policy": policy.removeprefix(f"{model}:"), "texts": len(part.counts)}
        row["tokens"] = int(part.before_end.sum())
        for i, name in enumerate((*MEASURES, "length_change")):
            row |= {name: found.value[i], f"{name}_low": found.low[i], f"{name}_high": found.high[i]}
        rows.append(row)
    names = [n for name in (*MEASURES, "length_change") for n in (name, f"{name}_low", f"{name}_high")]
    return pd.DataFrame(rows, columns=["policy", "texts", "tokens", *names])


def _of(tokens: Tokens, source: str) -> Tokens | None:
    return tokens.of(sources=[source]) if source in tokens.sources else None


def _depth(tokens: Tokens, model: str, policy: str) -> int | None:
    """The depth all tokens of a policy leave at; None: by threshold."""
    kind = policy.removeprefix(f"{model}:")
    if kind.startswith("greedy@"):
        return int(kind.removeprefix("greedy@"))
    return tokens.exits_of(model)[-1] if kind == "full" else None


def _sums(part: Tokens, full: Tokens | None, model: str, depth: int | None, threshold: float) -> Floats:
    """Per request: the sums behind every measure, [requests, columns]. Unknown ones are NaN or 0 of 0."""
    counted, request = part.before_end, part.request
    by_text = np.zeros((12, len(part.counts)))
    by_text[0] = _per_text(part, counted.astype(float))
    known = "token_id" in part.columns and part.has("top1")
    last = part.fan("top1", model)[-1] == part.columns["token_id"] if known else part.fan("agrees", model)[-1]
    by_text[1] = _per_text(part, (last & counted).astype(float)) if known else np.nan
    logprob = part.fan("logprob", model)[-1].astype(float) if part.has("logprob") else np.full(part.size, np.nan)
    by_text[2] = _per_text(part, np.where(counted, logprob, 0.0))
    layers = exit_layers(part, model, threshold) if depth is None else np.full(part.size, depth)
    by_text[3] = _per_text(part, (layers * counted).astype(float))
    by_text[4] = 1.0
    by_text[5] = part.ends > 0
    by_text[6] = np.minimum(np.where(part.ends > 0, part.ends, part.counts), part.counts)
    by_text[7], by_text[8] = np.nan_to_num(part.right), ~np.isnan(part.right)
    if full is not None:
        by_text[9], by_text[10], by_text[11] = _beside(part, full, known=known)
    return sums_by(request, part.requests, by_text)


def _per_text(tokens: Tokens, values: Floats) -> Floats:
    return np.asarray(np.bincount(tokens.text, weights=values, minlength=len(tokens.counts)), np.float64)


def _beside(part: Tokens, full: Tokens, *, known: bool) -> tuple[Floats, Floats, Floats]:
    """Per text: share of the full model's text up to the first other token, tokens more than it, and whether there is
    such a text.
    """
    where = {name: i for i, name in enumerate(full.sequence.tolist())}
    same, more, has = np.zeros((3, len(part.counts)))
    for i, name in enumerate(part.sequence.tolist()):
        j = where.get(name)
        if j is None:
            continue
        mine, theirs = _length(part, i), _length(full, j)
        has[i], more[i] = 1.0, mine - theirs
        same[i] = _prefix(_ids(part, i)[:mine], _ids(full, j)[:theirs]) if known else np.nan
    return same, more, has


def _length(tokens: Tokens, text: int) -> int:
    count, end = int(tokens.counts[text]), int(tokens.ends[text])
    return min(end, count) if end > 0 else count


def _ids(tokens: Tokens, text: int) -> Ints:
    first = int(tokens.starts[text])
    return np.asarray(tokens.columns["token_id"][first : first + int(tokens.counts[text])])


def _prefix(mine: Ints, full: Ints) -> float:
    shared = min(len(mine), len(full))
    differs = np.flatnonzero(mine[:shared] != full[:shared])
    return float(differs[0] if len(differs) else shared) / max(1, len(full))


def _quality(s: Floats) -> Floats:
    n, texts, beside = s[..., 0], s[..., 4], s[..., 11]
    measures = [
        s[..., 1] / n, np.exp(-s[..., 2] / n), s[..., 9] / beside, s[..., 7] / s[..., 8], s[..., 5] / texts,
        s[..., 6] / texts, s[..., 3] / n, s[..., 10] / beside,
    ]  # fmt: skip
    return np.stack(measures, axis=-1)


def length_table(tokens: Tokens) -> pd.DataFrame:
    """Lengths of texts by task and source, tokens: prompts, and outputs up to their natural end.

    Columns task, source, texts, prompt_mean, prompt_p90, ended (share), output_mean, output_median, output_p90 (of
    texts that did not end, what was recorded: where ``ended`` is below 1 the figures are lower bounds), cut_at
    (longest).
    """
    length = np.minimum(np.where(tokens.ends > 0, tokens.ends, tokens.counts), tokens.counts)
    frame = pd.DataFrame(
        {"task": tokens.task, "source": tokens.source, "prompt": tokens.prompt_tokens, "ended": tokens.ends > 0,
         "output": length, "count": tokens.counts}
    )  # fmt: skip
    found = frame.groupby(["task", "source"], sort=False).agg(
        texts=("output", "size"),
        prompt_mean=("prompt", "mean"),
        prompt_p90=("prompt", lambda x: x.quantile(0.9)),
        ended=("ended", "mean"),
        output_mean=("output", "mean"),
        output_median=("output", "median"),
        output_p90=("output", lambda x: x.quantile(0.9)),
        cut_at=("count", "max"),
    )
    order = {task: i for i, task in enumerate(tokens.tasks)}
    return found.reset_index().sort_values("task", key=lambda t: t.map(order), kind="stable", ignore_index=True)
