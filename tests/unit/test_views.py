"""What is printed at 80 and 120 columns: names of rows are whole, counts are counts, reasons are said once."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from heliosim import console as console_module
from heliosim.cli import main
from heliosim.console import print_refused_first
from heliosim.coverage import CoverageRow
from heliosim.examples import drawn_workload, scenario_for
from heliosim.executors import InlineExecutor
from heliosim.fitted import Column, broken, fitted, print_fitted
from heliosim.metrics import SystemResult, metric_spec, summarise
from heliosim.paired import COMPARED, pair
from heliosim.plan_report import _rate_line
from heliosim.profile_view import open_profile
from heliosim.randomness import CrnRow, policies
from heliosim.replicate import replicate
from heliosim.replicated import Replicated
from heliosim.scenario import Scenario
from heliosim.statistics_view import (
    _REPLICATED,
    SHOWN,
    crn_verdict,
    few_seeds,
    print_coverage,
    print_crn,
    print_paired,
    reason_lines,
    replicated_rows,
)
from heliosim.stats import Interval, StoppingRule
from heliosim.sweep import Done, Finished, Job, most, plan_sweep, profiles_digest, run_job, run_sweep
from heliosim.sweep_tables import notes, summary_tables
from heliosim.tables import comparison_title, counted, print_comparison
from tests.synthetic_runs import synthetic_systems

WIDTHS = (80, 120)
Printed = Callable[[int, Callable[[], None]], str]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What a function prints on a console of a width."""

    def run(width: int, action: Callable[[], None]) -> str:
        out = io.StringIO()
        made = Console(file=out, width=width, highlight=False)
        monkeypatch.setattr(console_module, "console", lambda: made)
        action()
        assert max(map(len, out.getvalue().splitlines())) <= width
        return out.getvalue()

    return run


def rendered(tables: Sequence[Any], width: int) -> str:
    out = io.StringIO()
    for table in tables:
        Console(file=out, width=width, highlight=False).print(table)
    return out.getvalue()


