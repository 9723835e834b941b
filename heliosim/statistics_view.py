"""Intervals, differences and studies for a terminal: tables of 120 columns, with a word where a number cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from heliosim.metrics import MetricSpec, metric_spec
from heliosim.replicated import SATURATED, Replicated
from heliosim.stats import Interval

if TYPE_CHECKING:
    from rich.table import Table

    from heliosim.coverage import CoverageRow
    from heliosim.paired import Paired
    from heliosim.randomness import CrnRow

SHOWN: tuple[str, ...] = (
    "output_throughput", "request_throughput", "mean_ttft_ms", "median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "p90_tpot_ms", "p99_tpot_ms", "mean_e2el_ms", "p90_e2el_ms", "p99_e2el_ms",
    "mean_queue_ms", "slo_attainment", "request_goodput", "mean_batch_size", "peak_kv_bytes", "layers_per_token",
    "low_confidence_share", "perplexity", "agreement", "transitions", "preemptions", "energy_j", "utilisation",
)  # fmt: skip
"""Metrics of a summary of replications, in order."""
_ONLY_WITH_SLO = ("slo_attainment", "request_goodput")
_QUIET = ("energy_j",)


def replicated_table(replicated: Replicated, *, has_slo: bool) -> Table:
    """One metric a line: mean, half-width, the same in percent, spread of the replications."""
    table = _new_table(_title(replicated))
    table.add_column("metric")
    for name in ("mean", "±", "± %", "least … greatest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("note", style="dim")
    for name in SHOWN:
        if name in _ONLY_WITH_SLO and not has_slo:
            continue
        spec, interval = metric_spec(name), replicated.interval(name)
        known = [v for v in replicated.values(name) if v is not None]
        if interval.reason == SATURATED:
            table.add_row(spec.label, f"[yellow]{SATURATED}[/]", "", "", "", "", "depends on how long the run is")
            continue
        if name in _QUIET and not known:
            table.add_row(spec.label, "unavailable", "", "", "", spec.unit, "the profile has no power figures")
            continue
        spread = f"{spec.text(min(known))} … {spec.text(max(known))}" if known and min(known) != max(known) else "–"
        table.add_row(
            spec.label, spec.text(interval.mean), *_half_width(interval, spec), spread, spec.unit, _note(interval)
        )
    return table


def _title(replicated: Replicated) -> str:
    n = replicated.count
    first = replicated.replications[0]
    runs = f"{n} replications" if n != 1 else "1 replication"
    return f"{replicated.name} · simulated, {runs} of {first.requests:,} counted requests, {_level(replicated)} intervals"


def _level(replicated: Replicated) -> str:
    return f"{100 * replicated.rule.confidence:g} %"


def _half_width(interval: Interval, spec: MetricSpec) -> tuple[str, str]:
    if interval.half_width is None:
        return "–", "–"
    share = interval.relative_half_width
    return _width_text(interval, spec), "–" if share is None else f"{share:.1%}"


def _width_text(interval: Interval, spec: MetricSpec) -> str:
    """A half-width to two significant digits."""
    from heliosim.metrics import significant

    assert interval.half_width is not None
    return significant(interval.half_width * spec.scale, 2)


def _note(interval: Interval) -> str:
    return f"interval unavailable: {interval.reason}" if interval.half_width is None else ""


def replicated_notes(replicated: Replicated) -> list[str]:
    """Sentences under the table: horizon, warm-up, why it stopped; rich markup."""
    rule, warm_up = replicated.rule, replicated.warm_up
    lines = []
    if replicated.horizon == "terminating":
        lines.append("terminating: each replication runs from its empty start to its last request; nothing is left out.")
    elif warm_up.source == "given":
        lines.append(f"steady: the first {warm_up.requests:,} requests of each replication are left out, as given.")
    elif warm_up.is_settled:
        lines.append(
            f"steady: the first {warm_up.requests:,} requests of each replication are left out as warm-up "
            "(MSER-5 over a pilot run's delays)."
        )
    else:
        lines.append(
            f"[yellow]steady: the pilot run did not settle; half of each replication ({warm_up.requests:,} requests) is "
            "left out. Longer runs would say more.[/]"
        )
    saturated = sum(r.is_saturated for r in replicated.replications)
    drifts = [r.drift for r in replicated.replications if r.drift is not None]
    gained = f"waiting grew by {sum(drifts) / len(drifts):.2f} s per second" if drifts else "waiting grew"
    if replicated.is_saturated:
        lines.append(
            f"[yellow]saturated: {gained} of arrivals, without end, in {saturated} of {replicated.count} replications. "
            "Waiting times and percentiles would only tell how long the run is.[/]"
        )
    elif replicated.grows:
        lines.append(f"[yellow]{gained} of arrivals from beginning to end: longer days would be worse.[/]")
    if replicated.profile_uncertainty:
        lines.append("step costs were drawn anew for each replication (profile uncertainty).")
    lines.append(_why_it_stopped(replicated, rule.relative_half_width))
    return lines


def _why_it_stopped(replicated: Replicated, target: float) -> str:
    rule = replicated.rule
    if rule.least == rule.most:
        return f"{replicated.count} replications were asked for."
    watched = ", ".join(metric_spec(m).label for m in replicated.samples)
    if replicated.is_saturated:
        return "stopped: more replications would find it saturated, too."
    widest = rule.widest(replicated.samples)
    if widest <= 1:
        return f"stopped: every interval of {watched} is within ± {target:g} of its mean."
    return (
        f"[yellow]stopped at {rule.most} replications: the widest interval of {watched} is ± {widest * target:.1%}, "
        f"not within ± {target:.1%}. Run longer, or allow more.[/]"
    )


def print_replicated(replicated: Replicated, *, has_slo: bool) -> None:
    """Table and notes on standard output."""
    from heliosim.console import console

    out = console()
    out.print(replicated_table(replicated, has_slo=has_slo))
    for line in replicated_notes(replicated):
        out.print(line)


def _new_table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
