"""Rows of what the paper left out: batches of more than one under load, tails of latency, limits kept."""

from __future__ import annotations

from heliosim.reproduction.rows import Answer, Experiment, Plot, Row, Runs, Series, samples, series_of, value_of

SETTING = "Llama-2 pair, A100"
SYSTEMS = ("vanilla small", "vanilla large", "early exit small", "early exit large", "HELIOS")
RATES = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0)


def at(system: str, rate: float) -> Experiment:
    return Experiment(SETTING, system, (("rate_per_s", rate),))


def _lines(runs: Runs, metric: str, scale: float = 1.0) -> tuple[Series, ...]:
    return tuple(
        series_of(s, [(r, [scale * v for v in samples(runs, at(s, r), metric)]) for r in RATES]) for s in SYSTEMS
    )


def curves(runs: Runs) -> Answer:
    """Output tokens per second against P99 of TTFT and mean TPOT, and attainment, by arrival rate."""
    x = "requests per second"
    plots = (
        Plot("Output throughput", x, "tokens per second", _lines(runs, "output_throughput")),
        Plot("Time to first token, P99", x, "ms", _lines(runs, "p99_ttft_ms")),
        Plot("Time per output token, mean", x, "ms", _lines(runs, "mean_tpot_ms")),
        Plot("Requests within TTFT 1 s and TPOT 50 ms", x, "%", _lines(runs, "slo_attainment", 100.0)),
        Plot("Batch size, mean", x, "rows", _lines(runs, "mean_batch_size")),
    )
    beside = [
        value_of(f"{s} at {r:g} requests/s: {word}", [k * v for v in samples(runs, at(s, r), metric)])
        for s in SYSTEMS
        for r in (2.0, 8.0)
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
        "all systems under load: throughput, P99, limits kept (batch up to 64)",
        "shape",
        "",
        curves,
        assumptions=("derived profile under load",),
        needs=tuple(at(s, r) for s in SYSTEMS for r in RATES),
        remark=(
            "The paper has batch 1 and no arrivals. Under load loads block everybody, and a switch moves gigabytes: "
            "HELIOS "
            "keeps fewer requests within the limits than early exit alone unless loads are hidden or rare."
        ),
        is_ours=True,
    ),
)
