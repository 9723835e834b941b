"""Runs groups one behind the other, each in a process of its own, within the time there is; a later call goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from heliosim.formats.files import write_text

from .book import read_book
from .plan import CPU_GRACE, Group, Measure, Options, groups, require_same

Say = Callable[[str], None]
GRACE = 1.25
"""A group may take so much more than its measures' budgets before it is ended."""
LEAST_S = 5.0


class Runner:
    """``work``: what is measured, kept until a later call goes on with it. ``began``: seconds count from here."""

    def __init__(self, options: Options, work: Path, say: Say = print) -> None:
        self.options, self.work, self.say = options, work, say
        self.began = time.monotonic()

    @property
    def left_s(self) -> float:
        return self.options.seconds - (time.monotonic() - self.began)

    def run(self) -> None:
        """Measure what is not measured yet. Raises KeyboardInterrupt behind noting where it stopped."""
        require_same(self.work, self.options)
        self.work.mkdir(parents=True, exist_ok=True)
        write_text(self.work / "options.json", self.options.as_json())
        for group in groups(self.options):
            done = [m.name for m in group.measures if self._is_done(group, m)]
            if done:
                self.say(f"{group.title}: kept from before: {', '.join(done)}")
            self._group(group, [m for m in group.measures if m.name not in done])

    def _is_done(self, group: Group, measure: Measure) -> bool:
        book = read_book(self.work / group.name, measure.name)
        return book is not None and book["state"] == "done"

    def _group(self, group: Group, measures: Sequence[Measure]) -> None:
        """Until every measure has begun: one that takes its process along is noted, the rest gets a new one."""
        folder = self.work / group.name
        for measure in measures:
            (folder / f"{measure.name}.json").unlink(missing_ok=True)
        waiting = list(measures)
        while waiting:
            if self.left_s < LEAST_S:
                for measure in waiting:
                    note_state(folder, measure, "no time", f"the {self.options.seconds:.0f} s were over")
                return
            grace = GRACE if self.options.is_gpu else CPU_GRACE
            limit = min(self.left_s, grace * (group.start_s + sum(m.seconds for m in waiting)) + 5)
            code = self._process(group, waiting, limit)
            for measure in waiting:
                book = read_book(folder, measure.name)
                if book is not None and book["state"] == "running":
                    ended = f"ended behind {limit:.0f} s, out of time" if code is None else f"its process died ({code})"
                    note_state(folder, measure, "failed", ended)
            self._tell(folder, waiting)
            before = len(waiting)
            waiting = [m for m in waiting if read_book(folder, m.name) is None]
            if len(waiting) == before:  # it does not even start
                for measure in waiting:
                    why = "out of time before it began" if code is None else f"its process ended with code {code}"
                    note_state(folder, measure, "failed", why)
                return

    def _tell(self, folder: Path, measures: Sequence[Measure]) -> None:
        for measure in measures:
            if book := read_book(folder, measure.name):
                self.say(f"  {measure.title}: {book['state']}, {book['seconds']:.0f} s {book['error']}".rstrip())

    def _process(self, group: Group, measures: Sequence[Measure], limit_s: float) -> int | None:
        """Exit code of a process that runs measures; None: it was ended behind ``limit_s`` seconds."""
        self.say(f"{group.title}: {', '.join(m.name for m in measures)} (at most {limit_s:.0f} s)")
        names = [m.name for m in measures]
        command = [sys.executable, "-m", f"{__package__}.child", str(self.work), group.name, *names]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with (self.work / "log.txt").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                return process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    _end(process)

    def interrupted(self) -> None:
        """Note what was under way as stopped."""
        for group in groups(self.options):
            for measure in group.measures:
                book = read_book(self.work / group.name, measure.name)
                if book is not None and book["state"] == "running":
                    note_state(self.work / group.name, measure, "failed", "interrupted")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, and what it started: they are a session of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def note_state(folder: Path, measure: Measure, state: str, error: str) -> None:
    """Set what is said of a measure; its figures so far are kept."""
    book = read_book(folder, measure.name) or {"seconds": 0.0, "got": [], "notes": []}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{measure.name}.json", json.dumps({**book, "state": state, "error": error}, indent=1))
