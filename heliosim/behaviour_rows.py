"""A behaviour summary as rows of text, the same for terminal and report."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from heliosim.behaviour_order import WINDOW_TOKENS
from heliosim.behaviour_summary import ALL_TASKS, BehaviourSummary


@dataclass(frozen=True)
class TableRows:
    """``names``: how many of the columns, from the left, tell rows apart."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 2


LINES = {
    "expected calibration error": "10 bins of equal width; it leans upward in small samples",
    "perplexity": "exp of the mean negative log-probability of the tokens that stand in the texts",
}
"""What figures mean, for a footer."""


def number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def cells(row: dict[Hashable, Any], name: str, digits: int | None = None) -> str:
    """``span`` of a column that has its bounds beside it."""
    value, low, high = (float(row.get(f"{name}{end}", math.nan)) for end in ("", "_low", "_high"))
    return span(value, low, high, digits)


def span(value: float, low: float, high: float, digits: int | None = None) -> str:
    """A value and its interval; shares unless ``digits`` are given."""
    show = percent if digits is None else lambda v: number(v, digits)
    return show(value) if math.isnan(low) or math.isnan(value) else f"{show(value)} ({show(low)}…{show(high)})"


def share_rows(summary: BehaviourSummary) -> TableRows:
    """Exit shares at several thresholds, open loop."""
    rows = []
    for m in summary.models.values():
        for threshold, part in m.shares.groupby("threshold"):
            shares = [f"{r['exit_layer']}: {span(r['share'], r['low'], r['high'])}" for r in part.to_dict("records")]
            rows.append([m.model, f"{threshold:g}", " · ".join(shares)])
    return TableRows(
        "Where tokens leave, open loop, by threshold", ["model", "TH", "share by exit layer"], rows, names=3
    )


def depth_rows(summary: BehaviourSummary) -> TableRows:
    """Agreement, perplexity, confidence by depth."""
    rows = []
    for m in summary.models.values():
        for own, given in zip(m.depths.to_dict("records"), m.depths_of_target.to_dict("records"), strict=True):
            more = [number(own.get(name, math.nan)) for name in ("margin", "entropy")]
            said = [cells(own, "agreement"), cells(given, "perplexity", 2), percent(own["confidence"]), *more]
            rows.append([m.model, str(own["exit_layer"]), *said])
    sources = {m.target_source for m in summary.models.values()}
    title = f"By depth, all tokens forced to leave there (perplexity on texts of {', '.join(sorted(sources))})"
    columns = ["model", "layer", "equals last layer", "perplexity", "confidence", "margin", "entropy (nats)"]
    return TableRows(title, columns, rows)


def reliability_rows(summary: BehaviourSummary) -> TableRows:
    """Calibration errors against the last layer, and against the text where known."""
    rows = []
    for m in summary.models.values():
        for name, table in (("last layer", m.reliability), (f"text ({m.target_source})", m.targets)):
            for r in table.to_dict("records") if table is not None else []:
                if name == "last layer" and r["exit_layer"] == m.exits[-1] and len(m.exits) > 1:
                    continue  # the last layer agrees with itself
                said = [cells(r, "ece", 3), cells(r, "gap", 3), percent(r["right"])]
                rows.append([m.model, str(r["exit_layer"]), name, *said])
    columns = ["model", "layer", "right means", "calibration error", "confidence less right", "right"]
    return TableRows("Reliability of confidence", columns, rows, names=3)


def confidence_rows(summary: BehaviourSummary) -> TableRows:
    """How often an exit says what the last layer says, by its confidence."""
    rows = [
        [m.model, str(r["exit_layer"]), f"{r['bin_low']:.1f} to {r['bin_high']:.1f}", percent(r["confidence"]),
         span(r["right"], r["low"], r["high"]), f"{r['tokens']:,}"]
        for m in summary.models.values()
        for r in m.confidence.to_dict("records")
        if r["exit_layer"] < m.exits[-1] or len(m.exits) == 1
    ]  # fmt: skip
    columns = ["model", "layer", "confidence", "its mean", "equals last layer", "tokens"]
    return TableRows("Agreement with the last layer, by confidence", columns, rows, names=3)


def joint_rows(summary: BehaviourSummary) -> TableRows:
    """Where two models leave the same tokens; each pair of models once."""
    rows = []
    for pair in summary.pairs:
        for r in pair.joint.to_dict("records") if pair.one < pair.other else ():
            where = [f"{pair.one}@{r[pair.one]}", f"{pair.other}@{r[pair.other]}"]
            rows.append([*where, span(r["share"], r["low"], r["high"]), percent(r["given_one"]), f"{r['tokens']:,}"])
    columns = ["leave the one at", "the other at", "of all tokens", "of those that leave the one there", "tokens"]
    return TableRows(f"Two models on the same tokens, threshold {summary.threshold:g}", columns, rows)


def complement_rows(summary: BehaviourSummary) -> TableRows:
    """How models help each other."""
    rows = [
        [pair.one, pair.other, str(r["measure"]), span(r["value"], r["low"], r["high"], 3)]
        for pair in summary.pairs
        for r in pair.complement.to_dict("records")
    ]
    title = f"Two models on the same text, threshold {summary.threshold:g}, first exits"
    return TableRows(title, ["hard for", "with", "measure", "value"], rows, names=3)


