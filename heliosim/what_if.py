"""One setting tried out, and what changes against the setting tried before it: the numbers behind the what-if page.

A few independent replications of one scenario, small enough to answer while somebody moves a slider. Two settings of
one seed meet the same requests at the same times, standing for the same texts (``replicate``), so their differences are
taken pair by pair and luck that both share cancels. Each replication begins empty; its first requests are left out of
every figure (a fixed share, said with the result) while the server fills up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from heliosim.errors import InputError
from heliosim.formats.results import RunResults
from heliosim.metrics import SCALARS, metric_spec, request_latencies
from heliosim.replicate import horizon_of, measure, replication_seed
from heliosim.replicated import Horizon, Replicated, Replication, WarmUp
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario
from heliosim.stats import Interval, StoppingRule
from heliosim.sweep import open_once

OnProgress = Callable[[str, float], None]
Verdict = Literal["better", "worse", "different", "no difference shown", "not known"]
SETTLING = 0.1
"""Share of a replication's first requests that is left out."""
QUANTILES = 400
"""Points of a distribution that are kept."""
SLICES = 120
"""Points of a course over time that are kept."""
SHOWN = (
    "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "p99_e2el_ms", "output_throughput", "slo_attainment",
    "utilisation", "mean_batch_size", "layers_per_token", "agreement", "perplexity", "joules_per_token", "transitions",
)  # fmt: skip
"""Metrics of a table of differences, in order."""


@dataclass(frozen=True)
class Tried:
    """What came of one setting.

    ``latencies``: quantiles, ms, of the finished requests of all replications, by ``ttft``, ``tpot``, ``e2el`` at
    evenly spaced shares; ``counts``: requests behind each. ``exits``: model, exit layer, share of tokens. ``course``:
    of the first replication, by slice of time: time_s and the greatest rows in a step and requests waiting. ``wall_s``:
    how long the simulation took.
    """

    name: str
    digest: str
    requests: int
    replicated: Replicated
    latencies: Mapping[str, Sequence[float]]
    counts: Mapping[str, int]
    exits: Sequence[tuple[str, int, float]]
    course: Mapping[str, Sequence[float]]
    profile_kind: str
    wall_s: float

    @property
    def seed(self) -> int:
        """Seed of the first replication."""
        return self.replicated.replications[0].seed


def try_out(
    scenario: Scenario, replications: int = 5, *, settling: float = SETTLING, on_progress: OnProgress | None = None
) -> Tried:
    """Run a setting's replications in this process. ``on_progress`` may raise to stop.

    Raises InputError for fewer than two replications, a share to leave out that leaves nothing, and what the scenario
    or its profile cannot do.
    """
    if replications < 2:
        raise InputError("replications", replications, "an interval needs two", "Give 2 or more.")
    if not 0 <= settling < 1:
        raise InputError("settling", settling, "must be a share from 0 to less than 1", "Try 0.1.")
    started = time.perf_counter()
    profile = open_once(scenario.profile)
    found: list[Replication] = []
    pooled: dict[str, list[npt.NDArray[np.float64]]] = {"ttft": [], "tpot": [], "e2el": []}
    exits: list[pd.Series[float]] = []
    course: dict[str, list[float]] = {}
    cut = 0
    horizon = horizon_of(scenario)
    for index in range(replications):
        seeded = scenario.model_copy(update={"seed": replication_seed(scenario.seed, index)})
        results = run_simulated(seeded, profile if scenario.fleet is None else None)
        cut = int(settling * results.requests.num_rows) if horizon == "steady" else 0
        found.append(measure(results, scenario, index, WarmUp(cut, "given" if cut else "none")))
        for name, values in request_latencies(results, found[-1].after_s).items():
            pooled[name].append(values)
        exits.append(_exits(results, found[-1].after_s))
        course = course or _course(results)
        if on_progress is not None:
            on_progress(f"replication {index + 1} of {replications}", (index + 1) / replications)
    joined = {name: np.concatenate(parts) for name, parts in pooled.items()}
    mix = pd.concat(exits).groupby(level=[0, 1]).sum()
    return Tried(
        name=scenario.name,
        digest=scenario.hash,
        requests=int(sum(one.requests for one in found) / len(found)) + cut,
        replicated=_replicated(scenario.name, horizon, cut, tuple(found)),
        latencies={name: quantiles_of(values) for name, values in joined.items()},
        counts={name: len(values) for name, values in joined.items()},
        exits=_shares(mix),
        course=course,
        profile_kind=results.info.profile_kind,
        wall_s=time.perf_counter() - started,
    )


def _replicated(name: str, horizon: Horizon, cut: int, found: tuple[Replication, ...]) -> Replicated:
    rule = StoppingRule.exactly(len(found))
    return Replicated(name, horizon, WarmUp(cut, "given" if cut else "none"), rule, (), found)


def quantiles_of(values: npt.NDArray[np.float64]) -> list[float]:
    """Values at evenly spaced shares from 0 to 1, at most ``QUANTILES``; fewer values are kept as they are, sorted."""
    if len(values) <= QUANTILES:
        return [float(v) for v in np.sort(values)]
    return [float(v) for v in np.quantile(values, np.linspace(0, 1, QUANTILES))]


