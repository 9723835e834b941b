"""A fleet in which nobody fails and no sender waits for an answer, in a hurry.

Between two arrivals replicas know nothing of each other: each goes on by itself up to the next one, in a sprint where
it can, and only those in which something ends by then are touched. A request is then routed on what is true of every
replica at that moment. What happens at one moment, and in which order, is what ``fleet.py`` has SimPy do: steps end,
requests are routed, replicas act. Its tables are the same to the last bit, which tests demand of random scenarios.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from heapq import heappop, heappush, heapreplace
from math import inf

from heliosim.flight import Flight
from heliosim.replica import Life, as_cutter
from heliosim.serving.routing import Router
from heliosim.sprint import Lead, Sprint, let_go, take_in
from heliosim.types import Arrival, Bytes, Directive, Idle, Request, Seconds, tick


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
        self._among: Callable[[Request, Sequence[int]], int] | None = getattr(router, "choose_among", None)
        self._outstanding = [0] * len(lives)
        self._striding: set[int] = set()
        self._runners = [
            Runner(life, Lead(self._outstanding, place), name, gaps, self._striding)
            for place, (name, life) in enumerate(zip(names, lives, strict=True))
        ]
        self._shown = [Shown(self, runner) for runner in self._runners]
        self._due: list[tuple[Seconds, int]] = []

    def run(self, arrivals: Sequence[Arrival]) -> None:
        """Serve them all; they are sorted by time. Checks every server's books."""
        ready = list(self._runners)  # at 0 s all come up, and act behind what is routed then
        for arrival in arrivals:
            until_s = arrival.request.arrival_s
            if until_s > self.now:
                ready = self._go_on(ready, until_s)
                self._on_progress(until_s)
                self.now = until_s
            self._route(arrival, until_s, ready)
        self._go_on(ready, inf)
        assert not any(self._outstanding), f"requests that never left: {self._outstanding}"
        for runner in self._runners:
            runner.life.server.stop()

    def _go_on(self, ready: Sequence[Runner], until_s: Seconds) -> list[Runner]:
        """Everybody to a time nobody comes before; returns those who have come to it exactly and are yet to act."""
        due, runners = self._due, self._runners
        again: list[Runner] = []
        for runner in ready:
            if runner.go_on(until_s):
                again.append(runner)
            elif runner.due_s < inf:
                heappush(due, (runner.due_s, runner.lead.place))
        while due and due[0][0] <= until_s:
            due_s, place = due[0]
            runner = runners[place]
            if runner.due_s != due_s or runner.is_ready:
                heappop(due)  # it ended earlier
            elif runner.go_on(until_s):
                heappop(due)
                again.append(runner)
            elif runner.due_s < inf:
                heapreplace(due, (runner.due_s, place))
            else:
                heappop(due)
        return again

    def _route(self, arrival: Arrival, now: Seconds, ready: list[Runner]) -> None:
        """Hand out who arrives now; adds who acts now to ``ready``."""
        if self._among is None or self._striding:
            place = self._router.choose(arrival.request, self._shown)
        else:
            place = self._among(arrival.request, self._outstanding)
        self._outstanding[place] += 1
        runner = self._runners[place]
        before_s = runner.due_s
        runner.receive(arrival, now)
        due_s = runner.due_s
        if due_s != before_s:
            if due_s == now:
                ready.append(runner)
            else:
                heappush(self._due, (due_s, place))


class Runner:
    """One replica: what it does now, and what is there for it.

    ``due_s``: when what it does ends; inf: it does nothing. ``is_ready``: it has come to ``due_s`` and is to act.
    ``striding``: places of those in whom requests may have ended that are not booked yet.
    """

    __slots__ = (
        "_gaps", "_received", "_sprint", "_steps", "_striding", "due_s", "flight", "is_ready", "lead", "life", "name",
    )  # fmt: skip

    def __init__(self, life: Life, lead: Lead, name: str, gaps: float, striding: set[int]) -> None:
        self.life, self.lead, self.name, self._gaps, self._striding = life, lead, name, gaps, striding
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
                try:
                    next(self._steps)
                except StopIteration as end:
                    self._steps = None
                    if end.value is not None:
                        now = end.value
                        continue
                else:
                    now = lead.end_s
                    break
            assert directive is not None
            flight = self._take_off(directive, now)
            if flight is None:
                self.due_s = inf
                return False
            now = flight.end_s
            if now > until_s:
                break
            self._land(flight)
        self.due_s, self.is_ready = now, now == until_s
        return self.is_ready

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
        outcome = life.engine.perform(action)
        if outcome.stride is not None and outcome.stride.ended:
            self._striding.add(lead.place)
        self.flight = Flight(action, outcome, now)
        return self.flight

    def _land(self, flight: Flight) -> None:
        self.flight = None
        self._striding.discard(self.lead.place)
        served = self.life.server.complete(flight.action, flight.outcome, flight.end_s)
        self.lead.outstanding[self.lead.place] -= len(served)

    def ended(self, now: Seconds) -> int:
        """Requests that have ended in the stride under way, and are not booked yet."""
        return 0 if self.flight is None else self.flight.ended(now)

    def kv_used_blocks(self, now: Seconds) -> int:
        """KV blocks in use by the step under way."""
        pool = self.life.server.pool
        if self.flight is not None:
            return self.flight.kv_blocks(pool, now)
        if self._steps is None or self.lead.steps is None:
            return pool.used_blocks
        return self.lead.used_blocks(now)


class Shown:
    """What a router may see of a replica as it is now (``routing.ReplicaStatus``)."""

    __slots__ = ("_herd", "_runner")
    is_up = True

    def __init__(self, herd: Herd, runner: Runner) -> None:
        self._herd, self._runner = herd, runner

    @property
    def name(self) -> str:
        return self._runner.name

    @property
    def outstanding(self) -> int:
        runner = self._runner
        booked = runner.lead.outstanding[runner.lead.place]
        return booked if runner.flight is None else booked - runner.ended(self._herd.now)

    @property
    def waiting(self) -> int:
        return self.outstanding - self.running

    @property
    def running(self) -> int:
        return self._runner.life.server.batcher.running - self._runner.ended(self._herd.now)

    @property
    def kv_used_bytes(self) -> Bytes:
        pool = self._runner.life.server.pool
        return self._runner.kv_used_blocks(self._herd.now) * pool.block_bytes

    @property
    def kv_total_bytes(self) -> Bytes:
        return self._runner.life.server.pool.kv_total_bytes
