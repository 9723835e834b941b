"""How the calibrated set-up was chosen: every neighbour that was tried, and how far its state shares lie."""

from __future__ import annotations

from heliosim.reproduction.inputs import STATE_SHARES
from heliosim.reproduction.rows import Answer, Row, Runs, samples, value_of
from heliosim.reproduction.setups import GRID
from heliosim.reproduction.systems import ASSUMED, SIMULATED, helios


def distances(runs: Runs, setup: str) -> list[float]:
    """Sum over placements of |our share of tokens - the paper's|, in points, one per replication."""
    own = {place: samples(runs, helios(setup), f"state:{place[0]}@{place[1]}") for place in STATE_SHARES}
    count = len(next(iter(own.values())))
    return [100 * sum(abs(own[p][k] - share) for p, share in STATE_SHARES.items()) for k in range(count)]


def of_means(runs: Runs, setup: str) -> float:
    """The same of mean shares: what the choice goes by."""
    means = {(m, d): samples(runs, helios(setup), f"state:{m}@{d}") for m, d in STATE_SHARES}
    return 100 * sum(abs(sum(v) / len(v) - STATE_SHARES[p]) for p, v in means.items())


def chosen(runs: Runs) -> str:
    """The set-up of the grid nearest to the paper's state shares."""
    return min(GRID, key=lambda name: of_means(runs, name))


def grid(runs: Runs) -> Answer:
    beside = []
    for name in sorted(GRID, key=lambda n: of_means(runs, n)):
        shares = [samples(runs, helios(name), f"state:{m}@{d}") for m, d in STATE_SHARES]
        mean = of_means(runs, name)
        words = " / ".join(f"{100 * sum(v) / len(v):.1f}" for v in shares)
        found = value_of(f"{name}: shares {words} %", distances(runs, name))
        beside.append(type(found)(found.part, mean))
    return Answer(beside=tuple(beside))


_WANTED = " / ".join(f"{100 * share:g}" for share in STATE_SHARES.values())
_PLACES = " / ".join(f"{model}@{depth}" for model, depth in STATE_SHARES)

ROWS = (
    Row(
        "choosing",
        "how the calibrated set-up was chosen",
        "shape",
        "points",
        grid,
        inputs=(*SIMULATED, "state shares"),
        assumptions=ASSUMED,
        needs=tuple(helios(name) for name in GRID),
        remark=(
            f"Judged by nothing but the shares of tokens served by {_PLACES}: {_WANTED} % in the paper (D). The value "
            "is the sum of the absolute distances of mean shares, in points; the first line is the calibrated set-up. "
            "Replications have seeds of their own, so no reported run took part in the choice."
        ),
        is_ours=True,
    ),
)
