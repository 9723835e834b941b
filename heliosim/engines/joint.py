"""Tokens of a step whose exits depend on who else is in the batch (exit batching ``eager``), from recorded confidences.

Each exit's confidence of each token is on record, so what a row would have said at the exit where its batch left is
known, as long as its text is. That text was generated under another rule, unless the profile holds one of this rule:
figures of quality are only given then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heliosim.exits.batching import AtExit, exit_batcher
from heliosim.types import ExitRule, RequestId


@dataclass(frozen=True, slots=True)
class Fan:
    """What every exit would have said of a text's tokens, [exits, tokens]; positions wrap around as in a ``Walk``."""

    confidences: npt.NDArray[np.float64]
    agrees: npt.NDArray[np.bool_]

    def at(self, position: int) -> tuple[list[float], list[bool]]:
        """Of one token, by exit."""
        column = position % self.confidences.shape[1]
        return self.confidences[:, column].tolist(), self.agrees[:, column].tolist()


class JointBlock:
    """Tokens of one step, in batch order; arrays [tokens]."""

    def __init__(
        self, requests: Sequence[RequestId], layers: Sequence[int], confidences: Sequence[float], agrees: Sequence[bool]
    ) -> None:
        self.requests = np.array(requests, np.int64)
        self.exit_layers = np.array(layers, np.int64)
        self.confidences = np.array(confidences, np.float64)
        self.logprobs = np.log(np.maximum(self.confidences, 1e-12))
        self._agrees = np.array(agrees, np.bool_)

    def agrees(self) -> npt.NDArray[np.bool_]:
        return self._agrees


def leave_together(
    rule: ExitRule,
    ends: Sequence[int],
    requests: Sequence[RequestId],
    seen: Sequence[tuple[list[float], list[bool]]],
    may_stop: bool,
) -> JointBlock:
    """Where the tokens of a step leave. ``seen``: of each, confidence and agreement by exit; ``may_stop``: it is a step
    of decode rows alone.
    """
    batcher = exit_batcher(rule.batching)
    left: dict[int, int] = {}
    last = len(ends) - 1
    for i in range(len(ends)):
        for row, (confidences, _) in enumerate(seen):
            if row not in left and (i == last or confidences[i] >= rule.threshold):
                left[row] = i
        undecided = len(seen) - len(left)
        if i == last or not may_stop or not undecided:
            continue
        if batcher.verdict(AtExit(len(seen), len(seen), undecided, ends[i + 1] - ends[i]), rule) == "stop":
            left |= {row: i for row in range(len(seen)) if row not in left}
    at = [left[row] for row in range(len(seen))]
    return JointBlock(
        requests,
        [ends[i] for i in at],
        [confidences[i] for (confidences, _), i in zip(seen, at, strict=True)],
        [agrees[i] for (_, agrees), i in zip(seen, at, strict=True)],
    )
