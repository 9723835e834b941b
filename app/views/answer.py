"""Answer: one question, one sentence, with intervals and what to look at next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import streamlit as st
from heliosim_app import asked, parts, state, wording
from heliosim_app.answer import find, repriced
from heliosim_app.files import report_html, run_tables, scenario_zip
from heliosim_app.fleets import offers, price_of, providers, with_text
from heliosim_app.question import LOADS, Question, devices, slug
from heliosim_app.run import one_run
from heliosim_app.shipped import EXAMPLES, shipped_answer
from heliosim_app.work import Ticket, desk, key_of

from heliosim import charts
from heliosim.metrics import Slo, SystemResult
from heliosim.prices import Price


def page() -> None:
    """Draw the page."""
    st.title("How many GPUs does it take?")
    _examples()
    _inputs()
    question = asked.question()
    answer = parts.await_ticket(answer_ticket(question), "Searching the smallest fleet")
    if answer is not None:
        _answer(question, repriced(answer, _price(question.device)))
    _next(question)


def answer_ticket(question: Question) -> Ticket:
    """The answer to a question: shipped, remembered, or being searched."""
    key = key_of("answer", asdict(question))
    known = shipped_answer(question)
    if known is not None:
        desk().know(key, known)
    return desk().ask(find, question, key=key)


def _price(gpu: str) -> Price | None:
    """What a GPU costs by the inputs: the provider's price, or what was edited on Plan."""
    base = offers([gpu], state.value("provider"))
    return price_of(with_text(base, state.value("prices"))[0])


# --- asking ---------------------------------------------------------------------------------------------------


def _examples() -> None:
    with st.container(horizontal=True, gap="small"):
        for name, example in EXAMPLES.items():
            st.button(
                example.title,
                key=f"example-{name}",
                on_click=state.put,
                args=(example.inputs,),
                type="tertiary",
                icon=":material/lightbulb:",
            )


def _inputs() -> None:
    with st.container(border=True):
        first = st.columns(4, vertical_alignment="bottom")
        state.draw("load", on=first[0], on_change=asked.take_lengths)
        state.draw("rate", on=first[1])
        state.draw("ttft", on=first[2])
        state.draw("tpot", on=first[3])
        second = st.columns(3, vertical_alignment="bottom")
        models = state.draw("models", on=second[0])
        device = state.draw("device", on=second[1], options=devices(models))
        asked.draw_system(models, device, on=second[2])
        with st.expander("Lengths, batching, memory, prices, seed"):
            third = st.columns(4, vertical_alignment="bottom")
            for key, on in zip(("prompt", "output", "requests", "seed"), third, strict=True):
                state.draw(key, on=on)
            fourth = st.columns(4, vertical_alignment="bottom")
            for key, on in zip(("batch", "step_tokens", "memory"), fourth, strict=False):
                state.draw(key, on=on)
            state.draw("provider", on=fourth[3], options=providers())


# --- answering ------------------------------------------------------------------------------------------------


def _answer(question: Question, answer: Mapping[str, Any]) -> None:
    currency = answer["currency"]
    st.html(f'<p class="hs-sentence" role="status">{parts.escaped(wording.sentence(question, answer))}</p>')
    parts.badges(*parts.kinds_of(question.profile()))
    parts.tiles(wording.answer_tiles(question, answer, currency))
    judgement = answer["verified_with_fresh_seeds"]
    if judgement is not None:
        parts.caption(
            f"95 % intervals of means over {judgement['replications']} runs of {question.requests:,} requests "
            f"with seeds the search had not seen, from seed {question.seed}",
            f"exits of task {question.task()}",
            "the first 10 % of requests are left out",
        )
    for note in wording.notes_of(answer):
        st.caption(f":material/info: {parts.plain(note)}")
    winner = answer["winner"]
    run = _run(question, winner["count"]) if winner is not None else None
    _downloads(question, answer, run)


def _run(question: Question, count: int) -> Any:
    """One run of the fleet, drawn: how its latencies are spread."""
    ticket = desk().ask(one_run, question, count, key=key_of("run", asdict(question), count))
    run = parts.await_ticket(ticket, "Simulating the fleet")
    if run is None:
        return None
    name = wording.fleet_text(count, 1, question.system)
    systems = [SystemResult(question.system, run, clock="cpu")]
    slo = Slo(question.ttft_ms, question.tpot_ms)
    style = parts.style_of([question.system], charts.caption_of(systems))
    figure = charts.latency_figure(charts.latency_data(systems), style, slo)
    alt = (
        f"Share of requests by TTFT, TPOT and end-to-end latency in one run of {name}, with the limits as dotted lines"
    )
    parts.chart(figure, alt, key="answer-latency")
    return run


def _downloads(question: Question, answer: Mapping[str, Any], run: Any) -> None:
    name = f"{slug(question.load)}-{slug(question.system)}-{slug(question.device)}"
    count = answer["winner"]["count"] if answer["winner"] is not None else 1
    files = [
        parts.Download(
            "Scenario (YAML and profile)", f"{name}.zip", lambda: scenario_zip(question, count), "application/zip"
        ),
        parts.Download("Answer (JSON)", f"{name}.json", json.dumps(answer, indent=2), "application/json"),
    ]
    if run is not None:
        tables = run_tables(run)
        files += [
            parts.Download("Requests (CSV)", f"{name}.csv", lambda: tables.to_csv(index=False).encode(), "text/csv"),
            parts.Download(
                "Requests (Parquet)", f"{name}.parquet", lambda: parts.parquet_of(tables), "application/octet-stream"
            ),
            parts.Download("Report (HTML)", f"{name}.html", lambda: report_html(question, answer, run), "text/html"),
        ]
    parts.downloads(*files, key="answer")


# --- going on -------------------------------------------------------------------------------------------------


def _next(question: Question) -> None:
    st.subheader("Look further")
    busy = {"at_load": 85} if "at_load" in state.INPUTS else {}
    with st.container(horizontal=True):
        parts.link("plan", "Is there a cheaper fleet?", key="to-plan", icon=":material/savings:")
        parts.link("compare", "What does HELIOS gain over early exit?", key="to-compare", icon=":material/balance:")
        parts.link("what-if", "What if …?", key="to-what-if", icon=":material/tune:")
        parts.link("timeline", "Why does p99 jump at 85 % load?", key="to-timeline", icon=":material/timeline:", **busy)
        parts.link("exits", "Where do tokens leave?", key="to-exits", icon=":material/stairs:")
        parts.link("calibration", "Can I trust this profile?", key="to-calibration", icon=":material/verified:")
    parts.caption(
        f"{LOADS[question.load].label}, {question.rate_per_s:g} requests/s; every page opens with these inputs"
    )
