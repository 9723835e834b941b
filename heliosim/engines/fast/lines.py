"""What a stride will do, laid out before it begins: who decodes when, what is read, how many steps there may be.

Everything here follows from the action and the texts; nothing is known of tokens to come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heliosim.engines.fast.state import RowNow
from heliosim.engines.models.paged import PagedKV, Row
from heliosim.engines.texts import Text
from heliosim.types import Chunk, RequestId, Run


@dataclass(slots=True)
class Line:
    """A request that yields tokens in the stride, from step ``since`` on: the first is read off its text if ``reads``,
    else computed by a decode row. ``position``: of the token that the first one follows; ``left``: tokens to
    come at most.
    """

    request: RequestId
    text: Text
    since: int
    position: int
    left: int
    reads: bool

    def tokens_in_kv(self, steps: int) -> int:
        """Once ``steps`` steps of the stride are done."""
        return self.position + max(1, min(steps - self.since, self.left))

    def length_at(self, step: int) -> int:
        """Tokens that the decode row of a step attends to (of one that has ended: as if it had just)."""
        return self.position + 1 + min(step - self.since, self.left - 1)

    @property
    def last(self) -> int:
        """The step with which it ends, if nothing ends it earlier."""
        return self.since + self.left - 1


class Layout:
    """``lines`` in the order in which they stand in the batch; ``steps``: how many there are at most."""

    def __init__(self, run: Run, going: Mapping[RequestId, Text], most: int) -> None:
        batch, self._texts = run.batch, going
        self.lines = [
            Line(request, going[request], 0, offset + batch.ticks, going[request].left, False)
            for request, offset in zip(batch.decoding, batch.offsets, strict=True)
        ]
        reading = (batch.chunks, *run.program)
        for k, chunks in enumerate(reading):
            for chunk in chunks:
                if chunk.emits:
                    text, position = going[chunk.request], chunk.start + chunk.count - 1
                    self.lines.append(Line(chunk.request, text, k, position, text.left, True))
        self.chunks: list[tuple[Chunk, ...]] = list(reading)
        for line in self.lines:
            assert line.position == len(line.text.known) - 1, f"request {line.request}: the text ends elsewhere"
        self.steps = self._steps(run, most)

    def _steps(self, run: Run, most: int) -> int:
        steps = min(run.max_steps, most)
        if run.within_s is not None and run.within_s <= 0:
            return 1
        ends = sorted(line.last for line in self.lines)
        if run.max_ends is not None and run.max_ends <= len(ends):
            steps = min(steps, ends[run.max_ends - 1] + 1)
        for end in ends:
            if self.reads_at(end + 1):
                steps = min(steps, end + 1)
        is_reading_on = any(self.chunks[1:])
        if ends and not is_reading_on:
            steps = min(steps, ends[-1] + 1)
        return max(1, steps)

    def reads_at(self, step: int) -> tuple[Chunk, ...]:
        """Chunks of a step."""
        return self.chunks[step] if step < len(self.chunks) else ()

    def decoding_at(self, step: int) -> int:
        """Lines, from the first on, that are decode rows of a step (those that ended before it included)."""
        return sum(not line.reads if line.since == step else line.since < step for line in self.lines)

    def emitting_at(self, step: int) -> int:
        """Lines, from the first on, that yield a token with a step."""
        return sum(line.since <= step for line in self.lines)

    def take_blocks(self, kv: PagedKV, steps: int) -> None:
        """Let everybody hold the blocks that ``steps`` steps need."""
        for line in self.lines:
            if line.since < steps:
                kv.take(line.request, line.tokens_in_kv(steps))
        for chunks in self.chunks[:steps]:
            for chunk in chunks:
                kv.take(chunk.request, chunk.start + chunk.count)

    def rows(self, kv: PagedKV, steps: int) -> list[RowNow]:
        """Lines of the first ``steps`` steps as the device sees them when the stride begins."""
        return [
            RowNow(
                line.text.known[line.position],
                line.position,
                line.left,
                line.text.heeds_eos,
                line.text.seed,
                kv.tables[line.request],
            )
            for line in self.lines
            if line.since < steps
        ]

    def chunk_rows(self, kv: PagedKV, step: int) -> tuple[list[Row], list[list[int]], list[bool]]:
        """Chunks of a step: places, ids and whether they yield a token."""
        rows, ids, emits = [], [], []
        for chunk in self.reads_at(step):
            rows.append(Row(kv.tables[chunk.request], chunk.start, chunk.count))
            ids.append(self._texts[chunk.request].known[chunk.start : chunk.start + chunk.count])
            emits.append(chunk.emits)
        return rows, ids, emits
