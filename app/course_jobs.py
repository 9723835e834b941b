"""Work of the page Timeline, done in a worker process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from heliosim_app.jobs import Report
from heliosim_app.question import Question
from heliosim_app.run import one_run

BURST_PER_S = 1e4
STEADY = (0.15, 0.75)
"""Of the requests that end: between which shares of them a burst is served at full batch."""
LEAST_QUIET = 30
QUIETER = 30
"""The quieter run has so many percent of capacity less, but at least ``LEAST_QUIET``."""


def capacity_of(run: Any) -> float | None:
    """Requests per second that a server ended while it had more than it could serve, from a burst's table of requests;
    None if too few ended.
    """
    ends = sorted(t for t, s in zip(*(run.requests[c].to_pylist() for c in ("finish_s", "status")), strict=True)
                  if s == "finished")  # fmt: skip
    low, high = (int(share * (len(ends) - 1)) for share in STEADY)
    if high - low < 10 or ends[high] <= ends[low]:
        return None
    return (high - low) / (ends[high] - ends[low])


def capacity(question: Question, *, report: Report) -> dict[str, Any]:
    """What one server can keep up with, requests per second, by a burst of the question's own requests."""
    run = one_run(replace(question, rate_per_s=BURST_PER_S), report=report)
    return {"per_s": capacity_of(run), "requests": question.requests}


def at_load(question: Question, per_s: float, percent: float) -> Question:
    """The question at a share of what one server keeps up with."""
    return replace(question, rate_per_s=float(f"{per_s * percent / 100:.4g}"))


def quiet_percent(percent: float) -> float:
    return max(LEAST_QUIET, percent - QUIETER)
