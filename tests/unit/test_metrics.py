"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from heliosim.formats.results import Deployed, RunInfo, RunResults
from heliosim.metrics import (
    METRICS,
    SCALARS,
    Slo,
    Summary,
    SystemResult,
    compare_summaries,
    significant,
    summarise,
)
from heliosim.recorder import NullRecorder, Recorder, TableRecorder
from heliosim.types import Batch, ExitRule, Load, Outcome, Placement, Run, Served, StepRecord, Tokens

INFO = RunInfo(
    name="hand",
    mode="simulated",
    clock="simulated",
    seed=3,
    scenario_hash="s",
    profile_hash="p",
    versions={"x": "1"},
    deployed={"replica": Deployed(idle_w=3.0)},
)
M4, N2 = Placement("m", 4), Placement("n", 2)


def step(start: float, seconds: float, **changes: Any) -> StepRecord:
    base = StepRecord(
        start_s=start,
        seconds=seconds,
        kind="run",
        reason="",
        model="m",
        depth=4,
        layers_run=4,
        rows=1,
        decode_rows=1,
        prefill_tokens=0,
        tokens_out=1,
        waiting=0,
        running=1,
        weights_bytes=100,
        kv_used_bytes=0,
        kv_total_bytes=900,
        breaches=0,
        is_probe=False,
        energy_j=2.0,
    )
    return base._replace(**changes)


def emit(recorder: TableRecorder, now: float, placement: Placement, tokens: Tokens, *, is_probe: bool = False) -> None:
    n = len(tokens)
    batch = Batch(tokens.requests, (0,) * n, (1,) * n, (True,) * n)
    recorder.tokens(now, Run(placement, ExitRule("greedy"), batch, is_probe=is_probe), Outcome(1.0, tokens))


def served(k: int, arrival: float, finish: float, output: int, **changes: Any) -> Served:
    base = Served(k, arrival, None, None, finish, 10, 16, output, "finished")
    return replace(base, **changes)


def results(recorder: TableRecorder, scenario: str = "", tasks: dict[int, str] | None = None) -> RunResults:
    return RunResults.of(recorder, INFO, scenario, tasks=tasks)


def hand_run() -> RunResults:
    """Load m@4 [0, 1], steps [1, 2] and [2, 3], load n@2 [3, 3.5], idle, step [4, 5]; one request is refused."""
    r = TableRecorder()
    load = {"kind": "load", "rows": 0, "layers_run": 0, "tokens_out": 0}
    r.tokens(1.0, Load(M4, 9, "choose"), Outcome(1.0))
    r.step(step(0.0, 1.0, reason="choose", **load))
    emit(r, 2.0, M4, Tokens((0,), (2,), (0.9,), (-0.1,), (False,), (5,), (True,)), is_probe=True)
    r.step(step(1.0, 1.0, kv_used_bytes=10, is_probe=True))
    r.served(served(2, 2.0, 2.0, 0, status="refused", refusal="too long"))
    emit(r, 3.0, M4, Tokens((0, 1), (4, 4), (0.5, 0.9), (-0.2, -0.3), (False, False), (6, 7), (False, True)))
    r.step(step(2.0, 1.0, rows=2, kv_used_bytes=30))
    small = {"model": "n", "depth": 2, "weights_bytes": 50}
    r.step(step(3.0, 0.5, reason="switch", kv_used_bytes=20, **load, **small))
    emit(r, 5.0, N2, Tokens((0, 1), (2, 2), (0.7, 0.8), (-0.4, -0.5), (True, True)))
    r.served(served(0, 0.0, 5.0, 3, admitted_s=1.0, first_token_s=2.0, placement=N2, predicted_tokens=4.0))
    changes: dict[str, Any] = {"prompt_tokens": 4, "is_probe": True, "preemptions": 1, "placement": N2}
    changes |= {"priority": 1, "predicted_tokens": 4.5, "recomputed_tokens": 7}
    r.served(served(1, 1.5, 5.0, 2, admitted_s=2.0, first_token_s=3.0, **changes))
    r.step(step(4.0, 1.0, rows=2, layers_run=2, **small))
    r.event(5.0, "breach", {"costs": {"load": math.inf}, "n": 3})
    return results(r)


@pytest.fixture(name="summary")
def _summary() -> Summary:
    return summarise(hand_run(), slo=Slo(ttft_ms=1600, tpot_ms=2000))


