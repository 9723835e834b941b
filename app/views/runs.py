"""Runs: look at run folders on this machine, side by side."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st
from heliosim_app import parts
from heliosim_app.state import Input, draw, register

from heliosim import charts
from heliosim.errors import HelioSimError
from heliosim.formats.results import RunResults, load_run, replay_caution
from heliosim.metrics import SCALARS, SystemResult, metric_spec, summarise

register(Input("folder", "text", "Folder of runs", "", help="Run folders below it are found."))


def start_folder() -> str:
    """The folder that ``heliosim dashboard --runs`` named."""
    given = sys.argv[1:]
    return given[given.index("--runs") + 1] if "--runs" in given[:-1] else "demo/runs"


def find_runs(folder: Path) -> dict[str, Path]:
    """Run folders below ``folder``, by name."""
    return {str(p.parent.relative_to(folder)): p.parent for p in sorted(folder.glob("**/run.json"))}


@st.cache_data(show_spinner="Reading runs", max_entries=8)
def read(folders: tuple[str, ...], changed: tuple[int, ...]) -> list[RunResults]:
    return [load_run(Path(folder)) for folder in folders]


def as_systems(names: list[str], runs: list[RunResults]) -> list[SystemResult]:
    """Each run as a system of its own, under its folder's name."""
    return [
        SystemResult(name, run, clock="cpu")
        if run.info.mode == "simulated"
        else SystemResult(name, None, [run], run.info.clock)
        for name, run in zip(names, runs, strict=True)
    ]


def page() -> None:
    st.title("Runs")
    folder = Path(draw("folder", help="Run folders below it are found.") or start_folder())
    found = find_runs(folder) if folder.is_dir() else {}
    if not found:
        st.info(f"No runs below {folder}. Make some with `heliosim demo`, or name another folder above.")
        return
    chosen = st.multiselect("Runs", list(found), default=list(found)[:3])
    if not chosen:
        st.info("Choose at least one run.")
        return
    try:
        paths = [found[name] for name in chosen]
        runs = read(tuple(map(str, paths)), tuple((p / "run.json").stat().st_mtime_ns for p in paths))
    except HelioSimError as error:
        st.error(parts.plain(str(error)))
        return
    _compare(chosen, runs)


def _compare(chosen: list[str], runs: list[RunResults]) -> None:
    systems = as_systems(chosen, runs)
    parts.badges(
        *(("live" if r.info.mode == "live" else "simulated") for r in runs),
        *(r.info.profile_kind for r in runs),
        *("replayed" for r in runs if r.info.replayed_exits),
    )
    if caution := replay_caution(r.info for r in runs):
        st.caption(parts.plain(caution))
    style = charts.Style.of(systems)
    summaries = {name: summarise(run) for name, run in zip(chosen, runs, strict=True)}
    rows = [
        {"metric": metric_spec(m).title, **{n: metric_spec(m).text(s.value(m)) for n, s in summaries.items()}}
        for m in SCALARS
    ]
    st.dataframe(rows, hide_index=True)
    names = ", ".join(chosen)
    latency = charts.latency_figure(charts.latency_data(systems), style)
    parts.chart(latency, f"Latency distributions of {names}", key="latency")
    parts.chart(charts.exit_figure(charts.exit_data(systems), style), f"Exit layers of {names}", key="exits")
    one = st.selectbox("Timeline of", chosen)
    run = runs[chosen.index(one)]
    timeline = charts.timeline_figure(charts.timeline_data(run), style, one)
    parts.chart(timeline, f"Placement, batch size and memory of {one} over time", key="timeline")
