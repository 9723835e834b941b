"""Simulations for the dashboard: in worker processes, with progress and cancel, remembered by what they depend on.

``desk()`` is shared by all sessions of a server. ``Desk.ask`` answers a ``Ticket`` at once: a remembered value, work
that somebody else has asked for already, or new work. Values are kept in memory, and those that are plain data or run
folders also on disk, in a bounded folder, so that a restarted dashboard has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from heliosim_app.jobs import Done, Mailbox, Trouble, perform, trouble_of, warm

State = Literal["running", "done", "failed", "cancelled"]
IN_MEMORY = 64
"""Tickets that are remembered."""
ON_DISK_BYTES = 256 * 2**20
WORKERS = 2


def key_of(*parts: Any) -> str:
    """A name for a result from everything it depends on: hashes, seeds, plain data, and HelioSim's version."""
    from heliosim import __version__

    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class Ticket:
    """Work that was asked for. ``value`` once ``state`` is done, ``trouble`` once it is failed."""

    key: str
    mailbox: Mailbox
    future: Future[Any] | None = None
    value: Any = None
    trouble: Trouble | None = None
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False

    @property
    def state(self) -> State:
        if self.future is not None and not self.future.done():
            return "running"
        if self.trouble is not None:
            return "failed"
        return "cancelled" if self.is_cancelled else "done"

    @property
    def progress(self) -> tuple[list[str], float]:
        """Lines the work said so far, and the share it thinks is done."""
        return self.mailbox.read()

    def wait(self, seconds: float) -> bool:
        """Whether the work has ended, waiting for it no longer than so."""
        from concurrent.futures import wait

        if self.future is not None:
            wait([self.future], seconds)
        end = time.monotonic() + 1.0
        while self.future is not None and self.future.done() and not self._is_settled and time.monotonic() < end:
            time.sleep(0.002)
        return self.state != "running"

    @property
    def _is_settled(self) -> bool:
        return self.trouble is not None or self.is_cancelled or self.seconds is not None

    def settle(self, future: Future[Any]) -> None:
        """Take what the worker answered."""
        try:
            answer = future.result()
        except BaseException as error:
            died = (
                f"The worker process ended before its answer ({type(error).__name__}). Was it killed, or out of memory?"
            )
            self.trouble = Trouble(f"{died} Ask again.") if "Broken" in type(error).__name__ else trouble_of(error)
            return
        if answer is None:
            self.is_cancelled = True
        elif isinstance(answer, Trouble):
            self.trouble = answer
        else:
            assert isinstance(answer, Done)
            self.value, self.seconds, self.is_cancelled = answer.value, answer.seconds, False
        self.mailbox.clear()


class Desk:
    """Takes work in and remembers what came of it. Threads may share it."""

    def __init__(self, workers: int = WORKERS, folder: Path | None = None) -> None:
        from heliosim.executors import ProcessExecutor

        self.pool = ProcessExecutor(workers)
        self.folder = folder or cache_folder()
        self.boxes = Path(tempfile.mkdtemp(prefix="heliosim-dashboard-"))
        self.tickets: OrderedDict[str, Ticket] = OrderedDict()
        self.lock = threading.RLock()
        self.asked = 0
        for _ in range(workers):
            self.pool.submit(warm)
        at_exit = getattr(threading, "_register_atexit", None)
        if at_exit is not None:  # else the interpreter would wait for running work before it ends
            at_exit(self.close)

    def ask(self, function: Callable[..., Any], *arguments: Any, key: str) -> Ticket:
        """Work to be done, or what is known of it. A cancelled or failed one stands until it is forgotten."""
        with self.lock:
            known = self.tickets.get(key)
            if known is not None:
                self.tickets.move_to_end(key)
                return known
            ticket = Ticket(key, Mailbox(str(self.boxes / f"{key}-{self.asked}")))
            self.asked += 1
            kept = read_kept(self.folder, key)
            if kept is not None:
                ticket.value = kept
            else:
                ticket.future = self.pool.submit(
                    perform, function, arguments, str(ticket.mailbox.said)[: -len(".json")]
                )
                ticket.future.add_done_callback(lambda future: self._finish(ticket, future))
            self.tickets[key] = ticket
            while len(self.tickets) > IN_MEMORY:
                self.tickets.popitem(last=False)
            return ticket

    def known(self, key: str) -> Ticket | None:
        """What is remembered or being worked on under a key; None: it must be asked for."""
        with self.lock:
            if key not in self.tickets:
                kept = read_kept(self.folder, key)
                if kept is None:
                    return None
                self.know(key, kept)
            return self.tickets[key]

    def _finish(self, ticket: Ticket, future: Future[Any]) -> None:
        ticket.settle(future)
        if ticket.trouble is None and not ticket.is_cancelled:
            keep(self.folder, ticket.key, ticket.value)

    def know(self, key: str, value: Any) -> None:
        """Remember a value that came from elsewhere, such as a shipped answer."""
        with self.lock:
            self.tickets.setdefault(key, Ticket(key, Mailbox(str(self.boxes / key)), value=value))

    def cancel(self, ticket: Ticket) -> None:
        """Ask the work to stop; it does at its next report."""
        ticket.is_cancelled = True
        ticket.mailbox.stop.touch()

    def forget(self, key: str) -> None:
        """Have the next one who asks get new work."""
        with self.lock:
            self.tickets.pop(key, None)

    def close(self) -> None:
        """Give up all work and take the temporary files away."""
        self.pool.abandon()
        shutil.rmtree(self.boxes, ignore_errors=True)


# --- on disk --------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where results are kept: ``heliosim/dashboard`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heliosim" / "dashboard"


def keep(folder: Path, key: str, value: Any) -> None:
    """Keep plain data (JSON) or a run (a run folder); other values stay in memory alone."""
    from heliosim.formats.files import write_json
    from heliosim.formats.results import RunResults, save_run

    try:
        if isinstance(value, RunResults):
            save_run(folder / key, value, overwrite=True)
        elif isinstance(value, Mapping):
            write_json(folder / f"{key}.json", value)
        trim(folder)
    except OSError:
        return  # a full or read-only disk costs time, not the answer


def read_kept(folder: Path, key: str) -> Any:
    """A kept value, or None. What cannot be read is made again."""
    from heliosim.errors import HelioSimError
    from heliosim.formats.results import load_run

    try:
        if (folder / f"{key}.json").is_file():
            os.utime(folder / f"{key}.json")
            return json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        if (folder / key / "run.json").is_file():
            os.utime(folder / key)
            return load_run(folder / key)
    except (OSError, ValueError, HelioSimError):
        return None
    return None


def trim(folder: Path, most_bytes: int = ON_DISK_BYTES) -> None:
    """Take the results away that were not used for longest until the folder is small enough."""
    found = [(path.stat().st_mtime, path, _size(path)) for path in folder.iterdir() if path.name != "profiles"]
    total = sum(size for _, _, size in found)
    for _, path, size in sorted(found, key=lambda one: one[0]):
        if total <= most_bytes:
            return
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        total -= size


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size


def desk() -> Desk:
    """The server's desk; its workers start with the first page."""
    import streamlit as st

    @st.cache_resource(show_spinner=False)
    def one() -> Desk:
        return Desk()

    return one()
