"""From a scenario to a server: the one place where parts are put together, the same for simulated and live runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from heliosim.formats.profile import ClockName, Profile
from heliosim.offline import build_repository
from heliosim.recorder import Recorder
from heliosim.scenario import Scenario
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.kinds import Context
from heliosim.serving.memory import MemoryPool
from heliosim.serving.repository import Repository
from heliosim.serving.server import Server, require_placeable
from heliosim.types import ExitBatching


def build_server(scenario: Scenario, profile: Profile, recorder: Recorder, max_stride: int = 1) -> Server:
    """A server for a scenario. Sizes come from the profile, so simulated and live books are the same.

    ``max_stride``: decode steps an engine may do in one action.

    Raises InputError for unknown models, UnknownNameError for unknown controllers, MemoryBudgetError if not even one
    layer fits.
    """
    models = {name: profile.spec(name) for name in scenario.models}
    for spec in models.values():
        require_placeable(spec, min(spec.exits), scenario.memory.budget_bytes)
    context = Context(models, _repository(scenario, profile, scenario.clock))
    controller = scenario.controller_kind().build(context)
    batcher = ContinuousBatcher(scenario.batcher.max_batch, scenario.batcher.token_budget, scenario.batcher.watermark)
    return Server(controller, batcher, MemoryPool(scenario.memory.budget_bytes), models, recorder, max_stride)


def _repository(scenario: Scenario, profile: Profile, clock: ClockName) -> Callable[[float, ExitBatching], Repository]:
    @cache
    def at(threshold: float, batching: ExitBatching) -> Repository:
        budget, max_batch = scenario.memory.budget_bytes, scenario.batcher.max_batch
        return build_repository(profile, scenario.models, clock, budget, max_batch, threshold, batching)

    return at
