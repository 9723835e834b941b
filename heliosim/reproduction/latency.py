"""Rows about time per token and time to the first token."""

from __future__ import annotations

from heliosim.reproduction.inputs import EXIT_SHARES, EXITS, LARGE, LAYER_S, SMALL, STATE_SHARES
from heliosim.reproduction.rows import Answer, Row, Runs, Value, samples, value_of
from heliosim.reproduction.systems import ALONE_LARGE, ALONE_SMALL, ASSUMED, HELIOS, SIMULATED, THREE, helios

NAMES = ("OPT-1.3B", "OPT-6.7B", "HELIOS")
TTFT = helios(objective="ttft")


def full_ms(model: str) -> float:
    """Mean TPOT of a full model under early exit: seconds of a layer times the mean exit."""
    mean = sum(e * s for e, s in zip(EXITS[model], EXIT_SHARES[model], strict=True)) / sum(EXIT_SHARES[model])
    return 1e3 * LAYER_S[model] * mean


def mixed_ms() -> float:
    """Mean TPOT over the placements of ``STATE_SHARES``: partial ones at their depth, full ones as alone."""
    whole = {SMALL: EXITS[SMALL][-1], LARGE: EXITS[LARGE][-1]}
    ms = {(m, d): full_ms(m) if d == whole[m] else 1e3 * LAYER_S[m] * d for m, d in STATE_SHARES}
    return sum(share * ms[place] for place, share in STATE_SHARES.items()) / sum(STATE_SHARES.values())


def tpot_given_shares(_: Runs) -> Answer:
    return Answer((Value(NAMES[0], full_ms(SMALL)), Value(NAMES[1], full_ms(LARGE)), Value(NAMES[2], mixed_ms())))


def tpot_simulated(runs: Runs) -> Answer:
    """Token-weighted, as the figure above; the mean over requests beside."""
    pairs = tuple(zip(NAMES, THREE, strict=True))
    return Answer(
        tuple(value_of(name, samples(runs, x, "token_weighted_tpot_ms")) for name, x in pairs),
        beside=tuple(value_of(f"{name}, mean over requests", samples(runs, x, "mean_tpot_ms")) for name, x in pairs),
    )


def ttft(runs: Runs) -> Answer:
    """Mean TTFT with a queue of none: requests come one behind the other."""
    of = {x: samples(runs, x, "mean_ttft_ms") for x in (*THREE, TTFT)}
    ratios = [
        (f"{name} / HELIOS (objective TTFT)", [a / b for a, b in zip(of[x], of[TTFT], strict=True)])
        for name, x in (("OPT-1.3B", ALONE_SMALL), ("OPT-6.7B", ALONE_LARGE))
    ]
    return Answer(
        (
            *(value_of(name, of[x]) for name, x in zip(NAMES, (ALONE_SMALL, ALONE_LARGE, TTFT), strict=True)),
            *(value_of(name, values) for name, values in ratios),
        ),
        beside=(value_of("HELIOS, objective throughput", of[HELIOS]),),
    )


ROWS = (
    Row(
        "tpot",
        "TPOT given the state shares",
        "exact",
        "ms",
        tpot_given_shares,
        inputs=("tokens by exit alone", "seconds per layer", "state shares"),
        remark="The state shares are solved from the paper's tokens by exit; the next row has no need of them.",
    ),
    Row(
        "tpot-simulated",
        "TPOT, simulated",
        "calibrated",
        "ms",
        tpot_simulated,
        fitted=("HELIOS",),
        why="follows from the shares of placements",
        inputs=SIMULATED,
        assumptions=ASSUMED,
        needs=THREE,
    ),
    Row(
        "ttft",
        "TTFT, and what the objective TTFT gains",
        "calibrated",
        "ms",
        ttft,
        inputs=SIMULATED,
        assumptions=(*ASSUMED, "prefill rate"),
        needs=(*THREE, TTFT),
        why="prompt lengths and what both models pay alike are not published",
        remark=(
            "No prompt length is published. 42 and 69 ms cannot both come from launches (23 and 33 ms) plus "
            "arithmetic, "
            "which differs fourfold between the models: something that both pay alike, such as tokenising and "
            "sampling, "
            "must be in the paper's figures and is not in ours."
        ),
    ),
)
