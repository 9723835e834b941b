"""The wall-clock driver: the same server and controller, an engine that really executes.

Two clocks. ``wall``: what a user would feel; arrivals come in real time. ``cpu``: every step really executes and is
charged the process CPU time it took, host work of the serving loop included; idle time is skipped, arrivals advance on
this virtual clock. Waiting for a core does not count, so fidelity on shared machines is judged on it; what neighbours
do to shared caches and memory it does show.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from heliosim.drive import Finished, Log, attempt, feed, settle, settle_refused
from heliosim.engines.base import Engine
from heliosim.serving.server import Server
from heliosim.types import Idle, Outcome, Seconds, tick
from heliosim.workload import Source

LiveClock = Literal["cpu", "wall"]
_READ: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@contextmanager
def steady_process() -> Iterator[None]:
    """Keep the garbage collector out of the measured loop (its pauses belong to no step)."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def serve_live(
    server: Server,
    engine: Engine,
    source: Source,
    clock: LiveClock,
    *,
    keep_log: bool = True,
    on_progress: Callable[[float], None] | None = None,
) -> Finished:
    """Run one live server to the end of its source.

    A step is charged everything since the previous charge: scheduling, recording and the engine. An idle wait that
    overshoots is charged to the step behind it, so the log alone reproduces every time. Of a stride, the first step is
    charged what the engine did not count among its steps.
    """
    read = _READ[clock]
    keep_time = getattr(engine, "keep_time", None)
    if keep_time is not None:
        keep_time(read)
    max_ends = 1 if source.is_answering else None
    log: Log = []
    now: Seconds = 0.0
    with steady_process():
        mark = read()
        while True:
            feed(source, engine, server, now)
            action = server.next_action(now, source.next_s, max_ends)
            settle_refused(source, engine, server, now)
            if isinstance(action, Idle):
                if source.next_s is None:
                    break
                now, mark = _wait(now, source.next_s, mark, clock)
                continue
            outcome = attempt(engine, action)
            at = read()
            outcome = charged(outcome, tick(at - mark))
            mark = at
            now += outcome.seconds
            if keep_log:
                log.append((action, outcome))
            settle(source, server.complete(action, outcome, now))
            if on_progress is not None:
                on_progress(now)
    server.stop()
    return Finished(end_s=now, log=log)


def charged(outcome: Outcome, seconds: Seconds) -> Outcome:
    """An outcome that took ``seconds``; its stride's first step takes up the difference, so that steps add up."""
    stride = outcome.stride
    if stride is not None:
        first = stride.steps[0]
        more = seconds - sum(step.seconds for step in stride.steps)
        stride.steps[0] = first._replace(seconds=first.seconds + more)
    return outcome._replace(seconds=seconds)


def _wait(now: Seconds, until: Seconds, mark: float, clock: LiveClock) -> tuple[Seconds, float]:
    """Advance to the next arrival; returns the new time and the reading it corresponds to."""
    if until <= now:
        return now, mark
    if clock == "cpu":
        return until, time.process_time()
    target = mark + (until - now)
    while (left := target - time.perf_counter()) > 0:
        time.sleep(left)
    return until, target
