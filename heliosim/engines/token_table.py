"""What the tokens of decoding requests will do, laid out by decode step, for a simulated engine to read whole rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from heliosim.behaviour import Walk


class TokenTable:
    """One row per tick (a decode step of all requests), modulo ``height``; one column per slot a request holds."""

    def __init__(self, height: int, slots: int) -> None:
        self.height, self.slots = height, slots
        self.exit_layers = np.zeros((height, slots), np.int64)
        self.confidences = np.zeros((height, slots))
        self.logprobs = np.zeros((height, slots))
        self.agrees = np.zeros((height, slots), np.bool_)

    def lay_out(self, slot: int, walk: Walk, position: int, tick: int, count: int) -> None:
        """Enter tokens ``position`` on of a walk at ticks ``tick`` on; ``count`` must not exceed the height."""
        rows = np.arange(tick, tick + count) % self.height
        at = np.arange(position, position + count) % len(walk.exit_layers)
        self.exit_layers[rows, slot] = walk.exit_layers[at]
        self.confidences[rows, slot] = walk.confidences[at]
        self.logprobs[rows, slot] = walk.logprobs[at]
        self.agrees[rows, slot] = walk.agrees[at]

    def read(self, slots: npt.NDArray[np.int64], tick: int, steps: int) -> Walk:
        """What the requests of these slots do from ``tick`` on, [steps, rows] each."""
        at = np.ix_(np.arange(tick, tick + steps) % self.height, slots)
        return Walk(self.exit_layers[at], self.confidences[at], self.logprobs[at], self.agrees[at])
