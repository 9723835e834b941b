"""Replications, policy comparisons and studies on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliosim.coverage import cases
from heliosim.formats.profile import Profile
from heliosim.formats.replications import load_replications
from heliosim.formats.results import load_run
from heliosim.metrics import summarise
from heliosim.randomness import CrnRow
from heliosim.statistics_view import print_crn
from heliosim.stats import paired_difference
from tests.profiles import scenario, workload, write_synthetic_profile
from tests.unit.conftest import Cli

EXTRA = {"replications.json", "replications.parquet"}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


@pytest.fixture
def file(profile: Profile, tmp_path: Path) -> Callable[..., Path]:
    """Write a scenario with these changes."""

    def write(name: str = "exits", **changes: Any) -> Path:
        values = {"controller": {"kind": "early-exit", "model": "small"}, "workload": workload(40)} | changes
        content = yaml.safe_load(scenario(profile, name=name, **values).to_yaml())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_run_replicates_until_intervals_are_narrow(cli: Cli, file: Callable[..., Path], tmp_path: Path) -> None:
    code, out, err = cli("run", file(workload=workload(120)), "--out", "run", "--half-width", 0.2)
    assert code == 0, err
    found = load_replications(tmp_path / "run")
    assert found is not None
    assert 5 <= found.count <= 30
    run = load_run(tmp_path / "run")
    after_s = found.replications[0].after_s
    assert found.replications[0].values["mean_ttft_ms"] == summarise(run, after_s).mean_ttft_ms
    assert f"{found.count} replications" in out
    assert "left out as warm-up" in out
    assert "95 % intervals" in out
    assert "the same every time" in out, "preemptions"


def test_a_single_run_is_todays_and_the_others_leave_its_files_alone(
    cli: Cli, file: Callable[..., Path], tmp_path: Path
) -> None:
    path = file()
    assert cli("run", path, "--out", "one", "--replications", 1)[0] == 0
    code, out, _ = cli("run", path, "--out", "many", "--replications", 3)
    assert code == 0
    assert "3 replications were asked for" in out
    one = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    many = {p.name: p.read_bytes() for p in (tmp_path / "many").iterdir()}
    assert many.keys() - one.keys() == EXTRA
    assert {n: one[n] for n in one if n != "host.json"} == {n: many[n] for n in one if n != "host.json"}


def test_two_processes_find_the_same(cli: Cli, file: Callable[..., Path], tmp_path: Path) -> None:
    path = file()
    for jobs in (1, 2):
        assert cli("run", path, "--out", f"run-{jobs}", "--jobs", jobs, "--half-width", 0.3)[0] == 0
    for name in EXTRA:
        assert (tmp_path / "run-1" / name).read_bytes() == (tmp_path / "run-2" / name).read_bytes()


def test_saturation_is_said(cli: Cli, file: Callable[..., Path]) -> None:
    path = file(workload=workload(300, rate_per_s=3000.0))
    code, out, _ = cli("run", path, "--out", "run")
    assert code == 0
    row = next(line for line in out.splitlines() if line.lstrip().startswith("TTFT, p99"))
    assert "saturated" in row
    assert not any(c.isdigit() for c in row.replace("p99", "")), "no figure"
    assert "Waiting times and percentiles would only tell how long the run is" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--half-width", 0), "--half-width: must lie between 0 and 1"),
        (("--half-width", 0.1, "--replications", 4), "stands beside --replications"),
        (("--profile-uncertainty",), "profile uncertainty is unavailable"),
        (("--live", "--replications", 4), "--live is a single run"),
        (("--device", "cuda"), "--device: a simulation runs on no device"),
        (("--live", "--jobs", 2), "--live is a single run"),
        (("--replications", 1, "--half-width", 0.1), "--replications 1 is a single run"),
        (("--replications", 1, "--profile-uncertainty"), "--replications 1 is a single run"),
    ],
)
def test_what_cannot_be_asked(
    cli: Cli, file: Callable[..., Path], tmp_path: Path, arguments: tuple[object, ...], part: str
) -> None:
    code, _, err = cli("run", file(), "--out", "run", *arguments)
    assert code == 2
    assert part in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_policies_are_compared(cli: Cli, file: Callable[..., Path], tmp_path: Path) -> None:
    first = file("low")
    second = file("high", controller={"kind": "early-exit", "model": "small", "threshold": 0.95})
    code, out, err = cli("compare-policies", first, second, "--replications", 4, "--out", "figures.json")
    assert code == 0, err
    assert "high against low · 4 pairs, common random numbers" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    layers = figures["metrics"]["layers_per_token"]
    assert layers["difference"]["mean"] > 0
    assert layers["difference"]["half_width"] < layers["difference"]["mean"], "surely deeper"
    assert len(figures["seeds"]) == len(layers["values"]) == 4
    means = [sum(v[k] for v in layers["values"]) / 4 for k in (0, 1)]
    assert layers["difference"]["mean"] == pytest.approx(means[1] - means[0])
    code, _, err = cli("compare-policies", first, first)
    assert (code, "both scenarios have this name" in err) == (2, True)


def test_the_coverage_command(cli: Cli, tmp_path: Path) -> None:
    """So short a study must not pass: its exit code says so."""
    code, out, err = cli("statistics", "coverage", "--seeds", 2, "--length", 0.02)
    assert code == 1, err
    assert "M/E2/1" in out
    assert f"of {2 * len(cases())} between 90 % and 99 %" in out
    content = json.loads((tmp_path / "coverage.json").read_text())
    assert [len(v) for v in content["results"].values()] == [2] * len(cases())


def test_common_random_numbers_cut_the_variance(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("statistics", "crn", "--pairs", 12, "--requests", 80, "--out", "crn.json")
    assert code == 0, err + out
    rows = json.loads((tmp_path / "crn.json").read_text())
    thresholds = next(r for r in rows if r["second"] == "early-exit-0.9" and r["metric"] == "mean_tpot_ms")
    assert thresholds["variance_ratio"] > 3
    assert thresholds["difference"]["half_width"] < thresholds["independent_half_width"]
    assert {r["target"] for r in rows if r["second"] == "HELIOS"} == {None}


def test_a_difference_that_is_always_the_same_has_no_width(capfd: pytest.CaptureFixture[str]) -> None:
    same = paired_difference([1.0, 2.0], [1.0, 2.0]).interval
    print_crn([CrnRow("a", "b", "output_throughput", same, 17.0, None, 3.0)], 2, 20.0, 240)
    row = next(line for line in capfd.readouterr().out.splitlines() if "always equal" in line)
    assert re.search(r" 0\s+–\s+17\s+always equal", row), row


@pytest.mark.parametrize(("out", "said"), [("there.json", "--overwrite"), (".", "is a folder"), ("there.json/x", "no")])
def test_figures_replace_no_file_unasked(
    cli: Cli, file: Callable[..., Path], tmp_path: Path, out: str, said: str
) -> None:
    (tmp_path / "there.json").write_text("mine")
    pair = ("compare-policies", file("low"), file("high"), "--replications", 2)
    for command in (pair, ("statistics", "crn")):
        code, shown, err = cli(*command, "--out", out)
        assert (code, shown, err.count("\n")) == (2, "", 1), "before any work"
        assert said in err
    assert (tmp_path / "there.json").read_text() == "mine"
    assert cli(*pair, "--out", "there.json", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "there.json").read_text())["seeds"]


def test_an_unused_width_and_a_file_that_is_no_study(cli: Cli, file: Callable[..., Path], tmp_path: Path) -> None:
    code, out, err = cli("compare-policies", file("low"), file("high"), "--half-width", 0)
    assert (code, out) == (2, "")
    assert "--half-width: must lie between 0 and 1 (value: 0.0)" in err
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    code, out, err = cli("statistics", "coverage", "--out", "mine.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "mine.json: holds no study of coverage" in err
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'


def test_profile_uncertainty_of_fleets_is_refused_before_the_run(
    cli: Cli, file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliosim.runs.run_simulated", lambda *_, **__: pytest.fail("simulated first"))
    code, _, err = cli("run", file(fleet={"replicas": [{"name": "a", "count": 2}]}), "--profile-uncertainty")
    assert code == 2
    assert "profile uncertainty is unavailable for fleets" in err


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [(("sweep", "x"), True), (("statistics", "coverage"), True), (("run", "sweep"), False), (("compare", "x"), False)],
)
def test_only_commands_that_go_on_promise_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], goes_on: bool
) -> None:
    monkeypatch.setattr("heliosim.cli.app", lambda **_: 130)
    code, _, err = cli(*command)
    assert code == 130
    assert "No half-written file was left" in err
    assert ("run the same command to go on" in err) == goes_on
