"""One buffer of device memory for weights and KV: weights from its left end, KV blocks from its right.

Both regions are contiguous, so nothing is rounded: what the weights leave is KV blocks to the last byte, and a server's
books are the engine's. A layer has one place for ever, whatever the depth; a dropped layer's bytes lie next to the KV
blocks and become some. The buffer itself takes whole pages, of 2 MiB on a GPU, where the driver gives no less.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

PAGE_BYTES = {"cuda": 2 << 20, "cpu": 4096}
_ASK_FIRST_BYTES = 1 << 30
"""Host memory is promised before it is there: ask how much there is before taking as much as this."""

Allocate = Callable[[int, torch.device, torch.dtype], Tensor]


def allocate(values: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A new buffer of finite values. Raises RuntimeError (torch.OutOfMemoryError) if the device has not that much."""
    if device.type == "cpu":
        wanted, there = values * dtype.itemsize, available_bytes(device)
        if wanted >= _ASK_FIRST_BYTES and there is not None and wanted > there:
            raise torch.OutOfMemoryError(f"cannot allocate {wanted:,} B of {there:,} B of memory that are free")
    return torch.zeros(values, device=device, dtype=dtype)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device has not as much memory as was asked for."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error) or "overflow" in str(error)


def available_bytes(device: torch.device) -> int | None:
    """Bytes of memory that could be allocated now; None: nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


class Arena:
    """``data`` [values] holds everything; empty at the start. ``size``: values that may be used, of what pages give."""

    def __init__(self, device: torch.device, dtype: torch.dtype, allocate: Allocate = allocate) -> None:
        self.device, self.dtype, self._allocate = device, dtype, allocate
        self.data = torch.empty(0, device=device, dtype=dtype)
        self.allocations = 0
        """Buffers taken so far: one, unless a load asked for more than the arena was made for."""

    @property
    def nbytes(self) -> int:
        size: int = self.data.nbytes
        return size

    def part(self, first: int, values: int) -> Tensor:
        """The ``values`` values from ``first`` on."""
        assert first + values <= len(self.data), f"{first + values} values in an arena of {len(self.data)}"
        return self.data[first : first + values]

    def grow(self, values: int, left: int, right: int) -> bool:
        """Have room for ``values`` values, taking along the ``left`` first and the ``right`` last; False: it has.

        Raises RuntimeError if the device has not that much; the arena is as it was then.
        """
        if values <= len(self.data):
            return False
        page = PAGE_BYTES[self.device.type] // self.dtype.itemsize
        kept = self.data[:left], self.data[len(self.data) - right :]
        if not left and not right:  # nothing to take along: the old buffer makes room first
            self.data = self.data[:0].clone()
        made = self._allocate(-(-values // page) * page, self.device, self.dtype)
        if left:
            made[:left].copy_(kept[0])
        if right:
            made[len(made) - right :].copy_(kept[1])
        self.data = made
        self.allocations += 1
        return True

    def move_left(self, first: int, values: int, by: int) -> None:
        """Move ``values`` values from ``first`` on ``by`` places towards the left, over what lies there."""
        for done in range(0, values if by else 0, max(1, by)):
            count = min(by, values - done)
            source = self.part(first + done, count)
            self.part(first + done - by, count).copy_(source)
