"""What happened in a run, as tables, and why the slowest requests were slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from heliosim.course import changes_of, evaluations_of, loads_of, phases_of
from heliosim.diagnosis import Diagnosis, diagnose
from heliosim.formats.results import RunResults
from heliosim.recorder import TableRecorder
from heliosim.types import Load, Outcome, Placement, Served, StepRecord, Tokens
from tests.synthetic_runs import synthetic_run

PLACE = Placement("m", 4)


def told(
    steps: list[dict[str, Any]],
    served: list[dict[str, Any]],
    tokens: Sequence[tuple[int, ...]] = (),
    cap: int | None = 4,
) -> RunResults:
    """A run of steps (start_s, seconds and what differs from a step of one row) and requests. ``tokens``: requests
    that each run emits for.
    """
    recorder = TableRecorder()
    usual = {"kind": "run", "reason": "", "model": "m", "depth": 4, "layers_run": 4, "rows": 1, "decode_rows": 1}
    usual |= {"prefill_tokens": 0, "tokens_out": 0, "waiting": 0, "running": 1, "weights_bytes": 100}
    usual |= {"kv_used_bytes": 10, "kv_total_bytes": 100, "breaches": 0, "is_probe": False, "energy_j": None}
    for k, step in enumerate(steps):
        own = tokens[k] if k < len(tokens) else ()
        if own:
            emitted = Tokens(tuple(own), (4,) * len(own), (0.9,) * len(own), (-0.1,) * len(own), (False,) * len(own))
            recorder.tokens(0.0, Load(PLACE, 0, "unused"), Outcome(step["seconds"], emitted))
        recorder.step(StepRecord(**{**usual, **step}))
    for request in served:
        defaults = {"prompt_tokens": 8, "max_tokens": 8, "output_tokens": 4, "status": "finished", "refusal": ""}
        defaults |= {"preemptions": 0, "logprob_sum": 0.0, "is_probe": False, "placement": PLACE}
        recorder.served(Served(**{**defaults, **request}))
    base = synthetic_run("vanilla", "tiny-opt-m", requests=4)
    yaml = "batcher: {kind: continuous}\n" if cap is None else f"batcher: {{kind: continuous, max_batch: {cap}}}\n"
    return RunResults.of(recorder, base.info, yaml)


def test_phases_of_a_request_that_gave_up_kv() -> None:
    steps = [{"start_s": float(k), "seconds": 1.0} for k in range(8)]
    emits = [(), (0,), (0,), (), (), (), (0,), (0,)]
    one = {"id": 0, "arrival_s": 0.0, "admitted_s": 1.0, "first_token_s": 2.0, "finish_s": 8.0, "preemptions": 1}
    run = told(steps, [one], emits)
    found = [(p["phase"], p["start_s"], p["end_s"]) for p in phases_of(run).to_dict("records")]
    assert found == [
        ("waiting", 0.0, 1.0),
        ("prefill", 1.0, 2.0),
        ("decode", 2.0, 3.0),
        ("preempted", 3.0, 7.0),
        ("decode", 7.0, 8.0),
    ]


def test_phases_add_up_to_the_time_in_the_system() -> None:
    run = synthetic_run("helios", "tiny-opt-s")
    phases = phases_of(run)
    total = phases.assign(s=phases["end_s"] - phases["start_s"]).groupby("request_id")["s"].sum()
    requests = run.requests.to_pandas().set_index("request_id")
    assert (total - (requests["finish_s"] - requests["arrival_s"])).abs().max() < 1e-9
    some = phases_of(run, 0.2, 0.4, most=5)
    assert some["request_id"].nunique() == 5
    assert (some.groupby("request_id")["end_s"].max() >= 0.2).all()


def test_a_load_in_the_background_spans_its_transfer() -> None:
    run = told([{"start_s": 0.0, "seconds": 2.0}, {"start_s": 2.0, "seconds": 0.5, "kind": "load", "depth": 8}], [])
    detail = '{"placement": "m@8", "reason": "load", "hidden_s": 1.5, "exposed_s": 0.5, "transfer_s": 1.9}'
    event = pa.table({"time_s": [2.5], "replica": ["replica-0"], "kind": ["fetched"], "detail": [detail]})
    run = replace(run, events=event.cast(run.events.schema))
    (load,) = loads_of(run).to_dict("records")
    assert (load["start_s"], load["end_s"], load["is_background"]) == (0.5, 2.5, True)
    assert (load["exposed_s"], load["hidden_s"]) == (0.5, 1.5)
    assert list(changes_of(run)["what"]) == ["load in the background complete"]


def test_evaluations_are_stretches_of_one_placement() -> None:
    probe = {"seconds": 1.0, "is_probe": True}
    steps = [{"start_s": 0.0, **probe}, {"start_s": 1.0, **probe}, {"start_s": 2.0, **probe, "depth": 2}]
    found = evaluations_of(told([*steps, {"start_s": 3.0, "seconds": 1.0}], []))
    assert found[["placement", "start_s", "end_s", "steps"]].values.tolist() == [
        ["m@4", 0.0, 2.0, 2],
        ["m@2", 2.0, 3.0, 1],
    ]


def slow_run(**step: Any) -> RunResults:
    """Ten requests, the last of which waits nine seconds of ten while the server does ``step``."""
    at = {"arrival_s": 0.0, "admitted_s": 0.0, "first_token_s": 1.0, "finish_s": 2.0}
    last = {"id": 9, "arrival_s": 20.0, "admitted_s": 29.0, "first_token_s": 30.0, "finish_s": 31.0}
    served = [*({"id": k, **at} for k in range(9)), last]
    return told([{"start_s": 0.0, "seconds": 2.0}, {"start_s": 20.0, "seconds": 10.0, **step}], served)


@pytest.mark.parametrize(
    ("step", "cause", "said"),
    [
        ({"rows": 4, "running": 4, "waiting": 3}, "batch", "at its cap of 4 rows"),
        ({"kv_used_bytes": 97, "rows": 4, "waiting": 3}, "kv", "KV pool was full"),
        ({"kind": "load", "reason": "switch", "rows": 0}, "loading", "nothing ran but a load of weights"),
        ({"is_probe": True}, "evaluating", "HELIOS evaluated a candidate"),
        ({"rows": 2}, "steps", "steps under way"),
    ],
)
def test_the_cause_is_named(step: dict[str, Any], cause: str, said: str) -> None:
    found = diagnose(slow_run(**step), warm_up=0.0)
    assert found is not None
    assert found.cause == cause
    assert said in found.sentence("at 85 % load")
    assert found.sentence("at 85 % load").startswith("p99 TTFT is ")
    assert (found.slow, found.from_s) == (1, 20.0)


def test_a_jump_is_told_from_none() -> None:
    loud = slow_run(rows=4, waiting=3)
    found = diagnose(loud, loud, warm_up=0.0)
    assert found is not None
    assert "no jump" in found.sentence("now", "before")
    quieter = replace(found, quiet_p99_ttft_s=found.p99_ttft_s / 4, quiet_placement="m@2")
    assert "4.0 times the" in quieter.sentence()
    assert "Most steps ran m@4 here, m@2 with less load" in quieter.sentence()


def test_reading_prompts_is_a_cause_of_its_own() -> None:
    found = diagnose(synthetic_run("vanilla", "tiny-opt-m"))
    assert isinstance(found, Diagnosis)
    assert 0 <= found.waiting <= 1
    assert found.batch_cap is None


def test_nothing_served_is_no_diagnosis() -> None:
    assert diagnose(told([{"start_s": 0.0, "seconds": 1.0}], [])) is None
