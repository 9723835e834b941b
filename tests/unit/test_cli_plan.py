"""``heliosim plan`` and ``max-rate`` as typed: answers, exit codes, files that run as they are, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliosim.formats.results import load_run
from tests.unit.conftest import Cli

PLAN = Path(__file__).parents[2] / "heliosim" / "plans" / "code.yaml"


def plan(folder: Path, rate: float = 20.0, **changes: Any) -> Path:
    """The shipped plan of code completion, one candidate, few requests and replications."""
    raw = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    raw["workload"] |= {"requests": 80, "arrivals": {"kind": "poisson", "rate_per_s": rate}}
    raw |= {"candidates": raw["candidates"][1:2], "max_count": 3, "replications": {"least": 3, "most": 5}}
    raw["slo"] = {"limits": {"p99_ttft_ms": 600, "p99_tpot_ms": 30}}
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(raw | changes), encoding="utf-8")
    return file


def test_an_answer_is_printed_written_and_runs_as_it_is(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("plan", plan(tmp_path), "--out", "answer")
    assert code == 0
    for said in ("feasible", "2 × a100-depth24", "one fewer fails", "load −20 %", "load +20 %", "derived, not measured",
                 "USD per million output tokens", "kJ while stepping per 1,000 requests", "fresh seeds"):  # fmt: skip
        assert said in out
    answer = json.loads((tmp_path / "answer" / "plan.json").read_text(encoding="utf-8"))
    assert answer["answer"] == "feasible"
    assert answer["winner"]["count"] == 2
    assert answer["one_fewer"]["verdict"] == "misses"
    code, _, _ = cli("run", "answer/fleet.yaml", "--out", "run")
    assert code == 0
    run = load_run(tmp_path / "run")
    assert run.info.seed == answer["seed"]
    assert set(run.requests["replica"].to_pylist()) == {"a100-depth24-0", "a100-depth24-1"}
    code, again, _ = cli("plan", plan(tmp_path), "--out", "answer", "--json")
    assert code == 0
    assert json.loads(again) == answer


def test_no_fleet_is_exit_code_1_and_leaves_no_fleet(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("plan", plan(tmp_path, rate=400.0), "--out", "answer")
    assert code == 1
    assert "infeasible" in out
    assert {p.name for p in (tmp_path / "answer").iterdir()} <= {"plan.json", "probes"}


def test_a_limit_in_the_middle_of_the_spread_is_exit_code_3(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("plan", plan(tmp_path), "--out", "first", "--json")
    limits = json.loads(out)["winner"]["judgement"]["limits"]
    mean = next(m["interval"]["mean"] for m in limits if m["metric"] == "p99_ttft_ms")
    slo = {"limits": {"p99_ttft_ms": mean}}
    code, out, _ = cli("plan", plan(tmp_path, slo=slo, max_count=2), "--out", "second")
    assert code == 3
    assert "undecided" in out


def test_old_prices_are_pointed_out_and_own_ones_taken(cli: Cli, tmp_path: Path) -> None:
    own = {"schema_version": 1, "currency": "EUR", "prices": [
        {"gpu": "A100-80GB", "provider": "me", "region": "home", "price_per_gpu_hour": 1.25, "date": "2020-01-31",
         "source": "a bill"}]}  # fmt: skip
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    code, out, _ = cli("plan", plan(tmp_path), "--prices", "prices.yaml")
    assert code == 0
    assert "2.50 EUR/h" in out
    assert "older than half a year (A100-80GB: 2020-01-31)" in out
    code, _, err = cli("plan", plan(tmp_path), "--prices", "prices.yaml", "--provider", "you")
    assert code == 2
    assert "me" in err


def test_the_highest_rate_of_a_scenario(cli: Cli, tmp_path: Path) -> None:
    cli("plan", plan(tmp_path), "--out", "answer")
    options = ("--limit", "p99_ttft_ms=600", "--limit", "p99_tpot_ms=30", "--least", 3, "--most", 5)
    code, out, _ = cli("max-rate", "answer/one-fewer.yaml", *options, "--tolerance", 0.2, "--out", "rate", "--json")
    assert code == 0
    answer = json.loads(out)
    assert 1 < answer["sustained_per_s"] < answer["failed_per_s"] < 20
    sustained = yaml.safe_load((tmp_path / "rate" / "sustained.yaml").read_text(encoding="utf-8"))
    assert sustained["workload"]["arrivals"]["rate_per_s"] == pytest.approx(answer["sustained_per_s"])
    assert cli("run", "rate/sustained.yaml", "--out", "run")[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "slo"),
        (("--limit", "p99_ttft_ms"), "NAME=MILLISECONDS"),
        (("--limit", "p99_tft_ms=3"), "error: --limit: "),
        (("--limit", "p99_ttft_ms=3", "--limit", "p99_ttft_ms=4"), "--limit: is given twice"),
        (("--limit", "p99_tft_ms=3"), "p99_ttft_ms"),
        (("--share", "0.9"), "slo"),
        (("--limit", "p99_ttft_ms=3", "--tolerance", "2"), "--tolerance"),
        (("--limit", "p99_ttft_ms=3", "--most", "2"), "--most"),
        (("--limit", "p99_ttft_ms=3", "--warm-up", "1"), "--warm-up"),
        (("--address", "x:1"), "Add --executor dask"),
        (("--executor", "ray", "--address", "x:1", "--jobs", "2"), "the cluster at --address has its own workers"),
    ],
)
def test_bad_options_of_max_rate_are_named(cli: Cli, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    from heliosim.planfile import load_plan
    from heliosim.profile_view import open_profile

    loaded = load_plan(plan(tmp_path))
    candidate = loaded.candidates[0]
    loaded.scenario(candidate, open_profile(candidate.profile), 1).save(tmp_path / "s.yaml")
    code, out, err = cli("max-rate", "s.yaml", *options)
    assert code == 2
    assert not out
    assert said in err
    assert err.count("\n") == 1


def test_a_plan_refuses_workers_beside_a_cluster(cli: Cli, tmp_path: Path) -> None:
    plan(tmp_path)
    for options in (("--address", "x:1"), ("--executor", "dask", "--address", "x:1", "--jobs", 1)):
        code, _, err = cli("plan", "plan.yaml", *options)
        assert code == 2
        assert "--address" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["sweep", "tune", "max-rate"])
def test_commands_that_do_not_use_the_statistics_section_say_so(cli: Cli, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert "statistics section is not used" in " ".join(out.replace("│", " ").split())


def test_closed_loops_have_no_rate(cli: Cli, tmp_path: Path) -> None:
    from heliosim.planfile import load_plan
    from heliosim.profile_view import open_profile

    file = plan(tmp_path)
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["workload"]["arrivals"] = {"kind": "closed", "users": 4}
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    loaded = load_plan(file)
    candidate = loaded.candidates[0]
    loaded.scenario(candidate, open_profile(candidate.profile), 1).save(tmp_path / "s.yaml")
    code, _, err = cli("max-rate", "s.yaml", "--limit", "p99_ttft_ms=300")
    assert code == 2
    assert "closed" in err


def test_a_bad_plan_is_one_line(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("plan", plan(tmp_path, rooter="round-robin"))
    assert code == 2
    assert not out
    assert "router" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "plans").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["controller"].update(kind="fixed", depth=5), ["controller.depth", "(value: 5)", "no exit there"]),
        (lambda c: c.update(modles=c.pop("models")), ["field candidates.0.modles", "Did you mean 'models'?"]),
        (lambda c: c.update(profile="nowhere/at/all"), ["nowhere/at/all"]),
    ],
)
def test_a_candidate_that_cannot_run_is_refused_before_the_search(
    cli: Cli, tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: list[str]
) -> None:
    file = plan(tmp_path)
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    change(raw["candidates"][0])
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    code, out, err = cli("plan", file, "--out", "answer")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for part in ("plan.yaml", *said):
        assert part in err
    assert not (tmp_path / "answer").exists()


def test_near_names_are_those_of_the_same_level(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("plan", plan(tmp_path, memory={"budget_bytes": 5}))
    assert code == 2
    assert "field memory: unknown field" in err
    assert "Did you mean" not in err
    assert "Known: allow_extrapolation, candidates" in err


def test_example_plans_are_written_once_and_load(cli: Cli, tmp_path: Path) -> None:
    from heliosim.planfile import load_plan
    from heliosim.prices import load_prices

    code, out, _ = cli("example", "--plans", "--out", "mine")
    assert code == 0
    assert out.split() == ["mine/chat.yaml", "mine/code.yaml", "mine/prices.yaml", "mine/summarisation.yaml"]
    assert load_plan(tmp_path / "mine" / "chat.yaml").name == "chat"
    assert load_prices(tmp_path / "mine" / "prices.yaml").currency == "USD"
    assert cli("example", "--plans", "--out", "mine")[0] == 2
    assert cli("example", "--plans", "--profile", "tiny-opt-cpu", "--out", "other")[0] == 2


@pytest.mark.parametrize("command", ["plan", "max-rate"])
def test_an_answer_does_not_replace_the_users_files(cli: Cli, tmp_path: Path, command: str) -> None:
    from heliosim.planfile import load_plan
    from heliosim.profile_view import open_profile

    file = plan(tmp_path)
    loaded = load_plan(file)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "fleet.yaml").write_text("mine")
    scenario = tmp_path / "own" / "sustained.yaml"
    loaded.scenario(loaded.candidates[0], open_profile(loaded.candidates[0].profile), 1).save(scenario)
    arguments = (file,) if command == "plan" else (scenario, "--limit", "p99_ttft_ms=300")
    before = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    code, out, err = cli(command, *arguments, "--out", "own")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "own: the folder exists and holds no" in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()} == before
    code, _, err = cli(command, *arguments, "--out", "plan.yaml")
    assert (code, "plan.yaml: is no folder" in err) == (2, True)
    if command == "max-rate":
        (tmp_path / "own" / "max-rate.json").write_text("{}")
        assert "would replace this scenario" in cli(command, *arguments, "--out", "own")[2]
