"""Derived profiles: sound, small, and nowhere shown without saying what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from heliosim.charts import run_caption
from heliosim.cli import app
from heliosim.costs import StepShape
from heliosim.errors import InputError
from heliosim.formats.files import read_json, validate
from heliosim.formats.profile import ProfileFile
from heliosim.formats.results import load_run
from heliosim.metrics import SystemResult
from heliosim.profile_view import check_profile, open_profile, shipped_profiles
from heliosim.report import demo_report
from heliosim.runs import make_engine, run_simulated, save
from heliosim.scenario import Scenario
from heliosim.tables import comparison_text
from tests.synthetic_runs import synthetic_systems

DERIVED = ("llama2-a100-80gb", "llama2-h100-80gb")


def scenario(**changes: object) -> Scenario:
    values: dict[str, object] = {
        "name": "derived",
        "profile": DERIVED[0],
        "models": ["llama2-7b"],
        "workload": {
            "requests": 8,
            "arrivals": {"kind": "poisson", "rate_per_s": 5},
            "tasks": [{"task": "code", "prompt_tokens": 100, "output_tokens": 10}],
        },
        "memory": {"budget_bytes": "72 GB"},
        "controller": {"kind": "early-exit", "model": "llama2-7b"},
        "clock": "wall",
    }
    return Scenario.model_validate(values | changes)


@pytest.mark.parametrize("name", DERIVED)
def test_derived_profiles_pass_their_check_and_are_small(name: str) -> None:
    profile = open_profile(name)
    assert not profile.is_measured
    assert profile.origin == "derived, not measured"
    assert check_profile(profile) == 0
    assert sum(p.stat().st_size for p in profile.folder.iterdir()) < 400_000
    for facts in profile.facts.models.values():
        fit = facts.step["wall"]
        assert (fit.max_rows, fit.max_context, fit.max_tokens) == (256, 4096, 8192)
        assert fit.holdout.median_abs_error < 0.05
    assert {p.parent.name for p in (f / "profile.json" for f in shipped_profiles().values())} >= set(DERIVED)


@pytest.mark.parametrize("name", DERIVED)
def test_the_costs_fit_the_composed_steps_that_are_shipped(name: str) -> None:
    profile = open_profile(name)
    rows = pq.read_table(profile.folder / "steps.parquet").to_pylist()
    for row in rows:
        shape = StepShape(**{field: row[field] for field in StepShape._fields if field in row})
        row["error"] = profile.step_cost(row["model"], "wall").seconds(shape) / row["wall_s"] - 1
    errors = np.array([row["error"] for row in rows])
    assert np.median(np.abs(errors)) < 0.04
    assert abs(errors.mean()) < 0.02


def test_the_faster_gpu_and_the_smaller_model_are_faster() -> None:
    shape = StepShape(32, 32, 32, 32 * 1024, 0, 0, 32, 1, 32, 0, 0, 0, 1024)
    a, h = (open_profile(n) for n in DERIVED)
    times = {(p, m): q.step_cost(m, "wall").seconds(shape) for p, q in (("a", a), ("h", h)) for m in a.facts.models}
    assert times["h", "llama2-7b"] < 0.65 * times["a", "llama2-7b"]
    assert times["a", "llama2-2.7b"] < 0.65 * times["a", "llama2-7b"]
    assert times["a", "llama2-7b"] > 13.5e9 / 2.039e12  # no faster than reading the weights


def test_exits_have_the_shares_they_were_made_with() -> None:
    behaviour = open_profile(DERIVED[0]).behaviour
    by_task = {}
    for (_, source), text in behaviour.texts.items():
        if source == "llama2-7b:full":
            by_task.setdefault(text.task, []).append(float((text.confidence["llama2-7b@8"] >= 0.8).mean()))
    shares = {task: float(np.mean(v)) for task, v in by_task.items()}
    for task, share in (("chat", 0.30), ("summarisation", 0.38), ("code", 0.52)):
        assert shares[task] == pytest.approx(share, abs=0.06)


def test_whatever_shows_a_derived_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from heliosim.console import print_summary

    run = run_simulated(scenario())
    save(run, tmp_path / "run")
    read = load_run(tmp_path / "run")
    assert read.info.profile_kind == "derived"
    print_summary(read, None)
    assert "Derived, not measured" in capsys.readouterr().out
    assert "derived profile" in run_caption(read)
    system = SystemResult("x", read)
    assert "Derived, not measured" in comparison_text([system])
    demo_report(tmp_path / "report.html", [system], {}, [], [])
    assert "derived, not measured" in (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["profile", "show", DERIVED[0]])
    assert shown.exit_code == 0


def test_a_fleet_of_derived_replicas_is_derived() -> None:
    fleet = {"replicas": [{"name": "a", "count": 1}, {"name": "h", "count": 1, "profile": DERIVED[1]}]}
    assert run_simulated(scenario(fleet=fleet)).info.profile_kind == "derived"


def test_measured_runs_do_not_say_it() -> None:
    assert all(run.info.profile_kind == "measured" for run in synthetic_systems(requests=20, repeats=1)[0].runs)


def test_derived_profiles_refuse_what_they_cannot_do() -> None:
    profile = open_profile(DERIVED[0])
    with pytest.raises(InputError, match="no measured noise"):
        run_simulated(scenario(step_noise=0), profile)
    with pytest.raises(InputError, match="have no model"):
        make_engine(scenario(), profile)


def test_kind_and_derivation_belong_together() -> None:
    raw = read_json(shipped_profiles()[DERIVED[0]] / "profile.json")
    with pytest.raises(InputError, match="derivation"):
        validate(ProfileFile, raw | {"derivation": None}, "profile.json")
    with pytest.raises(InputError, match="derivation"):
        validate(ProfileFile, raw | {"kind": "measured"}, "profile.json")
