"""How far an evaluation of a few live requests misses, and how often that changes what HELIOS chooses.

The controller measures each candidate on some probes and never knows how lucky it was. A simulated run's profile does:
for each evaluation, this works out afterwards what the candidate delivers on average to requests of the probes' tasks,
in batches as large as the evaluation's own, and asks which candidate would have been chosen on those figures. What
counts as noise is which texts, exits and lengths the probes happened to have. No controller is ever shown this.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from heliosim.assembly import changes_of, repositories
from heliosim.errors import InputError
from heliosim.offline import decode_seconds, prefill_seconds, request_j
from heliosim.scenario import Scenario
from heliosim.serving.helios import HeliosParameters, changed_by
from heliosim.serving.repository import Candidate, Performance, Repository, scaled
from heliosim.types import Placement, Seconds

if TYPE_CHECKING:
    from heliosim.formats.profile import Profile
    from heliosim.formats.results import RunResults


@dataclass(frozen=True)
class Estimate:
    """One candidate in one evaluation: M as measured, as expected, and the costs of its M' that follow from each.

    ``standard_error``: over the probes, by figure, as the controller recorded it; None of a single probe. Costs:
    smaller is better, in the unit of the objective (seconds per token, seconds, perplexity, joules).
    ``expected_depth``: of M' on expected exits.
    """

    model: str
    probes: int
    measured: Performance
    standard_error: Mapping[str, float] | None
    expected: Performance
    measured_cost: float
    expected_cost: float
    expected_depth: int


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of all candidates, over at ``time_s``: who was chosen, and who would have been without noise."""

    time_s: Seconds
    candidates: tuple[Estimate, ...]
    chosen: str
    expected_choice: str

    @property
    def is_changed(self) -> bool:
        """Whether noise changed the choice of the model."""
        return self.chosen != self.expected_choice


def evaluation_noise(results: RunResults, profile: Profile) -> list[Evaluated]:
    """Every evaluation of a simulated HELIOS run. Raises InputError for a live run, a fleet, or another controller."""
    scenario = Scenario.model_validate(results.scenario)
    if results.info.mode != "simulated" or scenario.fleet is not None:
        what = "a live run" if scenario.fleet is None else "a fleet"
        raise InputError(
            "run", what, "expected values are worked out for one simulated server", "Simulate one replica."
        )
    parameters = scenario.controller_kind()
    if not isinstance(parameters, HeliosParameters):
        raise InputError("controller.kind", scenario.controller["kind"], "evaluates nothing", "Use helios.")
    repository = repositories(scenario, profile)(parameters.threshold, parameters.batching)
    lookup = _Expected(results, profile, scenario, parameters, repository)
    changes = iter(changes_of(scenario, profile))
    found: list[Evaluated] = []
    pending: list[Estimate] = []
    since_s = 0.0
    columns = (results.events[name].to_pylist() for name in ("time_s", "kind", "detail"))
    for time_s, kind, text in zip(*columns, strict=True):
        if kind == "evaluated":
            pending.append(lookup.estimate(json.loads(text), since_s, time_s))
            since_s = time_s
        elif kind == "reshortlisted":  # other figures, and whoever was being evaluated is forgotten
            change = next(changes)
            parameters = changed_by(change, parameters)
            repository = change.repository(parameters.threshold, parameters.batching)
            lookup = _Expected(results, profile, scenario, parameters, repository)
            pending, since_s = [], time_s
        elif kind == "choose" and pending:
            chosen = json.loads(text)["placement"].partition("@")[0]
            best = _best(pending, repository, parameters)
            found.append(Evaluated(time_s, tuple(pending), chosen, best))
            pending = []
    return found


def _best(rows: list[Estimate], repository: Repository, parameters: HeliosParameters) -> str:
    """The model HELIOS would choose on expected costs, ties going to the smaller weights."""
    lowest = min(row.expected_cost for row in rows)
    tied = [row for row in rows if row.expected_cost <= lowest * (1 + parameters.tie_tolerance)]
    specs = {name: candidate.spec for name, candidate in repository.candidates.items()}
    return min(tied, key=lambda r: (specs[r.model].weights_bytes(r.expected_depth), r.model)).model


