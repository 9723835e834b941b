"""Live against simulated: real kernels and memory at full size, exits replayed from a synthetic table.

Random weights say nothing, so both runs take their exits from the shipped spec of the pair; what is compared is time:
steps, queues, loads. Prompt and output lengths are drawn, so shapes are not those of the calibration's grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from heliosim.costs import shape_of
from heliosim.errors import InputError
from heliosim.examples import name_of
from heliosim.formats.profile import Profile, load_profile
from heliosim.formats.results import RunResults
from heliosim.metrics import Summary, summarise
from heliosim.replays import Replay, open_replay, replaying
from heliosim.runs import LiveRun, run_live, run_simulated
from heliosim.scenario import BatcherSpec, LiveSpec, Memory, Scenario
from heliosim.types import Run
from heliosim.workload import WorkloadSpec

from .book import Book
from .calibration import profile_folder
from .plan import METRICS, PAIR, SYSTEMS, Options
from .shapes import STAND_IN_NOTE, checkpoint_of, drop_engine, engine_options

SATURATED_PER_S = 1e6
SPEC = "opt-pair"
NEAR_TTFT_MS = 30.0
_SUMMARY = {
    "throughput": "output_throughput",
    "tpot": "mean_tpot_ms",
    "e2e": "mean_e2el_ms",
    "e2e_p99": "p99_e2el_ms",
    "ttft": "mean_ttft_ms",
}


@dataclass(frozen=True)
class Sizes:
    """Lengths of requests, batch and steps: inside what the calibration saw."""

    prompt: tuple[int, int]
    output: tuple[int, int]
    max_batch: int
    token_budget: int

    @classmethod
    def of(cls, options: Options) -> Sizes:
        return cls((50, 400), (24, 96), 32, 1024) if options.is_gpu else cls((20, 90), (8, 24), 4, 64)


def run(book: Book) -> None:
    """Every system at every load: simulated first, then live, with the same exits."""
    folder = profile_folder(book)
    if not (folder / "profile.json").exists():
        raise InputError("profile", str(folder), "the calibration of this group gave none", "See its error.")
    drop_engine(book)
    profile = load_profile(folder)
    replay = _replay(book)
    if not book.options.is_gpu:
        book.note(STAND_IN_NOTE)
    book.note(f"Exits are replayed: {replay.label}. Weights are random.")
    engine = _engine(book, profile, replay)
    try:
        _systems(book, profile, replay, engine)
    finally:
        engine.reset()
        engine.close()


def _replay(book: Book) -> Replay:
    """The pair's exits by the shipped spec, drawn once and kept in the work folder."""
    from heliosim.synthetic.draw import behaviour_for
    from heliosim.synthetic.spec import load_spec

    folder = Path(book.shared["work"]) / "exits"
    if not (folder / "behaviour.json").exists():
        behaviour_for({s.model: s.exits for s in PAIR}, load_spec(SPEC), book.options.seed).save(folder, overwrite=True)
    return open_replay(str(folder))


def _budget(profile: Profile) -> int:
    """Device memory for weights and KV: twice the larger model's weights, as in the shipped examples."""
    return 2 * max(profile.spec(s.model).weights_bytes(profile.spec(s.model).layers) for s in PAIR)


def _engine(book: Book, profile: Profile, replay: Replay) -> Any:
    from heliosim.engines.torch import TorchEngine

    names = {s.model: checkpoint_of(s, book.options, book.shared["work"]) for s in PAIR}
    made = engine_options(book.options)
    return TorchEngine(names, replay=replay.behaviour, seed=book.options.seed, budget_bytes=_budget(profile), **made)


