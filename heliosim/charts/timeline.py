"""One run over time, in numbers: what was resident, in use and on the breach counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from heliosim.formats.results import RunResults

_MAX_POINTS = 1200


@dataclass(frozen=True)
class TimelineData:
    """One run over time (seconds).

    ``bands``: start_s, end_s, model, depth, is_probe (what was resident, split where evaluation began or
    ended). ``loads``: start_s, end_s, model, depth, reason. ``series``: time_s, rows, waiting, weights_bytes,
    kv_bytes, breaches: values hold from their time to the next; of a fleet the sums over replicas (of breaches the
    greatest). ``budget_bytes``, ``max_breaches``: None if
    not known.
    """

    bands: pd.DataFrame
    loads: pd.DataFrame
    series: pd.DataFrame
    budget_bytes: int | None
    max_breaches: int | None
    end_s: float


def timeline_data(run: RunResults) -> TimelineData:
    """What was resident, in use and on the breach counter over one run; series are thinned by maxima."""
    steps = run.steps.to_pandas()
    if steps.empty:
        empty = pd.DataFrame({"start_s": [], "end_s": [], "model": [], "depth": []})
        series = pd.DataFrame({k: [] for k in ("time_s", *_SERIES)})
        return TimelineData(
            empty.assign(is_probe=False),
            empty.assign(reason=""),
            series,
            run.budget_bytes,
            run.max_breaches,
            0.0,
        )
    steps["end_s"] = steps["start_s"] + steps["seconds"]
    loads = steps[steps["kind"] == "load"][["start_s", "end_s", "model", "depth", "reason"]].reset_index(drop=True)
    own = [part for _, part in steps.groupby("replica", sort=False)]
    bands = pd.concat([_bands(part) for part in own], ignore_index=True)
    return TimelineData(
        bands=bands,
        loads=loads,
        series=_thinned(_together([_series(part) for part in own])),
        budget_bytes=run.budget_bytes,
        max_breaches=run.max_breaches,
        end_s=float(steps["end_s"].max()),
    )


_SERIES = ("rows", "waiting", "weights_bytes", "kv_bytes", "breaches")


def _bands(steps: pd.DataFrame) -> pd.DataFrame:
    """What was resident at one replica while it ran steps, split where evaluation began or ended."""
    key = steps["model"] + "@" + steps["depth"].astype(str) + steps["is_probe"].map({True: "?", False: ""})
    ran = steps[steps["kind"] == "run"]
    group = (key != key.shift()).cumsum()[ran.index]
    bands = ran.groupby(group).agg(
        start_s=("start_s", "min"),
        end_s=("end_s", "max"),
        model=("model", "first"),
        depth=("depth", "first"),
        is_probe=("is_probe", "first"),
    )
    return bands.reset_index(drop=True)


def _series(steps: pd.DataFrame) -> pd.DataFrame:
    """Step-wise values of one replica, with a row of rest wherever it was idle, and of nothing where it failed."""
    values = steps.rename(columns={"start_s": "time_s", "kv_used_bytes": "kv_bytes"})[["time_s", *_SERIES]]
    following = steps["start_s"].shift(-1)
    is_lost = steps["kind"] == "lost"
    idle = steps[(following > steps["end_s"]) | following.isna() | is_lost]
    rest = values.loc[idle.index].assign(time_s=idle["end_s"], rows=0, kv_bytes=0)
    rest.loc[is_lost[idle.index], list(_SERIES)] = 0
    return pd.concat([values, rest]).sort_values("time_s", kind="stable").reset_index(drop=True)


def _together(series: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Values of several replicas at each time: sums, of breach counters the greatest."""
    if len(series) == 1:
        return series[0]
    held = [s.drop_duplicates("time_s", keep="last").set_index("time_s") for s in series]
    times = sorted(set().union(*(h.index for h in held)))
    held = [h.reindex(times).ffill().fillna(0) for h in held]
    together = sum(held[1:], start=held[0])
    together["breaches"] = np.max([h["breaches"].to_numpy() for h in held], axis=0)
    return together.rename_axis("time_s").reset_index()[["time_s", *_SERIES]]


def _thinned(series: pd.DataFrame) -> pd.DataFrame:
    """At most ``_MAX_POINTS`` rows: the greatest value of each column in each of as many slices of time."""
    if len(series) <= _MAX_POINTS:
        return series
    first, last = series["time_s"].iloc[0], series["time_s"].iloc[-1]
    slot = ((series["time_s"] - first) / (last - first) * (_MAX_POINTS - 1)).astype(int)
    return series.groupby(slot).agg({"time_s": "min"} | dict.fromkeys(_SERIES, "max")).reset_index(drop=True)
