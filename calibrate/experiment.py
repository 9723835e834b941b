"""What demo and validation share: systems over one pair, one text workload, predicted first, then executed and
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliosim.costs import shape_of
from heliosim.examples import pair_of, scenario_for, systems
from heliosim.formats.profile import Profile
from heliosim.formats.results import RunResults, save_run
from heliosim.formats.trace import save_trace
from heliosim.metrics import Summary, summarise
from heliosim.runs import LiveRun, make_engine, run_live, run_simulated
from heliosim.scenario import Scenario
from heliosim.types import Arrival, Run
from heliosim.workload import WorkloadSpec, build_arrivals

TASKS = ("chat", "code", "arithmetic", "qa")
OUTPUT_TOKENS = (16, 48)
SATURATED_PER_S = 1e6
"""An arrival rate no system keeps up with: everything waits from the start."""


def write_workload(path: Path, profile: Profile, requests: int, seed: int, tasks: Sequence[str] = TASKS) -> None:
    """A trace of held-out prompts in consecutive task blocks. Its own arrival times are replaced by each scenario's
    process.
    """
    from heliosim.arrivals import Poisson
    from heliosim.formats.checkpoint import checkpoint_path
    from heliosim.synth import TextTask, text_trace

    facts = next(iter(profile.facts.models.values()))
    tokenizer = checkpoint_path(facts.checkpoint) / "tokenizer.json"
    each = [TextTask(t, n, OUTPUT_TOKENS) for t, n in zip(tasks, _split(requests, len(tasks)), strict=True)]
    rows = text_trace(each, order="blocks", arrivals=Poisson(rate_per_s=10.0), seed=seed, tokenizer_file=tokenizer)
    save_trace(rows, path)


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (k < total % parts) for k in range(parts)]


def workload(trace: Path, rate_per_s: float) -> WorkloadSpec:
    """The trace's requests, arriving as a Poisson process."""
    return WorkloadSpec.model_validate(
        {"trace": str(trace.resolve()), "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s}}
    )


def saturated(trace: Path) -> WorkloadSpec:
    """The trace's requests, all waiting from the start."""
    return WorkloadSpec.model_validate(
        {"trace": str(trace.resolve()), "arrivals": {"kind": "constant", "rate_per_s": SATURATED_PER_S}}
    )


@dataclass
class Measured:
    """One system at one load: predicted, executed, and (where replayed) simulated with the live run's own exits.

    ``draws``: the same prediction under the profile's recorded step-time noise, from several random places of it.
    """

    name: str
    scenario: Scenario
    simulated: RunResults
    live: list[LiveRun] = field(default_factory=list)
    replayed: RunResults | None = None
    draws: list[RunResults] = field(default_factory=list)

    @property
    def predicted(self) -> Summary:
        return summarise(self.simulated, slo=self.scenario.slo)

    def predicted_draws(self) -> list[Summary]:
        return [summarise(run, slo=self.scenario.slo) for run in self.draws]

    def measured(self) -> list[Summary]:
        return [summarise(run.results, slo=self.scenario.slo) for run in self.live]


class Bench:
    """A profile, one engine for all runs, and the systems to compare over the profile's pair."""

    def __init__(self, profile: Profile, seed: int, device: str = "auto") -> None:
        self.profile, self.seed = profile, seed
        small, large = pair_of(profile)
        self.systems: Mapping[str, Mapping[str, Any]] = systems(small, large)
        self.engine = make_engine(self.scenario("HELIOS", saturated(Path("none.jsonl"))), profile, device=device)

    def scenario(self, name: str, load: WorkloadSpec, **controller: Any) -> Scenario:
        return scenario_for(name, {**self.systems[name], **controller}, self.profile, load, seed=self.seed)

    def warm_up(self, trace: Path) -> None:
        """Run every system briefly, so that no measured run pays for first use."""
        for name in self.systems:
            load = workload(trace, 1000.0).model_copy(update={"requests": 24})
            run_live(self.scenario(name, load), self.profile, engine=self.engine, score_agreement=False)

    def predict(self, name: str, load: WorkloadSpec, *, draws: int = 0, **controller: Any) -> Measured:
        scenario = self.scenario(name, load, **controller)
        return self.predict_scenario(name, scenario, draws)

    def predict_scenario(self, name: str, scenario: Scenario, draws: int = 0) -> Measured:
        """Simulate a scenario with expected step times, and ``draws`` times under recorded noise."""
        noisy = [scenario.model_copy(update={"step_noise": k}) for k in range(draws)]
        return Measured(
            name,
            scenario,
            run_simulated(scenario, self.profile),
            draws=[run_simulated(s, self.profile) for s in noisy],
        )

    def execute(self, item: Measured, repeats: int, on_run: Callable[[int], None] = lambda _k: None) -> None:
        """Live repeats; the first one's tokens are scored against the full model."""
        for k in range(repeats):
            run = run_live(item.scenario, self.profile, engine=self.engine, score_agreement=not item.live)
            item.live.append(run)
            on_run(k)

    def replay(self, item: Measured) -> None:
        """Simulate again with the exits the first live run met."""
        from .replay import behaviour_of_run

        live = item.live[0]
        specs = {n: self.profile.spec(n) for n in item.scenario.models}
        behaviour = behaviour_of_run(self.engine, specs, self.arrivals(item), live.outputs, live.results)
        item.replayed = run_simulated(item.scenario, self.profile, behaviour=behaviour)

    def step_time_ratios(self, item: Measured) -> list[float]:
        """Measured over expected seconds of each live run's own steps, loads apart.

        The steps are those that really ran, so nothing of the workload, the exits or the queue is in it: what differs
        from 1 is the machine since the calibration, and the cost fit.
        """
        specs = {n: self.profile.spec(n) for n in item.scenario.models}
        costs = {n: self.profile.step_cost(n, item.scenario.clock) for n in item.scenario.models}
        ratios = []
        for run in item.live:
            steps = [(action, outcome) for action, outcome in run.log if isinstance(action, Run)]
            expected = sum(costs[a.placement.model].seconds(shape_of(a, o, specs[a.placement.model])) for a, o in steps)
            ratios.append(sum(o.seconds for _, o in steps) / expected)
        return ratios

    def arrivals(self, item: Measured) -> list[Arrival]:
        return build_arrivals(item.scenario.workload, item.scenario.seed)

    def has_parity(self, item: Measured) -> bool:
        """Whether the simulated driver, fed the first live run's outcomes, asks for exactly the same actions at the
        same times.
        """
        from heliosim.engines.replay import ReplayDiverged, ReplayEngine

        live = item.live[0]
        engine = ReplayEngine(live.log)
        try:
            again = run_simulated(item.scenario, self.profile, engine=engine)
        except ReplayDiverged:
            return False
        return engine.position == len(live.log) and again.steps.equals(live.results.steps)


def save_all(items: Sequence[Measured], folder: Path) -> None:
    """Write every run of some items under ``folder``, replacing earlier ones."""
    for item in items:
        name = item.scenario.name.lower()
        save_run(folder / f"{name}-simulated", item.simulated, overwrite=True)
        for k, run in enumerate(item.live):
            save_run(folder / f"{name}-live-{k + 1}", run.results, overwrite=True)
