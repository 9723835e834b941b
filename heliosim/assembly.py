"""From a scenario to a server: the one place where parts are put together, the same for simulated and live runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

from heliosim.costs import DISK_BYTE, STEP_SLOWDOWN
from heliosim.errors import InputError
from heliosim.exits.pricing import break_even
from heliosim.formats.profile import Profile
from heliosim.memory_model import MemoryNeeds, engine_needs
from heliosim.offline import build_repository
from heliosim.recorder import Recorder
from heliosim.scenario import Memory, Scenario
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.changes import Change
from heliosim.serving.controller import require_placeable
from heliosim.serving.kinds import Context
from heliosim.serving.loading import HostTier, Loading
from heliosim.serving.memory import MemoryPool
from heliosim.serving.ordered_batcher import OrderedBatcher
from heliosim.serving.ordering import Fcfs
from heliosim.serving.repository import Limits, Repository
from heliosim.serving.server import Server
from heliosim.types import ExitBatching, ExitRule, ModelSpec, tick

Repositories = Callable[[float, ExitBatching], Repository]
"""Offline figures of a scenario's models at a threshold and batch rule."""


def build_server(
    scenario: Scenario,
    profile: Profile,
    recorder: Recorder,
    max_stride: int = 1,
    known: Repositories | None = None,
    changes: Sequence[Change] | None = None,
) -> Server:
    """A server for a scenario. Sizes come from the profile, so simulated and live books are the same.

    ``max_stride``: decode steps an engine may do in one action. ``known``, ``changes``: ``repositories`` and
    ``changes_of`` the same scenario and profile, for servers that share them.

    Raises InputError for unknown models and changes that cannot be served behind, UnknownNameError for unknown
    controllers, MemoryBudgetError if not even one layer fits.
    """
    models = {name: profile.spec(name) for name in scenario.models}
    needs = needs_beside(scenario, profile)
    for spec in models.values():
        require_placeable(spec, min(spec.exits), scenario.memory.budget_bytes, needs.fixed)
    context = Context(models, known or repositories(scenario, profile), _break_evens(scenario, profile))
    controller = scenario.controller_kind().build(context)
    changes = changes_of(scenario, profile) if changes is None else changes
    check = getattr(controller, "check_changes", None)
    if check is not None:
        check(changes)
    batcher = build_batcher(scenario, needs.cap)
    pool = MemoryPool(scenario.memory.budget_bytes - needs.fixed)
    loading = loading_of(scenario.memory, models)
    loading.slows_steps = loading.overlaps and any(slowdowns(scenario, profile).values())
    less = partial(less_memory, scenario, profile)
    return Server(controller, batcher, pool, models, recorder, max_stride, loading, changes, less)


def changes_of(scenario: Scenario, profile: Profile) -> tuple[Change, ...]:
    """What a server is told during a run. Raises InputError for a parameter that the controller does not have."""
    kind, now, found = scenario.controller_kind(), scenario, []
    for change in scenario.changes:
        for name in ("objective", "max_perplexity"):
            if getattr(change, name) is not None and not hasattr(kind, name):
                problem = f"the controller {scenario.controller['kind']!r} has no {name}"
                where = f"changes at {change.at_s:g} s: {name}"
                raise InputError(where, getattr(change, name), problem, "Leave it out, or use helios.")
        now = now.behind(change)
        budget = None if change.memory is None else change.memory.budget_bytes
        detail, known = {"at_s": change.at_s, **change.detail}, repositories(now, profile)
        at_s, objective, perplexity = tick(change.at_s), change.objective, change.max_perplexity
        found.append(Change(at_s, budget, known, objective, perplexity, detail, needs_beside(now, profile).fixed))
    return tuple(found)


def less_memory(scenario: Scenario, profile: Profile, total_bytes: int, now: float) -> Change:
    """What a controller is told when a live engine finds that there are ``total_bytes`` for weights and KV."""
    aside = needs_beside(scenario, profile).fixed
    memory = scenario.memory.model_copy(update={"budget_bytes": total_bytes + aside})
    known = repositories(scenario.model_copy(update={"memory": memory}), profile)
    detail = {"budget_bytes": total_bytes + aside, "reason": "the device has no more"}
    return Change(now, total_bytes + aside, known, detail=detail, set_aside_bytes=aside)


