"""The SimPy driver: the server is a process, an engine's seconds become timeouts.

With the live driver in ``live.py`` this is all that differs between a simulated and a live run besides the engine.
Times are multiples of ``types.TICK``, so both drivers' clocks agree to the last bit when outcomes do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy

from heliosim.drive import Finished, feed, settle, settle_refused, without_collector
from heliosim.engines.base import Engine
from heliosim.serving.server import Server
from heliosim.sprint import Sprint
from heliosim.types import Idle
from heliosim.workload import Source

_IDLE = Idle()


def serve(
    env: simpy.Environment,
    server: Server,
    engine: Engine,
    source: Source,
    on_progress: Callable[[float], None] | None = None,
) -> Generator[simpy.Event, Any, None]:
    """One server as a SimPy process; ends when the source is exhausted and the server empty."""
    is_answering = source.is_answering
    max_ends = 1 if is_answering else None
    sprint = Sprint.of(server, engine, source)
    while True:
        now = env.now
        feed(source, engine, server, now)
        directive = server.ask(now)
        if directive is not None and sprint is not None:
            later = sprint.run(directive, now)
            if later is not None:
                yield env.timeout(later - now)
                if on_progress is not None:
                    on_progress(later)
                continue
        action = _IDLE if directive is None else server.act(directive, now, source.next_s, max_ends)
        settle_refused(source, engine, server, now)
        if isinstance(action, Idle):
            if source.next_s is None:
                return
            if source.next_s > now:
                yield env.timeout(source.next_s - now)
            continue
        outcome = engine.perform(action)
        yield env.timeout(outcome.seconds)
        served = server.complete(action, outcome, env.now)
        if is_answering:
            settle(source, served)
        if on_progress is not None:
            on_progress(env.now)


def simulate_server(
    server: Server, engine: Engine, source: Source, on_progress: Callable[[float], None] | None = None
) -> Finished:
    """Run one server to the end of its source; returns when the simulated clock stops. Checks the memory books."""
    env = simpy.Environment()
    env.process(serve(env, server, engine, source, on_progress))
    with without_collector():
        env.run()
    server.stop()
    return Finished(end_s=float(env.now))
