"""Search: the same study whatever the workers and the interruptions, limits kept with fresh seeds, a file that runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from heliosim.cli import main
from heliosim.errors import HelioSimError, InputError
from heliosim.executors import InlineExecutor, open_executor
from heliosim.formats.files import sole_writer
from heliosim.formats.tune import Limit, Range
from heliosim.metrics import summarise
from heliosim.profile_view import open_profile
from heliosim.replicate import replication_seed
from heliosim.runs import run_simulated
from heliosim.scenario import load_scenario
from heliosim.sweep import Done, Job, run_job
from heliosim.tune import (
    base_values,
    broken_by,
    evaluate,
    importance,
    is_feasible,
    open_problem,
    open_study,
    ranked,
    search,
    values_of,
    verify,
    without_password,
)
from heliosim.tune_report import verified_lines, write_results
from tests.unit.test_sweep import write_base

SEARCH: dict[str, Any] = {
    "controller.threshold": {"low": 0.5, "high": 0.95},
    "controller.window_tokens": {"low": 10, "high": 200, "log": True},
    "controller.candidates": {"choices": [["tiny-opt-s"], ["tiny-opt-s", "tiny-opt-l"]]},
}
CONTENT: dict[str, Any] = {
    "base": "base.yaml",
    "search": SEARCH,
    "objective": {"metric": "mean_tpot_ms"},
    "constraints": {"perplexity": {"at_most": 1.9}},
    "trials": 10,
    "batch": 3,
    "seeds": 2,
    "fresh_seeds": 2,
}


def write_tune(folder: Path, **changes: Any) -> Path:
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_base(tmp_path, requests=20)
    return tmp_path


def outcome(study: Any) -> list[tuple[Any, ...]]:
    """All that a study says of its trials."""
    return [(t.number, t.state.name, t.params, t.value, t.constraints, t.user_attrs) for t in study.trials]


def test_the_study_does_not_depend_on_workers_storage_or_interruptions(folder: Path) -> None:
    problem = open_problem(write_tune(folder))
    whole = open_study(problem, f"sqlite:///{folder}/whole.db")
    search(problem, whole, InlineExecutor())
    assert len(whole.trials) == 10

    two = open_study(problem, f"journal:{folder}/two.log")
    with open_executor("local", 2) as pool:
        search(problem, two, pool, trials=4)
        search(problem, two, pool)
    assert outcome(two) == outcome(whole)

    class Interrupted(InlineExecutor):
        left = 11  # in the middle of the second batch

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().submit(fn, *args, **kwargs)

    again = open_study(problem, f"journal:{folder}/again.log")
    with pytest.raises(KeyboardInterrupt):
        search(problem, again, Interrupted())
    assert [t.state.name for t in again.trials] == ["COMPLETE"] * 3 + ["RUNNING"] * 3
    search(problem, open_study(problem, f"journal:{folder}/again.log"), InlineExecutor())
    assert outcome(again) == outcome(whole)


def test_a_trial_is_the_mean_over_the_same_seeds(folder: Path) -> None:
    problem = open_problem(write_tune(folder))
    study = open_study(problem, f"journal:{folder}/study.log")
    search(problem, study, InlineExecutor(), trials=3)
    assert values_of(problem, study.trials[0]) == {
        "controller.threshold": 0.8,
        "controller.window_tokens": 100,
        "controller.candidates": ["tiny-opt-s", "tiny-opt-l"],
    }, "the first trial is the scenario as it is"
    base = problem.base
    summaries = [
        summarise(run_simulated(base.model_copy(update={"seed": replication_seed(base.seed, k)}))) for k in range(2)
    ]
    first = study.trials[0]
    tpot, perplexity = ([s.value(name) or 0.0 for s in summaries] for name in ("mean_tpot_ms", "perplexity"))
    assert first.value == pytest.approx(sum(tpot) / 2)
    assert broken_by(problem, first)["perplexity"] == pytest.approx((sum(perplexity) / 2 - 1.9) / 1.9)
    assert first.user_attrs["metrics"]["perplexity"] == first.user_attrs["perplexity"]


def test_infeasible_and_failed_trials_are_told_apart_and_neither_wins(folder: Path) -> None:
    ranges = {"controller.threshold": {"low": 0.5, "high": 0.99}, "batcher.max_batch": {"choices": [4, 16]},
              "batcher.token_budget": {"choices": [8, 256]}}  # fmt: skip
    path = write_tune(folder, search=ranges, constraints={"perplexity": {"at_most": 1.484}}, trials=16)
    problem = open_problem(path)
    study = open_study(problem, f"journal:{folder}/study.log")
    search(problem, study, InlineExecutor())
    states = {t.state.name for t in study.trials}
    assert states == {"COMPLETE", "FAIL"}
    for trial in study.trials:
        budget_is_small = (trial.params["batcher.max_batch"], trial.params["batcher.token_budget"]) == (16, 8)
        assert (trial.state.name == "FAIL") == budget_is_small
        if budget_is_small:
            assert "token_budget (8) must be at least max_batch (16)" in trial.user_attrs["error"]
    order = ranked(problem, study)
    feasible = [is_feasible(t) for t in order]
    assert feasible == sorted(feasible, reverse=True)
    assert set(feasible) == {True, False}
    assert order[0].value == min(t.value for t in order if is_feasible(t))
    shares = importance(study)
    assert set(shares) <= set(ranges)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert "sklearn" not in sys.modules


def test_the_winner_is_measured_with_seeds_no_trial_has_seen(folder: Path) -> None:
    problem = open_problem(write_tune(folder))
    study = open_study(problem, f"journal:{folder}/study.log")
    search(problem, study, InlineExecutor(), trials=6)
    found = verify(problem, study, InlineExecutor())
    last = found[-1]
    assert not last.broken
    seeds = [replication_seed(problem.base.seed, k) for k in (2, 3)]
    runs = [summarise(run_simulated(last.scenario.model_copy(update={"seed": s}))).mean_tpot_ms for s in seeds]
    assert last.measured.values("mean_tpot_ms") == runs
    base = [summarise(run_simulated(problem.base.model_copy(update={"seed": s}))).mean_tpot_ms for s in seeds]
    assert last.gain is not None
    assert last.gain.interval.mean == pytest.approx(sum(a - b for a, b in zip(runs, base, strict=True)) / 2)  # type: ignore[operator]


def test_the_command_writes_a_scenario_that_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tune(folder, trials=12)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["heliosim", "tune", "tune.yaml", "--out", "out"])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    assert end.value.code == 0, err
    for said in (
        "Best trials",
        "(as is)",
        "What mattered",
        "holds with 2 fresh seeds",
        "against the scenario as it is",
    ):
        assert said in out, said
    best = load_scenario(folder / "out" / "best.yaml")
    assert best.name == "base-tuned"
    assert run_simulated(best).counts["finished"] == 20
    trials = pq.read_table(folder / "out" / "trials.parquet").to_pylist()
    assert len(trials) == 12
    assert trials[0]["controller.candidates"] == '["tiny-opt-s", "tiny-opt-l"]'

    write_tune(folder, trials=12, constraints={"perplexity": {"at_most": 1.0}})
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "its study is of another search" in capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", ["heliosim", "tune", "tune.yaml", "--out", "other", "--trials", "3"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1, "no trial keeps the limit"
    assert "No trial keeps every limit" in capfd.readouterr().out
    assert not (folder / "other" / "best.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"controller.treshold": {"low": 0.5, "high": 0.9}}}, "controller.treshold.*'threshold'"),
        (
            {"search": {"controller.threshold": {"low": 1.2, "high": 1.5}}},
            r"search.controller.threshold = 1.2.*between",
        ),
        ({"search": {"controller.threshold": {"low": 0.9, "high": 0.5}}}, "must be less than high"),
        ({"search": {"controller.threshold": {"low": 0.5}}}, "give low and high, or choices"),
        ({"search": {"seed": {"low": 0, "high": 5}}}, "every trial sees the same seeds"),
        ({"objective": {"metric": "mean_tpot"}}, "did you mean 'mean_tpot_ms'"),
        ({"objective": {"metric": "transitions"}}, "say maximise or minimise"),
        ({"constraints": {"perplexity": {"at_most": 2, "at_least": 1}}}, "give at_most or at_least"),
        ({"sampler": "tpee"}, "field sampler"),
    ],
)
def test_mistakes_are_one_line(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_problem(write_tune(folder, **changes))


def test_ranges_and_limits() -> None:
    whole, share = Range(low=10, high=50, step=10), Range(low=0.0, high=1.0)
    assert [whole.holds(v) for v in (10, 50, 15, 60, 20.5, True, None)] == [True, True] + [False] * 5
    assert [share.holds(v) for v in (0, 0.25, 1.5, "x")] == [True, True, False, False]
    assert Range(choices=([1], "a")).holds([1])
    assert not Range(choices=(1, 2)).holds(True)
    assert Limit(at_most=200).excess(250) == 0.25
    assert Limit(at_least=0.9).excess(0.9) == 0
    assert Limit(at_least=0.5).excess(0.25) == 0.5


def test_values_of_the_base_outside_a_range_are_left_out(folder: Path) -> None:
    ranges = {"controller.threshold": {"low": 0.9, "high": 0.95}, "controller.max_breaches": {"low": 10, "high": 60}}
    assert base_values(open_problem(write_tune(folder, search=ranges))) == {"controller.max_breaches": 50}


def test_without_optuna_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(HelioSimError, match=r"pip install 'heliosim\[tune\]'"):
        open_study(open_problem(write_tune(folder)), "sqlite://")


# --- profiles to choose from --------------------------------------------------------------------------------


def slow_profile(folder: Path) -> Path:
    """The shipped profile with every step twice as slow."""
    copy = folder / "slow"
    shutil.copytree(open_profile("tiny-opt-cpu").folder, copy)
    slow_down(copy, 2.0)
    return copy


def slow_down(profile: Path, factor: float) -> None:
    path = profile / "profile.json"
    raw = json.loads(path.read_text())
    for model in raw["models"].values():
        costs = model["step"]["cpu"]["seconds_per"]
        model["step"]["cpu"]["seconds_per"] = {name: factor * value for name, value in costs.items()}
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("place", ["profile", "fleet"])
def test_equal_scenarios_of_other_profiles_are_other_trials(folder: Path, place: str) -> None:
    slow = str(slow_profile(folder))
    candidates: list[dict[str, Any]] = [{"profile": "tiny-opt-cpu"}, {"profile": slow}]
    if place == "fleet":
        candidates = [{"fleet": {"replicas": [{"name": "a", "profile": c["profile"]}]}} for c in candidates]
    field = next(iter(candidates[0]))
    problem = open_problem(write_tune(folder, search={field: {"choices": [c[field] for c in candidates]}}))
    shipped, slower = (m.mean("mean_tpot_ms") for m in evaluate(problem, candidates, range(1), InlineExecutor()))
    assert shipped is not None
    assert slower is not None
    assert slower > 1.5 * shipped


def test_a_changed_profile_or_trace_among_the_choices_is_another_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliosim.tune.open_once", load_profile_again)
    slow = slow_profile(folder)
    (folder / "a.csv").write_text("a")
    choices = [{"trace": str(folder / "a.csv")}, {"trace": str(folder / "none.csv")}]
    monkeypatch.setattr("heliosim.tune._require_possible", lambda *_: None)
    path = write_tune(folder, search={"profile": {"choices": [str(slow)]}, "workload": {"choices": choices}})
    before = open_problem(path).digest
    assert open_problem(path).digest == before
    (folder / "a.csv").write_text("b")
    another = open_problem(path).digest
    assert another != before
    slow_down(slow, 2.0)
    assert open_problem(path).digest != another


def load_profile_again(name: str) -> Any:
    return open_profile(name)


# --- what does not hold -------------------------------------------------------------------------------------


def test_a_best_scenario_of_an_earlier_call_does_not_stay(folder: Path) -> None:
    problem = open_problem(write_tune(folder))
    study = open_study(problem, f"journal:{folder}/study.log")
    search(problem, study, InlineExecutor(), trials=2)
    found = verify(problem, study, InlineExecutor())
    assert write_results(problem, study, found, folder) == folder / "best.yaml"
    broken = [dataclasses.replace(found[-1], broken=("perplexity",))]
    assert write_results(problem, study, broken, folder) is None
    assert not (folder / "best.yaml").exists()


class Without:
    """An executor whose runs lack a metric in one replication."""

    def __init__(self, metric: str, seed: int) -> None:
        self.metric, self.seed = metric, seed

    def __call__(self, job: Job) -> Done:
        done = run_job(job)
        gone = {self.metric: None} if job.scenario.seed == self.seed else {}
        return dataclasses.replace(done, metrics={**done.metrics, **gone})


@pytest.mark.parametrize("metric", ["perplexity", "mean_tpot_ms"])
def test_a_metric_without_a_value_on_fresh_seeds_is_broken(
    folder: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = open_problem(write_tune(folder))
    study = open_study(problem, f"journal:{folder}/study.log")
    search(problem, study, InlineExecutor(), trials=2)
    monkeypatch.setattr("heliosim.tune.run_job", Without(metric, replication_seed(problem.base.seed, 3)))
    found = verify(problem, study, InlineExecutor())
    assert all(one.broken == (metric,) for one in found)
    assert f"breaks {metric} (no value) with 2 fresh seeds" in verified_lines(problem, found)[0]
    gain = found[0].gain
    assert gain is not None
    assert gain.interval.reason.startswith("no data") == (metric == "mean_tpot_ms"), "no pair is left out"
    assert write_results(problem, study, found, folder) is None


@pytest.fixture
def tune(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``heliosim tune tune.yaml`` with arguments: exit code, standard output, standard error."""
    write_tune(folder, trials=2, seeds=1, fresh_seeds=1)
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["heliosim", "tune", "tune.yaml", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("foo:bar", "--storage: it cannot be opened"),
        ("sqlite:///nodir/x.db", "unable to open database file"),
        ("postgresql+psycopg2://me:secret@nowhere/x", "--storage: it cannot be opened"),
        ("nonsense://me:secret@nowhere/x", "--storage: it cannot be opened"),
        ("sqlite:///damaged.db", "file is not a database"),
        ("journal:nodir/x.log", "--storage: it cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_line(
    tune: Callable[..., Any], folder: Path, storage: str, said: str
) -> None:
    (folder / "damaged.db").write_text("no database at all, " * 100)
    code, out, err = tune("--out", "out", "--storage", storage)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert "secret" not in err
    assert not (folder / "out").exists(), "nothing is left behind"


def test_a_folder_has_one_study_and_one_writer(tune: Callable[..., Any], folder: Path) -> None:
    (folder / "own").mkdir()
    (folder / "own" / "best.yaml").write_text("mine")
    code, _, err = tune("--out", "own")
    assert (code, [p.name for p in (folder / "own").iterdir()]) == (2, ["best.yaml"])
    assert "own: the folder exists and holds no study of tune" in err
    with sole_writer(folder / "out", "tune"):
        code, _, err = tune("--out", "out")
    assert (code, "another tune is writing here" in err) == (2, True)
    assert not (folder / "out").exists()
    assert tune("--out", "out", "--storage", "journal:one.log")[0] in (0, 1)
    code, out, _ = tune("--out", "out", "--storage", "journal:one.log", "--trials", "1")
    assert code in (0, 1)
    assert "The study has 2 trials already, more than the 1 asked for." in out
    write_tune(folder, seed=5)
    code, _, err = tune("--out", "other", "--storage", "journal:one.log")
    assert code == 2
    assert "another storage" in err


def test_no_password_is_shown() -> None:
    assert without_password("mysql://me:secret@host:33/x?a=b") == "mysql://me:***@host:33/x?a=b"
    assert without_password("cannot reach 'mysql://me:p:w@rd@host/x'") == "cannot reach 'mysql://me:***@host/x'"
    assert without_password("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
