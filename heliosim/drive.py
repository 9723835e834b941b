"""What both drivers share: one turn of feeding arrivals to a server and its engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from heliosim.engines.base import Engine
from heliosim.errors import DeviceMemoryError, LoadError
from heliosim.serving.server import Server
from heliosim.types import Failure, Load, Outcome, Run, Seconds, Served
from heliosim.workload import Source


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python's garbage collector out of a simulation: what it makes is freed when nobody refers to it any more,
    and looking for cycles among everything that is going on takes a seventh of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def attempt(engine: Engine, action: Run | Load) -> Outcome:
    """Have a live engine do an action. What its device or files refuse is an outcome, for the server to go on from."""
    try:
        return engine.perform(action)
    except DeviceMemoryError as error:
        return Outcome(0.0, failure=Failure("memory", str(error), error.is_intact, error.available_bytes))
    except LoadError as error:
        return Outcome(0.0, failure=Failure("load", str(error), error.is_intact))


Log = list[tuple[Run | Load, Outcome]]


@dataclass
class Finished:
    """What a driver hands back: the actions with their outcomes, when asked for, and when the last one ended."""

    end_s: Seconds
    log: Log = field(default_factory=list)


def feed(source: Source, engine: Engine, server: Server, now: Seconds) -> None:
    """Submit every arrival due by ``now``, and tell source and engine of refused requests."""
    next_s = source.next_s
    if next_s is not None and next_s <= now:
        for arrival in source.take(now):
            engine.accept(arrival)
            server.submit(arrival.request, now)
        settle_refused(source, engine, server, now)


def settle_refused(source: Source, engine: Engine, server: Server, now: Seconds) -> None:
    for refused in server.take_refused():
        engine.forget(refused.id)
        source.finished(refused.id, now)


def settle(source: Source, served: list[Served]) -> None:
    """Tell the source of requests that ended, each at its time."""
    for record in served:
        source.finished(record.id, record.finish_s)