class _Expected:
    """What probes of a run would show on average."""

    def __init__(
        self,
        results: RunResults,
        profile: Profile,
        scenario: Scenario,
        parameters: HeliosParameters,
        repository: Repository,
    ) -> None:
        self.profile, self.scenario, self.parameters, self.repository = profile, scenario, parameters, repository
        self._requests = results.requests.select(
            ["task", "prompt_tokens", "output_tokens", "is_probe", "finish_s"]
        ).to_pylist()
        self._steps = results.steps.select(["start_s", "kind", "model", "rows", "is_probe"]).to_pylist()

    def estimate(self, detail: Mapping[str, Any], since_s: Seconds, until_s: Seconds) -> Estimate:
        name = detail["model"]
        candidate = self.repository.candidates[name]
        measured = Performance(detail["throughput_tok_per_s"], detail["ttft_s"], detail["perplexity"])
        expected, shares = self._performance(candidate, since_s, until_s)
        depth = candidate.greedy_depth(shares, self.parameters.coverage)
        return Estimate(
            name,
            detail["requests"],
            measured,
            detail.get("standard_error"),
            expected,
            self._partial_cost(candidate, measured, detail["greedy_depth"]),
            self._partial_cost(candidate, expected, depth),
            depth if self.parameters.use_greedy_depth else candidate.spec.layers,
        )

    def _partial_cost(self, candidate: Candidate, full: Performance, depth: int) -> float:
        """The objective of M', scaled from M as the controller scales it; of M itself if it serves full models."""
        if not self.parameters.use_greedy_depth:
            return full.cost(self.parameters.objective)
        offline = candidate.offline
        return scaled(full, offline[candidate.spec.layers], offline[depth]).cost(self.parameters.objective)

    def _performance(
        self, candidate: Candidate, since_s: Seconds, until_s: Seconds
    ) -> tuple[Performance, dict[int, float]]:
        """Expected figures of M, and shares of its exits, over requests of the tasks the probes had."""
        spec = candidate.spec
        probes = [r for r in self._requests if r["is_probe"] and since_s < r["finish_s"] <= until_s]
        weights = Counter(r["task"] for r in probes)
        alike = [r for r in self._requests if r["task"] in weights and r["output_tokens"]]
        total = sum(weights.values())

        def mean(column: str) -> float:
            found = 0.0
            for task, count in weights.items():
                values = [r[column] for r in alike if r["task"] == task]
                found += count / total * sum(values) / max(1, len(values))
            return found

        prompt, output = max(1, round(mean("prompt_tokens"))), max(1.0, mean("output_tokens"))
        steps = [
            s["rows"]
            for s in self._steps
            if s["is_probe"] and s["model"] == spec.name and since_s <= s["start_s"] < until_s
        ]
        rows = max(1, round(sum(steps) / len(steps))) if steps else 1
        behaviour = self.profile.behaviour
        texts = {key: text for key, text in behaviour.texts.items() if not any(weights) or text.task in weights}
        own = replace(behaviour, texts=texts or behaviour.texts)
        rule = self.parameters.rule("threshold")
        source = behaviour.source(Placement(spec.name, spec.layers), rule, spec.layers)
        shares = own.exit_shares(spec.name, source, rule.threshold)
        cost = self.profile.step_cost(spec.name, self.scenario.clock)
        reading = prefill_seconds(spec, cost, spec.layers, rule, prompt)
        decoding = decode_seconds(spec, cost, spec.layers, rule, shares, rows, prompt + round(output / 2))
        busy_s = reading + max(0.0, output - 1) * decoding / rows
        perplexity = own.perplexity(spec.name, spec.layers, source, rule.threshold)
        power = self.profile.step_power(spec.name)
        energy = None if power is None else request_j(power, reading, busy_s - reading)
        return Performance(output / busy_s, reading, perplexity, energy), shares


def noise_line(found: list[Evaluated]) -> str | None:
    """What to say of a run's evaluations; None without any."""
    if not found:
        return None
    changed = sum(one.is_changed for one in found)
    rows = [row for one in found for row in one.candidates]
    off = sorted(abs(row.measured_cost / row.expected_cost - 1) for row in rows if row.expected_cost > 0)
    return (
        f"evaluations: {len(found)}; noise of the probes changed the choice of the model in {changed}; "
        f"estimates miss the expected value by {off[len(off) // 2]:.0%} (median), {off[-1]:.0%} at most"
    )