EXPECTED: dict[str, float | None] = {
    "offered": 3,
    "completed": 2,
    "refused": 1,
    "total_input_tokens": 14,
    "total_output_tokens": 5,
    "duration": 5.0,
    "request_throughput": 2 / 5,
    "output_throughput": 5 / 5,
    "total_token_throughput": 19 / 5,
    "request_goodput": 1 / 5,
    "slo_attainment": 1 / 3,
    "mean_ttft_ms": 1750,
    "median_ttft_ms": 1750,
    "p90_ttft_ms": 1950,
    "p99_ttft_ms": 1995,
    "mean_tpot_ms": 1750,
    "median_tpot_ms": 1750,
    "p90_tpot_ms": 1950,
    "p99_tpot_ms": 1995,
    "token_weighted_tpot_ms": 5000 / 3,
    "mean_itl_ms": 5000 / 3,
    "median_itl_ms": 2000,
    "p90_itl_ms": 2000,
    "p99_itl_ms": 2000,
    "mean_e2el_ms": 4250,
    "median_e2el_ms": 4250,
    "p90_e2el_ms": 4850,
    "p99_e2el_ms": 4985,
    "mean_queue_ms": 750,
    "median_queue_ms": 750,
    "p90_queue_ms": 950,
    "p99_queue_ms": 995,
    "steps": 3,
    "mean_batch_size": 5 / 3,
    "max_batch_size": 2,
    "mean_weights_bytes": (100 * 3 + 50 * 2) / 5,
    "peak_weights_bytes": 100,
    "mean_kv_bytes": (0 + 10 + 30 + 20 + 0) / 5,
    "peak_kv_bytes": 30,
    "layers_per_token": 16 / 5,
    "mean_exit_layer": 14 / 5,
    "low_confidence_share": 2 / 5,
    "perplexity": math.exp(0.3),
    "agreement": 2 / 3,
    "transitions": 1,
    "initial_load_s": 1.0,
    "load_s": 0.5,
    "exposed_load_s": 0.5,
    "probe_request_share": 1 / 2,
    "probe_token_share": 1 / 5,
    "preemptions": 1,
    "energy_j": 10.0,
    "utilisation": 4.5 / 5,
    "recomputed_tokens": 7,
    "prediction_tau": -1.0,
    "prediction_mae_tokens": (1 + 2.5) / 2,
    "prefill_energy_j": 0.0,
    "decode_energy_j": 4.0,
    "load_energy_j": 4.0,
    "probe_energy_j": 2.0,
    "idle_energy_j": 3 * 0.5,
    "joules_per_token": 10 / 5,
    "joules_per_prompt": 10 / 2,
    "wh_per_prompt": 10 / 2 / 3600,
    "joules_per_token_with_idle": 11.5 / 5,
    "wh_per_prompt_with_idle": 11.5 / 2 / 3600,
}


def test_every_scalar_has_a_hand_computed_value() -> None:
    assert set(EXPECTED) == set(SCALARS)


@pytest.mark.parametrize("metric", sorted(EXPECTED))
def test_scalar(summary: Summary, metric: str) -> None:
    assert summary.value(metric) == pytest.approx(EXPECTED[metric], rel=1e-12)


def test_exit_mix_and_transitions(summary: Summary) -> None:
    assert summary.exit_mix == {
        "m": {2: pytest.approx(0.2), 4: pytest.approx(0.4)},
        "n": {2: pytest.approx(0.4)},
    }
    assert summary.transition_sequence == ("m@4 (choose)", "n@2 (switch)")
    assert summary.to_dict()["exit_mix"]["m"] == {"2": pytest.approx(0.2), "4": pytest.approx(0.4)}


def test_recorder_tables() -> None:
    run = hand_run()
    assert run.tokens["position"].to_pylist() == [0, 1, 0, 2, 1]
    assert run.tokens["step"].to_pylist() == [1, 2, 2, 4, 4]
    assert run.tokens["token_id"].to_pylist() == [5, 6, 7, None, None]
    assert run.tokens["agrees"].to_pylist() == [True, False, True, None, None]
    assert run.requests["model"].to_pylist() == [None, "n", "n"]
    assert run.events["kind"].to_pylist() == ["transition", "transition", "breach"]
    assert run.events["detail"][1].as_py() == '{"from": "m@4", "reason": "switch", "seconds": 0.5, "to": "n@2"}'
    assert run.events["detail"][2].as_py() == '{"costs": {"load": "inf"}, "n": 3}'


def test_threshold_comes_from_the_scenario_or_the_call() -> None:
    run = replace(hand_run(), scenario_yaml="controller: {kind: helios, threshold: 0.6}")
    assert summarise(run).low_confidence_share == pytest.approx(1 / 5)
    assert summarise(run, threshold=0.95).low_confidence_share == 1.0


def test_warm_up_leaves_out_early_requests() -> None:
    late = summarise(hand_run(), after_s=1.0)
    assert (late.offered, late.completed, late.total_output_tokens) == (2, 1, 2)
    assert late.duration == 3.5
    assert late.mean_ttft_ms == 1500
    assert late.mean_itl_ms == 2000
    assert late.steps == 3
    assert late.transition_sequence == ("n@2 (switch)",)
    assert (late.transitions, late.load_s) == (1, 0.5)


def test_without_slo_there_is_no_goodput() -> None:
    plain = summarise(hand_run())
    assert plain.request_goodput is None
    assert plain.slo_attainment is None