def correlation_rows(summary: BehaviourSummary) -> TableRows:
    """Autocorrelation of exit depth."""
    rows = []
    for m in summary.models.values():
        for r in m.correlation[m.correlation["lag"].isin((1, 2, 3, 5, 10))].to_dict("records"):
            said = [span(r["value"], r["low"], r["high"], 2), number(r["within"])]
            rows.append([m.model, str(r["lag"]), *said, f"{r['pairs']:,}"])
        rows.append([m.model, "variance between texts", percent(m.request_share), "", ""])
    title = f"Autocorrelation of exit depth, threshold {summary.threshold:g}"
    return TableRows(title, ["model", "tokens apart", "correlation", "within texts", "pairs"], rows)


def run_rows(summary: BehaviourSummary) -> TableRows:
    """Run lengths by exit."""
    rows = [
        [m.model, str(r["exit_layer"]), f"{r['runs']:,}", span(r["mean"], r["low"], r["high"], 2),
         number(r["median"], 0), number(r["p90"], 0), number(r["longest"], 0), number(r["independent"])]
        for m in summary.models.values()
        for r in m.runs.to_dict("records")
    ]  # fmt: skip
    columns = ["model", "layer", "runs", "mean tokens", "median", "p90", "longest", "if independent"]
    return TableRows(f"Runs of tokens that leave at the same exit, threshold {summary.threshold:g}", columns, rows)


def breach_rows(summary: BehaviourSummary) -> TableRows:
    """Breaches per window."""
    rows = [
        [m.model, str(r["depth"]), str(r["windows"]), span(r["mean"], r["low"], r["high"], 1),
         span(r["std"], r["std_low"], r["std_high"], 1), number(r["independent_std"], 1), percent(r["over_limit"])]
        for m in summary.models.values()
        for r in m.breaches.to_dict("records")
    ]  # fmt: skip
    columns = ["model", "loaded", "windows", "mean", "std", "std if independent", "above 50"]
    return TableRows(f"Breaches per {WINDOW_TOKENS} tokens, threshold {summary.threshold:g}", columns, rows)


def quality_rows(summary: BehaviourSummary) -> TableRows:
    """Closed loop, by policy."""
    rows = []
    for m in summary.models.values():
        for r in m.quality.to_dict("records"):
            said = [cells(r, "agreement"), cells(r, "perplexity", 2), percent(r["same_prefix"]), cells(r, "right")]
            length = [cells(r, "length", 1), percent(r["ended"]), number(r["length_change"], 1)]
            rows.append([m.model, str(r["policy"]), number(r["layers"]), *said, *length])
    columns = ["model", "policy", "layers", "agreement", "perplexity", "same prefix", "right lines", "length", "ended"]
    title = "Texts of each policy, judged by the full model (tokens up to the end of each text)"
    return TableRows(title, [*columns, "length less full's"], rows)


def length_rows(summary: BehaviourSummary) -> TableRows:
    """Lengths of prompts and outputs."""
    rows = [
        [str(r["task"]), str(r["source"]), str(r["texts"]), number(r["prompt_mean"], 1), number(r["prompt_p90"], 0),
         percent(r["ended"]), number(r["output_mean"], 1), number(r["output_median"], 0), number(r["output_p90"], 0),
         str(r["cut_at"])]
        for r in summary.lengths.to_dict("records")
    ]  # fmt: skip
    columns = ["task", "texts of", "texts", "prompt mean", "p90", "ended", "output mean", "median", "p90", "cut at"]
    return TableRows("Lengths, tokens", columns, rows)


def fit_rows(summary: BehaviourSummary) -> TableRows:
    """Fitted models beside the record, all tasks together."""
    rows = []
    for m in summary.models.values():
        if m.fits is None:
            continue
        for r in m.fits[m.fits["task"] == ALL_TASKS].to_dict("records"):
            allowed = f"{number(r['low'], 3)}…{number(r['high'], 3)}"
            met = "yes" if r["is_met"] else "no"
            said = [number(r["recorded"], 3), number(r["fitted"], 3), allowed, met]
            rows.append([m.model, str(r["model"]), str(r["statistic"]), *said])
    columns = ["of", "fitted model", "statistic", "recorded", "fitted", "chance allows", "met"]
    return TableRows("Fitted models beside the record", columns, rows, names=3)


def verdict_lines(summary: BehaviourSummary) -> list[str]:
    """Which fitted model suffices, a line per model."""
    lines = []
    for m in summary.models.values():
        if m.fits is None:
            continue
        said = [f"{task} {kind or 'none'}" for task, kind in m.sufficient.items()]
        lines.append(f"{m.model}: the simplest fitted model that meets every statistic: {', '.join(said)}.")
        if m.sufficient.get(ALL_TASKS) is None:
            whole = m.fits[(m.fits["task"] == ALL_TASKS) & ~m.fits["is_met"]]
            missed = whole[whole["model"] == whole["model"].iloc[-1]]
            lines.append(
                f"{missed['model'].iloc[0]} misses: {', '.join(missed['statistic'])}. Replay the record instead."
            )
    return lines
