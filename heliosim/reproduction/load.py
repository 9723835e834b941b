"""Rows of what the paper left out: batches of more than one under load, tails of latency, limits kept."""

from __future__ import annotations

from heliosim.reproduction.rows import Answer, Experiment, Plot, Row, Runs, Series, samples, series_of, value_of
from heliosim.reproduction.settings import LOAD

SYSTEMS = ("vanilla small", "vanilla large", "early exit small", "early exit large", "HELIOS")
RATES = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0)


def at(system: str, rate: float) -> Experiment:
    return Experiment(LOAD, system, (("rate_per_s", rate),))


NAMES = ("vanilla OPT-1.3B", "vanilla OPT-6.7B", "early exit OPT-1.3B", "early exit OPT-6.7B", "HELIOS (both)")


def _lines(runs: Runs, metric: str, scale: float = 1.0) -> tuple[Series, ...]:
    return tuple(
        series_of(name, [(r, [scale * v for v in samples(runs, at(s, r), metric)]) for r in RATES])
        for name, s in zip(NAMES, SYSTEMS, strict=True)
    )


def _latency_against_throughput(runs: Runs) -> tuple[Series, ...]:
    """Mean TPOT against output throughput, from the lowest rate to the highest."""
    found = []
    for name, s in zip(NAMES, SYSTEMS, strict=True):
        points = []
        for r in RATES:
            rate = samples(runs, at(s, r), "output_throughput")
            points.append((sum(rate) / len(rate), samples(runs, at(s, r), "mean_tpot_ms")))
        found.append(series_of(name, points))
    return tuple(found)


def curves(runs: Runs) -> Answer:
    """Throughput, tails of latency and attainment by arrival rate, and latency against throughput: all systems."""
    x = "requests per second that arrive"
    plots = (
        Plot("Throughput saturates", x, "output tokens/s", _lines(runs, "output_throughput")),
        Plot(
            "Latency against throughput, arrival rates 2 to 45 per second", "output tokens/s",
            "time per output token, mean, ms", _latency_against_throughput(runs),
        ),
        Plot("Waiting for the first token", x, "TTFT, P99, ms, log scale", _lines(runs, "p99_ttft_ms"), is_log=True),
        Plot("Time per output token", x, "TPOT, P99, ms, log scale", _lines(runs, "p99_tpot_ms"), is_log=True),
        Plot(
            "Requests served within their limits", x, "% within TTFT 1 s and TPOT 50 ms",
            _lines(runs, "slo_attainment", 100.0),
        ),
        Plot("Requests served together", x, "rows in a step, mean", _lines(runs, "mean_batch_size")),
    )  # fmt: skip
    beside = [
        value_of(f"{s} at {r:g} requests/s: {word}", [k * v for v in samples(runs, at(s, r), metric)])
        for s in SYSTEMS
        for r in (5.0, 15.0, 45.0)
        for word, metric, k in (
            ("tokens/s", "output_throughput", 1.0),
            ("P99 TTFT, ms", "p99_ttft_ms", 1.0),
            ("within limits, %", "slo_attainment", 100.0),
        )
    ]
    return Answer(plots=plots, beside=tuple(beside))


ROWS = (
    Row(
        "saturation",
        "all systems under load: throughput, P99, limits kept (batch up to 256)",
        "shape",
        "",
        curves,
        assumptions=("composed OPT pair under load",),
        needs=tuple(at(s, r) for s in SYSTEMS for r in RATES),
        remark=(
            "The paper has batch 1 and no arrivals. Loads overlap and expose next to nothing; what HELIOS pays for "
            "under load is evaluation: five requests on each full model in turn, while all others wait. Its P99 of "
            "TTFT is that wait. Early exit gains little in a batch, whose steps last as long as the deepest token."
        ),
        is_ours=True,
    ),
)
