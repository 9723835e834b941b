"""Experiments that several rows share: the paper's systems on the OPT pair, and HELIOS with something changed."""

from __future__ import annotations

from heliosim.reproduction.rows import Experiment

OPT = "OPT pair, batch 1"
ALONE_SMALL = Experiment(OPT, "early exit 1.3B")
ALONE_LARGE = Experiment(OPT, "early exit 6.7B")
VANILLA_SMALL = Experiment(OPT, "vanilla 1.3B")
VANILLA_LARGE = Experiment(OPT, "vanilla 6.7B")
HELIOS = Experiment(OPT, "HELIOS")
THREE = (ALONE_SMALL, ALONE_LARGE, HELIOS)


def helios(**changes: object) -> Experiment:
    """HELIOS with controller fields changed."""
    return Experiment(OPT, "HELIOS", tuple(sorted(changes.items())))


def alone(small: bool, **changes: object) -> Experiment:
    """A model alone under early exit, with controller fields changed."""
    return Experiment(OPT, "early exit 1.3B" if small else "early exit 6.7B", tuple(sorted(changes.items())))


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
    "probes do not count",
    "request effect",
    "exit spec",
    "back to back",
    "hidden loads",
)
"""Assumptions of every simulated row."""
