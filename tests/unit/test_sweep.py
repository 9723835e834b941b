"""Sweeps: the same tables whoever does the work, nothing twice, nothing lost, and on from where it stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from heliosim import sweep as sweep_module
from heliosim.cli import main
from heliosim.errors import InputError
from heliosim.examples import drawn_workload, scenario_for
from heliosim.executors import InlineExecutor, open_executor
from heliosim.formats.files import sole_writer
from heliosim.formats.results import load_run
from heliosim.metrics import SCALARS, summarise
from heliosim.profile_view import open_profile
from heliosim.sweep import estimate_s, look, plan_sweep, run_job, run_sweep
from heliosim.sweep_tables import query
from tests import work

GRID: dict[str, Any] = {"controller.threshold": [0.6, 0.9], "workload.arrivals.rate_per_s": [10, 40]}
Cli = Callable[..., tuple[int, str, str]]


def write_base(folder: Path, requests: int = 30) -> Path:
    profile = open_profile("tiny-opt-cpu")
    workload = drawn_workload(profile, requests // 2, 20.0)
    workload = workload.model_copy(update={"tasks": workload.tasks[:2]})
    path = folder / "base.yaml"
    scenario_for("base", {"kind": "helios"}, profile, workload).save(path)
    return path


def write_sweep(folder: Path, **content: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", **content}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base scenario and a sweep of four points, two runs each."""
    made = tmp_path_factory.mktemp("sweep")
    write_base(made)
    write_sweep(made, grid=GRID, replications=2, slo={"ttft_ms": 50})
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """The sweep as one process does it."""
    run_sweep(plan_sweep(folder / "sweep.yaml"), folder / "reference", InlineExecutor())
    return folder / "reference"


def tables(out: Path) -> tuple[bytes, bytes]:
    return (out / "results.parquet").read_bytes(), (out / "points.parquet").read_bytes()


def runs(out: Path) -> set[str]:
    return {p.name for p in (out / "runs").iterdir()}


# --- points -------------------------------------------------------------------------------------------------


