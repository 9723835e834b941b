"""What happened in a run, as tables: loads, evaluations, changes of placement with reasons, phases of requests. Pure.

Times are seconds on the run's clock. Every table is made of a run folder's own, so it says the same of simulated and
live runs, of one server and of a fleet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from heliosim.formats.results import RunResults

LOADS = ("replica", "start_s", "end_s", "placement", "reason", "exposed_s", "hidden_s", "is_background")
PHASES = ("request_id", "task", "replica", "phase", "start_s", "end_s")
CHANGES = ("time_s", "replica", "what", "placement", "reason", "seconds", "detail")
PHASE_NAMES = ("waiting", "prefill", "decode", "preempted")


def steps_of(run: RunResults) -> pd.DataFrame:
    """The table of steps with ``end_s`` and ``placement`` (model@depth)."""
    steps: pd.DataFrame = run.steps.to_pandas()
    steps["end_s"] = steps["start_s"] + steps["seconds"]
    steps["placement"] = steps["model"].astype(str) + "@" + steps["depth"].astype(str)
    return steps


def loads_of(run: RunResults) -> pd.DataFrame:
    """Every load: columns ``LOADS``. ``exposed_s``: no step could run; ``hidden_s``: steps ran beside it.

    A load in the background spans from its beginning to the moment it was complete or given up.
    """
    steps = steps_of(run)
    rows: list[dict[str, Any]] = []
    of_background = {(d["replica"], round(d["time_s"], 9)) for d in _fetches(run)}
    for step in steps[steps["kind"] == "load"].to_dict("records"):
        if (step["replica"], round(step["end_s"], 9)) in of_background:
            continue  # the end of a transfer that ran beside steps; its event says all of it
        rows.append(
            {
                "replica": step["replica"],
                "start_s": step["start_s"],
                "end_s": step["end_s"],
                "placement": step["placement"],
                "reason": step["reason"],
                "exposed_s": step["seconds"],
                "hidden_s": 0.0,
                "is_background": False,
            }
        )
    for fetch in _fetches(run):
        exposed, hidden = float(fetch.get("exposed_s") or 0.0), float(fetch.get("hidden_s") or 0.0)
        given_up = fetch["kind"] == "fetch abandoned"
        rows.append(
            {
                "replica": fetch["replica"],
                "start_s": max(0.0, fetch["time_s"] - exposed - hidden),
                "end_s": fetch["time_s"],
                "placement": fetch.get("placement", ""),
                "reason": f"{fetch.get('reason', '')}{', given up' if given_up else ''}",
                "exposed_s": exposed,
                "hidden_s": hidden,
                "is_background": True,
            }
        )
    return pd.DataFrame(rows, columns=list(LOADS)).sort_values("start_s", kind="stable").reset_index(drop=True)


def _fetches(run: RunResults) -> list[dict[str, Any]]:
    return [e for e in events_of(run) if e["kind"] in ("fetched", "fetch abandoned")]


def events_of(run: RunResults) -> list[dict[str, Any]]:
    """Events as plain data: time_s, replica, kind, and what their detail says."""
    found = []
    for event in run.events.to_pylist():
        try:
            detail = json.loads(event["detail"])
        except ValueError:
            detail = {}
        own = {"time_s": event["time_s"], "replica": event["replica"], "kind": event["kind"]}
        found.append({**(detail if isinstance(detail, dict) else {}), **own})
    return found


def evaluations_of(run: RunResults) -> pd.DataFrame:
    """Stretches in which a candidate was evaluated: columns replica, start_s, end_s, placement, steps."""
    steps = steps_of(run)
    ran = steps[steps["kind"] == "run"]
    columns = ["replica", "start_s", "end_s", "placement", "steps"]
    parts = []
    for replica, part in ran.groupby("replica", sort=False):
        key = part["placement"] + part["is_probe"].map({True: "?", False: ""})
        probed = part.assign(stretch=(key != key.shift()).cumsum())
        probed = probed[probed["is_probe"].astype(bool)]
        if probed.empty:
            continue
        spans = probed.groupby("stretch").agg(
            start_s=("start_s", "min"), end_s=("end_s", "max"), placement=("placement", "first"), steps=("step", "size")
        )
        parts.append(spans.assign(replica=replica)[columns])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


_WHAT = {
    "transition": "load",
    "fetched": "load in the background complete",
    "fetch abandoned": "load in the background given up",
    "stalled": "a step waited for layers",
    "shortlist": "candidates",
    "reshortlisted": "candidates again",
    "evaluated": "evaluated",
    "choose": "chosen",
    "load": "decided to load more layers",
    "switch": "decided to change the model",
    "breach": "too many breaches",
    "changed": "the scenario changed",
    "failed": "failed",
    "rerouted": "requests rerouted",
    "restarted": "restarted",
}


def changes_of(run: RunResults) -> pd.DataFrame:
    """Everything that was decided or happened beside steps, in order of time: columns ``CHANGES``."""
    rows = []
    for event in events_of(run):
        kind = event["kind"]
        placement = event.get("to") if kind == "transition" else event.get("placement") or event.get("model")
        seconds = event.get("seconds")
        if kind == "fetched":
            seconds = event.get("exposed_s")
        used = {"time_s", "replica", "kind", "to", "placement", "model", "reason", "seconds"}
        rest = {k: v for k, v in event.items() if k not in used and v not in (None, "", {}, [])}
        rows.append(
            {
                "time_s": event["time_s"],
                "replica": event["replica"],
                "what": _WHAT.get(kind, kind),
                "placement": None if isinstance(placement, dict) else placement,
                "reason": str(event.get("reason") or event.get("reaction") or ""),
                "seconds": seconds,
                "detail": "; ".join(f"{k} {_short(v)}" for k, v in rest.items()),
            }
        )
    frame = pd.DataFrame(rows, columns=list(CHANGES))
    return frame.sort_values("time_s", kind="stable").reset_index(drop=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value)
    return str(value)


def phases_of(
    run: RunResults, start_s: float = 0.0, end_s: float = float("inf"), most: int | None = None
) -> pd.DataFrame:
    """Phases of requests that were there between two times: columns ``PHASES``, in order of arrival.

    ``most``: requests at most, the first that arrived. Of a request that gave up KV, ``preempted`` are the longest
    stretches between two of its tokens in which steps ran without it, as many as it was preempted; without a table of
    tokens they are not known and count as decode. Of a request routed again, what came before its last attempt counts
    as waiting.
    """
    columns = ["request_id", "task", "replica", "arrival_s", "admitted_s", "first_token_s", "finish_s", "preemptions"]
    requests = run.requests.select(columns).to_pandas().sort_values(["arrival_s", "request_id"])
    requests = requests[(requests["finish_s"] >= start_s) & (requests["arrival_s"] <= end_s)]
    if most is not None:
        requests = requests.head(most)
    pauses = _pauses(run, requests[requests["preemptions"] > 0])
    rows: list[dict[str, Any]] = []
    for request in requests.to_dict("records"):
        for phase, low, high in _phases(request, pauses.get(request["request_id"], [])):
            own = {"phase": phase, "start_s": low, "end_s": high}
            rows.append({name: request[name] for name in ("request_id", "task", "replica")} | own)
    return pd.DataFrame(rows, columns=list(PHASES))


def _phases(request: Mapping[str, Any], pauses: list[tuple[float, float]]) -> list[tuple[str, float, float]]:
    admitted, first, finish = request["admitted_s"], request["first_token_s"], request["finish_s"]
    if admitted is None or np.isnan(admitted):
        return [("waiting", request["arrival_s"], finish)]
    found = [("waiting", request["arrival_s"], admitted)]
    if first is None or np.isnan(first):
        return [*found, ("prefill", admitted, finish)]
    found.append(("prefill", admitted, first))
    at = first
    for low, high in pauses:
        found += [("decode", at, low), ("preempted", low, high)]
        at = high
    return [part for part in [*found, ("decode", at, finish)] if part[2] > part[1]]


def _pauses(run: RunResults, requests: pd.DataFrame) -> dict[int, list[tuple[float, float]]]:
    """Stretches without a token of requests that were preempted, by request."""
    if requests.empty or not run.tokens.num_rows:
        return {}
    tokens = run.tokens.select(["request_id", "time_s", "step"]).to_pandas()
    tokens = tokens[tokens["request_id"].isin(set(requests["request_id"]))].sort_values(["request_id", "time_s"])
    found: dict[int, list[tuple[float, float]]] = {}
    times = dict(zip(requests["request_id"], requests["preemptions"], strict=True))
    for request, part in tokens.groupby("request_id"):
        at, step = part["time_s"].to_numpy(), part["step"].to_numpy()
        places = np.flatnonzero(np.diff(step) > 1)
        longest = places[np.argsort(-(at[places + 1] - at[places]), kind="stable")][: times[request]]
        found[int(request)] = [(float(at[k]), float(at[k + 1])) for k in sorted(longest)]
    return found
