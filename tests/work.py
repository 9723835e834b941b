"""Functions that tests send to worker processes; they must be importable there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from heliosim.errors import InputError


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    raise InputError("number", number, "is not wanted", "Leave it out.")


def threads_and_pid(_: object) -> tuple[str | None, int]:
    time.sleep(0.05)
    return os.environ.get("OMP_NUM_THREADS"), os.getpid()


def die_once(job: tuple[int, str]) -> int:
    """Squares the number; the first call for 3 has its own process killed in the middle. Each call leaves a mark."""
    number, folder = job
    marks = Path(folder)
    (marks / f"{number}-{time.monotonic_ns()}-{os.getpid()}").touch()
    if number == 3 and len(list(marks.glob("3-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die_always(number: int) -> int:
    """Squares the number; 2 kills the process every time."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number
