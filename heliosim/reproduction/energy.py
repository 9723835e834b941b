"""Rows about energy per prompt."""

from __future__ import annotations

from heliosim.reproduction.rows import Answer, Row, Runs, samples, value_of
from heliosim.reproduction.systems import ALONE_LARGE, ALONE_SMALL, ASSUMED, SIMULATED, helios

ENERGY = helios(objective="energy")


def energy(runs: Runs) -> Answer:
    """Watt-hours of the node per prompt; ratios, which no output length enters; what loads cost of what is saved."""
    small, large, ours = (samples(runs, x, "energy_wh") for x in (ALONE_SMALL, ALONE_LARGE, ENERGY))
    loads = samples(runs, ENERGY, "energy_loads_wh")
    saved = [100 * w / (a - b + w) for w, a, b in zip(loads, small, ours, strict=True)]
    partial = [
        100 * (1 - a - b)
        for a, b in zip(
            samples(runs, ENERGY, "state:opt-1.3b@24"), samples(runs, ENERGY, "state:opt-6.7b@32"), strict=True
        )
    ]
    return Answer(
        (
            value_of("OPT-1.3B, Wh", small),
            value_of("OPT-6.7B, Wh", large),
            value_of("HELIOS, Wh", ours),
            value_of("OPT-6.7B / OPT-1.3B", [a / b for a, b in zip(large, small, strict=True)]),
            value_of("HELIOS / OPT-1.3B", [a / b for a, b in zip(ours, small, strict=True)]),
            value_of("tokens served by partial models, %", partial),
            value_of("loads over what is saved, %", saved),
        )
    )


ROWS = (
    Row(
        "energy",
        "energy per prompt under the objective energy",
        "calibrated",
        "Wh",
        energy,
        inputs=SIMULATED,
        assumptions=(*ASSUMED, "power of the node"),
        needs=(ALONE_SMALL, ALONE_LARGE, ENERGY),
        remark=(
            "Watt-hours scale with the output length, which the paper does not give: at the node's power its 0.50 Wh "
            "stand for some 600 tokens a prompt, our spec has 76. The ratios do not depend on it. The controller is "
            "told one "
            "power for both models, so it minimises time."
        ),
    ),
)
