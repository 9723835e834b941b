"""Why the slowest requests of a run were slow: one sentence, from its tables. Pure.

The slowest one in a hundred are those from the 99th percentile of TTFT on. What the server did from each one's arrival
to its first token is laid beside: loads with nothing else running, evaluations, and, while it had no place, whether the
batch was at its cap or the KV pool full. What the server mostly served with is said where a quieter run served with
another placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from heliosim.course import steps_of
from heliosim.formats.results import RunResults

FULL_SHARE = 0.9
"""KV in use from which the pool counts as full: a request takes several blocks at once."""
SLOW_QUANTILE = 0.99
JUMP = 1.5
"""How many times a quieter run's p99 is called a jump."""
MATTERS = 0.2
"""Share of the time to the first token from which a cause is named first."""


@dataclass(frozen=True)
class Diagnosis:
    """``p99_ttft_s``; ``quiet_p99_ttft_s`` of the quieter run (None: none given). ``slow``: requests at or above the
    99th percentile; they arrived ``from_s`` to ``to_s``. Shares of their time to the first token, added up over them:
    ``waiting`` without a place, and of it with ``batch_full``, ``kv_full``; ``loading`` (nothing else ran),
    ``evaluating``. ``most_waiting``: longest queue meanwhile; ``kv_share``: most KV in use over all there is.
    ``placement``, ``quiet_placement``: what most of the time of steps was spent with.
    """

    p99_ttft_s: float
    quiet_p99_ttft_s: float | None
    slow: int
    from_s: float
    to_s: float
    waiting: float
    batch_full: float
    kv_full: float
    loading: float
    evaluating: float
    most_waiting: int
    kv_share: float
    batch_cap: int | None
    cause: str
    placement: str = ""
    quiet_placement: str = ""

    def sentence(self, at: str = "", quiet: str = "") -> str:
        """The diagnosis in words. ``at``, ``quiet``: what the run and the quieter one are called (``at 85 % load``)."""
        text = f"p99 TTFT is {_ms(self.p99_ttft_s)}{f' {at}' if at else ''}"
        if self.quiet_p99_ttft_s:
            times = self.p99_ttft_s / self.quiet_p99_ttft_s
            quietly = f"{_ms(self.quiet_p99_ttft_s)}{f' {quiet}' if quiet else ''}"
            text += f", {times:.1f} times the {quietly}" if times >= JUMP else f", and {quietly}: no jump"
        text += f". The slowest {self.slow} requests arrived from {self.from_s:.1f} to {self.to_s:.1f} s"
        text = f"{text}; {self._why()}{self._beside()}."
        if self.quiet_placement and self.placement != self.quiet_placement:
            text += f" Most steps ran {self.placement} here, {self.quiet_placement} with less load."
        return text

    def _why(self) -> str:
        span = "of their time to the first token"
        waited = f"they waited {100 * self.waiting:.0f} % {span}, {self._queue}"
        cap = f" of {self.batch_cap} rows" if self.batch_cap else ""
        return {
            "loading": f"during {100 * self.loading:.0f} % {span} nothing ran but a load of weights",
            "evaluating": f"during {100 * self.evaluating:.0f} % {span} HELIOS evaluated a candidate, {self._queue}",
            "batch": f"{waited}, because the batch was at its cap{cap}",
            "kv": f"{waited}, because the KV pool was full",
            "steps": f"{waited}, for steps under way and for prompts read before theirs",
            "prefill": f"reading their prompts beside the running batch took {100 * (1 - self.waiting):.0f} % {span}",
        }[self.cause]

    @property
    def _queue(self) -> str:
        return f"with up to {self.most_waiting} requests waiting" if self.most_waiting else "with nobody else waiting"

    def _beside(self) -> str:
        """What it was not."""
        said = [f"KV was at most {100 * self.kv_share:.0f} % full"] if self.cause != "kv" else []
        quiet = [n for n, share in (("load", self.loading), ("evaluation", self.evaluating)) if share == 0]
        said += [f"no {' and no '.join(quiet)} ran meanwhile"] if quiet else []
        return f" ({', '.join(said)})" if said else ""


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def diagnose(run: RunResults, quiet: RunResults | None = None, warm_up: float = 0.1) -> Diagnosis | None:
    """Why the slowest requests waited for their first token; None if none got one. ``quiet``: a run with less load.
    ``warm_up``: share of the requests that is left out, the first ones.
    """
    requests = counted(run, warm_up)
    if requests.empty:
        return None
    p99 = float(requests["ttft_s"].quantile(SLOW_QUANTILE))
    slow = requests[requests["ttft_s"] >= p99]
    steps = steps_of(run)
    cap = batch_cap(run.scenario)
    spent: dict[str, float] = dict.fromkeys(("total", "waiting", "batch", "kv", "loading", "evaluating"), 0.0)
    most, kv = 0, 0.0
    for request in slow.to_dict("records"):
        own = steps if request["replica"] is None else steps[steps["replica"] == request["replica"]]
        found = _spent(own, request["arrival_s"], request["admitted_s"], request["first_token_s"], cap)
        for name in spent:
            spent[name] += found[name]
        most, kv = max(most, int(found["most"])), max(kv, found["kv_share"])
    share = {name: value / spent["total"] if spent["total"] else 0.0 for name, value in spent.items()}
    quieter = None if quiet is None else counted(quiet, warm_up)
    return Diagnosis(
        p99_ttft_s=p99,
        quiet_p99_ttft_s=None if quieter is None or quieter.empty else float(quieter["ttft_s"].quantile(SLOW_QUANTILE)),
        slow=len(slow),
        from_s=float(slow["arrival_s"].min()),
        to_s=float(slow["arrival_s"].max()),
        waiting=share["waiting"],
        batch_full=share["batch"],
        kv_full=share["kv"],
        loading=share["loading"],
        evaluating=share["evaluating"],
        most_waiting=most,
        kv_share=kv,
        batch_cap=cap,
        cause=_cause(share),
        placement=main_placement(run),
        quiet_placement="" if quiet is None else main_placement(quiet),
    )


