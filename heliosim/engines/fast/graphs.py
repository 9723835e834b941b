"""Steps made ready: captured as CUDA graphs that share one pool of memory, or, where there is none, called as they are.

A step is captured when it is first needed, for the addresses it then meets. It is first run twice with no row alive:
kernels are chosen and memory is there before the capture, and what such a run writes is what the step would write.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from heliosim.engines.fast.state import BatchState

Step = Callable[[], None]
MOST_GRAPHS = 192
"""Graphs kept at a time, of all placements together; the one used longest ago gives way."""


class Ready:
    """A step with the pass it runs on. ``go`` does it; on a GPU it returns at once."""

    __slots__ = ("go", "graph", "run", "step")

    def __init__(self, step: Step, run: Any) -> None:
        self.step, self.run, self.go, self.graph = step, run, step, None


class Graphs:
    """Steps by what they are for. ``captures``: how many were captured so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = 0
        self._ready: OrderedDict[Hashable, Ready] = OrderedDict()
        self._pool: Any = None

    def clear(self) -> None:
        """Forget all steps: what they ran on has moved."""
        self._ready.clear()

    def get(self, key: Hashable, make: Callable[[], tuple[Step, Any]]) -> Ready:
        """The step of that key, made with its pass if there is none."""
        ready = self._ready.get(key)
        if ready is not None:
            self._ready.move_to_end(key)
            return ready
        ready = Ready(*make())
        self._ready[key] = ready
        while len(self._ready) > MOST_GRAPHS:
            self._ready.popitem(last=False)
        return ready

    def capture(self, ready: Ready, state: BatchState) -> None:
        """Make a step ready to go, its attention being planned; nothing to do on a CPU or the second time."""
        if self.device.type != "cuda" or ready.graph is not None:
            return
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream, now = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            rehearse(ready, state)
        now.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            ready.step()
        ready.graph, ready.go = graph, graph.replay
        self.captures += 1


def rehearse(ready: Ready, state: BatchState) -> None:
    """Run a step twice with no row alive, and put back what that writes but keys and values, which are those the step
    will write: results, and what the step itself names (``overwrites``).
    """
    written = [state.alive, state.breaches, state.out, *getattr(ready.step, "overwrites", ())]
    before = [tensor.clone() for tensor in written]
    state.alive.zero_()
    for _ in range(2):
        ready.step()
    for tensor, value in zip(written, before, strict=True):
        tensor.copy_(value)
