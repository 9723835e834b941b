"""Rows about where tokens leave."""

from __future__ import annotations

from heliosim.reproduction.inputs import EXIT_SHARES, EXITS, LARGE, SMALL
from heliosim.reproduction.rows import Answer, Row, Runs, Value, samples, value_of
from heliosim.reproduction.systems import ASSUMED, HELIOS, SIMULATED


def _shown(model: str) -> Answer:
    return Answer(
        beside=tuple(Value(f"{model}@{e}", 100 * s) for e, s in zip(EXITS[model], EXIT_SHARES[model], strict=True))
    )


def small_alone(_: Runs) -> Answer:
    return _shown(SMALL)


def large_alone(_: Runs) -> Answer:
    return _shown(LARGE)


def under_helios(runs: Runs) -> Answer:
    """Share of all tokens by model and exit, and by the placement that served them."""
    keys = [(model, e) for model, exits in EXITS.items() for e in exits]
    states = [(SMALL, 6), (SMALL, 12), (SMALL, 24), (LARGE, 9), (LARGE, 32)]

    def share(name: str) -> list[float]:
        return [100 * x for x in samples(runs, HELIOS, name)]

    return Answer(
        tuple(value_of(f"{m}@{e}", share(f"exit:{m}@{e}")) for m, e in keys),
        beside=tuple(value_of(f"served by {m}@{d}", share(f"state:{m}@{d}")) for m, d in states),
    )


ROWS = (
    Row(
        "exits-small-alone",
        "tokens by exit, OPT-1.3B alone (6 / 12 / 24)",
        "input",
        "%",
        small_alone,
        inputs=("tokens by exit alone",),
        remark="An input: shown, not reproduced.",
    ),
    Row(
        "exits-large-alone",
        "tokens by exit, OPT-6.7B alone (9 / 17 / 32)",
        "input",
        "%",
        large_alone,
        inputs=("tokens by exit alone",),
        remark="An input: shown, not reproduced.",
    ),
    Row(
        "exits-helios",
        "tokens by exit under HELIOS",
        "calibrated",
        "%",
        under_helios,
        inputs=SIMULATED,
        assumptions=ASSUMED,
        needs=(HELIOS,),
        fitted=("*",),
        why="small shares are those of evaluations and LD; large ones hang on some ten reactions a run",
        remark=(
            "The calibrated set-up was fitted to the shares of placements, from which this table follows. The small "
            "shares are those of evaluations and of the few times that LD is chosen. Under the defaults a task whose "
            "first five requests put layer 6 below q is served by a deeper placement until the next evaluation. "
            "Intervals are wide: few reactions decide a run, and the paper shows one run."
        ),
    ),
)
