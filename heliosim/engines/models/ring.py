"""Two buffers that weights pass through on their way from disk to a device: one is read into while the other is copied.

They are pinned when the device is a GPU, and kept from load to load, so that no load has to make any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from heliosim.engines.models.host import Reader
    from heliosim.formats.checkpoint import CheckpointInfo


class Ring:
    """Buffers of ``values`` values, made when first asked for. One thread uses a ring at a time."""

    def __init__(self, values: int, *, is_pinned: bool = False) -> None:
        self.values, self._is_pinned = values, is_pinned
        self._buffers: list[Tensor] = []
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._reader: Reader | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the buffers take."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def buffer(self, values: int, dtype: torch.dtype) -> Tensor:
        """The next buffer, ``values`` long; waits until what was last copied from it has arrived."""
        assert values <= self.values, f"{values} values in a buffer of {self.values}"
        if len(self._buffers) <= self._turn:
            self._buffers.append(torch.empty(self.values, dtype=dtype, pin_memory=self._is_pinned))
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        return self._buffers[self._turn][:values]

    def sent(self) -> None:
        """The copy from the buffer given last has been issued, on the current stream."""
        if self._is_pinned:
            event = torch.cuda.Event()
            event.record()
            self._events[self._turn] = event
        self._turn = 1 - self._turn

    def reader(self, info: CheckpointInfo) -> Reader:
        """What reads a checkpoint's files; they stay open until another's are wanted, or ``close``."""
        from heliosim.engines.models.host import Reader

        if self._reader is None or self._reader.info is not info:
            self._reader = Reader(info)
        return self._reader

    def close(self) -> None:
        """Close files; the buffers stay."""
        self._reader = None
