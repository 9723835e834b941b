"""Rows about energy per prompt."""

from __future__ import annotations

from heliosim.reproduction.inputs import LARGE, SMALL
from heliosim.reproduction.opt_pair import power
from heliosim.reproduction.rows import Answer, Row, Runs, Value, samples, value_of
from heliosim.reproduction.systems import ALONE_LARGE, ALONE_SMALL, ASSUMED, SIMULATED, helios

ENERGY = helios(objective="energy")
SYSTEMS = (("OPT-1.3B", ALONE_SMALL), ("OPT-6.7B", ALONE_LARGE), ("HELIOS", ENERGY))


def energy(runs: Runs) -> Answer:
    """Watt-hours of the node per prompt; ratios, which no output length enters; what loads cost of what is saved."""
    of = {name: samples(runs, x, "wh_per_prompt") for name, x in SYSTEMS}
    small, large, ours = of.values()
    count = samples(runs, ENERGY, "completed")
    loads = [j / 3600 / n for j, n in zip(samples(runs, ENERGY, "load_energy_j"), count, strict=True)]
    saved = sum(small) / len(small) - sum(ours) / len(ours) + sum(loads) / len(loads)
    whole = (samples(runs, ENERGY, "state:opt-1.3b@24"), samples(runs, ENERGY, "state:opt-6.7b@32"))
    partial = [100 * (1 - a - b) for a, b in zip(*whole, strict=True)]
    return Answer(
        (
            *(value_of(f"{name}, Wh", values) for name, values in of.items()),
            value_of("OPT-6.7B / OPT-1.3B", [a / b for a, b in zip(large, small, strict=True)]),
            value_of("HELIOS / OPT-1.3B", [a / b for a, b in zip(ours, small, strict=True)]),
            value_of("tokens served by partial models, %", partial),
            Value("loads over what is saved, %", 100 * sum(loads) / len(loads) / saved),
        ),
        beside=(
            value_of("loads, Wh per prompt", loads),
            Value("power of the GPU that decodes, OPT-1.3B, W", power(SMALL).decode_w),
            Value("power of the GPU that decodes, OPT-6.7B, W", power(LARGE).decode_w),
        ),
    )


ROWS = (
    Row(
        "energy",
        "energy per prompt under the objective energy",
        "calibrated",
        "Wh",
        energy,
        inputs=SIMULATED,
        assumptions=(*ASSUMED, "prefill rate", "power of the node"),
        needs=(ALONE_SMALL, ALONE_LARGE, ENERGY),
        remark=(
            "Watt-hours scale with the output length, which the paper does not give: at the node's power its 0.50 Wh "
            "stand for many times the 76 tokens a prompt of our spec. The ratios do not depend on it. Overlapped "
            "transfers add no energy; what loads cost is the first load and what is exposed."
        ),
        why="output lengths and the meter are not published; ratios are comparable",
    ),
)
