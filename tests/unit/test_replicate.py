"""Replications: their seeds, when they stop, what is refused, warm-up, and that workers change nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heliosim.errors import InputError
from heliosim.formats.profile import Profile
from heliosim.formats.replications import load_replications, save_replications
from heliosim.formats.trace import TraceRow, save_trace
from heliosim.metrics import SCALARS, summarise
from heliosim.paired import pair
from heliosim.replicate import (
    Replicated,
    Replication,
    WarmUp,
    find_warm_up,
    horizon_of,
    measure,
    replicate,
    replication_seed,
    warm_up_of,
    watched_of,
)
from heliosim.replicated import is_refused
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.stats import StoppingRule
from tests.profiles import scenario, workload, write_synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")


def early_exit(profile: Profile, **changes: Any) -> Scenario:
    values = {"name": "exits", "controller": {"kind": "early-exit", "model": "small"}, "workload": workload(60)}
    return scenario(profile, **(values | changes))


# --- seeds and streams --------------------------------------------------------------------------------------


def test_replication_seeds() -> None:
    seeds = [replication_seed(7, k) for k in range(200)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 200
    assert all(0 <= s < 2**63 for s in seeds)
    assert seeds[1] != replication_seed(8, 1)


def test_the_first_replication_is_the_run_itself(profile: Profile) -> None:
    chosen = early_exit(profile)
    found = replicate(chosen, StoppingRule.exactly(2), warm_up=WarmUp(0, "given"))
    summary = summarise(run_simulated(chosen, profile))
    assert found.replications[0].values == {name: summary.value(name) for name in SCALARS}
    assert found.replications[1].values != found.replications[0].values


def test_policies_meet_the_same_requests(profile: Profile) -> None:
    """Arrivals, prompts, limits and output lengths depend on the replication alone."""
    controllers = ({"kind": "vanilla", "model": "large"}, {"kind": "early-exit", "model": "small"}, {"kind": "helios"})
    seen = []
    for controller in controllers:
        run = run_simulated(early_exit(profile, controller=controller, seed=replication_seed(3, 5)), profile)
        table = run.requests.sort_by("request_id")
        names = ("request_id", "task", "arrival_s", "prompt_tokens", "max_tokens", "output_tokens")
        seen.append([table[name].to_pylist() for name in names])
    assert seen[0] == seen[1] == seen[2]


def exits_of(profile: Profile, threshold: float, max_batch: int = 8) -> dict[tuple[int, int], tuple[int, float]]:
    """(exit layer, confidence) by request and position."""
    controller = {"kind": "early-exit", "model": "large", "threshold": threshold}
    batcher = {"max_batch": max_batch, "token_budget": 64}
    tokens = run_simulated(early_exit(profile, controller=controller, batcher=batcher), profile).tokens
    keys = zip(tokens["request_id"].to_pylist(), tokens["position"].to_pylist(), strict=True)
    values = zip(tokens["exit_layer"].to_pylist(), tokens["confidence"].to_pylist(), strict=True)
    return dict(zip(keys, values, strict=True))


def test_policies_meet_the_same_exits_token_by_token(profile: Profile) -> None:
    """Another batch size moves no exit; a higher threshold moves tokens deeper, and only those below it."""
    low, high = exits_of(profile, 0.8), exits_of(profile, 0.9)
    assert exits_of(profile, 0.8, max_batch=2) == low
    assert low.keys() == high.keys()
    moved = [key for key in low if low[key] != high[key]]
    assert 0 < len(moved) < len(low)
    for key in moved:
        assert low[key][1] < 0.9
        assert high[key][0] > low[key][0]
    for key in low.keys() - set(moved):
        assert low[key][1] >= 0.9 or low[key][0] == 12


# --- when it stops ------------------------------------------------------------------------------------------


def test_the_number_of_workers_changes_nothing(profile: Profile) -> None:
    chosen = early_exit(profile)
    rule = StoppingRule(least=3, most=12, relative_half_width=0.06)
    alone = replicate(chosen, rule)
    assert 3 < alone.count <= 12
    for width in (2, 5):
        with ThreadPoolExecutor(width) as executor:
            assert replicate(chosen, rule, executor=executor) == alone


def test_it_stops_where_every_watched_interval_is_narrow(profile: Profile) -> None:
    rule = StoppingRule(least=3, most=40, relative_half_width=0.05)
    found = replicate(early_exit(profile), rule, metrics=["mean_tpot_ms"])
    assert found.count < 40
    width = found.interval("mean_tpot_ms").relative_half_width
    assert width is not None
    assert width <= 0.05
    fewer = replace(found, replications=found.replications[:-1])
    assert fewer.count < 3 or not fewer.is_done


def test_a_run_already_made_is_not_made_again(profile: Profile) -> None:
    chosen = early_exit(profile)
    rule = StoppingRule.exactly(3)
    said: list[str] = []
    found = replicate(
        chosen, rule, first=run_simulated(chosen, profile), on_progress=lambda what, share: said.append(what)
    )
    assert found == replicate(chosen, rule)
    assert len(said) == 2


def test_what_is_watched(profile: Profile) -> None:
    assert watched_of(early_exit(profile)) == ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
    assert "slo_attainment" in watched_of(early_exit(profile, slo={"ttft_ms": 5.0}))
    assert watched_of(early_exit(profile, statistics={"metrics": ["perplexity"]})) == ("perplexity",)


# --- saturation ---------------------------------------------------------------------------------------------


def test_overload_is_saturated_at_once_and_its_percentiles_are_refused(profile: Profile) -> None:
    chosen = early_exit(profile, workload=workload(300, rate_per_s=3000.0), slo={"ttft_ms": 50.0})
    found = replicate(chosen, StoppingRule(least=5, most=40))
    assert found.is_saturated
    assert found.count == 3, "more than half of the five that would be the least"
    for metric in ("mean_ttft_ms", "p99_ttft_ms", "median_e2el_ms", "mean_queue_ms", "p99_tpot_ms", "slo_attainment"):
        interval = found.interval(metric)
        assert (interval.mean, interval.half_width, interval.reason) == (None, None, "saturated"), metric
    for metric in ("output_throughput", "mean_tpot_ms", "mean_batch_size", "agreement"):
        assert found.interval(metric).half_width is not None, metric
    assert not replicate(early_exit(profile), StoppingRule.exactly(3)).is_saturated


def test_exactly_so_many_are_run_of_a_saturated_system_too(profile: Profile) -> None:
    chosen = early_exit(profile, workload=workload(300, rate_per_s=3000.0))
    found = replicate(chosen, StoppingRule.exactly(5))
    assert found.is_saturated
    assert found.count == 5


def test_a_day_that_ends_is_never_saturated(profile: Profile) -> None:
    chosen = early_exit(profile, workload=workload(300, rate_per_s=3000.0), statistics={"horizon": "terminating"})
    found = replicate(chosen, StoppingRule.exactly(3))
    assert found.grows
    assert not found.is_saturated
    assert found.interval("p99_ttft_ms").half_width is not None
    assert found.warm_up == WarmUp(0, "none")


def test_what_is_refused_is_a_metric() -> None:
    refused = {m for m in SCALARS if is_refused(m)}
    assert {"p99_itl_ms", "median_queue_ms", "request_goodput"} <= refused
    assert not refused & {"mean_itl_ms", "token_weighted_tpot_ms", "output_throughput", "duration", "perplexity"}


# --- what a replication varies ------------------------------------------------------------------------------


def test_nothing_random_means_no_interval(profile: Profile, tmp_path: Path) -> None:
    """Every request of a trace with its own times, on a model without exits: only the recorded texts differ."""
    save_trace([TraceRow(0.01 * k, 20, 10, task="chat") for k in range(30)], tmp_path / "day.jsonl")
    day = {"trace": str(tmp_path / "day.jsonl")}
    plain = early_exit(profile, workload=day, controller={"kind": "vanilla", "model": "small"})
    found = replicate(plain, StoppingRule.exactly(3))
    assert found.horizon == "terminating"
    for metric in ("mean_ttft_ms", "p99_e2el_ms", "output_throughput"):
        interval = found.interval(metric)
        assert interval.mean is not None
        assert (interval.half_width, interval.reason) == (None, "the same every time"), metric
    with_exits = replicate(early_exit(profile, workload=day), StoppingRule.exactly(3))
    assert with_exits.interval("mean_tpot_ms").half_width is not None


@pytest.mark.parametrize(
    ("change", "horizon"),
    [
        ({}, "steady"),
        ({"arrivals": {"kind": "closed", "users": 3}}, "terminating"),
        ({"order": "blocks"}, "terminating"),
        ({"requests": 41}, "steady"),
        ({"arrivals": {"kind": "gamma", "rate_per_s": 5, "cv": 2}}, "steady"),
    ],
)
def test_horizons_by_workload(profile: Profile, change: dict[str, Any], horizon: str) -> None:
    assert horizon_of(early_exit(profile, workload=workload() | change)) == horizon
    said = early_exit(profile, workload=workload() | change, statistics={"horizon": "steady"})
    assert horizon_of(said) == "steady"


def test_fleets_are_replicated_and_failures_make_a_day(profile: Profile) -> None:
    groups = [{"name": "a", "count": 2}]
    found = replicate(early_exit(profile, fleet={"replicas": groups}), StoppingRule.exactly(2))
    assert found.horizon == "steady"
    assert found.interval("mean_ttft_ms").half_width is not None
    failing = {"replicas": groups, "failures": [{"replica": "a-1", "at_s": 0.1}]}
    assert horizon_of(early_exit(profile, fleet=failing)) == "terminating"
    with pytest.raises(InputError, match="unavailable for fleets"):
        replicate(early_exit(profile, fleet=failing), profile_uncertainty=True)


# --- warm-up ------------------------------------------------------------------------------------------------


def test_the_warm_up_is_that_of_a_pilot_and_the_same_for_all(profile: Profile) -> None:
    chosen = early_exit(profile, workload=workload(120))
    found = replicate(chosen, StoppingRule.exactly(3))
    assert found.warm_up == find_warm_up(chosen)
    assert found.warm_up.source == "mser-5"
    assert {r.requests for r in found.replications} == {120 - found.warm_up.requests}


def test_a_start_up_is_found_in_pilot_delays() -> None:
    rng = np.random.default_rng(1)
    delays = rng.normal(1.0, 0.1, (2, 400))
    delays[:, :60] += 5.0
    delays[0, [3, 200]] = np.nan  # refused
    found = warm_up_of(list(delays))
    assert found.is_settled
    assert 55 <= found.requests <= 75
    assert warm_up_of([np.arange(400.0)]) == WarmUp(200, "mser-5", is_settled=False)
    assert warm_up_of([np.full(10, np.nan)]) == WarmUp(5, "mser-5", is_settled=False)


def test_requests_of_the_warm_up_are_left_out(profile: Profile) -> None:
    chosen = early_exit(profile, statistics={"warm_up_requests": 20})
    assert find_warm_up(chosen) == WarmUp(20, "given")
    run = run_simulated(chosen, profile)
    found = measure(run, chosen, 0, WarmUp(20, "given"))
    arrivals = sorted(run.requests["arrival_s"].to_pylist())
    assert (found.requests, found.after_s) == (40, arrivals[20])
    assert found.values["mean_ttft_ms"] == summarise(run, arrivals[20]).mean_ttft_ms
    with pytest.raises(InputError, match="only 60 requests"):
        measure(run, chosen, 0, WarmUp(60, "given"))


def test_what_goes_wrong_in_a_replication_says_in_which(profile: Profile) -> None:
    """Prompts that only other seeds draw lie outside what was calibrated."""
    lengths = {"kind": "empirical", "values": [16, 200], "weights": [0.99, 0.01]}
    narrow = write_synthetic_profile(profile.folder.parent / "narrow", max_context=64)
    chosen = early_exit(narrow, workload=workload(12, prompt=lengths, output=4, max_tokens=4), seed=2)
    run_simulated(chosen, narrow)
    with pytest.raises(InputError, match=r"^replication [1-9]\d*: profile costs of small"):
        replicate(chosen, StoppingRule.exactly(40), warm_up=WarmUp(0, "given"))


# --- scenario files -----------------------------------------------------------------------------------------


def test_statistics_are_no_part_of_a_run(profile: Profile) -> None:
    """A scenario that says more about its replications is still the same run, and its file says nothing it did not."""
    plain = early_exit(profile)
    said = early_exit(profile, statistics={"replications": {"most": 7}})
    assert said.hash == plain.hash
    assert "statistics" not in plain.to_yaml()
    assert "most: 7" in said.to_yaml()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"horizon": "stedy"}, "steady"),
        ({"metrics": ["p99_ttft"]}, "did you mean 'p99_ttft_ms'"),
        ({"replications": {"least": 9, "most": 3}}, "most"),
        ({"replications": {"leest": 9}}, "leest"),
        ({"horizon": "terminating", "warm_up_requests": 5}, "no warm-up"),
    ],
)
def test_sections_that_make_no_sense_are_refused(profile: Profile, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        early_exit(profile, statistics=section)


# --- pairs --------------------------------------------------------------------------------------------------


def test_pairs_stop_when_differences_are_narrow(profile: Profile) -> None:
    low = early_exit(profile)
    high = early_exit(profile, name="deeper", controller={"kind": "early-exit", "model": "small", "threshold": 0.95})
    rule = StoppingRule(least=3, most=30, relative_half_width=0.06)
    found = pair(low, high, rule, executor=_Alone())
    assert 3 <= found.count < 30
    for metric in found.watched:
        half, size = found.difference(metric).interval.half_width, found.sizes[metric]
        if half is not None:
            assert size is not None
            assert half <= 0.06 * size
    ratio = found.difference("mean_tpot_ms").variance_ratio
    assert ratio is not None
    assert ratio > 1
    assert found.first.replications == replicate(low, StoppingRule.exactly(found.count)).replications
    with ThreadPoolExecutor(3) as executor:
        assert pair(low, high, rule, executor=executor) == found


def test_both_sides_of_a_pair_leave_out_the_same_requests(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = {"exits": WarmUp(10, "mser-5"), "deeper": WarmUp(25, "mser-5"), "slower": WarmUp(30, "mser-5")}
    monkeypatch.setattr("heliosim.paired.find_warm_up", lambda scenario, horizon: cuts[scenario.name])
    low = early_exit(profile)
    high = early_exit(profile, name="deeper", controller={"kind": "early-exit", "model": "small", "threshold": 0.95})
    for first, second in ((low, high), (high, low)):
        found = pair(first, second, StoppingRule.exactly(2), executor=_Alone())
        for a, b in zip(found.first.replications, found.second.replications, strict=True):
            assert (a.after_s, a.requests) == (b.after_s, 60 - 25)
            assert a.requests == b.requests
    slower = early_exit(profile, name="slower", workload=workload(60, rate_per_s=2.0))
    found = pair(low, slower, StoppingRule.exactly(2), executor=_Alone())
    assert (found.first.warm_up.requests, found.second.warm_up.requests) == (10, 30), "of other workloads its own each"


class _Alone(ThreadPoolExecutor):
    width = 1

    def __init__(self) -> None:
        super().__init__(1)


def test_pairs_of_different_kinds_are_refused(profile: Profile) -> None:
    first = early_exit(profile)
    with pytest.raises(InputError, match="horizon"):
        pair(first, early_exit(profile, statistics={"horizon": "terminating"}), StoppingRule(), executor=_Alone())
    with pytest.raises(InputError, match="seed"):
        pair(first, early_exit(profile, seed=4), StoppingRule(), executor=_Alone())


def test_differences_need_the_same_seeds() -> None:
    def one(seed: int) -> Replicated:
        run = Replication(0, seed, 10, 0.0, None, False, {"mean_ttft_ms": 1.0})
        return Replicated("x", "steady", WarmUp(0, "given"), StoppingRule(), (), (run,))

    with pytest.raises(ValueError, match="different seeds"):
        one(1).differences(one(2), "mean_ttft_ms")
    with pytest.raises(KeyError):
        one(1).interval("mean_tftf_ms")


# --- files --------------------------------------------------------------------------------------------------


def test_replications_are_read_as_they_were_written(profile: Profile, tmp_path: Path) -> None:
    found = replicate(early_exit(profile, seed=2**70), StoppingRule.exactly(3))
    save_replications(tmp_path, found)
    assert load_replications(tmp_path) == found
    table = tmp_path / "replications.parquet"
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save_replications(tmp_path, found)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(InputError, match="changed or damaged"):
        load_replications(tmp_path)
    table.unlink()
    with pytest.raises(InputError, match="missing"):
        load_replications(tmp_path)
    (tmp_path / "replications.json").unlink()
    assert load_replications(tmp_path) is None
