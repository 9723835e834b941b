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
from heliosim_calibrate.fit import fitted_cells

from heliosim.charts import fit_data, fit_figure
from heliosim.charts.alt import fit_alt
from heliosim.charts.calibration import Residual, residual_alt, residual_data, residual_figure
from heliosim.formats.profile import ClockName, Profile
from heliosim.profile_diff import compare_profiles
from heliosim.profile_view import open_profile, shipped_profiles
from heliosim.trust import Trust, asked_of, trust

NONE = "none"
ALL = "all models"
register(
    Input("against", "choice", "Compare with the profile", NONE),
    Input("fitted", "choice", "Show the fit of", ALL),
)


def page() -> None:
    """Draw the page."""
    st.title("Can I trust this profile here?")
    with st.container(border=True):
        asked.draw_who(st)
    question = asked.question()
    profile = question.profile()
    parts.badges(profile.facts.kind, *(["synthetic exits"] if profile.facts.kind != "measured" else []))
    _verdict(question, profile)
    st.subheader("How well the step times fit")
    _points(profile)
    st.subheader("Errors and range of the step times")
    st.dataframe(_fits(profile), hide_index=True)
    parts.caption(_said_of_errors(profile), f"seed {profile.facts.seed}")
    st.dataframe(_regions(profile), hide_index=True)
    parts.table_downloads(_regions(profile), f"{profile.folder.name}-errors", key="errors")
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


def _points(profile: Profile) -> None:
    """Every cell of the profile's own table beside the fit."""
    models = list(profile.facts.models)
    model = state.draw("fitted", options=(ALL, *models))
    clock = profile.clock()
    cells = cells_of(str(profile.folder), profile.hash, clock)
    cells = cells if model == ALL else cells[cells["model"] == model]
    if cells.empty:
        st.info("This profile keeps no step times of its own: its costs were added up from operator times. The errors "
                "below are those of the added-up costs.")  # fmt: skip
        return
    known = "measured" if profile.is_measured else profile.facts.kind
    note = f"{model if model != ALL else ', '.join(models)} · {clock} clock · cells the fit used · seed "
    note += f"{profile.facts.seed} · {profile.origin}"
    style = parts.style_of([], note)
    data = fit_data(list(cells["measured_s"]), list(cells["predicted_s"]), list(cells["groups"]))
    parts.chart(fit_figure(data, style, known), fit_alt(data, known), key="fit-points")
    pairs = zip(data.points["group"].tolist(), data.points["error"].tolist(), strict=True)
    errors = residual_data([Residual(group, error) for group, error in pairs])
    parts.chart(residual_figure(errors, style, "Cells of the fit", known), residual_alt(errors), key="fit-regions")
    shown = cells.rename(columns={"groups": "region", "measured_s": f"{known}_s"})
    parts.table_downloads(shown, f"{profile.folder.name}-cells", key="cells")


@st.cache_data(show_spinner="Reading step times", max_entries=8)
def cells_of(folder: str, digest: str, clock: ClockName) -> pd.DataFrame:
    """Cells of a profile's steps: model, region (``groups``), measured_s, predicted_s. A measured cell has 20 or more
    steps; what was derived has no noise, and one is enough.
    """
    profile = open_profile(folder)
    if not (profile.folder / "steps.parquet").is_file():
        return pd.DataFrame(columns=["model", "groups", "measured_s", "predicted_s"])
    return pd.DataFrame(fitted_cells(profile, clock, *(() if profile.is_measured else (1,))))


def _said_of_errors(profile: Profile) -> str:
    """What the validation errors of a profile are errors of."""
    return {
        "measured": "Hold-out errors: absolute, predicted against measured times of cells the fit never saw",
        "derived": "Validation errors: absolute, of the fit against derived times it never saw, not against an engine",
        "composed": "Validation errors: absolute, as the operator times were validated, not against a running engine",
    }[profile.facts.kind]


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
        seeded = "" if one.weights_seed is None else f", seed {one.weights_seed}"
        digest = (one.weights_sha256 or "no hash: no weights were read")[:64]
        said |= {f"{model}: checkpoint": one.checkpoint, f"{model}: weights (sha256)": f"{digest}{seeded}"}
        said |= {f"{model}: {term}": source for term, source in (one.memory.sources if one.memory else {}).items()}
    said |= {f"file {name} (sha256)": digest for name, digest in facts.files.items()}
    st.dataframe([{"fact": k, "value": str(v)} for k, v in said.items()], hide_index=True)
    st.markdown("**Cost terms and what each rests on**")
    terms = _terms(profile)
    st.dataframe(terms, hide_index=True)
    parts.table_downloads(terms, f"{profile.folder.name}-terms", key="terms")
    if facts.derivation is not None:
        st.markdown(parts.plain(facts.derivation.method))
        rows = [{"source": s.name, "used for": s.used_for, "licence": s.licence, "address": s.url}
                for s in facts.derivation.sources]  # fmt: skip
        st.dataframe(rows, hide_index=True)
        for line in facts.derivation.cross_checks:
            st.markdown(f"- Validation: {parts.plain(line)}")
        with st.expander(f"{len(facts.derivation.assumptions)} assumptions"):
            for line in facts.derivation.assumptions:
                st.markdown(f"- {parts.plain(line)}")


def _terms(profile: Profile) -> pd.DataFrame:
    """Every cost term that costs anything, in microseconds per unit, and where its value is from."""
    derivation = profile.facts.derivation
    rows = []
    for model, facts in profile.facts.models.items():
        for clock, fit in facts.step.items():
            rests = f"fit to {fit.steps:,} {'measured steps' if derivation is None else 'derived step times'}"
            if derivation is not None:
                rests += ": " + ", ".join(s.name for s in derivation.sources)
            rows += [{"model": model, "clock": clock, "term": term, "µs per unit": 1e6 * value, "rests on": rests}
                     for term, value in fit.seconds_per.items() if value]  # fmt: skip
        for clock, load in facts.load.items():
            rests = f"{load.loads:,} loads" if derivation is None else "assumed: see the assumptions below"
            rows += [{"model": model, "clock": clock, "term": f"load {term}", "µs per unit": 1e6 * value,
                      "rests on": rests} for term, value in load.seconds_per.items() if value]  # fmt: skip
    return pd.DataFrame(rows)
