"""The Chrome trace of a run keeps the trace event format and the run's times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from heliosim.course import loads_of, steps_of
from heliosim.formats.results import save_run
from heliosim.perfetto import REQUESTS_PID, trace_of, trace_text
from tests.synthetic_runs import synthetic_run

RUN = synthetic_run("helios", "tiny-opt-s")
NEEDS = {
    "X": {"ts", "dur", "pid", "tid", "name"},
    "C": {"ts", "pid", "name", "args"},
    "b": {"ts", "pid", "tid", "id", "cat", "name"},
    "e": {"ts", "pid", "tid", "id", "cat", "name"},
    "i": {"ts", "pid", "tid", "s", "name"},
    "M": {"pid", "tid", "name", "args"},
}
"""What each kind of event must have, after the description of the trace event format."""


def test_every_event_keeps_the_format() -> None:
    trace = json.loads(trace_text(RUN))
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        assert NEEDS[event["ph"]] <= set(event), event
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event.get("dur", 0) >= 0
        assert event["ph"] != "C" or all(isinstance(v, int | float) for v in event["args"].values())
        assert event["ph"] != "i" or event["s"] in ("g", "p", "t")
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] in "Xi"} <= named


def test_async_slices_open_and_close_in_order() -> None:
    stacks: dict[str, list[str]] = {}
    at: dict[str, float] = {}
    for event in trace_of(RUN)["traceEvents"]:
        if event["ph"] not in "be":
            continue
        assert event["pid"] == REQUESTS_PID
        assert event["ts"] >= at.get(event["id"], 0.0)
        at[event["id"]] = event["ts"]
        stack = stacks.setdefault(event["id"], [])
        if event["ph"] == "b":
            stack.append(event["name"])
        else:
            assert stack.pop() == event["name"]
    assert len(stacks) == RUN.requests.num_rows
    assert not any(stacks.values())


def test_steps_and_loads_are_all_there_with_their_times() -> None:
    events = trace_of(RUN)["traceEvents"]
    steps = steps_of(RUN)
    ran = steps[steps["kind"] == "run"]
    slices = [e for e in events if e["ph"] == "X" and e["cat"] in ("step", "evaluation")]
    assert len(slices) == len(ran)
    assert sum(e["dur"] for e in slices) == pytest.approx(1e6 * ran["seconds"].sum())
    assert sum(e["cat"] == "evaluation" for e in slices) == int(ran["is_probe"].sum())
    assert sum(e["ph"] == "X" and e["cat"] == "load" for e in events) == len(loads_of(RUN))
    memory = [e["args"]["KV in use"] for e in events if e["ph"] == "C" and e["name"].startswith("memory")]
    assert max(memory) == steps["kv_used_bytes"].max()


def test_the_command_writes_it(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    save_run(tmp_path / "run", RUN)
    out = tmp_path / "trace.json"
    code, said, _ = cli("export-trace", tmp_path / "run", "--out", out, "--requests", 3)
    kinds = Counter(e["ph"] for e in json.loads(out.read_text())["traceEvents"])
    assert code == 0
    assert f"{kinds.total():,} events" in said
    ids = {e["id"] for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "b"}
    assert len(ids) == 3
    code, _, said = cli("export-trace", tmp_path / "run", "--out", out)
    assert code == 2
    assert "exists already" in said
