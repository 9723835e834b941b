"""What if: move a slider and see what changes, with the setting before as a ghost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st
from heliosim_app import asked, parts, state
from heliosim_app.jobs import Trouble, trouble_of
from heliosim_app.question import devices
from heliosim_app.settings import FREE, PARAMETERS, Setting, depths_of, mix_text, parse_mix, tasks_of
from heliosim_app.state import Input, register
from heliosim_app.study_jobs import what_if
from heliosim_app.work import desk, key_of

from heliosim import charts
from heliosim.charts import Style
from heliosim.errors import HelioSimError
from heliosim.metrics import metric_spec
from heliosim.what_if import Tried, differences, tried_of

register(
    Input("th", "slider", "Threshold TH (confidence)", 0.8, low=0.0, high=1.0, step=0.05,
          help="A token leaves at the first exit that is so sure."),
    Input("q", "slider", "Coverage q (share of tokens)", 0.7, low=0.0, high=1.0, step=0.05,
          help="HELIOS loads so many layers that this share of tokens can leave before their end."),
    Input("cbc", "slider", "Breach limit CBC (tokens)", 50, low=0, high=100, step=5,
          help="Breaches among the last 100 tokens from which on HELIOS loads more layers or changes the model."),
    Input("ri", "slider", "Reassess interval RI (requests)", 150, low=10, high=600, step=10,
          help="HELIOS looks at its candidates again after so many served requests."),
    Input("depth", "choice", "Depth", FREE, names={FREE: "as the system chooses"},
          help="Or serve with one model at one depth, whatever the system says."),
    Input("mix", "text", "Task mix", "", help="Shares of tasks, as task:weight,task:weight. Empty: one task."),
    Input("total", "slider", "Requests in all", 2000, low=200, high=10_000, step=200,
          help="Shared by the replications; more make intervals narrower and answers slower."),
    Input("reps", "slider", "Replications", 5, low=2, high=20, step=1, help="Independent runs behind each interval."),
)  # fmt: skip
SLIDERS: Mapping[str, tuple[float, float, float]] = {
    "rate": (0.5, 100.0, 0.5), "prompt": (20, 900, 20), "output": (20, 900, 20), "batch": (8, 256, 8),
}  # fmt: skip
"""Shared inputs that this page draws as sliders: least, greatest, step."""
TILES = (("p99_ttft_ms", "ttft"), ("p99_tpot_ms", "tpot"), ("output_throughput", ""), ("slo_attainment", ""),
         ("agreement", ""), ("layers_per_token", ""), ("joules_per_token", ""), ("utilisation", ""))  # fmt: skip
WIDTH = 210
MEMORY = "_what_if"
PARQUET = "application/vnd.apache.parquet"


def page() -> None:
    st.title("What if")
    spots = _controls()
    try:
        setting = _setting()
        scenario = setting.scenario()
    except HelioSimError as error:
        _explain(trouble_of(error), spots)
        return
    ticket = desk().ask(what_if, scenario, setting.replications, key=key_of("what if", scenario.hash,
                        scenario.profile, setting.question.profile().hash, setting.replications))  # fmt: skip
    _drop_superseded(ticket)
    if ticket.wait(1.5) and ticket.trouble is not None and ticket.trouble.is_expected:
        _explain(ticket.trouble, spots)
        return
    plain = parts.await_ticket(ticket, "Simulation")
    if plain is not None:
        _show(setting, tried_of(plain), ticket.key)


# --- inputs ---------------------------------------------------------------------------------------------------


def _controls() -> dict[str, Any]:
    """Draw every input; answers where trouble with each can be explained."""
    spots: dict[str, Any] = {}
    with st.container(border=True):
        first, second, third = st.columns(3)
        models = state.draw("models", on=first)
        device = state.draw("device", on=second, options=devices(models))
        asked.draw_system(models, device, on=third)
        profile = asked.question().profile()
        kind = "fixed" if state.value("depth") != FREE else str(asked.question().controller_section()["kind"])
        known = PARAMETERS.get(kind, ())
        with st.container(horizontal=True, gap="small"):
            for key in ("rate", "prompt", "output"):
                spots[key] = _slide(key)
            for key, name in (("th", "threshold"), ("q", "coverage"), ("cbc", "max_breaches"),
                              ("ri", "reassess_interval")):  # fmt: skip
                spots[key] = _place(key, disabled=name not in known)
            spots["depth"] = _place("depth", options=depths_of(profile, asked.question().models_of()))
            spots["batch"] = _slide("batch")
            spots["memory"] = _place("memory", label="Memory (% of the device)")
            for key in ("step_tokens", "total", "reps", "seed"):
                spots[key] = _place(key)
        spots["mix"] = _mix(tasks_of(profile))
        if not known:
            st.caption("A full model without exits has no TH, q, CBC or RI: these sliders rest.")
        elif len(known) == 1:
            st.caption("q, CBC and RI belong to HELIOS: these sliders rest.")
    return spots


def _place(key: str, **more: Any) -> Any:
    with st.container(width=WIDTH, gap=None):
        state.draw(key, **more)
        return st.container()


def _slide(key: str) -> Any:
    """A shared number as a slider; its value may have come from a page where it can be larger."""
    one, (low, high, step) = state.INPUTS[key], SLIDERS[key]
    kind = type(one.default)
    now = state.value(key)
    high = one.high if now > high and one.high is not None else high
    with st.container(width=WIDTH, gap=None):
        if st.session_state.get(state.NEW) or key not in st.session_state:
            st.session_state[key] = kind(now)
        least = min(kind(low), kind(now))
        state.kept()[key] = st.slider(
            one.label, least, kind(high), step=kind(step), format=one.digits, key=key, help=one.help
        )
        return st.container()


def _mix(tasks: tuple[str, ...]) -> Any:
    """A slider per task; together they make the input ``mix``."""
    text = state.value("mix")
    weights, is_bad = {}, False
    try:
        weights = parse_mix(text, tasks) if text else {}
    except HelioSimError:
        is_bad = True  # said below, where the whole setting is read
    with st.expander(f"Task mix: {parts.plain(text) or 'one task'}"):
        with st.container(horizontal=True, gap="small"):
            for name in tasks:
                with st.container(width=WIDTH):
                    key = f"mix-{name}"
                    st.session_state[key] = int(weights.get(name, 0))
                    st.slider(f"{name} (weight)", 0, 10, key=key, on_change=_take_mix, args=(tasks,))
        st.caption("All at 0: one task, the workload's own.")
    if is_bad:
        st.button("Use one task instead", on_click=state.put, args=({"mix": ""},))
    return st.container()


def _take_mix(tasks: tuple[str, ...]) -> None:
    state.put({"mix": mix_text({name: st.session_state.get(f"mix-{name}", 0) for name in tasks})})


def _setting() -> Setting:
    depth = state.value("depth")
    return Setting(
        question=asked.question(),
        threshold=float(state.value("th")),
        coverage=float(state.value("q")),
        max_breaches=int(state.value("cbc")),
        reassess_interval=int(state.value("ri")),
        depth=depth,
        mix=state.value("mix"),
        total=int(state.value("total")),
        replications=int(state.value("reps")),
    )


WHERE = {"memory": "memory", "budget": "memory", "threshold": "th", "coverage": "q", "max_breaches": "cbc",
         "reassess": "ri", "depth": "depth", "mix": "mix", "task": "mix", "total": "total", "batch": "batch",
         "rate": "rate"}  # fmt: skip
"""Words of an error's place, and the input they speak of."""


