"""Prompts of nothing: token ids for requests that come without text, where what the model reads does not matter."""

from __future__ import annotations

from heliosim.streams import stream
from heliosim.types import Request

_DRAWN = 1 << 16
_STEP = 7919
"""Places between the starts of one request's prompt and the next one's; a prime."""


class MadeUpPrompts:
    """The prompt of a request depends on the seed, its number and its length alone."""

    def __init__(self, seed: int, vocab: int) -> None:
        drawn = stream(seed, "made-up prompts").integers(vocab, size=_DRAWN).tolist()
        self._ids: tuple[int, ...] = tuple(drawn)

    def of(self, request: Request) -> tuple[int, ...]:
        """As many ids as the request's prompt has."""
        first, count = request.id * _STEP % _DRAWN, request.prompt_tokens
        found = self._ids[first : first + count]
        while len(found) < count:
            found += self._ids[: count - len(found)]
        return found