def test_one_token_has_no_tpot_and_meets_any_tpot_limit() -> None:
    r = TableRecorder()
    emit(r, 1.0, M4, Tokens((0,), (4,), (0.9,), (-0.1,), (True,)))
    r.step(step(0.0, 1.0))
    r.served(served(0, 0.0, 1.0, 1, admitted_s=0.0, first_token_s=1.0))
    found = summarise(results(r), slo=Slo(tpot_ms=0.001))
    assert found.mean_tpot_ms is None
    assert found.token_weighted_tpot_ms is None
    assert found.mean_itl_ms is None
    assert found.p99_itl_ms is None
    assert found.mean_ttft_ms == 1000
    assert found.slo_attainment == 1.0
    assert found.agreement is None


def test_refused_only() -> None:
    r = TableRecorder()
    r.served(served(0, 1.0, 1.0, 0, status="refused", refusal="too long"))
    found = summarise(results(r), slo=Slo(ttft_ms=1))
    assert (found.offered, found.completed, found.refused) == (1, 0, 1)
    assert found.slo_attainment == 0.0
    assert found.duration is None
    assert found.output_throughput is None
    assert found.request_goodput is None
    assert found.exit_mix == {}
    assert found.load_s is None


def test_nothing_at_all_gives_no_numbers() -> None:
    found = summarise(results(TableRecorder()), slo=Slo(ttft_ms=1))
    counts = {
        "offered",
        "completed",
        "refused",
        "total_input_tokens",
        "total_output_tokens",
        "steps",
        "transitions",
    }
    for name in SCALARS:
        expected = 0 if name in counts | {"preemptions", "recomputed_tokens"} else None
        assert getattr(found, name) == expected, name


def test_classes_are_told_apart(summary: Summary) -> None:
    """Class 0: a request of 5 s and a refused one; class 1: one of 3.5 s."""
    assert set(summary.by_class) == {0, 1}
    assert summary.by_class[0]["requests"] == 2
    assert summary.by_class[0]["mean_e2el_ms"] == 5000
    assert summary.by_class[0]["mean_ttft_ms"] == 2000
    assert summary.by_class[1]["mean_e2el_ms"] == summary.by_class[1]["p99_e2el_ms"] == 3500
    assert summary.to_dict()["by_class"]["1"]["requests"] == 1


def test_steps_without_a_finished_request() -> None:
    r = TableRecorder()
    emit(r, 1.0, M4, Tokens((0,), (4,), (0.9,), (-0.1,), (False,)))
    r.step(step(0.0, 1.0))
    found = summarise(results(r))
    assert found.completed == 0
    assert found.mean_ttft_ms is None
    assert found.utilisation is None
    assert found.mean_batch_size == 1


def test_energy_is_unavailable_if_one_step_has_none() -> None:
    r = TableRecorder()
    r.step(step(0.0, 1.0))
    r.step(step(1.0, 1.0, energy_j=None))
    assert summarise(results(r)).energy_j is None


def test_comparison(summary: Summary) -> None:
    measured = [replace(summary, mean_ttft_ms=v) for v in (1600.0, 1900.0)]
    (row,) = compare_summaries(summary, measured, ["mean_ttft_ms"])
    assert (row.simulated, row.measured_mean, row.measured_min, row.measured_max) == (1750, 1750, 1600, 1900)
    assert (row.relative_error, row.is_inside_spread, row.repeats) == (0.0, True, 2)
    (row,) = compare_summaries(replace(summary, mean_ttft_ms=1400.0), measured, ["mean_ttft_ms"])
    assert row.relative_error == pytest.approx(-0.2)
    assert row.is_inside_spread is False


def test_comparison_without_data(summary: Summary) -> None:
    (row,) = compare_summaries(summary, [], ["mean_ttft_ms"])
    assert (row.measured_mean, row.relative_error, row.is_inside_spread) == (None, None, None)
    (row,) = compare_summaries(None, [summary], ["mean_ttft_ms"])
    assert (row.simulated, row.measured_mean, row.relative_error) == (None, 1750, None)
    zero = [replace(summary, load_s=0.0)]
    assert compare_summaries(summary, zero, ["load_s"])[0].relative_error is None
    assert compare_summaries(zero[0], zero, ["load_s"])[0].relative_error == 0.0


def test_unknown_metric_is_refused(summary: Summary) -> None:
    with pytest.raises(KeyError):
        summary.value("speed")
    with pytest.raises(KeyError):
        summary.value("exit_mix")


def test_slo_refuses_what_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="ttft_ms must be positive"):
        Slo(ttft_ms=0)


def test_system_needs_a_run() -> None:
    with pytest.raises(ValueError, match="neither"):
        SystemResult("x", None)


def test_every_shown_metric_exists() -> None:
    assert set(METRICS) <= set(SCALARS)


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (0.01234, "0.0123"), (0.0, "0"), (-2.5, "-2.50")],
)
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text


def test_null_recorder_takes_everything() -> None:
    recorder: Recorder = NullRecorder()
    recorder.step(step(0, 1))
    recorder.served(served(0, 0.0, 1.0, 1))
    recorder.event(0.0, "x", {})
    recorder.tokens(0.0, Load(M4, 1, ""), Outcome(1.0))
