"""Made-up studies and settings with known numbers, for tests of what reads them: nothing is simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heliosim.comparing import EXTRA, Cell, Study
from heliosim.metrics import SCALARS
from heliosim.replicated import Replicated, Replication, WarmUp
from heliosim.stats import StoppingRule
from heliosim.what_if import Tried

NOTHING: dict[str, float | None] = dict.fromkeys((*SCALARS, *EXTRA))


def cell(
    system: str, rate: float, values: Mapping[str, Sequence[float | None]], *, grew: bool = False, replicas: int = 1
) -> list[Cell]:
    """The replications of a cell: one per value of every metric."""
    count = max(len(v) for v in values.values())
    return [
        Cell(
            system, rate, replicas, k, 100 + k, 50, grew, 0.5 if grew else 0.0,
            {**NOTHING, **{name: found[k] for name, found in values.items()}},
            {"ttft": [1.0 + k, 2.0 + k, 3.0 + k]} if replicas == 1 and rate == 2.0 else {},
        )
        for k in range(count)
    ]  # fmt: skip


def study() -> Study:
    """Two systems at 1, 2 and 4 requests/s; the slow one is overloaded at 4. A map of the fast one over 1 and 2."""
    cells = []
    for system, factor in (("vanilla m", 1.0), ("HELIOS", 0.5)):
        for rate in (1.0, 2.0, 4.0):
            cells += cell(
                system,
                rate,
                {
                    "output_throughput": [10 * rate, 12 * rate],
                    "p99_ttft_ms": [100 * factor * rate, 110 * factor * rate],
                    "p99_tpot_ms": [20 * factor, 22 * factor],
                    "agreement": [1.0, 1.0] if factor == 1 else [0.9, 0.92],
                    "completed": [50, 50],
                    "slo_attainment": [1.0, 1.0],
                    "tokens_per_s_per_gpu": [10 * rate, 12 * rate],
                    "tokens_per_s_per_user": [50 / rate / factor, 52 / rate / factor],
                    "cost_per_million_tokens": [3 / rate, 3.2 / rate],
                },
                grew=system == "vanilla m" and rate == 4.0,
            )
    for count in (1, 2):
        for rate in (3.0, 6.0):
            share = [0.99, 1.0] if count == 2 and rate == 3.0 else [0.5, 0.6]
            over = count == 1 and rate == 6.0
            cells += cell("HELIOS", rate, {"slo_attainment": share}, grew=over, replicas=count)
    return Study(
        systems=("vanilla m", "HELIOS"),
        rates_per_s=(1.0, 2.0, 4.0),
        focus_per_s=2.0,
        replications=2,
        requests=50,
        base_seed=7,
        slo={"ttft_ms": 150.0},
        profile_kind="derived",
        settling=0.1,
        fleet_of="HELIOS",
        fleet_rates_per_s=(3.0, 6.0),
        replicas=(1, 2),
        cells=tuple(cells),
        currency="USD",
    )


def tried(values: Mapping[str, Sequence[float]], *, seed: int = 100, name: str = "hand") -> Tried:
    """A setting whose replications have these values."""
    count = max(len(v) for v in values.values())
    replications = tuple(
        Replication(k, seed + k, 50, 0.0, 0.0, False, {**NOTHING, **{n: v[k] for n, v in values.items()}})
        for k in range(count)
    )
    rule = StoppingRule.exactly(count)
    return Tried(
        name=name,
        digest=name,
        requests=50,
        replicated=Replicated(name, "steady", WarmUp(5, "given"), rule, (), replications),
        latencies={"ttft": [1.0, 2.0, 4.0], "tpot": [3.0], "e2el": [5.0, 6.0]},
        counts={"ttft": 150, "tpot": 150, "e2el": 150},
        exits=[("a", 4, 0.75), ("a", 8, 0.25)],
        course={"time_s": [0.5, 1.5], "rows": [3, 4], "waiting": [0, 2]},
        profile_kind="derived",
        wall_s=0.1,
    )
