"""One replica of a fleet: its lives, what it does now, the requests it has.

Several things may be due at one moment of a fleet; ``Turn`` says which comes first, whatever order SimPy was told of
them. So a run depends on its scenario alone. A replica acts as a single server does (``simulate.py``): requests that
arrive during a step are handed over behind it.

Its engine may do many steps at once, further than anything is known of. When a request is routed here meanwhile, or the
replica fails, the later steps are taken back (``SimEngine.cut``): they never happened. What others see of a replica is
what is true at that time, wherever in such a stride it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import simpy

from heliosim.engines.base import Engine
from heliosim.engines.sim import SimEngine
from heliosim.flight import Flight
from heliosim.lost_work import idle_loss, lost_step
from heliosim.recorder import TableRecorder
from heliosim.serving.routing import MOST_REPLICAS
from heliosim.serving.server import Server
from heliosim.types import Arrival, Bytes, Directive, Idle, RequestId, Run, Seconds, Served


class Turn(IntEnum):
    """What happens first at one moment of time."""

    FINISH = 1
    RESTART = 2
    FAIL = 3
    ROUTE = 4
    ACT = 5


class Moment(simpy.Event):  # type: ignore[misc]
    """``then`` is called ``delay`` seconds from now, in its turn; within a turn replicas come in order."""

    def __init__(
        self, env: simpy.Environment, delay: Seconds, turn: Turn, then: Callable[[], None], index: int = 0
    ) -> None:
        self.env, self._ok, self._value, self._defused = env, True, None, False
        self.callbacks = [lambda _: then()]
        env.schedule(self, turn * MOST_REPLICAS + index, delay)


@dataclass(frozen=True)
class Life:
    """What serves while a replica is up, from its start to its failure or the end of the run."""

    server: Server
    engine: Engine
    recorder: TableRecorder


class Surroundings(Protocol):
    """What a replica needs of its fleet."""

    env: simpy.Environment

    @property
    def max_ends(self) -> int | None:
        """How many requests may end before their senders are told; None: they will not react."""
        ...

    def on_progress(self, now: Seconds, /) -> None: ...

    def horizon_s(self, received: int, since_s: Seconds) -> Seconds | None:
        """How far strides should go, given how many requests a replica received since a time; results do not depend
        on it.
        """
        ...

    def left(self, record: Served) -> None:
        """A request is done, served or refused."""
        ...


class Replica:
    """One place for a server: the lives it has had, what it does now, the requests it has.

    ``held``: requests that were routed here, but for those that left with actions that are over.
    """

    def __init__(self, fleet: Surroundings, index: int, name: str, begin: Callable[[int], Life]) -> None:
        self.fleet, self.index, self.name, self._begin = fleet, index, name, begin
        self.lives: list[Life] = []
        self.life: Life | None = None
        self.flight: Flight | None = None
        self.held: dict[RequestId, Arrival] = {}
        self._inbox: list[Arrival] = []
        self._will_act = False
        self._received, self._since_s = 0, 0.0

    def start(self) -> None:
        """Come up, cold."""
        self.life = self.begin()
        self._received, self._since_s, self._will_act = 0, self.fleet.env.now, False
        self._act_next(self.life)

    def begin(self) -> Life:
        """A new life, cold."""
        life = self._begin(len(self.lives))
        self.lives.append(life)
        return life

    def receive(self, arrival: Arrival) -> None:
        """Take a request: it is handed to the server behind the step under way, or wakes it."""
        assert self.life is not None
        self.held[arrival.request.id] = arrival
        self._inbox.append(arrival)
        self._received += 1
        if self.flight is None:
            self._act_next(self.life)
        else:
            self._end_stride(self.life, self.flight)

    def fail(self) -> list[Arrival]:
        """Stop at once; returns the requests it had, in order of arrival."""
        life, flight, now = self.life, self.flight, self.fleet.env.now
        assert life is not None
        server = life.server
        if flight is None:
            step = idle_loss(server, now)
        else:
            kv_used, done = self.kv_used_bytes, flight.steps_done(now)
            self._keep_steps(life, flight, done)
            step = lost_step(server, flight, done, kv_used, now)
        running = server.batcher.running
        placement = None if server.placement is None else str(server.placement)
        detail = {"running": running, "waiting": len(self.held) - running, "placement": placement}
        life.recorder.step(step)
        life.recorder.event(now, "failed", {**detail, "lost_s": step.seconds})
        lost = sorted(self.held.values(), key=by_arrival)
        self.life, self.flight, self._inbox, self.held = None, None, [], {}
        return lost

    # -- what it does -------------------------------------------------------------------------------------------------

    def _act_next(self, life: Life) -> None:
        """Act when it is this replica's turn, once."""
        if not self._will_act:
            self._will_act = True
            Moment(self.fleet.env, 0.0, Turn.ACT, lambda: self._act(life), self.index)

    def _act(self, life: Life) -> None:
        if life is not self.life:
            return  # it failed meanwhile
        self._will_act = False
        now = self.fleet.env.now
        self._take_inbox(life)
        directive = life.server.ask(now)
        if directive is not None:
            self._perform(life, directive, now)

    def _perform(self, life: Life, directive: Directive, now: Seconds) -> None:
        fleet = self.fleet
        action = life.server.act(directive, now, fleet.horizon_s(self._received, self._since_s), fleet.max_ends)
        self._refuse(life)
        if not isinstance(action, Idle):
            self._take_off(life, Flight(action, life.engine.perform(action), now))

    def _take_off(self, life: Life, flight: Flight) -> None:
        self.flight = flight
        env = self.fleet.env
        Moment(env, flight.end_s - env.now, Turn.FINISH, lambda: self._land(life, flight), self.index)

    def _land(self, life: Life, flight: Flight) -> None:
        if flight is not self.flight:
            return  # it ended earlier
        self.flight = None
        env = self.fleet.env
        self._leave(life.server.complete(flight.action, flight.outcome, env.now))
        self.fleet.on_progress(env.now)
        if env.peek() > env.now:
            self._act(life)  # nothing else is due at this moment
        else:
            self._act_next(life)

    def _end_stride(self, life: Life, flight: Flight) -> None:
        """Have a stride end with the step under way."""
        now = self.fleet.env.now
        if flight.is_in_last_step(now):
            return
        self._take_off(life, flight.cut_to(as_cutter(life.engine).cut(flight.steps_begun(now))))

    def _keep_steps(self, life: Life, flight: Flight, steps: int) -> None:
        """Book the first steps of a stride, those that ended before a failure."""
        if steps:
            assert isinstance(flight.action, Run)
            kept = flight.cut_to(as_cutter(life.engine).cut(steps))
            self._leave(life.server.complete(flight.action, kept.outcome, kept.end_s))

    def _take_inbox(self, life: Life) -> None:
        if not self._inbox:
            return
        arrivals, self._inbox = self._inbox, []
        for arrival in arrivals:
            life.engine.accept(arrival)
            life.server.submit(arrival.request, self.fleet.env.now)
        self._refuse(life)

    def _refuse(self, life: Life) -> None:
        refused = life.server.take_refused()
        for record in refused:
            life.engine.forget(record.id)
        self._leave(refused)

    def _leave(self, records: Sequence[Served]) -> None:
        for record in records:
            del self.held[record.id]
            self.fleet.left(record)

    # -- what others see ----------------------------------------------------------------------------------------------

    @property
    def ended(self) -> int:
        """Requests that have ended in the stride under way."""
        return 0 if self.flight is None else self.flight.ended(self.fleet.env.now)

    @property
    def kv_used_bytes(self) -> Bytes:
        """KV held by the step under way."""
        life, flight = self.life, self.flight
        if life is None:
            return 0
        pool = life.server.pool
        return pool.kv_used_bytes if flight is None else flight.kv_blocks(pool, self.fleet.env.now) * pool.block_bytes


def as_cutter(engine: Engine) -> SimEngine:
    assert isinstance(engine, SimEngine), "only a simulated engine does several steps at once"
    return engine


class Seen:
    """What a router may see of a replica (``routing.ReplicaStatus``)."""

    __slots__ = ("_replica",)

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    @property
    def name(self) -> str:
        return self._replica.name

    @property
    def is_up(self) -> bool:
        return self._replica.life is not None

    @property
    def outstanding(self) -> int:
        replica = self._replica
        flight = replica.flight
        return len(replica.held) - (0 if flight is None else flight.ended(replica.fleet.env.now))

    @property
    def waiting(self) -> int:
        return self.outstanding - self.running

    @property
    def running(self) -> int:
        life = self._replica.life
        return 0 if life is None else life.server.batcher.running - self._replica.ended

    @property
    def kv_used_bytes(self) -> Bytes:
        return self._replica.kv_used_bytes

    @property
    def kv_total_bytes(self) -> Bytes:
        life = self._replica.life
        return 0 if life is None else life.server.pool.kv_total_bytes


def by_arrival(arrival: Arrival) -> tuple[Seconds, RequestId]:
    """What puts requests in order of arrival."""
    return arrival.request.arrival_s, arrival.request.id