def _systems(book: Book, profile: Profile, replay: Replay, engine: Any) -> None:
    keys = [(system, load) for system in SYSTEMS for load in book.options.loads]
    capacity: dict[str, float] = {}
    for system in SYSTEMS:
        full = _scenario(book, profile, system, 200, SATURATED_PER_S)
        capacity[system] = _value(summarise(run_simulated(full, profile, replay=replay)), "request_throughput")
    run_live(_scenario(book, profile, "helios", 12, SATURATED_PER_S), profile, engine=engine, replay=replay)  # warm up
    for k, (system, load) in enumerate(keys):
        seconds = book.left_s / (len(keys) - k)
        if book.is_late(0.5):
            for key in METRICS:
                book.cannot(f"{system}.{load:g}.{key}", "no time left")
            continue
        rate = load * capacity[system]
        warm = int(book.options.is_gpu)  # a first run meets shapes for the first time: graphs are captured
        each_s = max(0.3, 0.7 * seconds / (book.options.repeats + warm))
        requests = int(min(400, max(12, rate * each_s)))
        scenario = _scenario(book, profile, system, requests, rate)
        simulated = run_simulated(scenario, profile, replay=replay)
        repeats = range(book.options.repeats + warm)
        live = [run_live(scenario, profile, engine=engine, replay=replay) for _ in repeats][warm:]
        _judge(book, f"{system}.{load:g}", replaying(profile, scenario, replay), scenario, simulated, live)


def _scenario(book: Book, profile: Profile, system: str, requests: int, rate_per_s: float) -> Scenario:
    large, sizes = PAIR[-1].model, Sizes.of(book.options)
    controller: Mapping[str, Any] = {
        "vanilla": {"kind": "vanilla", "model": large},
        "early-exit": {"kind": "early-exit", "model": large},
        "helios": {"kind": "helios", "in_flight": "extend"},
    }[system]
    kind = "poisson" if rate_per_s < SATURATED_PER_S else "constant"
    lengths = {
        "prompt_tokens": {"kind": "uniform", "low": sizes.prompt[0], "high": sizes.prompt[1]},
        "output_tokens": {"kind": "uniform", "low": sizes.output[0], "high": sizes.output[1]},
    }
    tasks = [{"task": task, "share": 1.0, **lengths} for task in ("gsm8k", "codexglue", "hellaswag")]
    load = {"requests": requests, "arrivals": {"kind": kind, "rate_per_s": rate_per_s}, "tasks": tasks, "order": "mix"}
    return Scenario(
        name=system,
        seed=book.options.seed,
        profile=name_of(profile),
        models=tuple(s.model for s in PAIR),
        workload=WorkloadSpec.model_validate(load),
        memory=Memory(budget_bytes=_budget(profile)),
        batcher=BatcherSpec(max_batch=sizes.max_batch, token_budget=sizes.token_budget),
        controller=dict(controller),
        clock=profile.clock(),
        live=LiveSpec(max_stride=1),  # as calibrated: step by step
    )


def _judge(
    book: Book, prefix: str, profile: Profile, scenario: Scenario, simulated: RunResults, live: Sequence[LiveRun]
) -> None:
    """Signed relative error of each prediction against the mean of the live repeats."""
    guess = summarise(simulated)
    seen = [summarise(run.results) for run in live]
    ratios = [_step_ratio(profile, scenario, run) for run in live]
    book.put(f"{prefix}.step", mean(ratios) - 1, low=min(ratios) - 1, high=max(ratios) - 1)
    for key, name in _SUMMARY.items():
        values = [_value(s, name) for s in seen]
        predicted, truth = _value(guess, name), mean(values)
        error = predicted / truth - 1 if truth else 0.0
        passes = None
        if key == "ttft" and book.options.is_gpu:
            passes = abs(error) <= METRICS[key][1] or abs(predicted - truth) <= NEAR_TTFT_MS
        note = f"{predicted:.4g} against {truth:.4g} ({min(values):.4g} to {max(values):.4g})"
        book.put(f"{prefix}.{key}", error, note=note, passes=passes)
        book.row(system=scenario.name, key=f"{prefix}.{key}", metric=name, predicted=predicted, live=values,
                 requests=scenario.workload.requests)  # fmt: skip


def _step_ratio(profile: Profile, scenario: Scenario, run: LiveRun) -> float:
    """Expected over measured seconds of the live run's own steps."""
    steps = [(a, o) for a, o in run.log if isinstance(a, Run)]
    costs = {n: profile.step_cost(n, scenario.clock) for n in scenario.models}
    specs = {n: profile.spec(n) for n in scenario.models}
    expected = sum(costs[a.placement.model].seconds(shape_of(a, o, specs[a.placement.model])) for a, o in steps)
    return expected / sum(o.seconds for _, o in steps)


def _value(summary: Summary, name: str) -> float:
    value = summary.value(name)
    return 0.0 if value is None else float(value)
