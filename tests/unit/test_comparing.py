"""Studies of several systems: what is run, how it is paired, and what may be said of it."""

from __future__ import annotations

import json

import pytest

from heliosim.comparing import (
    MOST_CELLS,
    Cell,
    Plan,
    cell_interval,
    cell_scenario,
    is_overloaded,
    run_study,
)
from heliosim.errors import InputError
from heliosim.executors import open_executor
from heliosim.metrics import summarise
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.streams import replication_seed
from heliosim.study_tables import plain_study, study_of, study_table
from tests.studies import NOTHING, cell
from tests.unit.test_what_if import scenario


def systems(requests: int = 20) -> dict[str, Scenario]:
    early = scenario(requests=requests)
    vanilla = early.model_copy(update={"name": "vanilla", "controller": {"kind": "vanilla", "model": "tiny-opt-l"}})
    return {"vanilla": vanilla, "early exit": early}


PLAN = Plan(systems(), (30.0,), 60.0, replications=2, fleet_of="vanilla", fleet_rates_per_s=(60.0,), replicas=(1, 2))


@pytest.fixture(name="study", scope="module")
def _study():  # type: ignore[no-untyped-def]
    return run_study(PLAN)


def test_every_cell_once(study) -> None:  # type: ignore[no-untyped-def]
    found = [(c.system, c.rate_per_s, c.replicas, c.replication) for c in study.cells]
    assert found == PLAN.cells
    assert len(set(found)) == len(found) == 2 * 2 * 2 + 2  # the fleet of one at 60 is in the sweep already
    assert study.rates_per_s == (30.0, 60.0)


def test_systems_meet_the_same_requests(study) -> None:  # type: ignore[no-untyped-def]
    seeds = [[c.seed for c in study.cells_of(name, 60.0)] for name in study.systems]
    assert seeds[0] == seeds[1] == [replication_seed(3, 0), replication_seed(3, 1)]


def test_a_cell_is_the_run_it_names(study) -> None:  # type: ignore[no-untyped-def]
    one = study.cells_of("early exit", 30.0)[1]
    there = cell_scenario(systems()["early exit"], 30.0, 1).model_copy(update={"seed": one.seed})
    results = run_simulated(there)
    arrivals = sorted(results.requests["arrival_s"].to_pylist())
    summary = summarise(results, arrivals[2], there.slo)
    assert one.values["p99_ttft_ms"] == summary.p99_ttft_ms
    assert one.values["tokens_per_s_per_user"] == pytest.approx(1e3 / summary.mean_tpot_ms)
    assert one.values["tokens_per_s_per_gpu"] == summary.output_throughput
    assert one.values["cost_per_million_tokens"] is None  # no GPU, no price


def test_distributions_are_kept_at_the_focus_alone(study) -> None:  # type: ignore[no-untyped-def]
    assert study.cells_of("vanilla", 60.0)[0].latencies["ttft"]
    assert not study.cells_of("vanilla", 30.0)[0].latencies


def test_fleets_share_the_load(study) -> None:  # type: ignore[no-untyped-def]
    there = cell_scenario(PLAN.systems["vanilla"], 60.0, 2)
    assert there.fleet is not None
    assert there.fleet.names == ("replica-0", "replica-1")
    assert study.cells_of("vanilla", 60.0, 2)[0].values["tokens_per_s_per_gpu"] == pytest.approx(
        study.cells_of("vanilla", 60.0, 2)[0].values["output_throughput"] / 2
    )


def test_it_does_not_depend_on_who_ran_it(study) -> None:  # type: ignore[no-untyped-def]
    small = Plan(systems(10), (), 60.0, replications=2)
    with open_executor("local", 2) as executor:
        assert run_study(small, executor=executor) == run_study(small)


def test_it_survives_as_plain_data_and_as_a_table(study) -> None:  # type: ignore[no-untyped-def]
    assert study_of(json.loads(json.dumps(plain_study(study)))) == study
    table = study_table(study)
    assert len(table) == len(study.cells)
    assert {"system", "rate_per_s", "p99_ttft_ms", "cost_per_million_tokens"} <= set(table.columns)


def test_caption_says_what_it_rests_on(study) -> None:  # type: ignore[no-untyped-def]
    for word in ("20 requests per server and run", "first 10 % left out", "2 replications", "seed 3", "simulated"):
        assert word in study.caption


def test_an_overloaded_system_has_no_percentiles() -> None:
    calm, over = (
        cell("x", 1.0, {"p99_ttft_ms": [1, 2, 4], "agreement": [0.5, 0.6, 0.7]}, grew=g) for g in (False, True)
    )
    assert cell_interval(calm, "p99_ttft_ms").mean == pytest.approx(7 / 3)
    assert cell_interval(over, "p99_ttft_ms").reason == "saturated"
    assert cell_interval(over, "agreement").mean == pytest.approx(0.6)


def test_overload_is_growth_or_a_drift_that_is_known() -> None:
    def drifting(*drifts: float) -> list[Cell]:
        return [Cell("x", 1, 1, k, k, 9, False, drift, NOTHING) for k, drift in enumerate(drifts)]

    assert is_overloaded(drifting(0.5, 0.6, 0.55))
    assert not is_overloaded(drifting(0.5, -0.4, 0.1))  # by chance
    assert not is_overloaded(drifting(0.001, 0.0012, 0.0011))  # known, and nothing


def test_progress_may_stop_a_study() -> None:
    said = []

    def stop(text: str, share: float) -> None:
        said.append((text, share))
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(Plan(systems(10), (30.0,), 60.0, replications=2), on_progress=stop)
    assert said[0] == ("vanilla at 30 requests/s", 1 / 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"systems": {}}, "nothing to compare"),
        ({"replications": 1}, "replications"),
        ({"rates_per_s": (0.0,)}, "rates"),
        ({"replicas": (0,)}, "replicas"),
        ({"fleet_of": "vanila"}, "Did you mean 'vanilla'"),
        ({"rates_per_s": tuple(range(1, MOST_CELLS))}, "at most"),
    ],
)
def test_bad_plans_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Plan(**{"systems": systems(), "rates_per_s": (1.0,), "focus_per_s": 1.0, **change})  # type: ignore[arg-type]


def test_seeds_must_be_one() -> None:
    both = {"a": scenario(seed=1), "b": scenario(seed=2)}
    with pytest.raises(InputError, match="different seeds"):
        Plan(both, (1.0,), 1.0)
