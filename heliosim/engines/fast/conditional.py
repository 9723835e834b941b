"""Mode C: the whole batch stops at an exit, decided on the device.

Behind each exit a condition says whether the rows go on: with ``wait-for-deepest`` while a row has not left, with
``eager`` until enough have. The layers behind it stand in an IF node of the graph; in the other case their keys and
values are filled from the last hidden states. No step waits for the host. It needs conditional nodes of torch >= 2.12
and CUDA >= 12.4, and has not run on a GPU here; without a graph the same function asks the condition on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heliosim.engines.fast.passes import DecodePass
from heliosim.engines.fast.steps import Home, begun, first_confident, keep_hidden, run_layers, settle, taken
from heliosim.engines.sampler import Chosen
from heliosim.types import ExitRule

_CUDA = (12, 4)


def why_not(device: torch.device) -> str:
    """Why mode C cannot be used; empty: it can."""
    if device.type != "cuda":
        return f"conditional graph nodes need a GPU, not {device.type}"
    if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        return f"torch {torch.__version__} has no conditional graph nodes (2.12 has)"
    version = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    return "" if version >= _CUDA else f"CUDA {torch.version.cuda} has no conditional graph nodes (12.4 has)"


def branch(condition: Tensor, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Do one of two things by a boolean on the device, [] bool. In a capture both become IF nodes; in the runs before
    a capture both are done, so that all kernels are ready; else the host asks.
    """
    if condition.device.type != "cuda":
        (then if bool(condition) else otherwise)()
        return
    if not torch.cuda.is_current_stream_capturing():
        then()
        otherwise()
        return
    graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    for one, body in ((condition, then), (torch.logical_not(condition), otherwise)):
        graph.begin_capture_to_if_node(one)
        try:
            body()
        finally:
            graph.end_capture_to_conditional_node()


class ConditionalStep:
    """A decode step of ``rows`` rows under a rule that keeps them together."""

    def __init__(self, home: Home, run: DecodePass, rows: int, rule: ExitRule) -> None:
        self.home, self.run, self.rows, self.rule = home, run, rows, rule
        device, info = home.state.device, home.resident.host.info
        self.h = torch.zeros(rows, info.hidden, device=device, dtype=home.kv.dtype)
        self.said = Chosen(
            *(torch.zeros(rows, device=device, dtype=d) for d in (torch.float32, torch.float32, torch.int64))
        )
        self.exit_layers = torch.zeros(rows, device=device, dtype=torch.int64)
        self.deepest = torch.zeros(1, device=device, dtype=torch.int64)
        self.goes_on = torch.zeros((), device=device, dtype=torch.bool)

    def __call__(self) -> None:
        home, run, ends = self.home, self.run, self.home.exits
        self.h.copy_(run_layers(home, run, begun(home, run), 0, ends[0]))
        self._say(ends[0], is_first=True)
        self.goes_on.fill_(True)
        for i in range(len(ends) - 1):
            first, last = ends[i], ends[i + 1]
            self.goes_on.logical_and_(self._wants_more())
            branch(self.goes_on, self._on(first, last), self._filled(first, last))
        keep_hidden(home.kv, run.slots, self.h)
        settle(home, self.said, self.exit_layers, self.deepest, self.rows)

    def _say(self, layer: int, *, is_first: bool = False) -> None:
        """Ask the rows behind ``layer``."""
        before = None if is_first else (self.said, self.exit_layers)
        said, layers = first_confident(self.home, before, taken(self.home, self.h, layer, self.rows), layer)
        for mine, new in zip(self.said, said, strict=True):
            mine.copy_(new)
        self.exit_layers.copy_(layers)
        self.deepest.fill_(layer)

    def _wants_more(self) -> Tensor:
        """Whether the batch goes on behind the exit it was asked at last (``exits/batching.py``), [] bool."""
        state = self.home.state
        counts = self.run.is_on & (state.alive[: self.rows] > 0)
        has_left = self.said.tops.double().exp() >= state.threshold
        if self.rule.batching == "eager":
            rows = counts.sum()
            return (has_left & counts).sum() < rows.clamp(max=self.rule.quorum)
        return (counts & ~has_left).any()

    def _on(self, first: int, last: int) -> Callable[[], None]:
        def go() -> None:
            self.h.copy_(run_layers(self.home, self.run, self.h, first, last))
            self._say(last)

        return go

    def _filled(self, first: int, last: int) -> Callable[[], None]:
        """Keys and values of skipped layers, as the rule's method has them."""
        home, run = self.home, self.run
        layers, kv = home.resident.layers, home.kv.layers

        def fill() -> None:
            for i in range(first, last):
                if self.rule.skipped_kv == "copy":
                    kv[i].tokens.index_copy_(0, run.slots, kv[i - 1].tokens.index_select(0, run.slots))
                else:
                    home.resident.family.fill(layers[i], self.h, run, kv[i])

        return fill
