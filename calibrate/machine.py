"""How steady the machine is, measured beside the runs it disturbs: the same products on near and on far weights.

Both probes do the same arithmetic, one row through 72 matrices as a decode step does. The near one goes over one
layer's matrices again and again (0.8 MB, at home in a core's own cache), the far one over twelve layers' (9.4 MB, which
live in the cache a processor shares with its neighbours, or beyond it). If far varies where near does not, step times
vary with the memory traffic of others, and no profile can foretell them.
"""

from __future__ import annotations

import time
from typing import Any

_LAYERS, _WIDTH, _REPEATS = 12, 128, 12


class MachineProbe:
    """CPU seconds of one pass over near and over far weights; make it once, its weights are its own."""

    def __init__(self) -> None:
        import torch

        shapes = [(_WIDTH, _WIDTH)] * 4 + [(4 * _WIDTH, _WIDTH), (_WIDTH, 4 * _WIDTH)]
        self._far = [torch.ones(*shape) for _ in range(_LAYERS) for shape in shapes]
        self._near = self._far[: len(shapes)] * _LAYERS
        self._rows = {n: torch.ones(1, n) for n in (_WIDTH, 4 * _WIDTH)}

    def read(self) -> dict[str, float]:
        """``near_s`` and ``far_s``: medians of a dozen passes each, taken in turns."""
        near, far = [], []
        for _ in range(_REPEATS):
            near.append(self._pass(self._near))
            far.append(self._pass(self._far))
        return {"near_s": sorted(near)[_REPEATS // 2], "far_s": sorted(far)[_REPEATS // 2]}

    def _pass(self, weights: list[Any]) -> float:
        import torch

        with torch.inference_mode():
            self._over(weights)  # brings them as near as they fit
            began = time.process_time()
            self._over(weights)
            return time.process_time() - began

    def _over(self, weights: list[Any]) -> None:
        import torch

        for weight in weights:
            torch.nn.functional.linear(self._rows[weight.shape[1]], weight)
