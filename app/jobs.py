"""What a worker process does, and how it speaks with the dashboard: no Streamlit here, so that it starts quickly.

A job is a function of this package that takes its arguments and ``report(text, share)``, which it calls as it goes. The
report is left in a small file; a file beside it asks the job to stop, which it does at its next report.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = Callable[[str, float], None]
EVERY_S = 0.1
"""Reports are left no oftener."""
LINES = 60
"""The last lines of a report that are kept."""


class CancelledError(Exception):
    """Somebody asked the job to stop."""


@dataclass(frozen=True)
class Trouble:
    """Why there is no value. ``text``: one line for people; ``details``: where it happened, only of what nobody
    expected, to be sent with a report.
    """

    text: str
    where: str = ""
    is_expected: bool = True
    details: str = ""


@dataclass(frozen=True)
class Done:
    """A value and how long it took, seconds."""

    value: Any
    seconds: float


def trouble_of(error: BaseException) -> Trouble:
    """An error as a value: one line of what a user can correct, details of what they cannot."""
    from heliosim.errors import HelioSimError

    if isinstance(error, HelioSimError):
        return Trouble(str(error), getattr(error, "where", ""))
    if isinstance(error, OSError):
        return Trouble(f"{error.filename or 'a file'}: {error.strerror or error}. Check the path and free space.")
    details = "".join(traceback.format_exception(error))
    return Trouble(f"{type(error).__name__}: {error}", is_expected=False, details=details)


class Mailbox:
    """Two small files of one job: what it says, and whether it should stop."""

    def __init__(self, path: str) -> None:
        self.said, self.stop = Path(f"{path}.json"), Path(f"{path}.stop")
        self.lines: list[str] = []
        self.due = 0.0

    def report(self, text: str, share: float) -> None:
        """Leave a line; repeated ones are kept once. Raises CancelledError if asked to stop."""
        if not self.lines or self.lines[-1] != text:
            self.lines = [*self.lines[1 - LINES :], text]
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + EVERY_S
        if self.stop.exists():
            raise CancelledError
        temporary = self.said.with_suffix(".part")
        temporary.write_text(json.dumps({"lines": self.lines, "share": share}), encoding="utf-8")
        temporary.replace(self.said)

    def read(self) -> tuple[list[str], float]:
        """Lines and share done, as last left."""
        try:
            found = json.loads(self.said.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [], 0.0
        return list(found["lines"]), float(found["share"])

    def clear(self) -> None:
        for file in (self.said, self.stop):
            file.unlink(missing_ok=True)


def perform(function: Callable[..., Any], arguments: tuple[Any, ...], mailbox: str) -> Done | Trouble | None:
    """Do a job; None if it was stopped. Runs in the worker."""
    started = time.perf_counter()
    try:
        return Done(function(*arguments, report=Mailbox(mailbox).report), time.perf_counter() - started)
    except CancelledError:
        return None
    except Exception as error:  # the dashboard must go on, whatever a job does
        return trouble_of(error)


def warm() -> None:
    """Import what every job needs, so that the first one starts at once."""
    import heliosim.planning
    import heliosim.probing
    import heliosim.replicate
    import heliosim.runs  # noqa: F401
