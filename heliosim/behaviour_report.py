"""``behaviour.html``: what a behaviour table says, with figures, as one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from heliosim.behaviour_rows import (
    LINES,
    TableRows,
    breach_rows,
    complement_rows,
    confidence_rows,
    correlation_rows,
    depth_rows,
    fit_rows,
    joint_rows,
    length_rows,
    quality_rows,
    reliability_rows,
    run_rows,
    share_rows,
    verdict_lines,
)
from heliosim.behaviour_source import Opened, behaviour_of_profile
from heliosim.behaviour_summary import ALL_TASKS, BehaviourSummary, ModelSummary, summarise_behaviour
from heliosim.report import Card, Cards, Column, Details, Figure, Section, Table, Text, write_report

if TYPE_CHECKING:
    from heliosim.charts import Style
    from heliosim.formats.profile import Profile


def write_behaviour_report(profile: Profile, path: Path, *, name: str = "", seed: int = 0) -> None:
    """The report of a profile's behaviour at its own threshold, fitted models included."""
    opened = behaviour_of_profile(profile, name)
    summary = summarise_behaviour(opened.tokens, opened.facts.threshold, fits=True, seed=seed)
    write_opened(opened, summary, path)


def write_opened(opened: Opened, summary: BehaviourSummary, path: Path) -> None:
    """Write the report of a table and its summary."""
    write_report(
        path,
        f"Behaviour: {opened.name}",
        [_glance(opened, summary), *_sections(opened, summary)],
        subtitle=f"{opened.origin}; threshold {summary.threshold:g}",
        provenance=_provenance(opened, summary),
    )


def _style(opened: Opened, summary: BehaviourSummary) -> Style:
    from heliosim.charts import Style

    return Style({}, f"{summary.requests:,} prompts · {summary.tokens:,} tokens · {opened.origin}")


def _glance(opened: Opened, summary: BehaviourSummary) -> Section:
    cards = []
    for model in summary.models.values():
        first = model.shares[model.shares["threshold"] == summary.threshold].iloc[0]
        note = f"{first['low']:.0%} to {first['high']:.0%}; texts of {model.source}"
        cards.append(Card(f"{model.model}: leave at layer {model.exits[0]}", f"{first['share']:.0%}", note))
        early = model.depths.iloc[0]
        note = f"{early['agreement_low']:.0%} to {early['agreement_high']:.0%} of all tokens, sure or not"
        cards.append(
            Card(f"{model.model}@{model.exits[0]} says what the last layer says", f"{early['agreement']:.0%}", note)
        )
    reading = "Every figure is a count over recorded tokens; intervals are 95 %, from prompts drawn again."
    return Section("At a glance", reading, [Cards(cards), *([Text(opened.notes)] if opened.notes else [])])


def _sections(opened: Opened, summary: BehaviourSummary) -> list[Section]:
    style, models = _style(opened, summary), list(summary.models.values())
    return [
        _exits_section(summary, models, style),
        _quality_section(summary, models, style),
        _reliability_section(summary, models, style),
        *([_joint_section(summary, style)] if summary.pairs else []),
        _order_section(opened, summary, models, style),
        *([_fits_section(summary, models, style)] if any(m.fits is not None for m in models) else []),
    ]


def _exits_section(summary: BehaviourSummary, models: Sequence[ModelSummary], style: Style) -> Section:
    from heliosim.charts import behaviour as charts

    return Section(
        "Where tokens leave",
        "Each token leaves at the first exit whose confidence reaches the threshold. One pass at full depth says where,"
        " for every threshold.",
        [
            Figure(charts.exit_share_figure({m.model: m.by_task for m in models}, style)),
            Figure(charts.threshold_figure({m.model: m.curve for m in models}, summary.threshold, style)),
            *_tables(share_rows(summary)),
        ],
    )


def _quality_section(summary: BehaviourSummary, models: Sequence[ModelSummary], style: Style) -> Section:
    from heliosim.charts.behaviour import depth_quality_figure

    depths, wrote = {m.model: m.depths for m in models}, {m.model: m.quality for m in models}
    return Section(
        "Quality against depth",
        "Open loop: every token forced to leave at a layer, on given text. Closed loop: the own texts of a policy, "
        "judged by the full model.",
        [
            Figure(depth_quality_figure(depths, wrote, style)),
            *_tables(depth_rows(summary), quality_rows(summary)),
            Details("Lengths by task and policy", _tables(length_rows(summary))),
        ],
    )


