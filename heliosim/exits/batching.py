"""Exit batching: what a batch of decode rows does behind an exit at which some of its rows have left.

A rule sees counts and nothing else, so the simulated and the live engine ask the same question and get the same answer.
It is asked behind every exit but the last, in steps of decode rows alone: a step that reads prompts needs every layer.
A row leaves (takes its token) at the first exit where its confidence reaches the threshold, whatever the rule says.

A rule of your own is a class with these attributes, named by an entry point of the group ``heliosim.exit_batching``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple, Protocol

from heliosim.registry import EXIT_BATCHING
from heliosim.types import ExitRule

Verdict = Literal["go-on", "regroup", "stop"]
"""``go-on``: everybody who walks goes on; ``regroup``: only rows that have not left; ``stop``: nobody, and rows that
have not left take their token here.
"""


class AtExit(NamedTuple):
    """Behind an exit: ``rows`` in the step, of which ``walking`` came this far and ``undecided`` have not left;
    ``layers`` up to the next exit.
    """

    rows: int
    walking: int
    undecided: int
    layers: int


class ExitBatcher(Protocol):
    """``runs_all``: every layer runs for every row. ``is_joint``: rows may have to leave because others did, so a
    token's exit depends on its batch.
    """

    runs_all: bool
    is_joint: bool

    def verdict(self, at: AtExit, rule: ExitRule) -> Verdict: ...


class Full:
    """Every layer runs for every row; tokens are taken where they were confident."""

    runs_all, is_joint = True, False

    def verdict(self, at: AtExit, rule: ExitRule) -> Verdict:
        return "go-on"


class WaitForDeepest:
    """All rows walk until the last of them has left."""

    runs_all, is_joint = False, False

    def verdict(self, at: AtExit, rule: ExitRule) -> Verdict:
        return "go-on" if at.undecided else "stop"


class Eager:
    """The whole batch leaves as soon as ``quorum`` of its rows have left, or all."""

    runs_all, is_joint = False, True

    def verdict(self, at: AtExit, rule: ExitRule) -> Verdict:
        return "stop" if at.rows - at.undecided >= min(rule.quorum, at.rows) else "go-on"


class Rebatch:
    """Rows that have left stay behind, and the others go on as a smaller batch, if the rows x layers this saves up to
    the next exit are at least ``break_even``; else everybody walks to the next exit, where it is asked again.
    """

    runs_all, is_joint = False, False

    def verdict(self, at: AtExit, rule: ExitRule) -> Verdict:
        if not at.undecided:
            return "stop"
        saved = (at.walking - at.undecided) * at.layers
        return "regroup" if saved and saved >= rule.break_even else "go-on"


@cache
def exit_batcher(name: str) -> ExitBatcher:
    """The rule of that name. Raises UnknownNameError."""
    found: ExitBatcher = EXIT_BATCHING.get(name)()
    return found


class Segment(NamedTuple):
    """Layers ``first`` to ``last`` (counted from 1) that the same rows walk: those still undecided behind exit number
    ``behind``, or all (``behind`` -1), ``walking`` of them.
    """

    first: int
    last: int
    behind: int
    walking: int


def segments(rule: ExitRule, exits: Sequence[int], rows: int, undecided: Sequence[int]) -> list[Segment]:
    """What a step of ``rows`` decode rows walks. ``exits``: those up to the resident depth, which is the last;
    ``undecided``: rows that have not left behind each of them but the last.
    """
    batcher = exit_batcher(rule.batching)
    walking = rows
    found: list[Segment] = []
    first, behind = 1, -1
    for i, layer in enumerate(exits[:-1]):
        verdict = batcher.verdict(AtExit(rows, walking, undecided[i], exits[i + 1] - layer), rule)
        if verdict == "go-on" or (verdict == "regroup" and undecided[i] in (0, walking)):
            continue
        found.append(Segment(first, layer, behind, walking))
        if verdict == "stop":
            return found
        first, behind, walking = layer + 1, i, undecided[i]
    found.append(Segment(first, exits[-1], behind, walking))
    return found
