"""Step-time noise as it was recorded: what a machine did to step times beyond their expected values.

Calibration measures steps one behind the other. The ratio of each one's measured to its predicted time, in that order,
is a recording of the machine: slow phases keep their length and their depth. A simulated engine plays it from a random
place, going round, so that waiting times feel the phases (a queue does not average them out) and repeats of a scenario
differ as live repeats do. The recording is shared by all models and shapes; it does not know which of them suffer most,
and what the fit gets wrong about a shape is in it too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

_GOLDEN = 0.6180339887498949


class RecordedNoise:
    """``ratios``: measured over predicted, in order; ``expected_s``: predicted seconds of the same steps.

    The recording advances by expected seconds, under which its mean ratio is total measured over total predicted time:
    1 for a fit without bias. Raises ValueError if it is empty or not positive.
    """

    def __init__(self, ratios: Sequence[float], expected_s: Sequence[float]) -> None:
        if len(ratios) != len(expected_s) or not ratios:
            raise ValueError(f"{len(ratios)} ratios for {len(expected_s)} steps")
        if min(ratios) <= 0 or min(expected_s) <= 0:
            raise ValueError("ratios and seconds must be positive")
        self.ratios = tuple(ratios)
        self.ends_s = tuple(accumulate(expected_s))

    def player(self, rng: np.random.Generator, draw: int = 0) -> NoisePlayer:
        """A player that starts at a random place.

        Draws 0, 1, 2, ... from one generator's place are spread evenly over the recording (by the golden section), so
        that the mean of a few does not hang on where the first one fell.
        """
        return NoisePlayer(self, (float(rng.random()) + draw * _GOLDEN) % 1.0 * self.ends_s[-1])


class NoisePlayer:
    """Where a run is in a recording."""

    def __init__(self, recording: RecordedNoise, at_s: float) -> None:
        self.recording, self.at_s = recording, at_s

    def factor(self, expected_s: float) -> float:
        """The ratio of the next ``expected_s`` seconds; a step longer than recorded ones takes the first it meets."""
        ends = self.recording.ends_s
        ratio = self.recording.ratios[min(bisect_right(ends, self.at_s), len(ends) - 1)]
        self.at_s = (self.at_s + expected_s) % ends[-1]
        return ratio
