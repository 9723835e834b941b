"""A progress log ends with what the run's tables say; a simulated engine takes what its own costs predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliosim.assembly import build_server
from heliosim.examples import REFERENCE, drawn_workload
from heliosim.profile_view import open_profile
from heliosim.progress_log import LoggingRecorder, log_path, read_log
from heliosim.runs import sim_engine
from heliosim.scenario import Scenario
from heliosim.simulate import simulate_server
from heliosim.workload import build


def test_the_last_line_is_the_whole_run(tmp_path: Path) -> None:
    profile = open_profile(REFERENCE)
    scenario = Scenario.model_validate(
        {
            "name": "followed",
            "profile": REFERENCE,
            "models": ["tiny-opt-s"],
            "controller": {"kind": "vanilla", "model": "tiny-opt-s"},
            "memory": {"budget_bytes": 64_000_000},
            "workload": drawn_workload(profile, 4).model_dump(),
        }
    )
    path = log_path(tmp_path / "run")
    recorder = LoggingRecorder(path, scenario, profile, every_s=0.0)
    engine = sim_engine(scenario, profile)
    simulate_server(build_server(scenario, profile, recorder), engine, build(scenario.workload, scenario.seed))
    assert not read_log(path).has_ended
    recorder.close(True)
    found, tables = read_log(path), recorder.tables()
    last, steps = found.lines[-1], tables.steps.to_pandas()
    ran = steps[steps["kind"] == "run"]
    assert found.has_ended
    assert found.header.scenario_hash == scenario.hash
    assert (last.finished, last.output_tokens) == (tables.requests.num_rows, steps["tokens_out"].sum())
    assert last.priced_steps == last.steps == len(ran)
    assert last.measured_step_s == pytest.approx(ran["seconds"].sum())
    assert last.predicted_step_s == pytest.approx(last.measured_step_s, rel=1e-6)
    ttft = tables.requests.to_pandas().eval("first_token_s - arrival_s").mean()
    assert last.mean_ttft_s == pytest.approx(ttft)
    assert len(found.lines) > len(ran)