def _explain(trouble: Trouble, spots: Mapping[str, Any]) -> None:
    """Say what is wrong beside the input that can put it right."""
    where = trouble.where.lower()
    key = next((key for word, key in WHERE.items() if word in where), "")
    parts.show_trouble(trouble, spots.get(key))


def _drop_superseded(ticket: Any) -> None:
    """Give up the simulation of a setting that has been left."""
    before = st.session_state.get("_what_if_ticket")
    if before is not None and before.key != ticket.key and before.state == "running":
        desk().cancel(before)
        desk().forget(before.key)
    st.session_state["_what_if_ticket"] = ticket


# --- results --------------------------------------------------------------------------------------------------


def _show(setting: Setting, now: Tried, key: str) -> None:
    before, changed = _remember(now, key)
    parts.badges(*parts.kinds_of(setting.question.profile()))
    _say_change(before, changed)
    limits = {"ttft": setting.question.ttft_ms, "tpot": setting.question.tpot_ms}
    table = differences(now, before) if before is not None and _can_pair(now, before) else None
    if now.replicated.is_saturated:
        st.warning(
            "Overloaded: waiting grows without end, so there is no typical latency. Lower the rate, or make answers "
            "cheaper (depth, threshold, lengths).",
            icon=":material/hourglass_top:",
        )
    _tiles(now, limits, table)
    theme = charts.DARK if parts.is_dark() else charts.LIGHT
    colour = charts.system_colours([setting.question.system], theme)[setting.question.system]
    style = Style({"now": colour}, caption_of(now), theme, signs=64)
    metric = _pick_latency()
    cdf = charts.tried_cdf_data(now, before)
    figure = charts.cdf_figure(cdf, style, metric, limits.get(metric))
    words = charts.cdf_alt(cdf, metric, limits.get(metric))
    mix, course = charts.mix_data(now, before), charts.course_data(now, before)
    shown = [
        (figure, words, f"cdf-{metric}"),
        (charts.mix_figure(mix, style), charts.mix_alt(mix), "mix"),
        (charts.course_figure(course, style), charts.course_alt(course), "course"),
    ]
    if table is not None:
        shown.insert(1, (charts.difference_figure(table, style), charts.difference_alt(table), "differences"))
    for row in range(0, len(shown), 2):
        with st.container(key=f"hs-pair-{row}"):
            pair = shown[row : row + 2]
            for place, (picture, said, name) in zip(st.columns(2) if len(pair) == 2 else [st], pair, strict=True):
                with place.container():
                    parts.chart(picture, said, key=f"what-if-{name}")
    if table is not None:
        with st.expander("Every difference as a number"):
            st.dataframe(table.drop(columns="metric"), hide_index=True)
    _downloads(setting, now, table)


