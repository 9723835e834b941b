"""A fleet in which nobody fails and no sender waits for an answer, in a hurry.

Between two arrivals replicas know nothing of each other: each goes on by itself up to the next one, in a sprint where
it can, and only those in which something ends by then are touched. A request is then routed on what is true of every
replica at that moment. What happens at one moment, and in which order, is what ``fleet.py`` has SimPy do: steps end,
requests are routed, replicas act. Its tables are the same to the last bit, which tests demand of random scenarios.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from heapq import heappop, heappush
from math import inf

from heliosim.flight import Flight
from heliosim.replica import Life, as_cutter
from heliosim.serving.routing import Router
from heliosim.sprint import Lead, Sprint, let_go, take_in
from heliosim.types import Arrival, Bytes, Directive, Idle, Seconds, tick


class Herd:
    """``lives`` behind a ``router``, with their ``names``. ``gaps``: how far strides go, in mean gaps between the
    requests of a replica; results do not depend on it.
    """

    def __init__(
        self,
        names: Sequence[str],
        lives: Sequence[Life],
        router: Router,
        gaps: float = 1.0,
        on_progress: Callable[[float], None] = lambda now: None,
    ) -> None:
        self.now: Seconds = 0.0
        self._router, self._on_progress = router, on_progress
        self._outstanding = [0] * len(lives)
        self._runners = [
            Runner(life, Lead(self._outstanding, place), name, gaps)
            for place, (name, life) in enumerate(zip(names, lives, strict=True))
        ]
        self._due: list[tuple[Seconds, int]] = []

    def run(self, arrivals: Sequence[Arrival]) -> None:
        """Serve them all; they are sorted by time. Checks every server's books."""
        at, count, runners = 0, len(arrivals), self._runners
        acting = list(runners)  # at 0 s all come up, and act behind what is routed then
        while True:
            until_s = arrivals[at].request.arrival_s if at < count else inf
            if until_s > self.now:
                acting = self._go_on(acting, until_s)
            if at == count:
                break
            self.now = until_s
            first = at
            while at < count and arrivals[at].request.arrival_s == until_s:
                at += 1
            self._route(arrivals[first:at], acting)
            self._on_progress(until_s)
        assert not any(self._outstanding), f"requests that never left: {self._outstanding}"
        for runner in runners:
            runner.life.server.stop()

    def _go_on(self, acting: Sequence[Runner], until_s: Seconds) -> list[Runner]:
        """Everybody to a time nobody comes before; returns those who have come to it exactly and are yet to act."""
        due, runners = self._due, self._runners
        ready: list[Runner] = []
        for runner in acting:
            if runner.go_on(until_s):
                ready.append(runner)
            elif runner.due_s < inf:
                heappush(due, (runner.due_s, runner.lead.place))
        while due and due[0][0] <= until_s:
            due_s, place = heappop(due)
            runner = runners[place]
            if runner.due_s != due_s or runner.is_ready:
                continue  # it ended earlier
            if runner.go_on(until_s):
                ready.append(runner)
            elif runner.due_s < inf:
                heappush(due, (runner.due_s, place))
        return ready

    def _route(self, arrivals: Sequence[Arrival], acting: list[Runner]) -> None:
        """Hand out who arrives now, in order; adds those who act now to ``acting``."""
        now, outstanding, runners = self.now, self._outstanding, self._runners
        among = getattr(self._router, "choose_among", None)
        if among is not None and any(runner.hides_ends for runner in runners):
            among = None
        seen = [Shown(runner, now) for runner in runners] if among is None else []
        for arrival in arrivals:
            request = arrival.request
            place = self._router.choose(request, seen) if among is None else among(request, outstanding)
            outstanding[place] += 1
            runner = runners[place]
            before_s = runner.due_s
            runner.receive(arrival, now)
            if runner.due_s == before_s:
                continue
            if runner.due_s == now:
                acting.append(runner)
            else:
                heappush(self._due, (runner.due_s, place))


