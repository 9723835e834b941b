"""The dashboard's first page: open a folder of runs and look at them. Pages to come are listed in docs.

Run with ``streamlit run app/main.py -- FOLDER`` (default: demo/runs). Figures come from ``heliosim.charts``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

from heliosim import charts
from heliosim.errors import HelioSimError
from heliosim.formats.results import RunResults, load_run
from heliosim.metrics import SCALARS, SystemResult, metric_spec, summarise


def find_runs(folder: Path) -> dict[str, Path]:
    """Run folders below ``folder``, by name."""
    return {str(p.parent.relative_to(folder)): p.parent for p in sorted(folder.glob("**/run.json"))}


@st.cache_data(show_spinner="Reading runs")
def read(folders: tuple[str, ...]) -> list[RunResults]:
    return [load_run(Path(folder)) for folder in folders]


def as_systems(names: list[str], runs: list[RunResults]) -> list[SystemResult]:
    """Each run as a system of its own, under its folder's name."""
    return [
        SystemResult(name, run, clock="cpu")
        if run.info.mode == "simulated"
        else SystemResult(name, None, [run], run.info.clock)
        for name, run in zip(names, runs, strict=True)
    ]


def page(folder: Path) -> None:
    st.title("HelioSim runs")
    found = find_runs(folder) if folder.is_dir() else {}
    if not found:
        st.info(f"No runs below {folder}. Make some with `heliosim demo`, or name another folder in the sidebar.")
        return
    chosen = st.multiselect("Runs", list(found), default=list(found)[:3])
    if not chosen:
        st.info("Choose at least one run.")
        return
    try:
        runs = read(tuple(str(found[name]) for name in chosen))
    except HelioSimError as error:
        st.error(str(error))
        return
    systems = as_systems(chosen, runs)
    style = charts.Style.of(systems)
    summaries = {name: summarise(run) for name, run in zip(chosen, runs, strict=True)}
    rows = [
        {
            "metric": f"{metric_spec(m).label} ({metric_spec(m).unit})",
            **{n: metric_spec(m).text(s.value(m)) for n, s in summaries.items()},
        }
        for m in SCALARS
    ]
    st.dataframe(rows, hide_index=True)
    st.plotly_chart(charts.latency_figure(charts.latency_data(systems), style))
    st.plotly_chart(charts.exit_figure(charts.exit_data(systems), style))
    one = st.selectbox("Timeline of", chosen)
    run = runs[chosen.index(one)]
    st.plotly_chart(charts.timeline_figure(charts.timeline_data(run), style, one))


def main() -> None:
    st.set_page_config(page_title="HelioSim", layout="wide")
    start = sys.argv[1] if len(sys.argv) > 1 else "demo/runs"
    page(Path(st.sidebar.text_input("Folder of runs", start)))


main()
