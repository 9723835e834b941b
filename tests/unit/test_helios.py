"""The controller's six steps on a stub engine with hand-made confidences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from heliosim.drive import Finished
from heliosim.errors import InputError
from heliosim.recorder import TableRecorder
from heliosim.serving.helios import BreachCounter, BreachGuard, Helios, HeliosParameters
from heliosim.serving.repository import Candidate, Evaluation, Limits, Performance, Repository
from heliosim.simulate import simulate_server
from heliosim.types import Load, Placement, Run, StepPower, Stride, StrideStep, Tokens
from heliosim.workload import OpenLoop
from tests.helpers import StubEngine, arrival, server, spec

SMALL = spec("small", 6, (2, 4, 6))
LARGE = spec("large", 12, (4, 8, 12))


def performance(throughput: float) -> Performance:
    return Performance(throughput, ttft_s=1 / throughput, perplexity=2.0)


def repository(budget: int = 100_000, load_s: float = 0.0) -> Repository:
    small = Candidate(SMALL, {2: performance(300), 4: performance(200), 6: performance(100)}, {2: 0.8, 4: 0.1, 6: 0.1})
    large = Candidate(
        LARGE, {4: performance(150), 8: performance(90), 12: performance(60)}, {4: 0.75, 8: 0.05, 12: 0.2}
    )
    return Repository({"small": small, "large": large}, budget, lambda old, new: load_s)


def run(
    parameters: HeliosParameters,
    confident: float = 0.95,
    requests: int = 60,
    repo: Repository | None = None,
) -> tuple[Helios, StubEngine, TableRecorder, Finished]:
    """A run in which every token of the full model leaves at the first exit and partial tokens have ``confident``."""
    controller = Helios(repo or repository(), parameters)

    def exit_of(request: int, position: int, step: Run) -> tuple[int, float]:
        first = SMALL.exits[0] if step.placement.model == "small" else LARGE.exits[0]
        return (first, 0.9) if step.exits.kind == "threshold" else (step.placement.depth, confident)

    engine = StubEngine(seconds=lambda r: 0.001 * r.placement.depth, exit_of=exit_of)
    recorder = TableRecorder()
    srv = server(controller, SMALL, LARGE, recorder=recorder)
    done = simulate_server(srv, engine, OpenLoop([arrival(k, at=0.02 * k) for k in range(requests)]))
    return controller, engine, recorder, done


def placements(engine: StubEngine) -> list[str]:
    return [str(a.placement) for a in engine.actions if isinstance(a, Load)]


def reasons(engine: StubEngine) -> list[str]:
    return [a.reason for a in engine.actions if isinstance(a, Load)]


def test_evaluates_each_candidate_fully_loaded_then_loads_the_best_partial() -> None:
    controller, engine, _, _ = run(HeliosParameters(reassess_interval=1000))
    assert placements(engine) == ["small@6", "large@12", "small@2"]
    assert reasons(engine) == ["evaluate", "evaluate", "choose"]
    probes = {r for a in engine.actions if isinstance(a, Run) and a.is_probe for r in a.batch.requests}
    assert len(probes) == 10, "five live requests per candidate, their outputs kept"
    assert controller.table["small"][1].placement == Placement("small", 2)
    assert controller.table["large"][1].placement == Placement("large", 4)


def test_partial_models_use_the_greedy_rule_and_full_models_the_threshold() -> None:
    _, engine, _, _ = run(HeliosParameters(reassess_interval=1000))
    for action in engine.actions:
        if isinstance(action, Run):
            depth = action.placement.depth
            is_full = depth == {"small": 6, "large": 12}[action.placement.model]
            assert action.exits.kind == ("threshold" if is_full else "greedy")


def test_reassesses_after_the_interval_with_the_same_candidates() -> None:
    _, engine, _, _ = run(HeliosParameters(reassess_interval=20), requests=70)
    chosen = reasons(engine).count("choose")
    assert chosen >= 3
    assert reasons(engine).count("evaluate") in (2 * chosen, 2 * chosen + 1, 2 * chosen + 2)
    _, engine, _, _ = run(HeliosParameters(reassess_interval=20, use_reassess=False), requests=70)
    assert reasons(engine).count("choose") == 1


def test_breaches_switch_or_load_by_cost() -> None:
    base = HeliosParameters(reassess_interval=1000)
    _, engine, _, _ = run(base, confident=0.3)
    reaction = reasons(engine)[3]
    assert reaction in ("load", "switch")
    _, engine, _, _ = run(replace(base, use_switch=False), confident=0.3)
    assert reasons(engine)[3] == "load"
    assert placements(engine)[3] == "small@6", "fixed exits: load to the full model"
    _, engine, _, _ = run(replace(base, use_load=False), confident=0.3)
    assert reasons(engine)[3] == "switch"
    assert placements(engine)[3] == "large@4"
    _, engine, _, _ = run(replace(base, use_load=False, use_switch=False), confident=0.3)
    assert len(reasons(engine)) == 3


def test_loading_can_go_exit_by_exit() -> None:
    _, engine, _, _ = run(
        HeliosParameters(reassess_interval=1000, use_switch=False, load_step="next-exit"), confident=0.3
    )
    assert placements(engine)[2:] == ["small@2", "small@4", "small@6"]


def test_an_expensive_load_makes_the_other_reaction_win() -> None:
    """With free loads the faster placement wins; a cost on every change leaves the order, a cost on one reverses it."""
    free = repository()
    costly = Repository(free.candidates, free.budget_bytes, lambda old, new: 1e6 if new.model == "large" else 0.0)
    _, engine, _, _ = run(HeliosParameters(reassess_interval=1000), confident=0.3, repo=costly)
    assert reasons(engine)[3] == "load"
    costly = Repository(free.candidates, free.budget_bytes, lambda old, new: 1e6 if new.model == "small" else 0.0)
    _, engine, _, _ = run(HeliosParameters(reassess_interval=1000), confident=0.3, repo=costly)
    assert reasons(engine)[3] == "switch"


def test_no_breach_is_counted_on_confident_tokens_or_full_models() -> None:
    controller, engine, _, _ = run(HeliosParameters(reassess_interval=1000), confident=0.81)
    assert controller.breaches == 0
    assert len(reasons(engine)) == 3


def test_switching_evaluation_off_trusts_the_repository() -> None:
    _, engine, _, _ = run(HeliosParameters(use_evaluation=False))
    assert placements(engine) == ["small@2"]
    assert not any(a.is_probe for a in engine.actions if isinstance(a, Run))


def test_switching_greedy_depth_off_serves_the_full_model() -> None:
    _, engine, _, _ = run(HeliosParameters(use_greedy_depth=False, reassess_interval=1000))
    assert placements(engine) == ["small@6", "large@12", "small@6"]


def test_one_candidate_at_full_coverage_is_the_early_exit_baseline_after_its_probe() -> None:
    _, engine, _, _ = run(
        HeliosParameters(candidates=("small",), coverage=1.0, use_evaluation=False, use_reassess=False)
    )
    assert placements(engine) == ["small@6"]
    assert {a.exits.kind for a in engine.actions if isinstance(a, Run)} == {"threshold"}


def test_ties_go_to_the_smaller_model() -> None:
    same = {d: performance(100) for d in (2, 4, 6)}
    small = Candidate(SMALL, same, {2: 1.0})
    large = Candidate(LARGE, {d: performance(100.5) for d in (4, 8, 12)}, {4: 1.0})
    repo = Repository({"small": small, "large": large}, 100_000, lambda old, new: 0.0)
    _, engine, _, _ = run(HeliosParameters(use_evaluation=False), repo=repo)
    assert placements(engine) == ["small@2"]
    _, engine, _, _ = run(HeliosParameters(use_evaluation=False, tie_tolerance=0.0), repo=repo)
    assert placements(engine) == ["large@4"]


def test_candidates_that_do_not_fit_are_left_out_and_none_is_an_error() -> None:
    controller = Helios(repository(budget=8_000), HeliosParameters())
    assert controller.candidates == ["small"]
    with pytest.raises(InputError, match="no candidate fits"):
        Helios(repository(budget=3_000), HeliosParameters())


@pytest.mark.parametrize(
    ("limits", "left_out", "reason"),
    [
        (Limits(), None, ""),
        (Limits(ttft_s=0.005), "large", "TTFT of 6.7 ms at best, 5.0 ms asked for"),
        (Limits(perplexity=2.0), None, ""),
        (Limits(longest_tokens=400), "large", "no KV for a request of 400 tokens"),
    ],
    ids=str,
)
def test_limits_make_the_shortlist(limits: Limits, left_out: str | None, reason: str) -> None:
    """large answers in 1 / 150 s at best; its 12,500 B leave 7,500 B: 19 blocks of 384 B, 304 tokens."""
    found = repository(budget=20_000).shortlist("throughput", 3, (), limits)
    assert found.names == [n for n in ("small", "large") if n != left_out]
    assert list(found.refused) == ([left_out] if left_out else [])
    assert reason in "".join(found.refused.values())
    assert found.explain()[0].startswith(f"{found.names[0]}: candidate 1")


def test_every_model_that_is_no_candidate_is_told_why() -> None:
    other = Candidate(replace(LARGE, name="other", vocabulary="w"), repository().candidates["large"].offline, {4: 1.0})
    repo = Repository({**repository().candidates, "other": other}, 100_000, lambda old, new: 0.0)
    found = repo.shortlist("throughput", 1)
    assert found.names == ["small"]
    assert found.refused["large"] == "not among the 1 best by throughput"
    assert found.refused["other"] == "another tokenizer or vocabulary than small, the best by throughput"
    mixed = repo.shortlist("throughput", 3, one_vocabulary=False)
    assert sorted(mixed.names) == ["large", "other", "small"]
    assert not mixed.refused
    assert sorted(Helios(repo, HeliosParameters(use_tokenizer_rule=False)).candidates) == sorted(mixed.names)
    assert Helios(repo, HeliosParameters()).candidates == ["small", "large"]
    named = repo.shortlist("throughput", 3, ("large",))
    assert named.refused["small"] == "not among the scenario's candidates"


def test_the_slo_counts_for_the_shortlist_where_it_is_asked_to() -> None:
    base = repository()
    repo = Repository(base.candidates, base.budget_bytes, base.load_seconds, Limits(ttft_s=0.005))
    assert Helios(repo, HeliosParameters()).candidates == ["small", "large"]
    controller = Helios(repo, HeliosParameters(shortlist_by_slo=True))
    assert controller.candidates == ["small"]
    assert "large" in controller.take_notes()[0].detail["refused"]
    with pytest.raises(InputError, match=r"perplexity of 2\.000 at best, 1\.500 asked for"):
        Helios(repo, HeliosParameters(max_perplexity=1.5))


def test_limits_that_limit_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"controller\.shortlist_by_slo: has no effect"):
        Helios(repository(), HeliosParameters(shortlist_by_slo=True))
    for value in (0.5, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"controller\.max_perplexity"):
            HeliosParameters(max_perplexity=value)


def test_energy_needs_energy_figures() -> None:
    with pytest.raises(InputError, match="no energy figures"):
        Helios(repository(), HeliosParameters(objective="energy"))


@pytest.mark.parametrize(("kind", "expected"), [("sliding", 2), ("tumbling", 1), ("none", 4)])
def test_breach_windows(kind: str, expected: int) -> None:
    counter = BreachCounter(kind, 4)  # type: ignore[arg-type]
    for is_breach in (True, True, True, False, False, True):
        counter.add(is_breach)
    assert counter.count == expected
    counter.reset()
    assert counter.count == 0


@pytest.mark.parametrize("in_flight", ["boundary", "reprefill", "extend"])
def test_every_request_ends_whatever_happens_to_those_in_flight(in_flight: str) -> None:
    parameters = HeliosParameters(reassess_interval=25, in_flight=in_flight, use_switch=False, load_step="next-exit")  # type: ignore[arg-type]
    _, engine, _, _ = run(parameters, confident=0.3, requests=80)
    assert sum(engine.generated.values()) == 80 * 8
    kept = [a.kept for a in engine.actions if isinstance(a, Load) and a.kept]
    assert bool(kept) == (in_flight == "extend")


@dataclass
class _Told:
    """Tokens of a stride, given."""

    exit_layers: Any
    logprobs: Any
    requests: Any = None
    confidences: Any = None


def test_an_evaluation_counts_a_stride_as_its_steps() -> None:
    exits, logprobs = [2, 4, 6, 2, 2], np.log([0.9, 0.31, 0.77, 0.5, 0.123])
    seconds, rows, watts = [0.25, 0.125, 0.5], [2, 1, 2], 3.7
    power = StepPower(watts, watts, watts)
    steps = [StrideStep(s, 6, n, n, 0, n) for s, n in zip(seconds, rows, strict=True)]
    whole, single = Evaluation(), Evaluation()
    whole.add_stride(Stride(steps, [], power, _Told(np.array(exits), logprobs)))
    at = 0
    for s, n in zip(seconds, rows, strict=True):
        left, sums = tuple(exits[at : at + n]), tuple(logprobs[at : at + n].tolist())
        single.add_step(s, Tokens(tuple(range(n)), left, (0.5,) * n, sums, (False,) * n), watts * s)
        at += n
    assert whole.performance() == single.performance()
    assert whole.shares() == single.shares()


@pytest.mark.parametrize("kind", ["sliding", "tumbling", "none"])
@pytest.mark.parametrize("limit", [0, 3, 7])
def test_a_guard_trips_where_the_counter_would(kind: str, limit: int) -> None:
    """Shown many steps at once, the guard names the step in which counting token by token first exceeds the limit."""
    rng = np.random.default_rng(limit)
    for _ in range(50):
        rows = rng.integers(1, 5, size=12)
        confidences, ends = rng.random(rows.sum()), np.cumsum(rows)
        counter, token_by_token = (BreachCounter(kind, 8) for _ in range(2))  # type: ignore[arg-type]
        for is_breach in rng.random(5) < 0.4:
            counter.add(bool(is_breach))
            token_by_token.add(bool(is_breach))
        expected = None
        for at, confidence in enumerate(confidences):
            token_by_token.add(bool(confidence < 0.3))
            if token_by_token.count > limit:
                expected = int(np.searchsorted(ends, at, side="right"))
                break
        before = counter.count
        assert BreachGuard(counter, 0.3, limit).first_trip(confidences, ends) == expected
        assert counter.count == before