def caption_of(now: Tried) -> str:
    """Sample size, replications and seed of a setting."""
    left_out = now.replicated.warm_up.requests
    return (
        f"{now.requests} requests in each of {now.replicated.count} replications, first {left_out} left out · "
        f"seed {state.value('seed')} · simulated in {now.wall_s:.1f} s"
    )


def _remember(now: Tried, key: str) -> tuple[Tried | None, dict[str, tuple[str, str]]]:
    """The setting before, and what was changed since, by input."""
    memory = st.session_state.setdefault(MEMORY, {"now": None, "before": None})
    query = state.query()
    if memory["now"] is None or memory["now"][0] != key:
        if not st.session_state.get("what-if-hold") or memory["before"] is None:
            memory["before"] = memory["now"]
        memory["now"] = (key, now, query)
    if memory["before"] is None or memory["before"][0] == key:
        return None, {}
    _, before, old = memory["before"]
    changed = {k: (old.get(k, ""), query.get(k, "")) for k in {*old, *query} if old.get(k) != query.get(k)}
    return before, changed


def _say_change(before: Tried | None, changed: Mapping[str, tuple[str, str]]) -> None:
    if before is None:
        st.markdown("Move a slider: what was before stays as a ghost, and differences get intervals.")
        return
    said = []
    for key, values in sorted(changed.items()):
        one = state.INPUTS[key]
        old, new = (value or one.default_text for value in values)
        said.append(f"**{parts.plain(one.label)}** {parts.plain(old or '–')} → {parts.plain(new or '–')}")
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("Changed: " + ", ".join(said) if said else "Nothing changed.")
        said_of = "Compare with this setting however often you change something."
        st.toggle("Hold the ghost", key="what-if-hold", help=said_of)
        st.button("Go back", on_click=_go_back, icon=":material/undo:", help="Take the setting before again.")


def _go_back() -> None:
    old = st.session_state[MEMORY]["before"][2]
    now = state.query()
    changes = {k: state.INPUTS[k].default for k in now if k not in old}
    state.put({**changes, **{k: state.parse(state.INPUTS[k], text) for k, text in old.items()}})


def _can_pair(now: Tried, before: Tried) -> bool:
    from heliosim.what_if import are_paired

    if are_paired(now, before):
        return True
    st.info("The seed changed, so the two settings met other requests: no difference can be told from luck.")
    return False


def _tiles(now: Tried, limits: Mapping[str, float | None], table: Any) -> None:
    texts = {} if table is None else {r["metric"]: r for r in table.to_dict("records")}
    shown = []
    for name, limit_name in TILES:
        spec, found = metric_spec(name), now.replicated.interval(name)
        limit = limits.get(limit_name) if limit_name else None
        row = texts.get(name)
        note = "" if row is None else charts.difference_text(row).partition(": ")[2]
        shown.append(
            parts.tile(spec.label, found, spec.unit, scale=spec.scale, note=note, verdict=_verdict(found, limit),
                       help=f"Mean of {found.count} replications, 95 % interval.")
        )  # fmt: skip
    parts.tiles(shown, columns=4)


def _verdict(found: Any, limit: float | None) -> parts.Verdict:
    if limit is None or found.mean is None:
        return "none"
    if found.low is None or found.high is None:
        return "meets" if found.mean <= limit else "misses"
    return "meets" if found.high <= limit else "misses" if found.low > limit else "undecided"


def _pick_latency() -> str:
    """Which latency the distribution shows."""
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "End to end"}
    found = st.segmented_control(
        "Distribution of",
        list(names),
        format_func=names.__getitem__,
        default="ttft",
        key="what-if-metric",
        label_visibility="collapsed",
    )
    return str(found or "ttft")


def _downloads(setting: Setting, now: Tried, table: Any) -> None:
    import pandas as pd

    rows = [{"replication": r.index, "seed": str(r.seed), **r.values} for r in now.replicated.replications]
    runs = pd.DataFrame(rows)
    files = [
        parts.Download("Scenario", "what-if.yaml", setting.scenario().to_yaml(), "application/yaml"),
        parts.Download("Runs, CSV", "what-if.csv", lambda: runs.to_csv(index=False).encode(), "text/csv"),
        parts.Download("Runs, Parquet", "what-if.parquet", lambda: parts.parquet_of(runs), PARQUET),
    ]
    if table is not None:
        gaps = table.to_csv(index=False).encode()
        files.append(parts.Download("Differences, CSV", "what-if-differences.csv", gaps, "text/csv"))
    parts.downloads(*files, key="what-if-files")
    parts.link("compare", "Compare systems here", key="what-if-compare", icon=":material/compare_arrows:")
