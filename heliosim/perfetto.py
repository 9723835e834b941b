"""A run as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open. Pure.

The JSON object format of the trace event format: ``X`` complete slices, ``C`` counters, ``b``/``e`` async slices, ``i``
instants, ``M`` names. ``ts`` and ``dur`` are microseconds on the run's clock. Every replica is a process; its threads
are engine steps, loads with nothing beside them, loads in the background, and decisions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from heliosim.course import events_of, loads_of, phases_of, steps_of
from heliosim.formats.results import RunResults

STEPS, LOADS, BACKGROUND, DECISIONS = 1, 2, 3, 4
THREADS = {
    STEPS: "engine steps",
    LOADS: "loads (nothing else runs)",
    BACKGROUND: "loads in the background",
    DECISIONS: "decisions",
}
REQUESTS_PID = 1
"""The process that holds the requests; replicas follow."""
Event = dict[str, Any]


def trace_of(run: RunResults, most_requests: int | None = None) -> dict[str, Any]:
    """The whole run as a JSON object. ``most_requests``: the first that arrived; None: all."""
    info = run.info
    steps, requests = steps_of(run), phases_of(run, most=most_requests)
    replicas = sorted({*steps["replica"].dropna(), *(e["replica"] for e in events_of(run) if e["replica"])})
    pids = {str(name): REQUESTS_PID + 1 + k for k, name in enumerate(replicas)}
    events = [*_names(pids), *_steps(steps, pids), *_loads(run, pids), *_counters(steps, pids)]
    events += [*_decisions(run, pids), *_requests(requests)]
    said = {"run": info.name, "mode": info.mode, "clock": info.clock, "seed": info.seed, "profile": info.profile_kind}
    said |= {"scenario_hash": info.scenario_hash, "exits": info.replayed_exits or info.behaviour, **info.versions}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {k: str(v) for k, v in said.items()}}


def trace_text(run: RunResults, most_requests: int | None = None) -> str:
    """The trace as JSON text; the same run gives the same text."""
    return json.dumps(trace_of(run, most_requests), separators=(",", ":"), allow_nan=False)


def write_trace(run: RunResults, out: Path, most_requests: int | None = None) -> int:
    """Write a trace file, all of it or nothing; answers how many events it holds."""
    from heliosim.formats.files import write_text

    trace = trace_of(run, most_requests)
    write_text(out, json.dumps(trace, separators=(",", ":"), allow_nan=False))
    return len(trace["traceEvents"])


def _us(seconds: float) -> float:
    return round(1e6 * float(seconds), 3)


def _names(pids: Mapping[str, int]) -> Iterator[Event]:
    yield _named("process_name", REQUESTS_PID, 0, "requests")
    for order, (name, pid) in enumerate(pids.items()):
        yield _named("process_name", pid, 0, name)
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": order}}
        for thread, said in THREADS.items():
            yield _named("thread_name", pid, thread, said)


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


_STEP_FACTS = (
    "step",
    "rows",
    "decode_rows",
    "prefill_tokens",
    "tokens_out",
    "layers_run",
    "waiting",
    "running",
    "breaches",
)


def _steps(steps: pd.DataFrame, pids: Mapping[str, int]) -> Iterator[Event]:
    for step in steps[steps["kind"] == "run"].to_dict("records"):
        name = f"evaluate {step['placement']}" if step["is_probe"] else str(step["placement"])
        yield {
            "ph": "X",
            "name": name,
            "cat": "evaluation" if step["is_probe"] else "step",
            "ts": _us(step["start_s"]),
            "dur": _us(step["seconds"]),
            "pid": pids[step["replica"]],
            "tid": STEPS,
            "args": {fact: int(step[fact]) for fact in _STEP_FACTS},
        }


def _loads(run: RunResults, pids: Mapping[str, int]) -> Iterator[Event]:
    for load in loads_of(run).to_dict("records"):
        yield {
            "ph": "X",
            "name": f"load {load['placement']}",
            "cat": "load",
            "ts": _us(load["start_s"]),
            "dur": _us(load["end_s"] - load["start_s"]),
            "pid": pids[load["replica"]],
            "tid": BACKGROUND if load["is_background"] else LOADS,
            "args": {"reason": load["reason"], "exposed_s": load["exposed_s"], "hidden_s": load["hidden_s"]},
        }


def _counters(steps: pd.DataFrame, pids: Mapping[str, int]) -> Iterator[Event]:
    """Values from the start of each step to the next; a value that stays is not said again."""
    tracks = {
        "memory (bytes)": {"weights": "weights_bytes", "KV in use": "kv_used_bytes"},
        "requests": {"rows": "rows", "waiting": "waiting"},
        "placement depth (layers)": {"layers": "depth"},
        "breaches": {"breaches": "breaches"},
    }
    last: dict[tuple[int, str], tuple[int, ...]] = {}
    for step in steps.to_dict("records"):
        pid = pids[step["replica"]]
        for name, series in tracks.items():
            values = tuple(int(step[column]) for column in series.values())
            if last.get((pid, name)) == values:
                continue
            last[pid, name] = values
            args = dict(zip(series, values, strict=True))
            yield {"ph": "C", "name": name, "ts": _us(step["start_s"]), "pid": pid, "tid": 0, "args": args}


def _decisions(run: RunResults, pids: Mapping[str, int]) -> Iterator[Event]:
    for event in events_of(run):
        if event["replica"] not in pids:
            continue
        args = {k: v for k, v in event.items() if k not in ("time_s", "replica", "kind")}
        yield {
            "ph": "i",
            "s": "p",
            "name": event["kind"],
            "cat": "decision",
            "ts": _us(event["time_s"]),
            "pid": pids[event["replica"]],
            "tid": DECISIONS,
            "args": args,
        }


def _requests(phases: pd.DataFrame) -> Iterator[Event]:
    """An async slice per request, its phases nested in it."""
    for request, part in phases.groupby("request_id", sort=False):
        own = {"cat": "request", "id": f"{request}", "pid": REQUESTS_PID, "tid": 0}
        low, high = float(part["start_s"].min()), float(part["end_s"].max())
        facts = {"task": str(part["task"].iloc[0]), "replica": str(part["replica"].iloc[0])}
        yield {**own, "ph": "b", "name": f"request {request}", "ts": _us(low), "args": facts}
        for phase in part.to_dict("records"):
            yield {**own, "ph": "b", "name": phase["phase"], "ts": _us(phase["start_s"])}
            yield {**own, "ph": "e", "name": phase["phase"], "ts": _us(phase["end_s"])}
        yield {**own, "ph": "e", "name": f"request {request}", "ts": _us(high)}
