"""Experiments that several rows share: the paper's systems on the OPT pair, and HELIOS with something changed."""

from __future__ import annotations

from heliosim.reproduction.rows import DEFAULTS, Experiment
from heliosim.reproduction.settings import OPT

ALONE_SMALL = Experiment(OPT, "early exit 1.3B", setup=DEFAULTS)
ALONE_LARGE = Experiment(OPT, "early exit 6.7B", setup=DEFAULTS)
HELIOS = Experiment(OPT, "HELIOS", setup=DEFAULTS)
THREE = (ALONE_SMALL, ALONE_LARGE, HELIOS)


def helios(setup: str = DEFAULTS, **changes: object) -> Experiment:
    """HELIOS with controller fields changed."""
    return Experiment(OPT, "HELIOS", tuple(sorted(changes.items())), setup)


def alone(small: bool, **changes: object) -> Experiment:
    """A model alone under early exit, with controller fields changed."""
    return Experiment(OPT, "early exit 1.3B" if small else "early exit 6.7B", tuple(sorted(changes.items())), DEFAULTS)


SIMULATED = (
    "tokens by exit alone",
    "joint exits",
    "seconds per layer",
    "workload",
    "HELIOS parameters",
)
"""Inputs of every simulated row."""
ASSUMED = (
    "threshold",
    "coverage",
    "probes",
    "request effect",
    "exit spec",
    "back to back",
    "overlapped loads",
    "host link",
)
"""Assumptions of every simulated row."""