def made(rate_per_s: float, requests: int = 120, name: str = "exits", **controller: object) -> Scenario:
    profile = open_profile("tiny-opt-cpu")
    workload = drawn_workload(profile, requests // 2, rate_per_s)
    workload = workload.model_copy(update={"tasks": workload.tasks[:2]})
    kind = {"kind": "early-exit", "model": "tiny-opt-s", **controller}
    return scenario_for(name, kind, profile, workload)


# --- fitting ------------------------------------------------------------------------------------------------


def test_optional_columns_go_first_then_the_table_is_parted() -> None:
    columns = [Column("name", is_name=True), Column("a" * 20), Column("b" * 20), Column("c" * 20, optional=1)]
    rows = [["first-name", "1", "2", "3"]]
    assert len(rendered(fitted(columns, rows, 90), 90).splitlines()) == 3
    narrower = fitted(columns, rows, 60)
    assert [[str(c.header) for c in t.columns] for t in narrower] == [["name", "a" * 20, "b" * 20]]
    parts = fitted(columns, rows, 40)
    assert [[str(c.header) for c in t.columns] for t in parts] == [["name", "a" * 20], ["name", "b" * 20]]
    assert rendered(parts, 40).count("first-name") == 2


def test_long_names_go_on_in_the_next_line() -> None:
    out = io.StringIO()
    columns = [Column("name", is_name=True, wrap=10), Column("value")]
    print_fitted(Console(file=out, width=80), "title", columns, [["x" * 25, "17"]])
    assert out.getvalue().count("x") == 25
    assert "…" not in out.getvalue()


@pytest.mark.parametrize("text", ["early-exit-tiny-opt-s", "one name of words", "x" * 30, "HELIOS", "max_breaches"])
def test_broken_headings_lose_nothing(text: str) -> None:
    lines = broken(text, 12).splitlines()
    assert max(map(len, lines)) <= 13
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


# --- replications -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steady() -> Replicated:
    return replicate(made(20.0), StoppingRule.exactly(3))


@pytest.mark.parametrize("width", WIDTHS)
def test_replicated_metrics_are_whole_and_one_line_each(printed: Printed, steady: Replicated, width: int) -> None:
    rows = replicated_rows(steady, has_slo=False)
    text = printed(width, lambda: print_fitted(console_module.console(), "t", _REPLICATED, rows))
    lines = text.splitlines()
    for name in SHOWN:
        if name not in ("slo_attainment", "request_goodput"):
            assert sum(line.startswith(metric_spec(name).title) for line in lines) == 1, name
    assert len(lines) == len(rows) + 4


def test_each_reason_is_said_once(steady: Replicated) -> None:
    lines = reason_lines(steady, has_slo=False)
    assert sum("the same every time" in line for line in lines) == 1
    assert any(line.startswith("unavailable, no power figures: Energy") for line in lines)


# --- two policies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_policies_keep_their_columns_and_say_the_direction(printed: Printed, width: int) -> None:
    first, second = (
        going_on(made(20.0, name="early-exit-tiny-opt-s")),
        going_on(made(20.0, name="deeper", threshold=0.95)),
    )
    found = pair(first, second, StoppingRule.exactly(3), executor=InlineExecutor())
    text = printed(width, lambda: print_paired(found))
    heading = text.split("───")[0]
    assert "early-exit-" in heading
    assert "tiny-opt-s" in heading
    for column in ("deeper", "difference", "±", "variance"):
        assert column in heading
    assert "…" not in text
    for name in COMPARED:
        if name not in ("slo_attainment", "request_goodput", "energy_j"):
            assert metric_spec(name).title.split(" (")[0] in text
    said = " ".join(text.split())
    assert "deeper less early-exit-tiny-opt-s (second less first), both simulated" in said
    assert "steady: the question is a system that goes on like this" in said


# --- the studies --------------------------------------------------------------------------------------------


def coverage_row(seeds: int, covered: int, statistic: Any = "mean") -> CoverageRow:
    return CoverageRow("M/E2/1", 0.9, statistic, 28.904, 14_000, seeds, covered, 28.9, 7.6, 888.0)


@pytest.mark.parametrize("width", WIDTHS)
def test_coverage_names_queue_and_load_in_every_line(printed: Printed, width: int) -> None:
    rows = [coverage_row(2, 2), coverage_row(2, 1, "p95")]
    text = printed(width, lambda: print_coverage(rows))
    assert sum("M/E2/1  90 %" in line for line in text.splitlines()) == 2
    assert "100.0 %" in text
    assert "so few cannot pass" in " ".join(text.split())


def test_what_few_seeds_can_show() -> None:
    assert "steps of 50 %, and none lies between the limits" in few_seeds(2, 24)
    # of 12 exact intervals 11 must hold: 12 * 0.95**11 * 0.05
    assert "with probability 34.1 %" in few_seeds(12, 24)
    assert "200 seeds (there: 99.8 %)" in few_seeds(12, 24)


def crn_row(ratio: float | None, target: float | None = 3.0) -> CrnRow:
    gap = Interval(0.0217, 0.00082, 60)
    return CrnRow("early-exit-0.8", "HELIOS-on-one-model", "output_throughput", gap, 0.016, ratio, target)


@pytest.mark.parametrize("width", WIDTHS)
def test_crn_says_what_it_did_and_why_it_fails(printed: Printed, width: int) -> None:
    text = printed(width, lambda: print_crn([crn_row(2.0), crn_row(3_821_408.0)], 60, 20.0, 240))
    said = " ".join(text.split())
    assert "HELIOS-on-one-model − early-exit-0.8" in said
    assert "Output throughput (tok/s)" in text
    assert "3,821,408.0" in text
    assert "60 pairs" in said
    assert "240 requests, Poisson arrivals at 20 requests/s" in said
    assert "exit code 1: 1 line of 2 below the target" in said


def test_crn_names_the_lines_without_a_target() -> None:
    lines = crn_verdict([crn_row(0.5, target=None), crn_row(4.0)])
    assert lines == [
        "target: a variance ratio of 3 or more in every line, but HELIOS-on-one-model − early-exit-0.8: "
        "there a policy's own chance decides."
    ]


# --- sweeps -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("sweep")
    made(20.0, 60).save(folder / "base.yaml")
    grid = {"controller.threshold": [0.7, 0.8], "workload.arrivals.rate_per_s": [20, 600]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "grid": grid, "replications": 3}))
    return run_sweep(plan_sweep(folder / "sweep.yaml"), folder / "out", InlineExecutor())


@pytest.mark.parametrize("width", WIDTHS)
def test_a_sweep_names_its_points_in_every_table(finished: Finished, width: int) -> None:
    tables = summary_tables(finished, width)
    assert len(tables) == (1 if width == 120 else 2)
    text = rendered(tables, width)
    assert text.count("threshold") == text.count("rate_per_s") == len(tables)
    assert sum(line.split()[:2] == ["0.7", "600"] for line in text.splitlines()) == len(tables)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def going_on(scenario: Scenario, horizon: str = "steady") -> Scenario:
    return Scenario.model_validate(yaml.safe_load(scenario.to_yaml()) | {"statistics": {"horizon": horizon}})


def job_at(rate_per_s: float, horizon: str) -> Job:
    scenario = made(rate_per_s, 300)
    return Job(0, 0, going_on(scenario, horizon), profiles_digest(scenario), "", 0.0, None)


def test_a_sweep_calls_a_day_that_ends_never_saturated() -> None:
    steady, day = run_job(job_at(2000.0, "steady")), run_job(job_at(2000.0, "terminating"))
    assert (steady.error, day.error) == (None, None)
    assert (steady.saturated, steady.grew) == (True, True)
    assert (day.saturated, day.grew) == (False, True)


