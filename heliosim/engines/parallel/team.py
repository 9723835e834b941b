"""The driver's side of a tensor-parallel group: it starts the workers, tells them what it does itself, and ends them.

Commands go through a pipe to each worker. A pipe may stay silent for as long as a server is idle, and closes when
either end dies, which a collective operation would notice late or never.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Event, Thread
from typing import IO, Any

from heliosim.engines.parallel.links import Seat
from heliosim.errors import HelioSimError

PATIENCE_S = 60.0
"""How long ranks wait for each other inside a step, a load or the start, unless told otherwise."""
_FAREWELL_S = 5.0


class LostRankError(HelioSimError):
    """A rank ended, or did not answer in time. ``rank``: which; ``why``: what is known of it."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(rank, why)
        self.rank, self.why = rank, why

    def __str__(self) -> str:
        return f"tensor-parallel rank {self.rank} is lost: {self.why}. The engine is closed; start the run again."


class Worker:
    """One worker process and the pipe to it. ``log``: what it prints, read if it dies without a word."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        here, there = Pipe()
        self.pipe: Connection = here
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the worker
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "heliosim.engines.parallel.worker", str(there.fileno()), str(os.getpid())],
            pass_fds=[there.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C is for the driver, which tells the workers
        )
        there.close()

    def receive(self, timeout_s: float) -> tuple[str, Any]:
        """The next answer. Raises LostRankError if none comes."""
        try:
            if not self.pipe.poll(timeout_s):
                raise LostRankError(self.rank, f"no answer within {timeout_s:g} s")
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            raise self.lost() from None
        if kind == "died":
            raise LostRankError(self.rank, value)
        return kind, value

    def lost(self, wait_s: float = _FAREWELL_S) -> LostRankError:
        """Why it is gone, as far as it can be known; its end is waited for."""
        with suppress(EOFError, OSError):
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "died":
                    return LostRankError(self.rank, value)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        code = self.process.poll()
        said = self._last_line()
        ended = "it does not answer" if code is None else f"its process ended with code {code}"
        return LostRankError(self.rank, f"{ended}{': ' + said if said else ''}")

    def _last_line(self) -> str:
        self.log.seek(0)
        lines = self.log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def end(self, *, at_once: bool) -> None:
        """Close the pipe, on which a worker ends by itself, and see that it does."""
        self.pipe.close()
        if at_once:
            self.process.kill()
        try:
            self.process.wait(_FAREWELL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Team:
    """Workers of ranks 1 to ``count`` - 1, on ``devices``. ``options``: what their engines take beside that."""

    def __init__(
        self, count: int, port: int, devices: Sequence[str], options: Mapping[str, Any], timeout_s: float = PATIENCE_S
    ) -> None:
        self.timeout_s = timeout_s
        self.is_closed = False
        self.workers = [Worker(rank) for rank in range(1, count)]
        for worker, device in zip(self.workers, devices, strict=True):
            seat = Seat(worker.rank, count, port, timeout_s)
            self._send(worker, pickle.dumps({"seat": seat, "device": device, "options": dict(options)}))

    def tell(self, command: str, *arguments: Any) -> None:
        """Have every worker do something, in the order things were told. Raises LostRankError if one is gone."""
        if self.is_closed:
            raise HelioSimError("this tensor-parallel engine is closed; make another")
        message = pickle.dumps((command, arguments), protocol=5)
        for worker in self.workers:
            self._send(worker, message)

    def answers(self, *, timeout_s: float | None = None) -> list[tuple[str, Any]]:
        """One answer of each worker."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        try:
            return [worker.receive(limit) for worker in self.workers]
        except LostRankError:
            self.close(at_once=True)
            raise

    def failed(self, error: BaseException) -> HelioSimError:
        """What to raise where a collective operation failed with ``error``; ends the workers."""
        time.sleep(0.05)  # what made a peer fail may be on its way
        dead = [w for w in self.workers if w.process.poll() is not None or w.pipe.poll()]
        if dead:
            found = dead[0].lost()
        else:
            said = (str(error).strip() or "no reason given").splitlines()[0]
            found = LostRankError(self.workers[0].rank, f"no answer within {self.timeout_s:g} s ({said})")
        self.close(at_once=True)
        return found

    def close(self, *, at_once: bool = False) -> None:
        """End all workers; ``at_once``: whatever they are doing. Again: nothing happens."""
        if self.is_closed:
            return
        self.is_closed = True
        for worker in self.workers:
            worker.end(at_once=at_once)

    def _send(self, worker: Worker, message: bytes) -> None:
        try:
            worker.pipe.send_bytes(message)
        except OSError:
            found = worker.lost()
            self.close(at_once=True)
            raise found from None


class Watch:
    """Calls ``abort`` once if a process ends, or if what began with ``begin`` lasts longer than ``timeout_s``.

    A GPU that waits for a rank that is gone waits forever; a CPU rank is told by its socket and needs no watch.
    """

    def __init__(self, team: Team, abort: Callable[[], None], every_s: float = 0.2) -> None:
        self._team, self._abort, self._every_s = team, abort, every_s
        self._began: float | None = None
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self) -> None:
        self._began = None

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            began = self._began
            is_late = began is not None and time.monotonic() - began > self._team.timeout_s
            if is_late or any(w.process.poll() is not None for w in self._team.workers):
                for worker in self._team.workers:
                    worker.process.kill()
                self._abort()
                return
