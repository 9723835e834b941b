"""Timeline: what happened in a run, and why the slowest requests were slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st
from heliosim_app import asked, parts, state
from heliosim_app.course_jobs import quiet_percent
from heliosim_app.courses import DEFAULT_PERCENT, capacity_ticket, run_ticket
from heliosim_app.question import slug
from heliosim_app.state import Input, register
from heliosim_app.views.runs import find_runs, read, start_folder

from heliosim import charts
from heliosim.charts import phases
from heliosim.course import changes_of, evaluations_of, loads_of
from heliosim.diagnosis import Diagnosis, diagnose
from heliosim.formats.results import RunResults

ASKED = "question"
register(
    Input("course", "text", "Run", ASKED),
    Input("at_load", "slider", "Load (% of what one server keeps up with)", DEFAULT_PERCENT, low=10, high=150, step=5),
    Input("from_s", "number", "From (s)", 0.0, low=0, high=1e7, step=1.0, digits="%g"),
    Input("to_s", "number", "To (s)", 0.0, low=0, high=1e7, step=1.0, digits="%g"),
)
JSON = "application/json"
SHOWN = 200
"""Rows of the table of changes that are drawn at once."""


def page() -> None:
    """Draw the page."""
    st.title("What happened, and when?")
    folder = Path(state.value("folder") or start_folder())
    found = find_runs(folder) if folder.is_dir() else {}
    chosen = _choose(found, folder)
    if chosen == ASKED:
        _of_question()
    elif chosen in found:
        path = found[chosen]
        run = read((str(path),), ((path / "run.json").stat().st_mtime_ns,))[0]
        _show(run, chosen, None, "", "", None)


def _choose(found: dict[str, Path], folder: Path) -> str:
    """Which run is shown. A link may name one that is not here."""
    now = str(state.value("course"))
    if now not in (ASKED, *found):
        st.warning(
            f"The link names the run {parts.plain(now)}, which is not below {parts.plain(str(folder))}. "
            "Shown is a run of the question instead.",
            icon=":material/link_off:",
        )
        state.put({"course": ASKED})
        now = ASKED
    if not found:
        return now
    options = [ASKED, *found]
    if st.session_state.get(state.NEW) or "course-box" not in st.session_state:
        st.session_state["course-box"] = now
    named = {ASKED: "one server of this question"}
    picked = st.selectbox("Run", options, key="course-box", format_func=lambda o: named.get(o, o), on_change=_take_run)
    return str(picked)


def _take_run() -> None:
    state.put({"course": st.session_state["course-box"], "from_s": 0.0, "to_s": 0.0})


def _of_question() -> None:
    with st.container(border=True):
        asked.draw_who(st)
        first, second, third, fourth = st.columns([2, 1, 1, 1], vertical_alignment="bottom")
        percent = state.draw("at_load", on=first, on_change=_whole)
        state.draw("batch", on=second)
        state.draw("requests", on=third)
        state.draw("seed", on=fourth)
    question = asked.question()
    known = parts.await_ticket(capacity_ticket(question), "Measuring what one server keeps up with")
    if known is None:
        return
    if not known["per_s"]:
        st.info("Too few requests finish to tell what one server keeps up with. Ask for more requests.")
        return
    less = quiet_percent(percent)
    loud, quiet = (run_ticket(question, known["per_s"], share) for share in (percent, less))
    run = parts.await_ticket(loud, f"Simulating {percent:g} % load")
    if run is None:
        return
    quieter = parts.await_ticket(quiet, f"Simulating {less:g} % load") if less < percent else None
    if less < percent and quieter is None:
        return
    rate = known["per_s"] * percent / 100
    parts.badges(*parts.kinds_of(question.profile()))
    told = (
        f"One server keeps up with {known['per_s']:.3g} requests/s of these (a burst of {known['requests']:,}); "
        f"{percent:g} % of that are {rate:.3g} requests/s."
    )
    _show(run, question.system, quieter, f"at {percent:g} % load", f"at {less:g} %", question.ttft_ms, told)


def _whole() -> None:
    state.put({"from_s": 0.0, "to_s": 0.0})


# --- showing --------------------------------------------------------------------------------------------------


def _show(
    run: RunResults, name: str, quiet: RunResults | None, at: str, less: str, limit: float | None, told: str = ""
) -> None:
    if not run.steps.num_rows:
        st.info("Nothing ran in this run, so there is nothing to show over time.")
        return
    if not told:
        parts.badges("live" if run.info.mode == "live" else "simulated", run.info.profile_kind)
    found = diagnose(run, quiet)
    if found is not None:
        st.html(f'<p class="hs-sentence" role="status">{parts.escaped(found.sentence(at, less))}</p>')
    parts.caption(
        told, f"{run.requests.num_rows:,} requests", f"seed {run.info.seed}", "the first 10 % count in no p99"
    )
    if found is not None:
        _tiles(found)
    end = _end_of(run)
    low, high = _stretch(end, found)
    style = replace(parts.style_of([name], _caption(run)), signs=84)
    waits = phases.waits_data(run, limit)
    parts.chart(phases.waits_figure(waits, style, (low, high)), phases.waits_alt(waits), key="course-waits")
    stretch = phases.stretch_data(run, low, high)
    parts.chart(phases.stretch_figure(stretch, style, name, low), charts.timeline_alt(stretch), key="course-timeline")
    _requests(run, low, high, style)
    _changes(run, low, high)
    _downloads(run, name)


def _caption(run: RunResults) -> str:
    """Sample size, seed and origin."""
    import pyarrow.compute as pc

    origin = run.info.mode if run.info.mode == "simulated" else f"live, {run.info.clock} clock"
    origin += "" if run.info.profile_kind == "measured" else f", {run.info.profile_kind} profile"
    origin += ", exits replayed" if run.info.replayed_exits else ""
    tokens = pc.sum(run.steps["tokens_out"]).as_py() or 0
    return f"{run.requests.num_rows:,} requests · {tokens:,} tokens · seed {run.info.seed} · {origin}"


def _end_of(run: RunResults) -> float:
    import pyarrow.compute as pc

    return float(pc.max(pc.add(run.steps["start_s"], run.steps["seconds"])).as_py())


def _tiles(found: Diagnosis) -> None:
    """Where the slow requests' time went."""
    note = "of the slowest requests' time to the first token"
    shown = [
        ("No place in the batch", found.waiting, "all waiting"),
        ("… batch at its cap", found.batch_full, f"cap {found.batch_cap} rows" if found.batch_cap else "no cap known"),
        ("… KV pool full", found.kv_full, f"at most {100 * found.kv_share:.0f} % full"),
        ("Loads, nothing else ran", found.loading, ""),
        ("Evaluations", found.evaluating, ""),
    ]
    tiles = [parts.Tile(label, f"{100 * share:.0f} %", said, help=note) for label, share, said in shown]
    parts.tiles(tiles, columns=5)
    parts.caption(f"Shares {note}: {found.slow} requests at or above the 99th percentile")