def main_placement(run: RunResults) -> str:
    """The placement that most of the time of steps was spent with; empty without steps."""
    steps = steps_of(run)
    spent = steps[steps["kind"] == "run"].groupby("placement")["seconds"].sum()
    return "" if spent.empty else str(spent.idxmax())


def counted(run: RunResults, warm_up: float) -> pd.DataFrame:
    """Requests that got a first token, without the first ones by arrival; ``ttft_s`` beside their columns."""
    columns = ["request_id", "replica", "arrival_s", "admitted_s", "first_token_s"]
    table = run.requests.select(columns).to_pandas().sort_values(["arrival_s", "request_id"])
    behind: pd.DataFrame = table.iloc[int(warm_up * len(table)) :].dropna(subset=["first_token_s", "admitted_s"])
    return behind.assign(ttft_s=behind["first_token_s"] - behind["arrival_s"])


def batch_cap(scenario: Mapping[str, Any]) -> int | None:
    """Rows a batch may have, as a scenario says; None if it does not."""
    batcher = scenario.get("batcher")
    value = batcher.get("max_batch") if isinstance(batcher, dict) else None
    return value if isinstance(value, int) else None


def _cause(share: Mapping[str, float]) -> str:
    """The cause that is named: the greatest that matters, a load or an evaluation before a full batch behind it."""
    for name in ("loading", "evaluating"):
        if share[name] >= MATTERS and share[name] >= 0.5 * max(share["batch"], share["kv"]):
            return name
    if share["waiting"] < 0.5:
        return "prefill"
    name = "kv" if share["kv"] > share["batch"] else "batch"
    return name if share[name] >= 0.5 * share["waiting"] else "steps"


def _spent(
    steps: pd.DataFrame, arrival_s: float, admitted_s: float, first_token_s: float, cap: int | None
) -> dict[str, float]:
    """Seconds of one request's time to the first token, by what its server did."""
    near = steps[(steps["end_s"] > arrival_s) & (steps["start_s"] < first_token_s)]
    low, high = near["start_s"].to_numpy(), near["end_s"].to_numpy()
    whole = np.clip(np.minimum(high, first_token_s) - np.maximum(low, arrival_s), 0, None)
    waited = np.clip(np.minimum(high, admitted_s) - np.maximum(low, arrival_s), 0, None)
    is_load = near["kind"].isin(("load", "fetch")).to_numpy()
    is_probe = near["is_probe"].to_numpy(dtype=bool) & ~is_load
    runs = ~is_load & ~is_probe
    used = near["kv_used_bytes"].to_numpy() / np.maximum(near["kv_total_bytes"].to_numpy(), 1)
    held = np.maximum(near["rows"].to_numpy(), near["running"].to_numpy())
    is_capped = np.zeros(len(near), bool) if cap is None else held >= cap
    is_full = used >= FULL_SHARE
    return {
        "total": first_token_s - arrival_s,
        "waiting": max(0.0, admitted_s - arrival_s),
        "batch": float(waited[runs & is_capped & ~is_full].sum()),
        "kv": float(waited[runs & is_full].sum()),
        "loading": float(whole[is_load].sum()),
        "evaluating": float(whole[is_probe].sum()),
        "most": float(near["waiting"].max()) if len(near) else 0.0,
        "kv_share": float(used.max()) if len(near) else 0.0,
    }
