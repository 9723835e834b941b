"""The SimPy driver of a fleet: replicas, a dispatcher that reads the source and asks the router, and what befalls them.

A replica that fails loses its step, its KV, its weights and its controller's memory. The requests it had are routed
anew at once, in order of arrival, and begin anew where they get to; while no replica is up requests wait here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import simpy

from heliosim.drive import without_collector
from heliosim.engines.sim import SimEngine
from heliosim.errors import InputError
from heliosim.herd import Herd
from heliosim.recorder import TableRecorder
from heliosim.replica import Life, Moment, Replica, Seen, Turn, by_arrival
from heliosim.serving.routing import MOST_REPLICAS, Router
from heliosim.simulate import simulate_server
from heliosim.types import Arrival, RequestId, Seconds, Served, tick
from heliosim.workload import OpenLoop, Source

NO_REPLICA = "no replica is up"


@dataclass(frozen=True)
class Outage:
    """Replica ``index`` fails at ``at_s`` and comes back at ``back_s`` (None: never)."""

    index: int
    at_s: Seconds
    back_s: Seconds | None


@dataclass
class FleetRun:
    """A fleet on its way through a source.

    ``members``: name of each replica and what begins a life of it, given the number of lives it had. ``recorder``
    keeps what happens at the dispatcher: requests refused there. ``gaps``: how far strides go, see ``horizon_s``.
    """

    members: Sequence[tuple[str, Callable[[int], Life]]]
    router: Router
    source: Source
    outages: Sequence[Outage] = ()
    on_progress: Callable[[float], None] = lambda now: None
    recorder: TableRecorder = field(default_factory=TableRecorder)
    gaps: float = 1.0
    may_hurry: bool = True

    def __post_init__(self) -> None:
        if len(self.members) > MOST_REPLICAS:
            raise ValueError(f"{len(self.members)} replicas; at most {MOST_REPLICAS}")
        self.env = simpy.Environment()
        self.replicas = [Replica(self, k, name, begin) for k, (name, begin) in enumerate(self.members)]
        self.retries: dict[RequestId, int] = {}
        self._seen = tuple(Seen(replica) for replica in self.replicas)
        self._waiting: list[Arrival] = []
        self._lost: list[tuple[TableRecorder, list[RequestId]]] = []
        self._due_s: Seconds | None = None
        self._up = 0
        self._last_s: Seconds = 0.0

    def run(self) -> None:
        """To the end of the source. Checks every server's books."""
        if self.may_hurry and not self.outages and isinstance(self.source, OpenLoop):
            looks = getattr(self.router, "looks_at_load", None)  # a router that does not say is shown what there is
            is_blind = looks is False or (looks is True and len(self.replicas) == 1)
            with without_collector():
                self._run_apart(self.source) if is_blind else self._run_herd(self.source)
            return
        for outage in self.outages:
            self._expect(outage)
        for replica in self.replicas:
            replica.start()
        self._up = len(self.replicas)
        self._expect_arrival()
        self.env.run()
        while self._waiting:  # who is refused may ask again
            self._refuse_waiting()
            self.env.run()
        for replica in self.replicas:
            assert not replica.held, f"{replica.name} still has requests {sorted(replica.held)[:5]}"
            if replica.life is not None:
                replica.life.server.stop()

    def _run_apart(self, source: OpenLoop) -> None:
        """Each replica alone, with the requests that the router gives it."""
        lives = self._begin_all()
        for life, share in zip(lives, self._shares(source), strict=True):
            simulate_server(life.server, life.engine, share, self.on_progress)

    def _shares(self, source: OpenLoop) -> list[OpenLoop]:
        """The requests of each replica, where the router does not look at any."""
        if len(self.replicas) == 1:
            return [source]
        arrivals, deal = source.take(float("inf")), getattr(self.router, "deal", None)
        if deal is not None:
            return [OpenLoop.of_sorted(arrivals[share]) for share in deal(len(arrivals), len(self.replicas))]
        everybody = [_Unseen(replica.name) for replica in self.replicas]
        shares: list[list[Arrival]] = [[] for _ in self.replicas]
        for arrival in arrivals:
            shares[self.router.choose(arrival.request, everybody)].append(arrival)
        return [OpenLoop.of_sorted(share) for share in shares]

    def _begin_all(self) -> list[Life]:
        """A life for every replica; engines that are alike work out a step once."""
        lives = [replica.begin() for replica in self.replicas]
        kinds: list[SimEngine] = []
        for engine in (life.engine for life in lives if isinstance(life.engine, SimEngine)):
            if not any(kind.share(engine) for kind in kinds):
                kinds.append(engine)
        return lives

    def _run_herd(self, source: OpenLoop) -> None:
        """Each replica alone from one arrival to the next."""
        names = [replica.name for replica in self.replicas]
        Herd(names, self._begin_all(), self.router, self.gaps, self.on_progress).run(source.take(float("inf")))

    # -- what replicas need -----------------------------------------------------------------------------------------

    @property
    def max_ends(self) -> int | None:
        return 1 if self.source.is_answering else None

    def horizon_s(self, received: int, since_s: Seconds) -> Seconds | None:
        """The next arrival where all come to one replica; else ``gaps`` times the mean gap this replica has seen: most
        strides end with an arrival, and what was planned beyond it is taken back.
        """
        next_s = self.source.next_s
        if len(self.replicas) == 1 or next_s is None or not received:
            return next_s
        now = self.env.now
        return max(next_s, tick(now + self.gaps * (now - since_s) / received))

    def left(self, record: Served) -> None:
        self._note(record.finish_s)
        self.source.finished(record.id, record.finish_s)
        self._expect_arrival()

    def _note(self, at_s: Seconds) -> None:
        """Something happened to a request or a replica."""
        if at_s > self._last_s:
            self._last_s = at_s

    # -- the dispatcher ---------------------------------------------------------------------------------------------

    def _expect_arrival(self) -> None:
        """Wake up for the source's next arrival."""
        due = self.source.next_s
        if due is not None and (self._due_s is None or due < self._due_s):
            self._due_s = due
            self._route_in(max(0.0, due - self.env.now))

    def _route_in(self, delay: Seconds) -> None:
        Moment(self.env, delay, Turn.ROUTE, self._route)

    def _route(self) -> None:
        """Hand out who waits here and who arrives now, in order of arrival."""
        now = self.env.now
        if self._due_s is not None and self._due_s <= now:
            self._due_s = None
        arriving = self.source.take(now)
        if arriving:
            self._note(arriving[-1].request.arrival_s)
        due = self._waiting + arriving if self._waiting else arriving
        self._waiting = [] if self._up else due
        went: dict[RequestId, str] = {}
        for arrival in due if self._up else ():
            replica = self._choose(arrival)
            replica.receive(arrival)
            if self._lost:
                went[arrival.request.id] = replica.name
        while self._lost:
            recorder, requests = self._lost.pop(0)
            to = dict(Counter(went[r] for r in requests if r in went))
            recorder.event(now, "rerouted", {"requests": len(requests), "to": to})
        self._expect_arrival()

    def _choose(self, arrival: Arrival) -> Replica:
        index = self.router.choose(arrival.request, self._seen)
        replica = self.replicas[index]
        if replica.life is None:
            remedy = "Correct the router: it must choose a replica that is up."
            raise InputError("fleet.router", replica.name, "the router chose a replica that is down", remedy)
        return replica

    def _refuse_waiting(self) -> None:
        """The run is over for those no replica will ever take."""
        refused, self._waiting = self._waiting, []
        for arrival in refused:
            record = _refused(arrival, self._last_s)
            self.recorder.served(record)
            self.left(record)

    # -- failures ---------------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        """Whether every request has left; what befalls a replica then is no part of the run."""
        return self.source.is_exhausted and not self._waiting and not any(replica.held for replica in self.replicas)

    def _expect(self, outage: Outage) -> None:
        Moment(self.env, outage.at_s, Turn.FAIL, lambda: self._fail(outage), outage.index)

    def _fail(self, outage: Outage) -> None:
        replica, now = self.replicas[outage.index], self.env.now
        if self._is_over():
            return
        life = replica.life
        assert life is not None, f"{replica.name} is down already"
        lost = replica.fail()
        self._note(now)
        self._up -= 1
        if lost:
            for arrival in lost:
                self.retries[arrival.request.id] = self.retries.get(arrival.request.id, 0) + 1
            self._waiting = sorted(self._waiting + lost, key=by_arrival)
            self._lost.append((life.recorder, [arrival.request.id for arrival in lost]))
            self._route_in(0.0)
        if outage.back_s is not None:
            Moment(self.env, outage.back_s - now, Turn.RESTART, lambda: self._restart(replica), outage.index)

    def _restart(self, replica: Replica) -> None:
        if self._is_over():
            return
        now = self.env.now
        replica.start()
        self._note(now)
        self._up += 1
        replica.lives[-1].recorder.event(now, "restarted", {"requests_waiting": len(self._waiting)})
        self._route_in(0.0)


@dataclass(frozen=True)
class _Unseen:
    """A replica to a router that does not look."""

    name: str
    is_up: bool = True
    outstanding: int = 0
    waiting: int = 0
    running: int = 0
    kv_used_bytes: int = 0
    kv_total_bytes: int = 0


def _refused(arrival: Arrival, now: Seconds) -> Served:
    request = arrival.request
    return Served(
        id=request.id,
        arrival_s=request.arrival_s,
        admitted_s=None,
        first_token_s=None,
        finish_s=now,
        prompt_tokens=request.prompt_tokens,
        max_tokens=request.max_tokens,
        output_tokens=0,
        status="refused",
        refusal=NO_REPLICA,
        priority=request.priority,
        predicted_tokens=request.predicted_tokens,
    )


def outage(index: int, at_s: Seconds, restart_after_s: Seconds | None) -> Outage:
    """An outage at ticks of the clock."""
    return Outage(index, tick(at_s), None if restart_after_s is None else tick(at_s + restart_after_s))