def _reliability_section(summary: BehaviourSummary, models: Sequence[ModelSummary], style: Style) -> Section:
    from heliosim.charts import agreement_figure

    deepest = [m.confidence[m.confidence["exit_layer"] < m.exits[-1]] for m in models]  # the last agrees with itself
    found = pd.concat([part.assign(model=m.model) for m, part in zip(models, deepest, strict=True)])
    figure = agreement_figure(found.rename(columns={"right": "agreement"}), style)
    return Section(
        "Does confidence mean what it says?",
        "On the dotted line, tokens of 80 % confidence are the last layer's in 80 of 100 cases. The expected "
        "calibration error is the mean distance from it.",
        [
            Figure(figure),
            *_tables(reliability_rows(summary)),
            Details("By confidence", _tables(confidence_rows(summary))),
        ],
    )


def _joint_section(summary: BehaviourSummary, style: Style) -> Section:
    from heliosim.charts.behaviour import joint_figure

    figures = [Figure(joint_figure(pair.joint, style)) for pair in summary.pairs if pair.one < pair.other]
    reading = "All models were scored on the same text, so their exits are known token by token."
    tables = _tables(joint_rows(summary), complement_rows(summary))
    return Section("Two models on the same text", reading, [*figures, *tables])


def _order_section(opened: Opened, summary: BehaviourSummary, models: Sequence[ModelSummary], style: Style) -> Section:
    from heliosim.charts import behaviour_order as charts

    used = {m.model: opened.tokens.of(sources=[m.source]) for m in models}
    breaches = pd.concat([charts.breach_data(used[m.model], [m.model], summary.threshold) for m in models])
    correlations, exits = {m.model: m.correlation for m in models}, {m.model: m.exits for m in models}
    return Section(
        "How exits follow each other",
        "Texts that are easy as a whole, and runs of tokens that leave at the same exit, decide how breaches gather.",
        [
            Figure(charts.correlation_figure(correlations, exits, style)),
            Figure(charts.run_figure({m.model: m.runs for m in models}, style)),
            Figure(charts.breach_figure(breaches, style)),
            *_tables(correlation_rows(summary), run_rows(summary), breach_rows(summary)),
        ],
    )


def _fits_section(summary: BehaviourSummary, models: Sequence[ModelSummary], style: Style) -> Section:
    from heliosim.charts.behaviour_order import fit_check_figure

    figures = [
        Figure(fit_check_figure(m.fits[m.fits["task"] == ALL_TASKS], _named(style, m.model)))
        for m in models
        if m.fits is not None
    ]
    statistics = Details("All statistics", _tables(fit_rows(summary)))
    reading = "Models fitted to these tokens, drawn again many times: which of them gives back what was recorded?"
    return Section("Fitted models", reading, [Text(verdict_lines(summary)), *figures, statistics])


def _named(style: Style, model: str) -> Style:
    return style.noted(model)


def _tables(*found: TableRows) -> list[Table]:
    return [
        Table(
            [Column(c, "text" if i < rows.names else "number") for i, c in enumerate(rows.columns)],
            rows.rows,
            caption=rows.title,
        )
        for rows in found
        if rows.rows
    ]


def _provenance(opened: Opened, summary: BehaviourSummary) -> dict[str, str]:
    facts = opened.facts
    found = {"table": opened.name, "origin": opened.origin, "tasks": _counts(facts.tasks), "split": facts.split}
    if facts.references is not None:
        found["references"] = _counts(facts.references.tasks) or "none"
        if facts.references.file is not None:
            digest = (facts.references.sha256 or "")[:12]
            found["prompts file"] = (
                f"{facts.references.file} (sha256 {digest}), {facts.references.passed_over} too long"
            )
    found["texts of"] = ", ".join(f"{m.model}: {m.source}" for m in summary.models.values())
    found["intervals"] = "95 %, bootstrap over prompts with all their texts"
    return found | dict(LINES)


def _counts(tasks: object) -> str:
    return ", ".join(f"{n} {task}" for task, n in dict(tasks).items()) if isinstance(tasks, dict) else str(tasks)


__all__: Sequence[str] = ("write_behaviour_report", "write_opened")
