"""Functions that tests send to worker processes; they must be importable there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from heliosim.errors import InputError
from heliosim.sweep import Done, Job, run_job


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


def run_job_killed_once(job: Job) -> Done:
    """A sweep's run; the first one of point 2 has its process killed while it simulates."""
    assert job.folder is not None
    mark = Path(job.folder).parent / "killed"
    if job.point != 2 or mark.exists():
        return run_job(job)
    mark.touch()
    return run_job(job, on_progress=lambda now: os.kill(os.getpid(), signal.SIGKILL) if now > 0.1 else None)
