"""The rows of a batch as the device keeps them, in buffers that never move, and the host's side of them.

A row is a request that decodes. What the next step needs of it stands in one column of ``fields``: the token to feed,
its position, how many tokens it may still generate, whether it goes on, whether an end-of-sequence token ends it, and
the seed of its draws. A step feeds a row's token, takes the next one and writes it back, so steps follow each other
without the host. A row that has ended stays as it is: it computes the same token at the same place again, and nobody
looks.

Steps exist for few numbers of rows (``buckets``). Rows behind ``count`` repeat the first one to fill a step up; what
they write is what the first writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

FIELDS = ("ids", "positions", "left", "alive", "heeds_eos", "seeds")
OUT = ("id", "exit_layer", "was_alive", "top", "logprob", "sums")
"""Rows of a step's results [6, rows], float64: ids below 2^53 are exact. ``sums``: breaches so far, deepest layer."""


class RowNow(NamedTuple):
    """A row as the host uploads it. ``table``: the blocks of its text, those of tokens to come included."""

    id: int
    position: int
    left: int
    heeds_eos: bool
    seed: int
    table: Sequence[int]


class BatchState:
    """Buffers for ``most`` rows whose tables span up to ``width`` blocks.

    ``ids``, ``positions``, ``left``, ``alive``, ``heeds_eos``, ``seeds`` [most] int64 are views of ``fields``;
    ``tables`` [most, width] int32; ``count`` [1]: rows in use; ``threshold`` [1]: of breaches and exits; ``breaches``
    [1]: tokens below it so far; ``layers`` [1]: deepest layer of the last step; ``out``: the last step's results.
    """

    def __init__(self, most: int, width: int, device: torch.device) -> None:
        self.most, self.width, self.device = most, width, device
        whole = {"device": device, "dtype": torch.int64}
        self.fields = torch.zeros(len(FIELDS), most, **whole)
        self.ids, self.positions, self.left, self.alive, self.heeds_eos, self.seeds = self.fields.unbind(0)
        self.tables = torch.zeros(most, width, device=device, dtype=torch.int32)
        self.count, self.breaches, self.layers = (torch.zeros(1, **whole) for _ in range(3))
        self.threshold = torch.zeros(1, device=device, dtype=torch.float64)
        self.out = torch.zeros(len(OUT), most, device=device, dtype=torch.float64)
        is_pinned = device.type == "cuda"
        self._fields = torch.zeros(len(FIELDS), most, dtype=torch.int64, pin_memory=is_pinned)
        self._tables = torch.zeros(most, width, dtype=torch.int32, pin_memory=is_pinned)
        self._fields_now, self._tables_now = self._fields.numpy(), self._tables.numpy()

    def upload(self, rows: Sequence[RowNow], count: int, threshold: float) -> None:
        """Let the device know all rows of a stride, ``count`` of which decode at once. Nothing earlier may be under way
        but copies that were read.
        """
        n = len(rows)
        fields, tables = self._fields_now, self._tables_now
        for k, row in enumerate(rows):
            fields[:, k] = (row.id, row.position, row.left, 1, row.heeds_eos, row.seed)
            tables[k, : len(row.table)] = row.table
            tables[k, len(row.table) :] = row.table[0]  # read and hidden, so it must be a block of KV
        # whole, because a copy of some columns would go through memory that is not pinned
        self.fields.copy_(self._fields, non_blocking=True)
        self.tables[:n].copy_(self._tables[:n], non_blocking=True)
        self.threshold.fill_(threshold)
        self.breaches.zero_()
        self.count.fill_(count)

    def use(self, count: int) -> None:
        """Let the first ``count`` rows decode from the next step on."""
        self.count.fill_(count)


def bucket_of(rows: int, buckets: Sequence[int]) -> int:
    """The smallest step that holds ``rows``."""
    return next(bucket for bucket in buckets if bucket >= rows)


def buckets_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 up to 64, every 32 beyond: padding costs at most a fifth of a step of more than 40 rows."""
    steps = [1, 2, 4, *range(8, 65, 8), *range(96, most + 32, 32)]
    return (*(b for b in steps if b < most), most)