def test_a_point_is_saturated_if_more_than_half_of_its_runs_are(finished: Finished) -> None:
    assert most([True, True, False])
    assert not most([True, False])
    results = [Done(d.metrics, saturated=k % 3 == 0, grew=True) for k, d in enumerate(finished.results)]
    minority = Finished(finished.sweep, results, finished.names)
    assert "saturated" not in rendered(summary_tables(minority, 120), 120)
    assert any("longer days would be worse" in note for note in notes(minority))
    results = [Done(d.metrics, saturated=k % 3 != 0, grew=True) for k, d in enumerate(finished.results)]
    majority = Finished(finished.sweep, results, finished.names)
    assert "saturated" in rendered(summary_tables(majority, 120), 120)
    assert "4 of 4 points" in notes(majority)[0]


# --- compared runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_compared_systems_are_named_whole(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    systems, out = synthetic_systems(), io.StringIO()
    print_comparison(systems, file=out)
    assert max(map(len, out.getvalue().splitlines())) <= width
    for system in systems:
        assert out.getvalue().count(system.name) == 8


def test_without_live_runs_nothing_is_called_measured() -> None:
    systems, out = [SystemResult(s.name, s.simulated) for s in synthetic_systems()], io.StringIO()
    print_comparison(systems, file=out)
    assert comparison_title(systems) == "Simulated systems"
    assert "measured" not in out.getvalue()
    assert "error" not in out.getvalue()


# --- numbers and words --------------------------------------------------------------------------------------


def test_counts_are_whole_and_shares_in_percent() -> None:
    assert metric_spec("completed").text(5.0) == "5"
    assert metric_spec("max_batch_size").text(1234.0) == "1,234"
    assert metric_spec("transitions").text(2.5) == "2.50"
    assert metric_spec("probe_request_share").text(0.025) == "2.50"
    assert metric_spec("probe_request_share").unit == "%"
    assert metric_spec("total_token_throughput").unit == "tok/s"


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [(658.8, 0.26, "0.3"), (3446.0, 11.2, "11"), (658.8, 0.012, "< 0.1"), (0.03, 0.0088, "0.0088"), (658.8, 0.0, "0")],
)
def test_half_widths_have_no_more_decimals_than_their_mean(mean: float, half: float, text: str) -> None:
    assert metric_spec("output_throughput").width_text(half, mean) == text


def test_one_is_singular() -> None:
    assert [counted(n, "run") for n in (0, 1, 2, 1200)] == ["0 runs", "1 run", "2 runs", "1,200 runs"]


def test_rates_are_never_in_powers_of_ten() -> None:
    assert _rate_line(123456.0, None) == "[bold green]at least 123,456 requests/s[/]: no rate tried missed"
    assert "no rate tried missed" not in _rate_line(123456.0, None, has_missed=True)
    assert "1,200 requests/s[/] keep the limits, 1,300 is" in _rate_line(1200.0, 1300.0)


# --- commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a command: its standard output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["heliosim", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main()
        return capfd.readouterr().out

    return run


@pytest.mark.parametrize(
    ("horizon", "said"), [("steady", "saturated: waiting grew by"), ("terminating", "longer days would be worse")]
)
def test_a_single_run_says_that_it_is_overloaded(cli: Callable[..., str], horizon: str, said: str) -> None:
    job_at(2000.0, horizon).scenario.save(Path("over.yaml"))
    assert said in cli("run", "over.yaml", "--out", "over", "--replications", 1)


def test_compare_says_that_replications_are_not_in_it(cli: Callable[..., str]) -> None:
    made(20.0, 40).save(Path("s.yaml"))
    cli("run", "s.yaml", "--out", "many", "--replications", 3)
    assert "many shows replication 0 alone, one of 3" in cli("compare", "many")
    cli("run", "s.yaml", "--out", "one", "--replications", 1)
    assert "replication 0" not in cli("compare", "one")


def test_derived_is_said_of_all_replications_and_of_studies(cli: Callable[..., str]) -> None:
    out = cli("statistics", "crn", "--profile", "llama2-a100-80gb", "--pairs", 5, "--requests", 20)
    assert out.count("Derived, not measured") == 1
    policies("llama2-a100-80gb", 20.0, 20, 0)[0][0].save(Path("s.yaml"))
    out = cli("run", "s.yaml", "--out", "run", "--replications", 2)
    assert out.count("Derived, not measured") == 1
    assert out.index("Derived, not measured") < out.index("of replication 0")


def test_most_requests_refused_stands_above_the_figures(printed: Printed) -> None:
    run = synthetic_systems()[0].simulated
    assert run is not None
    column = run.requests.schema.get_field_index("status")
    gone = run.requests.set_column(column, "status", pa.array(["refused"] * run.requests.num_rows))
    refused = replace(run, requests=gone)
    text = printed(80, lambda: print_refused_first(refused, summarise(refused)))
    assert "requests were refused: there are no figures of any" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_saturated_policy_has_no_line_for_an_slo_it_lacks(printed: Printed, width: int) -> None:
    first, second = going_on(made(20.0, 300, name="calm")), going_on(made(2000.0, 300, name="rushed"))
    found = pair(first, second, StoppingRule.exactly(3), executor=InlineExecutor())
    text = printed(width, lambda: print_paired(found))
    assert "saturated" in text
    assert "SLO attainment" not in text
    assert text.count("difference unavailable, saturated") == 1
    assert " 0 requests" not in text