def _stretch(end: float, found: Diagnosis | None) -> tuple[float, float]:
    """The stretch of time that is looked at, in seconds; the link says it."""
    end = max(0.1, round(end + 0.05, 1))
    low, high = min(float(state.value("from_s")), end), float(state.value("to_s")) or end
    high = min(max(high, low), end)
    if high - low < 0.05:
        low, high = 0.0, end
    whole, slow = st.columns([4, 1], vertical_alignment="bottom")
    st.session_state["stretch"] = (low, high)
    whole.slider("Stretch (s)", 0.0, end, key="stretch", step=0.1, on_change=_take_stretch, args=(end,))
    with slow.container(horizontal=True):
        if found is not None:
            near = {"from_s": max(0.0, round(found.from_s - 1, 1)), "to_s": round(min(end, found.to_s + 3), 1)}
            said = "From a second before the first of the slowest requests arrived to three behind the last."
            st.button(
                "Slowest", key="stretch-slow", on_click=state.put, args=(near,), icon=":material/zoom_in:", help=said
            )
        st.button("All", key="stretch-all", on_click=_whole, icon=":material/zoom_out:")
    return low, high


def _take_stretch(end: float) -> None:
    low, high = st.session_state["stretch"]
    state.put({"from_s": float(low), "to_s": 0.0 if high >= end else float(high)})


def _requests(run: RunResults, low: float, high: float, style: Any) -> None:
    data = phases.phases_data(run, low, high)
    if not data.requests:
        st.info("No request was there in this stretch.")
        return
    parts.chart(phases.phases_figure(data, style), phases.phases_alt(data), key="course-phases")


def _changes(run: RunResults, low: float, high: float) -> None:
    st.subheader("Decisions and loads, with reasons")
    changes = changes_of(run)
    near = changes[(changes["time_s"] >= low) & (changes["time_s"] <= high)]
    loads, probes = loads_of(run), evaluations_of(run)
    exposed, hidden = loads["exposed_s"].sum(), loads["hidden_s"].sum()
    parts.caption(
        f"{len(near)} of the run's {len(changes)} fall in this stretch",
        f"whole run: {len(loads)} loads, {exposed:.3g} s with nothing beside them and {hidden:.3g} s beside steps",
        f"{len(probes)} evaluations, {(probes['end_s'] - probes['start_s']).sum():.3g} s",
    )
    if near.empty:
        return
    shown = near.head(SHOWN).drop(columns=[] if near["replica"].nunique() > 1 else ["replica"])
    titles = {"time_s": "time (s)", "what": "what", "seconds": "nothing ran (s)", "detail": "details"}
    shown = shown.assign(seconds=["" if s is None or s != s else f"{s:.4f}" for s in shown["seconds"]])
    st.dataframe(shown.fillna({"placement": ""}).rename(columns=titles), hide_index=True)


def _downloads(run: RunResults, name: str) -> None:
    from heliosim.perfetto import trace_text

    file = slug(name)
    decisions = changes_of(run)
    binary = "application/octet-stream"
    parts.downloads(
        parts.Download("Trace for Perfetto", f"{file}.trace.json", lambda: trace_text(run).encode(), JSON),
        parts.Download("Steps (Parquet)", f"{file}-steps.parquet", lambda: _parquet(run.steps), binary),
        parts.Download("Decisions (CSV)", f"{file}-decisions.csv", decisions.to_csv(index=False).encode(), "text/csv"),
        parts.Download("Scenario", f"{file}.yaml", run.scenario_yaml, "application/yaml"),
        key="course-files",
    )
    st.caption("The trace opens at ui.perfetto.dev or chrome://tracing; it is read there in your browser.")


def _parquet(table: Any) -> bytes:
    return parts.parquet_of(table.to_pandas())
