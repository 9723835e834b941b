"""What steps said, brought to the host while the next step runs.

Two places on the host take turns. A step's results are copied there on the device's own time, and an event says when
they have come, so reading a step's results waits for that step and not for those behind it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from heliosim.engines.fast.state import OUT, BatchState


class StepResult(NamedTuple):
    """Of the rows of a step, [rows]: ids of tokens, exit layers, whether the row had not ended before, natural logs of
    the highest probability and of the token's own; ``breaches``: so far in the stride; ``layers``: deepest that ran.
    ``confidences``, ``agrees``: of rows that had not ended, in order, where exits are replayed.
    """

    ids: npt.NDArray[np.int64]
    exit_layers: npt.NDArray[np.int64]
    was_alive: npt.NDArray[np.bool_]
    tops: npt.NDArray[np.float64]
    logprobs: npt.NDArray[np.float64]
    breaches: int
    layers: int
    confidences: npt.NDArray[np.float64] | None = None
    agrees: npt.NDArray[np.bool_] | None = None


class Results:
    """``push`` behind each step, ``read`` in the same order, at most two behind."""

    def __init__(self, state: BatchState) -> None:
        self.state = state
        self._is_cuda = state.device.type == "cuda"
        shape = (len(OUT), state.most)
        self._places = [torch.zeros(shape, dtype=torch.float64, pin_memory=self._is_cuda) for _ in range(2)]
        self._views = [place.numpy() for place in self._places]
        self._events: list[Any] = [torch.cuda.Event() if self._is_cuda else None for _ in range(2)]
        self._pushed = self._read = 0

    def push(self) -> None:
        """Send the last step's results on their way."""
        assert self._pushed - self._read < 2, "results would be written over before they were read"
        k = self._pushed % 2
        self._places[k].copy_(self.state.out, non_blocking=self._is_cuda)
        if self._is_cuda:
            self._events[k].record(torch.cuda.current_stream(self.state.device))
        self._pushed += 1

    def read(self, rows: int) -> StepResult:
        """The oldest results not read, of a step of ``rows`` rows."""
        assert self._read < self._pushed, "there is nothing to read"
        k = self._read % 2
        self._read += 1
        if self._is_cuda:
            self._events[k].synchronize()
        out = self._views[k]
        ids, layers, alive = out[0, :rows].astype(np.int64), out[1, :rows].astype(np.int64), out[2, :rows] > 0
        return StepResult(
            ids, layers, alive, out[3, :rows].copy(), out[4, :rows].copy(), int(out[5, 0]), int(out[5, 1])
        )

    def skip(self) -> None:
        """Leave out results that nobody wants; they have come when anything behind them has."""
        self._read = self._pushed
