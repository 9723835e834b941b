"""`heliosim validate`: the published fidelity figures. Profile first, then prediction, then measurement; every signed
error is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from heliosim.console import console, progress_bar
from heliosim.formats.files import write_json, write_text
from heliosim.formats.profile import Profile, load_profile
from heliosim.metrics import Summary, summarise
from heliosim.workload import WorkloadSpec

from .calibrate import Request, calibrate
from .demo import PAIRS, is_reusable
from .experiment import Bench, Measured, saturated, save_all, workload, write_workload
from .machine import MachineProbe
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
NOISE_DRAWS = 5
"""Draws of the recorded step-time noise a prediction is the mean of, at least."""
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
    machine: list[dict[str, Any]] = field(default_factory=list)
    step_time: list[dict[str, Any]] = field(default_factory=list)


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
    facts, clock = _profile_facts(profile), profile.clock()
    evidence = Evidence(facts, clock, STEP_BAR, exit_bars, requests, repeats, seed)
    with progress_bar("Validating") as progress:
        progress("warming up", 0.0)
        bench.warm_up(trace)
        probe = MachineProbe() if clock == "cpu" else None
        v = Validation(bench, trace, repeats, evidence, progress, out, probe)
        capacity = _saturated(v)
        _loads(v, capacity)
        if wall and clock != "wall":
            _wall(v, capacity)
        _ablations(v)
    v.save_evidence()
    text = page(
        dataclasses.asdict(evidence), f"heliosim validate --requests {requests} --repeats {repeats} --seed {seed}"
    )
    write_text(out / "validation.md", text)
    if doc is not None:
        write_text(doc, text)
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
        models=PAIRS["opt"], out=folder, device=device, max_batch=16, rounds=20, prompts_per_task=32,
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


@dataclass
class Validation:
    """The parts one validation works with."""

    bench: Bench
    trace: Path
    repeats: int
    evidence: Evidence
    progress: Report
    out: Path
    probe: MachineProbe | None = None

    def predict(self, name: str, load: WorkloadSpec, clock: Literal["cpu", "wall"] | None = None) -> Measured:
        scenario = self.bench.scenario(name, load)
        if clock is not None:
            scenario = scenario.model_copy(update={"clock": clock})
        return self.bench.predict_scenario(name, scenario, max(NOISE_DRAWS, self.repeats))

    def run_interleaved(
        self, items: Mapping[tuple[str, str], Measured], repeats: int, what: str, start: float, share: float
    ) -> None:
        """Every item once per repeat, so that a drift of the machine meets all alike. Keys: load, what it is called."""
        total = repeats * len(items)
        for k in range(total):
            (load, name), item = list(items.items())[k % len(items)]
            text = f"{what}: {name} {load}, repeat {k // len(items) + 1} of {repeats}"
            self.progress(text, start + share * k / total)
            before = self.probe.read() if self.probe else None
            self.bench.execute(item, 1)
            if self.probe and before:
                self._note_machine(item, load, before, self.probe.read())

    def _note_machine(self, item: Measured, load: str, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        found: dict[str, Any] = {k: (before[k] + after[k]) / 2 for k in before}
        live, expected = summarise(item.live[-1].results).value("mean_tpot_ms"), item.predicted.value("mean_tpot_ms")
        ratio = live / expected if live and expected else None
        found |= {"system": item.name, "load": load, "clock": item.scenario.clock, "tpot_ratio": ratio}
        self.evidence.machine.append(found)

    def save_evidence(self) -> None:
        """What is known so far, so that an interruption loses no measurement."""
        write_json(self.out / "validation.json", dataclasses.asdict(self.evidence))


def _saturated(v: Validation) -> dict[str, float]:
    """Predict and measure every system with everything waiting; returns measured requests per second."""
    items = {("saturated", name): v.predict(name, saturated(v.trace)) for name in v.bench.systems}
    v.run_interleaved(items, v.repeats, "capacity", 0.0, 0.2)
    capacity = {}
    for item in items.values():
        measured = item.measured()
        capacity[item.name] = _mean([m.request_throughput for m in measured])
        v.evidence.capacity.append({"system": item.name, **_quality(item, measured)})
    _close(v, items)
    return capacity


def _loads(v: Validation, capacity: Mapping[str, float]) -> None:
    items = {
        (f"{load:.0%}", name): v.predict(name, workload(v.trace, load * capacity[name]))
        for load in LOADS
        for name in v.bench.systems
    }
    v.run_interleaved(items, v.repeats, "load", 0.2, 0.4)
    _close(v, items)


def _wall(v: Validation, capacity: Mapping[str, float]) -> None:
    """The same loads on the wall clock, for its spread; the rates are those of the cpu clock."""
    items = {
        (f"{load:.0%}", name): v.predict(name, workload(v.trace, load * capacity[name]), "wall")
        for load in LOADS
        for name in v.bench.systems
    }
    v.run_interleaved(items, min(v.repeats, 3), "wall clock", 0.6, 0.2)
    for (load, _), item in items.items():
        _judge(v.evidence, item, load)


def _close(v: Validation, items: Mapping[tuple[str, str], Measured]) -> None:
    """Judge, replay and save what was run at some loads."""
    for (load, _), item in items.items():
        _judge(v.evidence, item, load)
        ratios = v.bench.step_time_ratios(item)
        v.evidence.step_time.append({"system": item.name, "load": load, "ratios": ratios})
        _replays(v.bench, v.evidence, item, load)
    for load in dict.fromkeys(load for load, _ in items):
        save_all([i for (at, _), i in items.items() if at == load], v.out / "runs" / load.replace("%", "pct"))
    v.save_evidence()


def _ablations(v: Validation) -> None:
    """HELIOS with each mechanism off, saturated: what it is worth here, measured and simulated."""
    load = saturated(v.trace)
    items = {("saturated", label): v.bench.predict("HELIOS", load, **changes) for label, changes in ABLATIONS.items()}
    v.run_interleaved(items, min(v.repeats, 3), "ablations", 0.8, 0.2)
    for (_, label), item in items.items():
        v.evidence.ablations.append({"variant": label, **_quality(item, item.measured())})


def _judge(evidence: Evidence, item: Measured, load: str) -> None:
    """One row per metric: predicted, measured, both spreads, signed error, and whether it meets its bar.

    The prediction is the mean over draws of the recorded step-time noise; ``without_noise`` is what expected step times
    alone give.
    """
    draws, measured = item.predicted_draws(), item.measured()
    for metric, bar in BARS.items():
        plain, drawn = item.predicted.value(metric), [d.value(metric) for d in draws]
        seen = [x for x in (m.value(metric) for m in measured) if x is not None]
        row: dict[str, Any] = {
            "system": item.name,
            "load": load,
            "clock": item.scenario.clock,
            "metric": metric,
            "bar": bar,
            "without_noise": plain,
            **_spread("predicted", drawn),
            **_spread("measured", seen),
        }
        guess, truth = row["predicted"], row["measured"]
        row["error"] = None if guess is None or not truth else guess / truth - 1
        row["inside_spread"] = bool(seen) and guess is not None and min(seen) <= guess <= max(seen)
        row["passes"] = None if row["error"] is None else abs(row["error"]) <= bar or row["inside_spread"]
        evidence.rows.append(row)


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, least and most of the values that are known."""
    known = [v for v in values if v is not None]
    if not known:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: sum(known) / len(known), f"{name}_min": min(known), f"{name}_max": max(known)}


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
