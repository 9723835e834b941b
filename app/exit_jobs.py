"""What the page Exits shows, from a profile's behaviour table."""

from __future__ import annotations

from heliosim.behaviour_source import open_behaviour
from heliosim.behaviour_summary import BehaviourSummary, summarise_behaviour


def summary_of(folder: str, threshold: float) -> tuple[str, BehaviourSummary]:
    """Where the exits come from, in words, and all their tables at a threshold."""
    opened = open_behaviour(folder)
    return opened.origin, summarise_behaviour(opened.tokens, threshold)
