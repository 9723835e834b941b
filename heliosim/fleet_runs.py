"""From a scenario with a fleet to its tables: replicas built from their groups, routed, merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heliosim.assembly import build_server, changes_of, repositories
from heliosim.behaviour import Behaviour
from heliosim.engines.sim import SimEngine
from heliosim.errors import about
from heliosim.fleet import FleetRun, outage
from heliosim.fleet_tables import merged
from heliosim.formats.profile import Profile, ProfileKind, least_sure, shared_hash
from heliosim.profile_view import open_profile
from heliosim.recorder import TableRecorder, Tables
from heliosim.registry import ROUTERS
from heliosim.replica import Life
from heliosim.scenario import Fleet, ReplicaGroup, Scenario
from heliosim.streams import stream
from heliosim.workload import build

if TYPE_CHECKING:
    import numpy as np

    from heliosim.runs import OnProgress


@dataclass
class FleetBuilder:
    """What replicas of one scenario are built from. ``profile``: the scenario's own; None: opened when needed.

    ``engines``: all that were built so far.
    """

    scenario: Scenario
    fleet: Fleet
    profile: Profile | None
    behaviour: Behaviour | None
    max_stride: int

    def __post_init__(self) -> None:
        self.engines: list[SimEngine] = []
        self._opened: dict[str, Profile] = {} if self.profile is None else {self.scenario.profile: self.profile}

    def profile_of(self, group: ReplicaGroup) -> Profile:
        name = group.profile or self.scenario.profile
        if name not in self._opened:
            self._opened[name] = open_profile(name)
        return self._opened[name]

    @property
    def profile_hash(self) -> str:
        """The profile's, if all replicas have the same one; else a digest of the groups', in order."""
        return shared_hash([self.profile_of(group).hash for group in self.fleet.replicas])

    @property
    def profile_kind(self) -> ProfileKind:
        """That of the replicas' profile which is farthest from a measurement."""
        return least_sure(self.profile_of(group).facts.kind for group in self.fleet.replicas)

    def members(self) -> list[tuple[str, Callable[[int], Life]]]:
        """Name of each replica, and what begins a life of it."""
        found: list[tuple[str, Callable[[int], Life]]] = []
        for group in self.fleet.replicas:
            begin = self._beginning(group)
            for name in group.replicas:
                found.append((name, _of(begin, name, len(found))))
        return found

    def _beginning(self, group: ReplicaGroup) -> Callable[[str, int, int], Life]:
        from heliosim.runs import sim_engine

        own = self.scenario.of_group(group)
        with about(group.label):
            profile = self.profile_of(group)
        known = repositories(own, profile)
        with about(group.label):
            changes = changes_of(own, profile)

        def begin(name: str, index: int, life: int) -> Life:
            recorder = TableRecorder(replica=name)
            noise = () if (index, life) == (0, 0) else (index, life)
            with about(group.label):
                engine = sim_engine(own, profile, self.behaviour, self.max_stride > 1, noise)
                server = build_server(own, profile, recorder, self.max_stride, known, changes)
            self.engines.append(engine)
            return Life(server, engine, recorder)

        return begin


def _of(begin: Callable[[str, int, int], Life], name: str, index: int) -> Callable[[int], Life]:
    return lambda life: begin(name, index, life)


@dataclass(frozen=True)
class FleetOutcome:
    """What a fleet's run leaves: its recorders in order of replicas and lives, retries by request, figures of the host.

    The last recorder is the dispatcher's. ``profiles``: by group, with how many replicas it has.
    """

    recorders: tuple[TableRecorder, ...]
    retries: dict[int, int]
    profile_hash: str
    profile_kind: ProfileKind
    extrapolated_steps: int
    profiles: dict[str, tuple[Profile, int]]

    def tables(self, tasks: dict[int, str]) -> Tables:
        """The tables of the whole fleet. ``tasks`` names the task of each request."""
        return merged(self.recorders, self.retries, tasks)


def run_fleet(
    scenario: Scenario,
    profile: Profile | None,
    behaviour: Behaviour | None,
    on_progress: OnProgress | None,
    max_stride: int,
) -> FleetOutcome:
    """Simulate a scenario that has a fleet."""
    fleet = scenario.fleet
    assert fleet is not None
    builder = FleetBuilder(scenario, fleet, profile, behaviour, max_stride)

    def streams(*name: str | int) -> np.random.Generator:
        return stream(scenario.seed, "router", *name)

    places = {name: k for k, name in enumerate(fleet.names)}
    outages = [outage(places[f.replica], f.at_s, f.restart_after_s) for f in fleet.failures]
    run = FleetRun(
        builder.members(),
        ROUTERS.get(fleet.router)(streams),
        build(scenario.workload, scenario.seed),
        sorted(outages, key=lambda o: (o.at_s, o.index)),
        on_progress or (lambda now: None),
        TableRecorder(replica=None),
        may_hurry=max_stride > 1,
    )
    run.run()
    lives = [life.recorder for replica in run.replicas for life in replica.lives]
    extrapolated = sum(engine.extrapolated_steps for engine in builder.engines)
    profiles = {group.name: (builder.profile_of(group), group.count) for group in fleet.replicas}
    return FleetOutcome(
        (*lives, run.recorder), run.retries, builder.profile_hash, builder.profile_kind, extrapolated, profiles
    )