def _exits(results: RunResults, after_s: float) -> pd.Series[float]:
    """Tokens by model and exit layer, of the requests that count."""
    requests = results.requests.select(["request_id", "arrival_s"]).to_pandas()
    kept = requests.loc[requests["arrival_s"] >= after_s, "request_id"]
    tokens = results.tokens.select(["request_id", "model", "exit_layer"]).to_pandas()
    counts: pd.Series[float] = tokens[tokens["request_id"].isin(kept)].groupby(["model", "exit_layer"]).size()
    return counts.astype(float)


def _shares(mix: pd.Series[float]) -> list[tuple[str, int, float]]:
    """Tokens by model and exit layer as shares of all."""
    table = (mix / max(float(mix.sum()), 1.0)).rename("share").reset_index()
    columns = (table["model"], table["exit_layer"], table["share"])
    return [(str(m), int(e), float(share)) for m, e, share in zip(*columns, strict=True)]


def _course(results: RunResults) -> dict[str, list[float]]:
    """Rows in a step and requests waiting over time, greatest values of a slice each."""
    steps = results.steps.select(["start_s", "rows", "waiting"]).to_pandas()
    if steps.empty:
        return {"time_s": [], "rows": [], "waiting": []}
    last = float(steps["start_s"].max()) or 1.0
    place = np.minimum((steps["start_s"] / last * SLICES).astype(int), SLICES - 1)
    sliced = steps.groupby(place).max()
    times = [(int(str(k)) + 0.5) * last / SLICES for k in sliced.index]
    return {"time_s": times, "rows": sliced["rows"].tolist(), "waiting": sliced["waiting"].tolist()}


# -- what changed -----------------------------------------------------------------------------------


def differences(now: Tried, before: Tried, metrics: Sequence[str] = SHOWN) -> pd.DataFrame:
    """What the setting ``now`` changes against the one ``before``, in the units metrics are shown in.

    Columns metric, label, unit, before, now, difference, low, high (95 % interval of the mean paired difference; NaN
    where it is not known), pairs, verdict, reason (why there is no interval). Raises InputError for settings that did
    not use the same random numbers: their differences would be luck too.
    """
    if not are_paired(now, before):
        remedy = "Give both the same seed."
        raise InputError("seed", now.seed, f"the setting before had {before.seed}: nothing can be paired", remedy)
    rows = []
    for name in metrics:
        spec = metric_spec(name)
        gap = now.replicated.differences(before.replicated, name).interval
        shown = [
            _scaled(v, spec.scale)
            for v in (
                before.replicated.interval(name).mean,
                now.replicated.interval(name).mean,
                gap.mean,
                gap.low,
                gap.high,
            )
        ]
        rows.append((name, spec.label, spec.unit, *shown, gap.count, verdict_of(gap, spec.better), reason_of(gap)))
    columns = ["metric", "label", "unit", "before", "now", "difference", "low", "high", "pairs", "verdict", "reason"]
    return pd.DataFrame(rows, columns=columns)


def are_paired(now: Tried, before: Tried) -> bool:
    """Whether two settings drew from the same streams, replication by replication."""
    pairs = zip(now.replicated.replications, before.replicated.replications, strict=False)
    return all(a.seed == b.seed for a, b in pairs)


def verdict_of(gap: Interval, better: str) -> Verdict:
    """What an interval of a difference says."""
    if gap.mean is None:
        return "not known"
    if gap.is_constant and gap.mean == 0:
        return "no difference shown"
    if gap.low is None or gap.high is None:
        return "not known"
    if gap.low <= 0 <= gap.high:
        return "no difference shown"
    if better == "neither":
        return "different"
    return "better" if (gap.mean > 0) == (better == "higher") else "worse"


def reason_of(gap: Interval) -> str:
    """Why there is no interval, for people; empty where there is one."""
    if gap.is_constant:
        return "the same in every pair"
    return "waiting grew without end in one of them" if gap.reason == "saturated" else gap.reason


def _scaled(value: float | None, scale: float) -> float:
    return float("nan") if value is None else value * scale


# -- plain data -------------------------------------------------------------------------------------


def plain_tried(tried: Tried) -> dict[str, Any]:
    """A result as plain data, to be kept or sent."""
    return asdict(tried)


def tried_of(plain: Mapping[str, Any]) -> Tried:
    """A result from plain data, as ``plain_tried`` made it."""
    held = dict(plain["replicated"])
    replications = tuple(_replication(one) for one in held["replications"])
    replicated = _replicated(held["name"], held["horizon"], held["warm_up"]["requests"], replications)
    exits = [(str(m), int(e), float(share)) for m, e, share in plain["exits"]]
    return Tried(**{**plain, "replicated": replicated, "exits": exits})


def _replication(plain: Mapping[str, Any]) -> Replication:
    return Replication(**{**plain, "values": {name: plain["values"].get(name) for name in SCALARS}})