def needs_beside(scenario: Scenario, profile: Profile) -> MemoryNeeds:
    """What the scenario's engine needs beside weights and KV for steps of its token budget."""
    return engine_needs([profile.facts.models[name] for name in scenario.models], scenario.batcher.token_budget)


def loading_of(memory: Memory, models: Mapping[str, ModelSpec]) -> Loading:
    """How weights come to a server's device."""
    host = None if memory.host_bytes is None else HostTier(memory.host_bytes, models)
    return Loading(memory.loads == "overlapped", memory.is_pipelined, host)


def load_costs(scenario: Scenario, profile: Profile) -> dict[str, Mapping[str, float]]:
    """Load coefficients of a scenario's models on its clock, bytes priced by where they wait.

    Raises InputError if the profile does not say what a byte from there takes.
    """
    memory = scenario.memory
    found: dict[str, Mapping[str, float]] = {}
    for name in scenario.models:
        costs = dict(profile.load_cost(name, scenario.clock))
        if memory.host != "pinned":
            costs["weights_byte"] = profile.seconds_per_byte(name, scenario.clock, memory.host)
        if memory.host_bytes is not None:
            costs[DISK_BYTE] = profile.seconds_per_byte(name, scenario.clock, "disk")
        slowdown = slowdowns(scenario, profile)[name]
        if slowdown is not None:
            costs[STEP_SLOWDOWN] = slowdown
        found[name] = costs
    return found


def slowdowns(scenario: Scenario, profile: Profile) -> dict[str, float | None]:
    """By model, a step's time beside a transfer over its time alone; None: the profile does not know."""
    fits = {name: profile.facts.models[name].load.get(scenario.clock) for name in scenario.models}
    return {name: None if fit is None else fit.step_slowdown for name, fit in fits.items()}


def build_batcher(scenario: Scenario, cap: int | None = None) -> ContinuousBatcher:
    """The batcher of a scenario, of at most ``cap`` rows. Raises InputError for an order that needs predictions where
    none are made.
    """
    spec, order = scenario.batcher, scenario.batcher.the_order()
    rows = spec.max_batch if cap is None else min(spec.max_batch, cap)
    if isinstance(order, Fcfs):
        return ContinuousBatcher(rows, spec.token_budget, spec.watermark)
    if order.needs_prediction and scenario.workload.predictor is None:
        remedy = "Give workload.predictor a kind; kind none takes max_tokens for the length."
        raise InputError("batcher.order", (spec.order or {})["kind"], "needs predicted lengths", remedy)
    return OrderedBatcher(order, rows, spec.token_budget, spec.watermark)


def _break_evens(scenario: Scenario, profile: Profile) -> Callable[[str, ExitRule], float]:
    """Rows x layers that a regrouping must save by model and rule, at half the context the costs were fitted to."""

    def at(model: str, rule: ExitRule) -> float:
        cost = profile.step_cost(model, scenario.clock)
        return break_even(cost, rule, cost.max_context // 2)

    return at


def _limits(scenario: Scenario) -> Limits:
    """The scenario's limits per request, as far as a repository has figures for them."""
    slo = scenario.slo
    if slo is None:
        return Limits()
    ttft_ms, tpot_ms = slo.ttft_ms, slo.tpot_ms
    return Limits(None if ttft_ms is None else ttft_ms / 1e3, None if tpot_ms is None else tpot_ms / 1e3)


def repositories(scenario: Scenario, profile: Profile) -> Repositories:
    """Offline figures, worked out once for each threshold and batch rule that is asked for."""

    @cache
    def at(threshold: float, batching: ExitBatching) -> Repository:
        needs, max_batch = needs_beside(scenario, profile), scenario.batcher.max_batch
        budget = scenario.memory.budget_bytes - needs.fixed
        return build_repository(
            profile,
            scenario.models,
            scenario.clock,
            budget,
            max_batch if needs.cap is None else min(max_batch, needs.cap),
            threshold,
            batching,
            loads=load_costs(scenario, profile),
            overlaps=scenario.memory.loads == "overlapped",
            limits=_limits(scenario),
        )

    return at