class Runner:
    """One replica: what it does now, and what is there for it.

    ``due_s``: when what it does ends; inf: it does nothing. ``is_ready``: it has come to ``due_s`` and is to act.
    """

    __slots__ = ("_gaps", "_received", "_sprint", "_steps", "due_s", "flight", "is_ready", "lead", "life", "name")

    def __init__(self, life: Life, lead: Lead, name: str, gaps: float) -> None:
        self.life, self.lead, self.name, self._gaps = life, lead, name, gaps
        self._sprint = Sprint.of(life.server, life.engine, None)
        self._steps: Generator[None, None, Seconds | None] | None = None
        self.flight: Flight | None = None
        self._received = 0
        self.due_s: Seconds = 0.0
        self.is_ready = True

    def receive(self, arrival: Arrival, now: Seconds) -> None:
        """Take a request behind the step under way; later steps of a stride are taken back."""
        self.lead.inbox.append(arrival)
        self._received += 1
        if self.is_ready:
            return
        if self._steps is not None:
            self.due_s = self.lead.end(now)
        elif self.flight is None:
            self.due_s, self.is_ready = now, True
        elif not self.flight.is_in_last_step(now):
            self.flight = self.flight.cut_to(as_cutter(self.life.engine).cut(self.flight.steps_begun(now)))
            self.due_s = self.flight.end_s

    def go_on(self, until_s: Seconds) -> bool:
        """Do what can be done before somebody may come at ``until_s``, to the end of the step that lasts longer. True
        if a step ends then exactly: it acts when it is known who comes.
        """
        lead = self.lead
        lead.until_s, self.is_ready = until_s, False
        now = self.due_s
        if self.flight is not None:
            self._land(self.flight)
        directive: Directive | None = None
        while True:
            if self._steps is None:
                if now >= until_s:
                    break
                directive = self._ask(now)
                if directive is None:
                    self.due_s = inf
                    return False
                if self._sprint is not None:
                    self._steps = self._sprint.steps(directive, now, lead)
            if self._steps is not None:
                later = self._sprint_on(self._steps)
                if later is None:
                    now = self.due_s = lead.end_s
                    break
                if later >= 0:
                    now = later
                    continue
            assert directive is not None
            flight = self._take_off(directive, now)
            if flight is None:
                self.due_s = inf
                return False
            now = self.due_s = flight.end_s
            if now > until_s:
                break
            self._land(flight)
        self.due_s, self.is_ready = now, now == until_s
        return self.is_ready

    def _sprint_on(self, steps: Generator[None, None, Seconds | None]) -> Seconds | None:
        """Let a sprint go on. Returns None where it rests, when it ended, or -1 if it could not do a step."""
        try:
            next(steps)
        except StopIteration as end:
            self._steps = None
            return -1.0 if end.value is None else float(end.value)
        return None

    def _ask(self, now: Seconds) -> Directive | None:
        """What its controller wants, now that who has come was handed over."""
        if self.lead.inbox:
            take_in(self.lead, self.life.engine, self.life.server, now)
        return self.life.server.ask(now)

    def _take_off(self, directive: Directive, now: Seconds) -> Flight | None:
        """Begin what a directive leads to; None: nothing."""
        life, lead = self.life, self.lead
        horizon_s = lead.until_s
        if self._received:  # most strides end with a request that comes here; what was planned beyond it is taken back
            horizon_s = max(horizon_s, tick(now + self._gaps * now / self._received))
        action = life.server.act(directive, now, None if horizon_s == inf else horizon_s, None)
        let_go(lead, life.engine, life.server)
        if isinstance(action, Idle):
            return None
        self.flight = Flight(action, life.engine.perform(action), now)
        return self.flight

    def _land(self, flight: Flight) -> None:
        self.flight = None
        served = self.life.server.complete(flight.action, flight.outcome, flight.end_s)
        self.lead.outstanding[self.lead.place] -= len(served)

    def ended(self, now: Seconds) -> int:
        """Requests that have ended in the stride under way, and are not booked yet."""
        return 0 if self.flight is None else self.flight.ended(now)

    @property
    def hides_ends(self) -> bool:
        """Whether ``ended`` may be other than 0."""
        flight = self.flight
        return flight is not None and flight.outcome.stride is not None and bool(flight.outcome.stride.ended)

    def kv_used_blocks(self, now: Seconds) -> int:
        pool = self.life.server.pool
        if self.flight is not None:
            return self.flight.kv_blocks(pool, now)
        used = None if self._steps is None else self.lead.used_blocks(now)
        return pool.used_blocks if used is None else used


class Shown:
    """What a router may see of a replica at one moment (``routing.ReplicaStatus``)."""

    __slots__ = ("_now", "_runner")
    is_up = True

    def __init__(self, runner: Runner, now: Seconds) -> None:
        self._runner, self._now = runner, now

    @property
    def name(self) -> str:
        return self._runner.name

    @property
    def outstanding(self) -> int:
        lead = self._runner.lead
        return lead.outstanding[lead.place] - self._runner.ended(self._now)

    @property
    def waiting(self) -> int:
        return self.outstanding - self.running

    @property
    def running(self) -> int:
        return self._runner.life.server.batcher.running - self._runner.ended(self._now)

    @property
    def kv_used_bytes(self) -> Bytes:
        return self._runner.kv_used_blocks(self._now) * self._runner.life.server.pool.block_bytes

    @property
    def kv_total_bytes(self) -> Bytes:
        return self._runner.life.server.pool.kv_total_bytes
