"""`heliosim validate`: the published fidelity figures. Profile first, then prediction, then measurement; every signed
error is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliosim.console import console, progress_bar
from heliosim.formats.files import write_json, write_text
from heliosim.formats.profile import Profile, load_profile
from heliosim.metrics import Summary, compare_summaries, summarise

from .calibrate import Request, calibrate
from .demo import PAIRS, is_reusable
from .experiment import Bench, Measured, saturated, save_all, workload, write_workload
from .validation_page import page

BARS = {
    "output_throughput": 0.07,
    "mean_tpot_ms": 0.07,
    "mean_e2el_ms": 0.07,
    "p99_e2el_ms": 0.12,
    "mean_ttft_ms": 0.12,
}
"""Largest relative error of a prediction, by metric; inside the spread of the live repeats it passes too."""

LOADS = (0.5, 0.8)
EXIT_BAR_REPLAYED, EXIT_BAR_DRAWN = 0.02, 0.05
STEP_BAR = 0.05

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "HELIOS (all mechanisms)": {},
    "no live evaluation": {"use_evaluation": False},
    "no greedy depth (full model, threshold exits)": {"use_greedy_depth": False},
    "no load on breach (switch only)": {"use_load": False},
    "no switch on breach (load only)": {"use_switch": False},
    "no reaction to breaches": {"use_load": False, "use_switch": False},
    "no re-assessment": {"use_reassess": False},
    "in flight: boundary": {"in_flight": "boundary"},
    "in flight: reprefill": {"in_flight": "reprefill"},
}


@dataclass
class Evidence:
    """Everything the page is made of, as plain data."""

    profile: dict[str, Any]
    clock: str
    step_bar: float
    exit_bars: dict[str, float]
    requests: int
    repeats: int
    seed: int
    capacity: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    exits: list[dict[str, Any]] = field(default_factory=list)
    transitions: list[dict[str, Any]] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    ablations: list[dict[str, Any]] = field(default_factory=list)


def run_validation(
    out: Path, doc: Path | None, *, repeats: int, requests: int, device: str, seed: int, wall: bool = True
) -> None:
    """Measure everything into ``out`` (runs, validation.json, validation.md); ``doc`` gets a copy of the page.

    A profile already complete in ``out`` is used again, so an interrupted validation goes on behind its calibration.
    """
    say = console().print
    profile = _profile(out / "profile", device, seed)
    trace = out / "workload.jsonl"
    write_workload(trace, profile, requests, seed)
    bench = Bench(profile, seed, device)
    exit_bars = {"drawn": EXIT_BAR_DRAWN, "replayed": EXIT_BAR_REPLAYED}
    evidence = Evidence(_profile_facts(profile), profile.clock(), STEP_BAR, exit_bars, requests, repeats, seed)
    with progress_bar("Validating") as progress:
        progress("warming up", 0.0)
        bench.warm_up(trace)
        capacity = _saturated(bench, trace, repeats, evidence, progress, out)
        _loads(bench, trace, capacity, repeats, evidence, progress, out)
        if wall and profile.clock() != "wall":
            _wall(bench, trace, capacity, min(repeats, 3), evidence, progress)
        _ablations(bench, trace, min(repeats, 3), evidence, progress)
    write_json(out / "validation.json", dataclasses.asdict(evidence))
    text = page(
        dataclasses.asdict(evidence), f"heliosim validate --requests {requests} --repeats {repeats} --seed {seed}"
    )
    write_text(out / "validation.md", text)
    if doc is not None:
        write_text(doc, text)
    clock = profile.clock()
    judged = [r["passes"] for r in evidence.rows if r["clock"] == clock and r["passes"] is not None]
    met = f"{sum(judged)} of {len(judged)} predictions on the {clock} clock meet their bars"
    say(f"{met}; see {doc or out / 'validation.md'}")


def _profile(folder: Path, device: str, seed: int) -> Profile:
    if (folder / "profile.json").exists():
        profile = load_profile(folder)
        if is_reusable(profile, PAIRS["opt"], device, seed):
            console().print(f"going on with the profile in {folder} (delete the folder to measure again)")
            return profile
    request = Request(
        models=PAIRS["opt"], out=folder, device=device, max_batch=16, rounds=8, prompts_per_task=32,
        seed=seed, overwrite=True,
    )  # fmt: skip
    with progress_bar("Calibrating") as progress:
        return calibrate(request, progress)


def _profile_facts(profile: Profile) -> dict[str, Any]:
    facts = profile.facts
    return {
        "device": facts.device,
        "versions": facts.versions,
        "hash": profile.hash,
        "premises": facts.premises,
        "fits": {
            name: {clock: fit.model_dump(exclude={"seconds_per"}) for clock, fit in m.step.items()}
            for name, m in facts.models.items()
        },
        "loads": {name: {clock: fit.model_dump() for clock, fit in m.load.items()} for name, m in facts.models.items()},
        "largest_batch": {name: [b.model_dump() for b in m.largest_batch] for name, m in facts.models.items()},
    }


Report = Callable[[str, float], None]


def _saturated(
    bench: Bench, trace: Path, repeats: int, evidence: Evidence, progress: Report, out: Path
) -> dict[str, float]:
    """Predict and measure every system with everything waiting; returns measured requests per second."""
    items = [bench.predict(name, saturated(trace)) for name in bench.systems]
    _run_interleaved(bench, items, repeats, progress, "capacity", 0.0, 0.2)
    capacity = {}
    for item in items:
        measured = item.measured()
        capacity[item.name] = _mean([m.request_throughput for m in measured])
        evidence.capacity.append({"system": item.name, **_quality(item, measured)})
        _judge(evidence, item, "saturated", item.scenario.clock)
        _replays(bench, evidence, item, "saturated")
    save_all(items, out / "runs" / "saturated")
    return capacity


def _loads(
    bench: Bench,
    trace: Path,
    capacity: Mapping[str, float],
    repeats: int,
    evidence: Evidence,
    progress: Report,
    out: Path,
) -> None:
    for k, load in enumerate(LOADS):
        label = f"{load:.0%}"
        items = [bench.predict(name, workload(trace, load * capacity[name])) for name in bench.systems]
        _run_interleaved(bench, items, repeats, progress, f"{label} load", 0.2 + 0.2 * k, 0.2)
        for item in items:
            _judge(evidence, item, label, item.scenario.clock)
            _replays(bench, evidence, item, label)
        save_all(items, out / "runs" / label.replace("%", "pct"))


def _wall(
    bench: Bench, trace: Path, capacity: Mapping[str, float], repeats: int, evidence: Evidence, progress: Report
) -> None:
    """The same loads on the wall clock, for its spread; the rates are those of the cpu clock."""
    from heliosim.runs import run_simulated

    for k, load in enumerate(LOADS):
        items = []
        for name in bench.systems:
            item = bench.predict(name, workload(trace, load * capacity[name]))
            item.scenario = item.scenario.model_copy(update={"clock": "wall"})
            item.simulated = run_simulated(item.scenario, bench.profile)
            items.append(item)
        _run_interleaved(bench, items, repeats, progress, f"wall, {load:.0%} load", 0.6 + 0.1 * k, 0.1)
        for item in items:
            _judge(evidence, item, f"{load:.0%}", "wall")


def _ablations(bench: Bench, trace: Path, repeats: int, evidence: Evidence, progress: Report) -> None:
    """HELIOS with each mechanism off, saturated: what it is worth here, measured and simulated."""
    items = [bench.predict("HELIOS", saturated(trace), **changes) for changes in ABLATIONS.values()]
    _run_interleaved(bench, items, repeats, progress, "ablations", 0.8, 0.2)
    for label, item in zip(ABLATIONS, items, strict=True):
        evidence.ablations.append({"variant": label, **_quality(item, item.measured())})


def _run_interleaved(
    bench: Bench, items: Sequence[Measured], repeats: int, progress: Report, what: str, start: float, share: float
) -> None:
    """Each system once per repeat, so that a drift of the machine meets all alike."""
    for k in range(repeats):
        for i, item in enumerate(items):
            progress(
                f"{what}: {item.name}, repeat {k + 1} of {repeats}",
                start + share * (k * len(items) + i) / (repeats * len(items)),
            )
            bench.execute(item, 1)


def _judge(evidence: Evidence, item: Measured, load: str, clock: str) -> None:
    """One row per metric: predicted, measured, spread, signed error, and whether it meets its bar."""
    for row in compare_summaries(item.predicted, item.measured(), tuple(BARS)):
        bar = BARS[row.metric]
        passes = None if row.relative_error is None else abs(row.relative_error) <= bar or bool(row.is_inside_spread)
        evidence.rows.append(
            {
                "system": item.name,
                "load": load,
                "clock": clock,
                "metric": row.metric,
                "predicted": row.simulated,
                "measured": row.measured_mean,
                "least": row.measured_min,
                "most": row.measured_max,
                "error": row.relative_error,
                "bar": bar,
                "inside_spread": row.is_inside_spread,
                "passes": passes,
            }
        )


def _replays(bench: Bench, evidence: Evidence, item: Measured, load: str) -> None:
    """Exit mix drawn and replayed against the first live run; transitions; parity of the drivers."""
    bench.replay(item)
    assert item.replayed is not None
    live, replayed = summarise(item.live[0].results), summarise(item.replayed)
    pooled = [m.exit_mix for m in item.measured()]
    evidence.exits.append(
        {
            "system": item.name,
            "load": load,
            "drawn_points": 100 * _mix_distance(item.predicted.exit_mix, pooled[0]),
            "replayed_points": 100 * _mix_distance(replayed.exit_mix, live.exit_mix),
            "repeat_points": 100 * max((_mix_distance(a, pooled[0]) for a in pooled[1:]), default=0.0),
        }
    )
    if item.name == "HELIOS":
        evidence.transitions.append(
            {
                "load": load,
                "live": list(live.transition_sequence),
                "replayed": list(replayed.transition_sequence),
                "drawn": list(item.predicted.transition_sequence),
            }
        )
    evidence.parity.append({"system": item.name, "load": load, "identical": bench.has_parity(item)})


def _mix_distance(a: Mapping[str, Mapping[int, float]], b: Mapping[str, Mapping[int, float]]) -> float:
    """Largest difference of a share, over models and exits."""
    keys = {(m, e) for mix in (a, b) for m, exits in mix.items() for e in exits}
    return max((abs(a.get(m, {}).get(e, 0.0) - b.get(m, {}).get(e, 0.0)) for m, e in keys), default=0.0)


QUALITY = (
    "output_throughput", "mean_tpot_ms", "mean_batch_size", "max_batch_size", "layers_per_token",
    "low_confidence_share", "perplexity", "agreement", "transitions", "load_s", "probe_token_share",
)  # fmt: skip


def _quality(item: Measured, measured: Sequence[Summary]) -> dict[str, Any]:
    """Speed beside quality: the live mean of each metric, throughput also as spread and as predicted."""
    found: dict[str, Any] = {}
    for name in QUALITY:
        values = [v for v in (m.value(name) for m in measured) if v is not None]
        found[name] = sum(values) / len(values) if values else None
    throughput = [m.output_throughput for m in measured if m.output_throughput is not None]
    found |= {"throughput_min": min(throughput), "throughput_max": max(throughput)}
    found["predicted_throughput"] = item.predicted.output_throughput
    found["request_throughput"] = _mean([m.request_throughput for m in measured])
    found["exit_mix"] = {m: {str(e): s for e, s in mix.items()} for m, mix in measured[0].exit_mix.items()}
    return found


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known)
