"""An action under way, and what is true of it at a time: steps done, requests ended, KV held.

A simulated engine answers with whole strides of steps. Everything here follows from the action, the outcome and the
time, so it is the same however many steps were asked for at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate

from heliosim.serving.memory import MemoryPool
from heliosim.types import Load, Outcome, Run, Seconds


class Flight:
    """``action``, with what came of it, from ``start_s`` to ``end_s``."""

    __slots__ = ("_ends_s", "_lasts_s", "action", "end_s", "outcome", "start_s")

    def __init__(self, action: Run | Load, outcome: Outcome, start_s: Seconds) -> None:
        self.action, self.outcome, self.start_s = action, outcome, start_s
        self.end_s: Seconds = start_s + outcome.seconds
        self._ends_s: list[Seconds] | None = None
        self._lasts_s: list[Seconds] | None = None if outcome.stride is not None and outcome.stride.ended else []

    def cut_to(self, outcome: Outcome) -> Flight:
        """The same with fewer steps."""
        return Flight(self.action, outcome, self.start_s)

    @property
    def ends_s(self) -> list[Seconds]:
        """When each step ends."""
        if self._ends_s is None:
            stride = self.outcome.stride
            steps = [(self.outcome.seconds,)] if stride is None else stride.steps
            self._ends_s = list(accumulate((step[0] for step in steps), initial=self.start_s))[1:]
        return self._ends_s

    def is_in_last_step(self, now: Seconds) -> bool:
        stride = self.outcome.stride
        return stride is None or len(stride.steps) == 1 or self.end_s - stride.steps[-1][0] < now

    def steps_done(self, now: Seconds) -> int:
        """Steps that have ended by ``now``."""
        return bisect_right(self.ends_s, now)

    def steps_begun(self, now: Seconds) -> int:
        """Steps up to the one under way, or up to the one that ends now."""
        return bisect_left(self.ends_s, now) + 1

    def ended(self, now: Seconds) -> int:
        """Requests that have ended by ``now``."""
        if self._lasts_s is None:
            stride, ends_s = self.outcome.stride, self.ends_s
            assert stride is not None
            self._lasts_s = [ends_s[step] for step, _, _ in stride.ended]
        return bisect_right(self._lasts_s, now) if self._lasts_s else 0

    def kv_blocks(self, pool: MemoryPool, now: Seconds) -> int:
        """KV blocks in use: those of the step under way; when a step ends now, those that are left of it.

        ``pool``: as it is while the action is under way, before anything of it is booked.
        """
        action, stride = self.action, self.outcome.stride
        if stride is None or isinstance(action, Load):
            return pool.used_blocks
        done = self.steps_done(now)
        next_is_planned = not done or self.ends_s[done - 1] < now
        gone = {request for step, request, _ in stride.ended if step < done}
        blocks = pool.used_blocks
        batch = action.batch
        for request, start in zip(batch.decoding, batch.starts, strict=False):
            blocks -= pool.blocks_for(start + 1)
            if request not in gone:
                blocks += pool.blocks_for(start + done + next_is_planned)
        for step, chunks in enumerate((batch.chunks, *action.program)):
            for chunk in chunks if step < done else ():
                if chunk.emits:  # it decodes from the step behind this one on
                    read = chunk.start + chunk.count
                    blocks -= pool.blocks_for(read)
                    if chunk.request not in gone:
                        blocks += pool.blocks_for(read + done - step - 1 + next_is_planned)
        return blocks
