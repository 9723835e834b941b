"""The two set-ups of the OPT pair that rows are shown under, and the grid that the second was chosen from.

``defaults``: everything as fixed before any result was seen. ``calibrated``: the neighbour of it, among ``GRID``, whose
state shares lie nearest to the paper's. What was fitted is no evidence, and is marked so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from heliosim.reproduction import inputs
from heliosim.reproduction.rows import CALIBRATED, DEFAULTS


@dataclass(frozen=True)
class Setup:
    """``coverage``: q; ``request_effect``: share of a token's difficulty that is its request's; ``probes_count``:
    whether requests that evaluate count towards RI.
    """

    coverage: float
    request_effect: float
    probes_count: bool

    @property
    def name(self) -> str:
        probes = "count" if self.probes_count else "do not count"
        return f"q {self.coverage:.2f}, request effect {self.request_effect:.2f}, probes {probes}"


_GRID = [Setup(*values) for values in product(inputs.GRID_COVERAGE, inputs.GRID_EFFECT, (True, False))]
GRID: Mapping[str, Setup] = {setup.name: setup for setup in _GRID}
"""What was tried, by name; judged by state shares, with seeds of its own."""
SETUPS: Mapping[str, Setup] = {
    DEFAULTS: Setup(*inputs.DEFAULT_SETUP),
    CALIBRATED: Setup(*inputs.CALIBRATED_SETUP),
    **GRID,
}


def is_choosing(setup: str) -> bool:
    """Whether runs of a set-up serve the choice, and so have the seeds of the choice."""
    return setup in GRID
