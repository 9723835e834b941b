"""What a layer needs to know of the other ranks of its tensor-parallel group; alone, nothing is done.

A rank holds some heads, some of the feed-forward's width and some rows of the embedding. Hidden states are whole on
every rank: the attention output and down projections of all ranks are summed, and only the first rank's sum starts from
the residual (``beta``).
"""

from __future__ import annotations

from torch import Tensor


class Ranks:
    """A group of one. ``rank`` counts from 0; ``beta``: how often this rank's part counts what is added to."""

    rank, count = 0, 1
    beta = 1

    def reduce(self, part: Tensor) -> Tensor:
        """The sum over ranks of a partial result, which may be overwritten."""
        return part

    def lookup(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows ``ids`` [T] of an embedding of which ``table`` holds this rank's rows; fresh memory, [T, d]."""
        return table.index_select(0, ids)

    def whole(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Logits [n, ``vocabulary``] from this rank's columns of them."""
        return logits


ALONE = Ranks()
