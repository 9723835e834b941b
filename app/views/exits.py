"""Exits: where tokens leave, how far confidence can be believed, how two models differ, how exits follow each other."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st
from heliosim_app import asked, parts, state
from heliosim_app.exit_jobs import summary_of
from heliosim_app.exit_words import (
    correlation_alt,
    curve_alt,
    depth_alt,
    joint_alt,
    runs_alt,
    shares_alt,
    tables_of,
)

from heliosim.behaviour_summary import BehaviourSummary
from heliosim.charts import agreement_figure
from heliosim.charts import behaviour as charts
from heliosim.charts import behaviour_order as order
from heliosim.charts.alt import agreement_alt


def page() -> None:
    """Draw the page."""
    st.title("Where do tokens leave?")
    with st.container(border=True):
        first, second, third = st.columns(3)
        models = state.draw("models", on=first)
        from heliosim_app.question import devices

        state.draw("device", on=second, options=devices(models))
        threshold = state.draw("th", on=third)
    profile = asked.question().profile()
    if not profile.has_behaviour:
        st.info("This profile has no exits. Choose other models, or measure them: heliosim behaviour measure.")
        return
    origin, summary = _read(str(profile.folder), profile.hash, float(threshold))
    is_imported = profile.facts.behaviour.split == "imported"
    made = "imported exits" if is_imported else "synthetic exits"
    parts.badges(profile.facts.kind, *([made] if is_imported or not profile.is_measured else []))
    shares = [m.shares[m.shares["threshold"] == summary.threshold].iloc[0] for m in summary.models.values()]
    said = [f"{100 * s['share']:.0f} % of {m.model}'s at layer {m.exits[0]}"
            for m, s in zip(summary.models.values(), shares, strict=True)]  # fmt: skip
    text = f"At a threshold of {summary.threshold:g} tokens leave early: {', '.join(said)}."
    st.html(f'<p class="hs-sentence" role="status">{parts.escaped(text)}</p>')
    note = f"{summary.requests:,} prompts · {summary.tokens:,} tokens · seed {profile.facts.seed} · {origin}"
    parts.caption(note, "open loop; intervals 95 %, prompts drawn again")
    for key, figure, alt in _figures(summary, parts.style_of([], note)):
        parts.chart(figure, alt, key=f"exits-{key}")
    st.subheader("Take the tables away")
    for key, table in tables_of(summary).items():
        st.caption(key.capitalize())
        parts.table_downloads(table, f"{profile.folder.name}-{key.replace(' ', '-')}", key=f"exits-{key}")


@st.cache_data(show_spinner="Counting exits", max_entries=16)
def _read(folder: str, digest: str, threshold: float) -> tuple[str, BehaviourSummary]:
    found: tuple[str, BehaviourSummary] = summary_of(folder, threshold)
    return found


def _figures(summary: BehaviourSummary, style: Any) -> list[tuple[str, Any, str]]:
    models = list(summary.models.values())
    known = [m.confidence[m.confidence["exit_layer"] < m.exits[-1]].assign(model=m.model) for m in models]
    agreement = pd.concat(known).rename(columns={"right": "agreement"})
    pairs = [pair for pair in summary.pairs if pair.one < pair.other]
    at = f"at threshold {summary.threshold:g}"
    return [
        ("shares", charts.exit_share_figure({m.model: m.by_task for m in models}, style),
         f"Share of tokens by exit layer {at}. {shares_alt(summary)}"),
        ("thresholds", charts.threshold_figure({m.model: m.curve for m in models}, summary.threshold, style),
         f"Mean exit depth and agreement with the last layer at every threshold. {curve_alt(summary)}"),
        ("agreement", agreement_figure(agreement, style),
         agreement_alt(agreement)),
        ("quality", charts.depth_quality_figure({m.model: m.depths for m in models},
                                                {m.model: m.quality for m in models}, style),
         f"Agreement against exit depth. {depth_alt(summary)}"),
        *((f"joint-{k}", charts.joint_figure(pair.joint, style),
           f"Exits of {pair.one} and {pair.other} on the same tokens {at}. {joint_alt(pair.joint)}")
          for k, pair in enumerate(pairs)),
        ("correlation", order.correlation_figure({m.model: m.correlation for m in models},
                                                 {m.model: m.exits for m in models}, style),
         f"Autocorrelation of exit depth by distance in tokens {at}. {correlation_alt(summary)}"),
        ("runs", order.run_figure({m.model: m.runs for m in models}, style),
         f"Mean runs of tokens that leave at the same exit {at}. {runs_alt(summary)}"),
    ]  # fmt: skip
