"""One run of a question's fleet, for figures and tables. Runs in a worker."""

from __future__ import annotations

from typing import Any

from heliosim_app.jobs import Report
from heliosim_app.question import Question


def one_run(question: Question, count: int = 1, load: float = 1.0, *, report: Report) -> Any:
    """Simulate ``count`` replicas under ``load`` times the question's load, with the question's seed."""
    from heliosim.runs import last_arrival, run_simulated

    scenario = question.scenario(count, load)
    end = last_arrival(scenario) or 1.0
    return run_simulated(
        scenario, question.profile(), on_progress=lambda now: report(f"{now:.0f} s simulated", min(0.99, now / end))
    )
