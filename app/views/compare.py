"""Compare: systems side by side under the same requests, from little load to too much."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st
from heliosim_app import asked, parts, state
from heliosim_app.comparisons import Comparison, focus_system
from heliosim_app.question import devices
from heliosim_app.shipped_studies import shipped_key, shipped_study
from heliosim_app.state import Input, register
from heliosim_app.study_jobs import compare, fleet_map
from heliosim_app.work import desk

from heliosim import charts
from heliosim.charts import Style
from heliosim.comparing import Study
from heliosim.metrics import metric_spec
from heliosim.study_report import TABLE, focus_rows, slo_text, write_study_report
from heliosim.study_tables import study_of, study_table

TRADES = {"gpu": "throughput per GPU", "cost": "cost", "quality": "agreement", "perplexity": "perplexity"}
PARQUET = "application/vnd.apache.parquet"
LATENCY = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "End to end"}

VIEWS = {
    "gains": "Gains",
    "latency": "Latency",
    "load": "Load",
    "trades": "Trade-offs",
    "fleets": "Fleets",
}
register(
    Input("compared", "several", "Systems (none chosen: all but the ablations of HELIOS)", []),
    Input("baseline", "choice", "Compare with", "", help="What the others' gains are measured against."),
    Input("focus", "number", "Rate per server (requests/s)", 0.0, low=0.0, high=500.0, step=0.5,
          digits="%g", help="0: one that every system should keep up with."),
    Input("study_requests", "whole", "Requests per run", 300, low=50, high=2000, step=50),
    Input("study_reps", "whole", "Replications", 3, low=2, high=10, step=1),
    Input("fleet", "choice", "Fleet map of", "", help="Attainment over load and number of servers."),
    Input("view", "choice", "Show", "gains", tuple(VIEWS), names=VIEWS),
    Input("replicas", "whole", "Servers, at most", 3, low=1, high=8, step=1),
)  # fmt: skip


def page() -> None:
    st.title("Compare")
    st.markdown("Systems under the same requests: how fast each is, where it gives in, what it costs in quality.")
    asked_for = _controls()
    key = asked_for.key()
    if key == shipped_key():
        desk().know(key, shipped_study())
    ticket = desk().ask(compare, asked_for.scenarios(), asked_for.focus_per_s, asked_for.replications, key=key)
    _drop_superseded(ticket)
    plain = parts.await_ticket(ticket, "Comparison")
    if plain is not None:
        _show(study_of(plain), asked_for)


# --- inputs ---------------------------------------------------------------------------------------------------


def _controls() -> Comparison:
    with st.container(border=True):
        first, second, third = st.columns(3)
        models = state.draw("models", on=first)
        state.draw("device", on=second, options=devices(models))
        state.draw("load", on=third, on_change=asked.take_lengths)
        with st.form("compare", border=False):
            _systems(list(_comparison(()).known))
            made = _comparison()
            options = {"baseline": made.baselines, "fleet": made.names}
            with st.container(horizontal=True, gap="small"):
                for key in ("baseline", "fleet", "focus", "prompt", "output", "ttft", "tpot", "study_requests",
                            "study_reps", "replicas", "seed", "batch", "step_tokens"):  # fmt: skip
                    with st.container(width=210):
                        state.draw(key, options=options.get(key))
            st.form_submit_button("Compare", type="primary", icon=":material/play_arrow:")
    return _comparison()


def _comparison(chosen: Sequence[str] | None = None) -> Comparison:
    """What the inputs say."""
    return Comparison(
        question=asked.question(),
        chosen=tuple(state.value("compared") if chosen is None else chosen),
        focus_per_s=float(state.value("focus")) or None,
        requests=int(state.value("study_requests")),
        replications=int(state.value("study_reps")),
        most_replicas=int(state.value("replicas")),
    )


def _systems(names: list[str]) -> None:
    """The choice of systems; one that these models do not have is left out and said."""
    held = [str(name) for name in state.value("compared")]
    lost = [name for name in held if name not in names]
    if lost:
        st.info(f"These models have no system called {parts.plain(', '.join(lost))}; it is left out.")
        state.put({"compared": [name for name in held if name in names]})
    state.draw("compared", options=names)


def _drop_superseded(ticket: Any) -> None:
    before = st.session_state.get("_compare_ticket")
    if before is not None and before.key != ticket.key and before.state == "running":
        desk().cancel(before)
        desk().forget(before.key)
    st.session_state["_compare_ticket"] = ticket


# --- results --------------------------------------------------------------------------------------------------


def _show(study: Study, asked_for: Comparison) -> None:
    theme = charts.DARK if parts.is_dark() else charts.LIGHT
    style = replace(Style.named(study.systems, study.caption, theme), signs=82)
    limits = charts.limits_of(study.slo)
    wanted = state.value("baseline")
    baseline = wanted if wanted in study.systems else asked_for.baselines[0]
    parts.badges(*parts.kinds_of(asked_for.question.profile()))
    st.html(f'<p class="hs-sentence">{sentence(study, baseline)}</p>')
    _table(study)
    view = _view()
    if view == "gains":
        _gains(study, baseline, style)
    elif view == "latency":
        _latency(study, style, limits)
    elif view == "load":
        _load(study, style, limits)
    elif view == "trades":
        _trades(study, style)
    else:
        _fleet(study, asked_for, style)
    _downloads(study, baseline)


def sentence(study: Study, baseline: str) -> str:
    """What HELIOS (or the first system) gains over the baseline, and at what quality."""
    from html import escape

    focus = focus_system(study.systems, baseline)
    if focus == baseline:
        return f"{escape(baseline)} alone: choose a second system to compare it with."
    rows = {r["metric"]: r for r in charts.gain_data(study, baseline).to_dict("records") if r["series"] == focus}
    said, same = [], []
    for metric in ("p99_ttft_ms", "p99_tpot_ms", "output_throughput", "perplexity"):
        row = rows[metric]
        if row["verdict"] in ("better", "worse"):
            text = charts.difference_text(row).rpartition(", ")[0].replace(": ", " ", 1)
            said.append(escape(f"{text} ({row['verdict']})"))
        elif row["verdict"] == "no difference shown":
            same.append(escape(str(row["label"])))
    told = "; ".join([*said, *([f"no difference shown in {' and '.join(same)}"] if same else [])]) or "nothing is known"
    return f"{escape(focus)} against {escape(baseline)} at {study.focus_per_s:g} requests/s per server: {told}."


def _table(study: Study) -> None:
    columns = ["System", *(metric_spec(m).title for m in TABLE)]
    st.dataframe([dict(zip(columns, row, strict=True)) for row in focus_rows(study)], hide_index=True)
    at = f"One server at {study.focus_per_s:g} requests/s"
    own = "agreement is with a model's own last layer: compare models by perplexity"
    parts.caption(at, f"SLO: {slo_text(study)}", own, study.caption)


def _gains(study: Study, baseline: str, style: Style) -> None:
    if len(study.systems) < 2:
        st.info("Choose a second system above to see what it gains.")
        return
    data = charts.gain_data(study, baseline)
    figure = charts.difference_figure(data, style, f"Against {baseline}", baseline)
    parts.chart(figure, charts.difference_alt(data, baseline), key="compare-gains")


def _latency(study: Study, style: Style, limits: dict[str, float]) -> None:
    metric = _pick("Distribution of", LATENCY, "compare-metric")
    data = charts.study_cdf_data(study)
    figure = charts.cdf_figure(data, style, metric, limits.get(metric))
    parts.chart(figure, charts.cdf_alt(data, metric, limits.get(metric)), key=f"compare-cdf-{metric}")


def _load(study: Study, style: Style, limits: dict[str, float]) -> None:
    metric = _pick("Latency", LATENCY, "compare-latency")
    knees = charts.saturation_data(study, f"p99_{metric}_ms")
    figure = charts.saturation_figure(knees, style, limits.get(metric))
    parts.chart(figure, charts.saturation_alt(knees), key=f"compare-saturation-{metric}")
    data = charts.rates_data(study)
    parts.chart(charts.rates_figure(data, style, limits), charts.rates_alt(data), key="compare-rates")


def _trades(study: Study, style: Style) -> None:
    other = _pick("Trade", TRADES, "compare-trade")
    x, y = ("gpu", other) if other in ("quality", "perplexity") else ("user", other)
    data = charts.pareto_data(study, x, y)
    if data.empty:
        st.info(f"No {TRADES[other]} is known for these systems on this device.")
        return
    figure = charts.pareto_figure(data, style, study.currency)
    parts.chart(figure, charts.pareto_alt(data), key=f"compare-pareto-{other}")


def _fleet(study: Study, asked_for: Comparison, style: Style) -> None:
    if not study.slo:
        st.info("Give a limit on TTFT or TPOT above to see how many servers keep it.")
        return
    name = state.value("fleet") if state.value("fleet") in study.systems else study.systems[0]
    most = asked_for.most_replicas
    arguments = (name, asked_for.scenarios()[name], study.focus_per_s, asked_for.replications, most)
    key = asked_for.key("fleet", name, most)
    if key == shipped_key("fleet"):
        desk().know(key, shipped_study("fleet"))
    plain = parts.await_ticket(desk().ask(fleet_map, *arguments, key=key), f"Fleets of {name}", at_once_s=0.1)
    if plain is None:
        return
    found = study_of(plain)
    data, noted = charts.attainment_data(found), replace(style, caption=found.caption)
    figure = charts.attainment_figure(data, noted, name, slo_text(found))
    parts.chart(figure, charts.attainment_alt(data, name), key="compare-fleet")
    parts.table_downloads(study_table(found), "fleets", key="compare-fleet-table")


def _view() -> str:
    """Which part is shown; links say it."""
    if st.session_state.get(state.NEW) or "view" not in st.session_state:
        st.session_state["view"] = state.value("view")
    names = state.INPUTS["view"].names
    found = st.segmented_control("Show", list(names), format_func=names.__getitem__, key="view")
    state.kept()["view"] = str(found or state.INPUTS["view"].default)
    return str(state.kept()["view"])


def _pick(label: str, names: dict[str, str], key: str) -> str:
    found = st.segmented_control(
        label, list(names), format_func=names.__getitem__, default=next(iter(names)), key=key,
        label_visibility="collapsed",
    )  # fmt: skip
    return str(found or next(iter(names)))


def _downloads(study: Study, baseline: str) -> None:
    table = study_table(study)
    parts.downloads(
        parts.Download("HTML report", "comparison.html", lambda: report_bytes(study, baseline), "text/html"),
        parts.Download("Runs, CSV", "comparison.csv", lambda: table.to_csv(index=False).encode(), "text/csv"),
        parts.Download("Runs, Parquet", "comparison.parquet", lambda: parts.parquet_of(table), PARQUET),
        key="compare-files",
    )
    parts.link("what-if", "Try settings", key="compare-what-if", icon=":material/tune:")


def report_bytes(study: Study, baseline: str) -> bytes:
    """The study as one HTML file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparison.html"
        write_study_report(path, study, baseline)
        return path.read_bytes()
