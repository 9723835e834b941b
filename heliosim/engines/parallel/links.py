"""How ranks reach each other: torch.distributed, NCCL between GPUs and gloo between CPUs.

One process is one rank of at most one group at a time, because torch keeps its default group per process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from heliosim.engines.models.ranks import Ranks
from heliosim.errors import HelioSimError

HOST = "127.0.0.1"
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.12


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's place in its group. ``port``: where rank 0 keeps the store that ranks meet at, on this machine.
    ``timeout_s``: how long one rank waits for the others inside a step or a load.
    """

    rank: int
    count: int
    port: int
    timeout_s: float


class Linked(Ranks):
    """One rank of several. ``reduce`` and ``whole`` are collective: every rank calls them in the same order."""

    def __init__(self, seat: Seat, device: torch.device, store: dist.Store | None = None) -> None:
        self.rank, self.count = seat.rank, seat.count
        self.beta = 0 if seat.rank else 1
        timeout = timedelta(seconds=seat.timeout_s)
        if dist.is_initialized():
            raise HelioSimError("this process is in a torch.distributed group already; close that engine first")
        if store is None:
            store = dist.TCPStore(HOST, seat.port, seat.count, is_master=False, timeout=timeout)
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        with _machine_settings():
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=store,
                rank=seat.rank,
                world_size=seat.count,
                timeout=timeout,
                device_id=device if is_cuda else None,
            )

    def reduce(self, part: Tensor) -> Tensor:
        dist.all_reduce(part)
        return part

    def lookup(self, table: Tensor, ids: Tensor) -> Tensor:
        rows = table.shape[0]
        mine = ids - self.rank * rows
        is_mine = (mine >= 0) & (mine < rows)
        found = table.index_select(0, mine.clamp(0, rows - 1))
        # multiplied, not filled: no condition has to come back from a device
        return self.reduce(found.mul_(is_mine[:, None]))

    def whole(self, logits: Tensor, vocabulary: int) -> Tensor:
        n, columns = logits.shape
        gathered = logits.new_empty(self.count, n, columns)
        _gather(gathered.view(-1, columns), logits.contiguous())
        return gathered.transpose(0, 1).reshape(n, self.count * columns)[:, :vocabulary]

    def close(self, *, is_broken: bool = False) -> None:
        """Leave the group. ``is_broken``: other ranks are gone, so wait for nobody."""
        if not dist.is_initialized():
            return
        if is_broken:
            self.abort()
        else:
            dist.destroy_process_group()

    def abort(self) -> None:
        """End what ranks that are gone will never answer; safe from any thread."""
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()


_SETTINGS = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
"""All ranks are on this machine, so gloo meets on its loopback, whatever the host is called (Linux); and NCCL leaves it
to ``team.Watch`` to end what a lost rank will never answer, instead of ending this process.
"""


@contextmanager
def _machine_settings() -> Iterator[None]:
    mine = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    if sys.platform != "linux":
        mine.pop("GLOO_SOCKET_IFNAME", None)
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]
