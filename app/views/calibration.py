"""Calibration: whether the profile can be trusted for this question, how well it fits, and where it comes from."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st
from heliosim_app import asked, parts, state
from heliosim_app.question import Question
from heliosim_app.run import one_run
from heliosim_app.state import Input, register
from heliosim_app.work import desk, key_of

from heliosim.formats.profile import Profile
from heliosim.profile_diff import compare_profiles
from heliosim.profile_view import open_profile, shipped_profiles
from heliosim.trust import Trust, asked_of, trust

NONE = "none"
register(Input("against", "choice", "Compare with the profile", NONE))


def page() -> None:
    """Draw the page."""
    st.title("Can I trust this profile here?")
    with st.container(border=True):
        asked.draw_who(st)
    question = asked.question()
    profile = question.profile()
    parts.badges(profile.facts.kind, *(["synthetic exits"] if profile.facts.kind != "measured" else []))
    _verdict(question, profile)
    st.subheader("Errors and range of the step times")
    st.dataframe(_fits(profile), hide_index=True)
    parts.caption("Errors: absolute, of predicted against measured or composed times of cells the fit never saw",
                  f"seed {profile.facts.seed}")  # fmt: skip
    st.dataframe(_regions(profile), hide_index=True)
    _diff(profile)
    _provenance(profile)


def _verdict(question: Question, profile: Profile) -> None:
    from dataclasses import asdict

    ticket = desk().ask(one_run, question, 1, key=key_of("run", asdict(question), 1))
    run = parts.await_ticket(ticket, "Simulating what is asked of the profile")
    if run is None:
        return
    needs = asked_of(run)
    found = trust(profile, question.models_of(), question.scenario().clock, needs)
    st.html(f'<p class="hs-sentence" role="status">{parts.escaped(found.sentence())}</p>')
    parts.tiles([
        parts.Tile("Rows in a step", f"{needs.rows:,}", "asked at most"),
        parts.Tile("Context", f"{needs.context:,} tokens", "asked at most"),
        parts.Tile("Tokens in a step", f"{needs.tokens:,}", "asked at most"),
    ], columns=3)  # fmt: skip
    parts.caption(f"Asked by one run of {run.requests.num_rows:,} requests on one server, seed {question.seed}")
    st.dataframe(_findings(found), hide_index=True)


def _findings(found: Trust) -> pd.DataFrame:
    rows = [{"trust": f.weight, "because": f.what, "what to do": f.remedy or "–"} for f in found.findings]
    return pd.DataFrame(rows)


def _fits(profile: Profile) -> pd.DataFrame:
    rows = []
    for model, facts in profile.facts.models.items():
        for clock, fit in facts.step.items():
            held = fit.holdout
            rows.append({
                "model": model, "clock": clock, "steps": fit.steps, "held-out cells": held.cells,
                "median error (%)": round(100 * held.median_abs_error, 2),
                "90th percentile (%)": round(100 * held.p90_abs_error, 2),
                "signed mean (%)": round(100 * held.mean_signed_error, 2),
                "rows to": fit.max_rows, "context to (tokens)": fit.max_context, "tokens to": fit.max_tokens,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _regions(profile: Profile) -> pd.DataFrame:
    rows = [
        {"model": model, "clock": clock, "region": region, "median error (%)": round(100 * error, 2)}
        for model, facts in profile.facts.models.items()
        for clock, fit in facts.step.items()
        for region, error in fit.holdout.by_region.items()
    ]
    return pd.DataFrame(rows)


def _diff(profile: Profile) -> None:
    st.subheader("Beside another profile")
    options = (NONE, *(name for name in shipped_profiles() if name != profile.folder.name))
    other = state.draw("against", options=options)
    if other == NONE:
        return
    found = compare_profiles(profile, open_profile(other))
    for note in (*found.notes, *(f"only here: {n}" for n in found.only_a), *(f"only there: {n}" for n in found.only_b)):
        st.caption(parts.plain(note))
    rows: list[dict[str, Any]] = [
        {"group": line.group, "model": line.model, "what": line.what, "unit": line.unit,
         "here": line.a, "there": line.b,
         "difference (%)": None if line.difference is None else round(100 * line.difference, 2)}
        for line in found.lines
    ]  # fmt: skip
    st.dataframe(rows, hide_index=True)


def _provenance(profile: Profile) -> None:
    st.subheader("Where it comes from")
    facts = profile.facts
    said = {
        **{f"device: {k}": v for k, v in facts.device.items()},
        **{f"version: {k}": v for k, v in facts.versions.items()},
    }
    said |= {"seed": facts.seed, "profile hash": profile.hash[:16]}
    for model, one in facts.models.items():
        said |= {f"{model}: weights": (one.weights_sha256 or "none")[:16]}
    st.dataframe([{"fact": k, "value": str(v)} for k, v in said.items()], hide_index=True)
    if facts.derivation is not None:
        st.markdown(parts.plain(facts.derivation.method))
        rows = [{"source": s.name, "used for": s.used_for, "licence": s.licence} for s in facts.derivation.sources]
        st.dataframe(rows, hide_index=True)
        with st.expander(f"{len(facts.derivation.assumptions)} assumptions"):
            for line in facts.derivation.assumptions:
                st.markdown(f"- {parts.plain(line)}")