def test_grid_and_list_make_every_combination_in_order(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "base.yaml", tmp_path)
    vanilla = {"controller": {"kind": "vanilla", "model": "tiny-opt-s"}, "name": "vanilla"}
    path = write_sweep(tmp_path, grid={"seed": [1, 2]}, list=[vanilla, {"controller.coverage": 0.9}])
    planned = plan_sweep(path, [("batcher.max_batch", [4, 8])])
    assert planned.fields == ("controller", "name", "controller.coverage", "seed", "batcher.max_batch")
    assert len(planned.points) == 8
    firsts = [(p.scenario.name, p.scenario.seed, p.scenario.batcher.max_batch) for p in planned.points]
    assert firsts[:3] == [("vanilla", 1, 4), ("vanilla", 1, 8), ("vanilla", 2, 4)]
    assert firsts[4] == ("base", 1, 4)
    assert planned.points[0].scenario.controller == vanilla["controller"]
    assert planned.points[4].scenario.controller == {"kind": "helios", "coverage": 0.9}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"grid": {"controller.threshold": [0.5, 1.5]}}, r"point 1 \(threshold=1.5\): controller.threshold: must lie"),
        ({"grid": {"controller.treshold": [0.5]}}, r"point 0 .*field controller.treshold: unknown.*'threshold'"),
        ({"grid": {"sede": [0]}}, r"point 0 \(sede=0\), field sede: unknown field.*'seed'"),
        ({"grid": {"models": [["tiny-opt-s"], ["tiny-opt-m"]]}}, r"point 1 .*'tiny-opt-m'"),
        ({"grid": {"memory.budget_bytes": ["20 MB", "1 kB"]}}, r"point 1 \(budget_bytes=1 kB\): memory.budget_bytes"),
        ({"grid": {"workload.tasks.0.task": ["chess"]}}, r"workload.tasks.0.task: unknown name \(value: 'chess'\)"),
        ({"grid": {"seed": [1]}, "list": [{"seed": 2}]}, "seed is in both grid and list"),
        ({"grid": {"seed": []}}, "seed has no values"),
        ({"grid": {"seed": [1, 2, 1]}}, "points 0 and 2 are the same scenario"),
        ({"gird": {}}, "field gird: unknown field .*'grid'"),
        ({"metrics": ["p99_tft_ms"]}, "did you mean 'p99_ttft_ms'"),
    ],
)
def test_every_point_is_checked_before_anything_runs(
    folder: Path, tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    shutil.copy(folder / "base.yaml", tmp_path)
    with pytest.raises(InputError, match=said):
        plan_sweep(write_sweep(tmp_path, **content))


# --- running ------------------------------------------------------------------------------------------------


def test_the_tables_say_what_the_run_folders_say(reference: Path) -> None:
    results = pq.read_table(reference / "results.parquet").to_pylist()
    assert [(r["point"], r["replication"]) for r in results] == [(p, k) for p in range(4) for k in range(2)]
    assert [r["controller.threshold"] for r in results] == [0.6] * 4 + [0.9] * 4
    assert [r["workload.arrivals.rate_per_s"] for r in results] == [10, 10, 40, 40] * 2
    assert runs(reference) == {r["run"] for r in results}
    for row in results[2:4]:
        run = load_run(reference / "runs" / row["run"])
        assert run.info.seed == row["seed"]
        assert run.scenario["workload"]["arrivals"]["rate_per_s"] == 40
        summary = summarise(run, slo=plan_sweep(reference.parent / "sweep.yaml").slo)
        assert {name: row[name] for name in SCALARS} == {name: getattr(summary, name) for name in SCALARS}
    assert results[0]["seed"] == 0
    assert len({r["seed"] for r in results}) == 2, "replications of all points share their seeds"
    assert results[0]["slo_attainment"] is not None
    points = pq.read_table(reference / "points.parquet").to_pylist()
    for point in points:
        both = [r["mean_ttft_ms"] for r in results if r["point"] == point["point"]]
        assert point["mean_ttft_ms"] == pytest.approx(sum(both) / 2)
        assert point["mean_ttft_ms_half_width"] == pytest.approx(12.706 * abs(both[0] - both[1]) / 2, rel=1e-3)


@pytest.fixture(scope="module", params=["local", "dask", "ray"])
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Two real workers of each kind."""
    with open_executor(request.param, 2) as executor:
        yield executor


def test_tables_are_the_same_bytes_and_a_killed_worker_changes_nothing(
    pool: Executor, folder: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_sweep(folder / "sweep.yaml")
    run_sweep(planned, tmp_path / "a", pool)
    assert tables(tmp_path / "a") == tables(reference)
    assert runs(tmp_path / "a") == runs(reference)

    monkeypatch.setattr(sweep_module, "run_job", work.run_job_killed_once)
    seen: list[int] = []
    run_sweep(planned, tmp_path / "b", pool, on_progress=lambda done, count: seen.append(done))
    assert (tmp_path / "b" / "killed").exists()
    assert seen == list(range(9)), "each run was counted once"
    assert tables(tmp_path / "b") == tables(reference)
    assert runs(tmp_path / "b") == runs(reference)


def test_only_what_is_missing_is_run_and_a_change_is_noticed(folder: Path, reference: Path, tmp_path: Path) -> None:
    for name in ("base.yaml", "sweep.yaml"):
        shutil.copy(folder / name, tmp_path)
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    planned = plan_sweep(tmp_path / "sweep.yaml")
    shutil.rmtree(out / "runs" / planned.jobs[3].name)
    (out / "runs" / planned.jobs[5].name / "run.json").unlink()
    (out / "runs" / ".half").mkdir()
    before = {
        p.name: (p / "run.json").stat().st_mtime_ns for p in (out / "runs").glob("[!.]*/") if (p / "run.json").exists()
    }
    state = look(planned, out)
    assert set(state.done) == {0, 1, 2, 4, 6, 7}
    assert not state.has_changed
    run_sweep(planned, out, InlineExecutor())
    assert tables(out) == tables(reference)
    assert runs(out) == runs(reference)
    assert all((out / "runs" / name / "run.json").stat().st_mtime_ns == then for name, then in before.items())

    write_sweep(tmp_path, grid={**GRID, "controller.threshold": [0.6, 0.7]}, replications=2, slo={"ttft_ms": 9})
    grown = plan_sweep(tmp_path / "sweep.yaml")
    state = look(grown, out)
    assert (len(state.done), state.added, state.dropped) == (4, 4, 4)
    fresh = run_job(grown.jobs[0])
    assert state.done[0] == fresh, "another SLO is worked out from the tables that were kept"


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_looking_writes_nothing_and_running_brings_names_and_summaries_up(
    folder: Path, reference: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "base.yaml", tmp_path)
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    before = everything(out)
    names = runs(out)
    path = write_sweep(tmp_path, grid={**GRID, "batcher.max_batch": [16]}, replications=2, slo={"ttft_ms": 9})
    planned = plan_sweep(path)
    state = look(planned, out)
    assert (len(state.done), len(state.stale)) == (8, 8)
    assert everything(out) == before
    run_sweep(planned, out, InlineExecutor())
    assert not runs(out) & names, "another field varies now"
    assert runs(out) == {job.name for job in planned.jobs}
    assert not look(planned, out).stale


def test_names_are_changed_by_the_only_writer(folder: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "base.yaml", tmp_path)
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    path = write_sweep(tmp_path, grid={**GRID, "batcher.max_batch": [16]}, replications=2)
    before = everything(out)
    with sole_writer(out, "sweep"), pytest.raises(InputError, match="another sweep is writing here"):
        run_sweep(plan_sweep(path), out, InlineExecutor())
    assert everything(out) == before


def test_a_folder_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="holds no sweep"):
        run_sweep(plan_sweep(folder / "sweep.yaml"), tmp_path, InlineExecutor())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_summaries_alone_are_enough_to_go_on(folder: Path, reference: Path, tmp_path: Path) -> None:
    planned = plan_sweep(folder / "sweep.yaml")
    run_sweep(planned, tmp_path / "out", InlineExecutor(), keep="summary")
    assert tables(tmp_path / "out") == tables(reference)
    assert not list((tmp_path / "out").rglob("tokens.parquet"))
    assert len(look(planned, tmp_path / "out", "summary").done) == 8
    assert len(look(planned, tmp_path / "out", "runs").done) == 0


def test_a_run_that_fails_is_a_row_that_says_why(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "base.yaml", tmp_path)
    path = write_sweep(tmp_path, grid={"batcher.token_budget": [64, 9000], "batcher.max_batch": [16]})
    raw = yaml.safe_load((tmp_path / "base.yaml").read_text())
    for task in raw["workload"]["tasks"]:
        task["prompt_tokens"] = 200
    raw["workload"]["arrivals"] = {"kind": "closed", "users": 16}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(raw))
    finished = run_sweep(plan_sweep(path), tmp_path / "out", InlineExecutor())
    assert [r.error is None for r in finished.results] == [True, False]
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert "calibrated" in rows[1]["error"]
    assert (rows[1]["mean_ttft_ms"], rows[1]["is_saturated"]) == (None, None)
    assert len(runs(tmp_path / "out")) == 1


def test_an_estimate_comes_from_a_part_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = plan_sweep(folder / "sweep.yaml").jobs
    assert estimate_s([]) is None
    assert 0.0 < (estimate_s(jobs) or 0) < 60
    monkeypatch.setattr(sweep_module, "PROBE_S", 0.0)
    assert 0.0 < (estimate_s(jobs) or 0) < 600


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path) -> Cli:
    """Run ``heliosim sweep`` in the sweep's folder: exit code, standard output, standard error."""
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["heliosim", "sweep", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_a_dry_run_counts_and_writes_nothing(cli: Cli, folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, _ = cli("sweep.yaml", "--dry-run", "--replications", 3)
    assert code == 0
    assert "4 points, 3 runs each: 12 runs, 12 to do." in out
    assert "Estimate: about " in out
    assert sorted(folder.iterdir()) == before


def test_the_command_prints_the_points_and_answers_queries(cli: Cli, reference: Path) -> None:
    pytest.importorskip("duckdb")
    sql = 'select count(*) as n, max("controller.threshold") as th from results where error is null'
    code, out, _ = cli("sweep.yaml", "--out", "reference", "--sql", sql)
    assert code == 0
    assert "8 of 8 runs are already there." in out
    assert "4 points, 2 runs each" in out
    assert "±" in out
    assert query(reference, sql) == (["n", "th"], [(8, 0.9)])
    assert cli("sweep.yaml", "--out", "reference", "--sql", "select nothing from results")[0] == 2
    code, out, err = cli("sweep.yaml", "--out", "reference", "--sql", sql, "--dry-run")
    assert (code, out, "--dry-run has no results to query" in err) == (2, "", True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "seed"], "--set: not of the form"),
        (["--set", "seed=1", "--set", "seed=2"], "--set: is given twice"),
        (["--executor", "rya"], "Did you mean 'ray'"),
        (["--address", "x:1"], "Add --executor dask"),
        (["--executor", "ray", "--address", "x:1", "--jobs", "2"], "the cluster at --address has its own workers"),
        (["--keep", "run"], "Did you mean 'runs'"),
        (["--metrics", "ttft"], "is not a metric"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(cli: Cli, arguments: list[str], said: str) -> None:
    code, _, err = cli("sweep.yaml", *arguments)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_interrupted_it_says_how_far_it_came_and_goes_on_from_there(tmp_path: Path) -> None:
    write_base(tmp_path, requests=120)
    write_sweep(tmp_path, grid={"controller.threshold": [0.5 + 0.01 * k for k in range(40)]})
    command = [sys.executable, "-m", "heliosim.cli", "sweep", "sweep.yaml", "--out", "out", "--jobs", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background do not hear Ctrl-C
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out" / "runs").glob("[!.]*/run.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    done = len(list((tmp_path / "out" / "runs").glob("[!.]*/run.json")))
    assert f"{done} of 40 runs are done and kept in out/runs." in err
    assert "run the same command to go on" in err
    assert 3 <= done < 40
    assert not (tmp_path / "out" / "results.parquet").exists()

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").glob("*/run.json")}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{done} of 40 runs are already there." in again.stdout
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    planned = plan_sweep(tmp_path / "sweep.yaml")
    run_sweep(planned, tmp_path / "whole", InlineExecutor())
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")
