"""The page Runs renders and reacts, on real run folders of a stub engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliosim.formats.results import RunInfo, RunResults, save_run
from heliosim.recorder import TableRecorder
from heliosim.simulate import simulate_server
from heliosim.workload import OpenLoop
from tests.helpers import StubEngine, arrival, server

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

from tests.app.helpers import open_page


def make_run(folder: Path, name: str, seconds: float) -> None:
    recorder = TableRecorder()
    engine = StubEngine(seconds=lambda run: seconds)
    simulate_server(server(recorder=recorder), engine, OpenLoop([arrival(k, at=0.05 * k) for k in range(20)]))
    info = RunInfo(
        name=name, mode="simulated", clock="simulated", seed=0, scenario_hash=name, profile_hash="p", versions={}
    )
    scenario = "controller: {kind: vanilla, model: m}\nmemory: {budget_bytes: 100000}\n"
    save_run(folder / name, RunResults.of(recorder, info, scenario, tasks=dict.fromkeys(range(20), "chat")))


def open_app(folder: Path) -> AppTest:
    app = open_page("runs")
    return app.text_input(key="folder").set_value(str(folder)).run()


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    app = open_app(tmp_path)
    assert not app.exception
    assert "heliosim demo" in app.info[0].value


def test_runs_are_listed_and_the_table_follows_the_choice(tmp_path: Path) -> None:
    make_run(tmp_path, "fast", 0.005)
    make_run(tmp_path, "slow", 0.02)
    app = open_app(tmp_path)
    assert not app.exception
    assert app.multiselect[0].value == ["fast", "slow"]
    assert list(app.dataframe[0].value.columns) == ["metric", "fast", "slow"]
    app.multiselect[0].set_value(["slow"]).run()
    assert not app.exception
    assert list(app.dataframe[0].value.columns) == ["metric", "slow"]


def test_a_damaged_run_is_explained(tmp_path: Path) -> None:
    make_run(tmp_path, "broken", 0.005)
    (tmp_path / "broken" / "tokens.parquet").write_bytes(b"nothing")
    app = open_app(tmp_path)
    assert not app.exception
    assert "tokens.parquet" in app.error[0].value
