"""Plan: the cheapest fleet among several GPUs and systems, with what nearly did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st
import yaml
from heliosim_app import asked, parts, state, wording
from heliosim_app.files import plan_report_html, plan_zip
from heliosim_app.fleets import (
    Offer,
    as_rows,
    find_fleet,
    fleet_plan,
    from_rows,
    offers,
    offers_text,
    price_table,
    providers,
    said,
    with_text,
)
from heliosim_app.question import Question, devices, systems
from heliosim_app.shipped import shipped_plan
from heliosim_app.work import Ticket, cache_folder, desk, key_of

from heliosim.planfile import PlanFile
from heliosim.prices import PriceTable, load_prices

BASE = "_offers"


def page() -> None:
    """Draw the page."""
    st.title("Which fleet is cheapest?")
    question = _inputs()
    held = _prices(question.models)
    gpus, names = _candidates(question.models)
    table = price_table(held, load_prices().currency)
    plan = fleet_plan(question, gpus, names, {o.gpu: o.most for o in held})
    ticket = plan_ticket(plan, table)
    if ticket is None:
        _ask(plan, table)
        return
    answer = parts.await_ticket(ticket, "Searching")
    if answer is not None:
        _answer(question, plan, table, answer)


def plan_key(plan: PlanFile, table: PriceTable) -> str:
    return key_of("plan", said(plan, table))


def plan_ticket(plan: PlanFile, table: PriceTable) -> Ticket | None:
    """The search for a plan, if anybody asked for it or it was shipped."""
    key = plan_key(plan, table)
    known = shipped_plan(plan, table)
    if known is not None:
        desk().know(key, known)
    return desk().known(key)


def _ask(plan: PlanFile, table: PriceTable) -> None:
    key = plan_key(plan, table)
    folder = cache_folder() / "probes" / key
    count = len(plan.candidates)

    def start() -> None:
        desk().ask(find_fleet, plan, table, folder, key=key)

    st.info(f"{count} candidate{'s' if count > 1 else ''} to look at. A search takes seconds to minutes.")
    st.button("Search the cheapest fleet", on_click=start, type="primary", icon=":material/search:", key="plan-search")


# --- asking ---------------------------------------------------------------------------------------------------


def _inputs() -> Question:
    with st.container(border=True):
        first = st.columns(4, vertical_alignment="bottom")
        for key, on in zip(("load", "rate", "ttft", "tpot"), first, strict=True):
            state.draw(key, on=on, on_change=asked.take_lengths if key == "load" else None)
        second = st.columns([2, 1, 1], vertical_alignment="bottom")
        state.draw("models", on=second[0])
        state.draw("requests", on=second[1])
        state.draw("seed", on=second[2])
    return asked.question()


def _candidates(models: str) -> tuple[list[str], list[str]]:
    known = devices(models)
    first, second = st.columns(2)
    gpus = state.draw("plan_devices", on=first, options=known) or list(known[:2])
    names = tuple(dict.fromkeys(name for gpu in known for name in systems(models, gpu)))
    chosen = state.draw("plan_systems", on=second, options=names) or list(names[:1])
    return gpus, chosen


def _prices(models: str) -> list[Offer]:
    """The editable table of GPUs; what is changed goes into the link."""
    with st.expander("GPU prices and how many there may be", icon=":material/payments:"):
        provider = state.draw("provider", options=providers())
        mark = (provider, models)
        base = offers(devices(models), provider)
        if st.session_state.get(state.NEW) or st.session_state.get(BASE, (None, None))[0] != mark:
            st.session_state[BASE] = (mark, with_text(base, state.value("prices")))
            st.session_state.pop("price-editor", None)
        currency = load_prices().currency
        edited = st.data_editor(
            pd.DataFrame(as_rows(st.session_state[BASE][1])),
            hide_index=True,
            disabled=["gpu", "provider", "date", "source"],
            key="price-editor",
            alt="Price per hour and number of replicas of each GPU",
            column_config={
                "gpu": "GPU",
                "price": st.column_config.NumberColumn(
                    f"{currency} per GPU and hour", min_value=0.01, max_value=9999.0
                ),
                "most": st.column_config.NumberColumn("Replicas at most", min_value=1, max_value=64, step=1),
                "provider": "Provider",
                "date": "Date",
                "source": "Source",
            },
        )
        held = from_rows(edited.to_dict("records"), base)
        state.kept()["prices"] = offers_text([o for o in held if o.is_edited])
        parts.caption("Prices are for comparing, not quotes; edit them in place", "what you change goes into the link")
    return held


# --- answering ------------------------------------------------------------------------------------------------


def _answer(question: Question, plan: PlanFile, table: PriceTable, answer: Mapping[str, Any]) -> None:
    currency = answer["currency"]
    st.html(f'<p class="hs-sentence" role="status">{parts.escaped(wording.plan_sentence(question, answer))}</p>')
    parts.badges(*parts.kinds_of(question.profile()))
    winner = answer["winner"]
    if winner is not None:
        parts.tiles(wording.answer_tiles(question, answer, currency))
        _around(question, answer, currency)
    st.subheader("Every candidate")
    said = "Candidates with lower bound, replicas, price and the limit that decided"
    st.table(
        _as_text(wording.candidate_rows(question, answer, currency)), hide_index=True, border="horizontal", alt=said
    )
    rule = plan.replications
    parts.caption(
        f"{100 * rule.confidence:g} % intervals, {rule.least} to {rule.most} runs of {question.requests:,} requests "
        f"from seed {question.seed}",
        "the winner is checked again with fresh seeds",
        "“At least” is a bound that no simulation is needed for",
    )
    for note in wording.notes_of(answer):
        st.caption(f":material/info: {parts.plain(note)}")
    _downloads(question, plan, table, answer)


def _around(question: Question, answer: Mapping[str, Any], currency: str) -> None:
    """What one fewer, another load and the next best fleet say."""
    first, second = st.columns(2)
    with first.container(border=True, height="stretch"):
        st.markdown("**One replica fewer**")
        st.write(parts.plain(wording.fewer_sentence(answer)))
    with second.container(border=True, height="stretch"):
        st.markdown("**Runner-up**")
        st.write(parts.plain(wording.runner_up(question, answer, currency)))
    rows = wording.sensitivity_rows(answer, currency)
    if rows:
        st.subheader("If the load is 20 % off")
        said = "Replicas needed at 80 and at 120 % of the load"
        st.table(_as_text(rows), hide_index=True, border="horizontal", alt=said)


def _downloads(question: Question, plan: PlanFile, table: PriceTable, answer: Mapping[str, Any]) -> None:
    name = f"plan-{question.load}"
    rows = wording.candidate_rows(question, answer, answer["currency"])
    files: Sequence[parts.Download] = (
        parts.Download(
            "Plan and fleets (YAML)", f"{name}.zip", lambda: plan_zip(plan, table, answer), "application/zip"
        ),
        parts.Download("Answer (JSON)", f"{name}.json", json.dumps(answer, indent=2), "application/json"),
        parts.Download("Candidates (CSV)", f"{name}.csv", lambda: csv_of(rows), "text/csv"),
        parts.Download(
            "Prices (YAML)", "prices.yaml", lambda: yaml.safe_dump(table.model_dump(mode="json")), "text/yaml"
        ),
        parts.Download("Report (HTML)", f"{name}.html", lambda: plan_report_html(question, plan, answer), "text/html"),
    )
    parts.downloads(*files, key="plan")


def _as_text(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table to read: texts that wrap, a dash where there is nothing."""
    return pd.DataFrame([{name: _text(value) for name, value in row.items()} for row in rows])


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return parts.plain(f"{value:,.2f}" if isinstance(value, float) else str(value))


def csv_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV."""
    return bytes(pd.DataFrame(rows).to_csv(index=False).encode())
