"""From a scenario to a server: the one place where parts are put together, the same for simulated and live runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from heliosim.exits.pricing import break_even
from heliosim.formats.profile import Profile
from heliosim.offline import build_repository
from heliosim.recorder import Recorder
from heliosim.scenario import Scenario
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.kinds import Context
from heliosim.serving.memory import MemoryPool
from heliosim.serving.repository import Repository
from heliosim.serving.server import Server, require_placeable
from heliosim.types import ExitBatching, ExitRule

Repositories = Callable[[float, ExitBatching], Repository]
"""Offline figures of a scenario's models at a threshold and batch rule."""


def build_server(
    scenario: Scenario,
    profile: Profile,
    recorder: Recorder,
    max_stride: int = 1,
    known: Repositories | None = None,
) -> Server:
    """A server for a scenario. Sizes come from the profile, so simulated and live books are the same.

    ``max_stride``: decode steps an engine may do in one action. ``known``: ``repositories`` of the same scenario and
    profile, for servers that share them.

    Raises InputError for unknown models, UnknownNameError for unknown controllers, MemoryBudgetError if not even one
    layer fits.
    """
    models = {name: profile.spec(name) for name in scenario.models}
    for spec in models.values():
        require_placeable(spec, min(spec.exits), scenario.memory.budget_bytes)
    context = Context(models, known or repositories(scenario, profile), _break_evens(scenario, profile))
    controller = scenario.controller_kind().build(context)
    batcher = ContinuousBatcher(scenario.batcher.max_batch, scenario.batcher.token_budget, scenario.batcher.watermark)
    return Server(controller, batcher, MemoryPool(scenario.memory.budget_bytes), models, recorder, max_stride)


def _break_evens(scenario: Scenario, profile: Profile) -> Callable[[str, ExitRule], float]:
    """Rows x layers that a regrouping must save by model and rule, at half the context the costs were fitted to."""

    def at(model: str, rule: ExitRule) -> float:
        cost = profile.step_cost(model, scenario.clock)
        return break_even(cost, rule, cost.max_context // 2)

    return at


def repositories(scenario: Scenario, profile: Profile) -> Repositories:
    """Offline figures, worked out once for each threshold and batch rule that is asked for."""

    @cache
    def at(threshold: float, batching: ExitBatching) -> Repository:
        budget, max_batch = scenario.memory.budget_bytes, scenario.batcher.max_batch
        return build_repository(profile, scenario.models, scenario.clock, budget, max_batch, threshold, batching)

    return at
