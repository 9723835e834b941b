"""Intervals, differences and studies for a terminal: tables of 120 columns, with a word where a number cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from heliosim.metrics import MetricSpec, metric_spec, significant
from heliosim.replicated import SATURATED, Replicated
from heliosim.stats import Interval

if TYPE_CHECKING:
    from rich.table import Table

    from heliosim.coverage import CoverageRow
    from heliosim.formats.results import RunResults
    from heliosim.metrics import Slo
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
            table.add_row(spec.label, "unavailable", "", "", "", spec.unit, "no power figures")
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
    return (
        f"{replicated.name} · simulated, {runs} of {first.requests:,} counted requests, {_level(replicated)} intervals"
    )


def _level(replicated: Replicated) -> str:
    return f"{100 * replicated.rule.confidence:g} %"


def _half_width(interval: Interval, spec: MetricSpec) -> tuple[str, str]:
    if interval.half_width is None:
        return "unavailable" if interval.mean is not None else "–", "–"
    share = interval.relative_half_width
    return _width_text(interval, spec), "–" if share is None else f"{share:.1%}"


def _width_text(interval: Interval, spec: MetricSpec) -> str:
    """A half-width to two significant digits."""
    assert interval.half_width is not None
    return significant(interval.half_width * spec.scale, 2)


def _note(interval: Interval) -> str:
    return interval.reason if interval.half_width is None else ""


def replicated_notes(replicated: Replicated) -> list[str]:
    """Sentences under the table: horizon, warm-up, why it stopped; rich markup."""
    rule, warm_up = replicated.rule, replicated.warm_up
    lines = []
    if replicated.horizon == "terminating":
        lines.append("terminating: replications run from their empty start to their last request; nothing is left out.")
    elif warm_up.source == "given":
        lines.append(f"steady: the first {warm_up.requests:,} requests of each replication are left out, as given.")
    elif warm_up.is_settled and not warm_up.requests:
        lines.append("steady: the delays of a pilot run show no warm-up (MSER-5); nothing is left out.")
    elif warm_up.is_settled:
        lines.append(
            f"steady: the first {warm_up.requests:,} requests of each replication are left out as warm-up "
            "(MSER-5 over a pilot run's delays)."
        )
    else:
        lines.append(
            f"[yellow]steady: no pilot run settled; half of each replication ({warm_up.requests:,} requests) is left "
            "out. Longer runs would say more.[/]"
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
    watched = "; ".join(metric_spec(m).label for m in replicated.samples)
    if replicated.is_saturated:
        return "stopped: more replications would find it saturated, too."
    widest = rule.widest(replicated.samples)
    if widest <= 1:
        return f"stopped: every interval of {watched} is within ± {target:.1%} of its mean."
    return (
        f"[yellow]stopped at {rule.most} replications: the widest interval of {watched} is ± {widest * target:.1%}, "
        f"not within ± {target:.1%}. Run longer, or allow more.[/]"
    )


def print_replicated(replicated: Replicated, first: RunResults, slo: Slo | None) -> None:
    """Table and notes, and what only the first run says (exits, refusals), on standard output."""
    from heliosim.console import console, print_details
    from heliosim.metrics import summarise

    out = console()
    out.print(replicated_table(replicated, has_slo=slo is not None))
    for line in replicated_notes(replicated):
        out.print(line)
    out.print(f"of replication 0, seed {first.info.seed}, whose tables are kept:")
    print_details(first, summarise(first, slo=slo))


def _new_table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def paired_table(paired: Paired) -> Table:
    """One metric a line: both means, difference with its interval, what pairing saved."""
    from heliosim.paired import COMPARED

    confidence = 100 * paired.first.rule.confidence
    title = f"{paired.second.name} against {paired.first.name} · {paired.count} pairs, common random numbers"
    table = _new_table(title)
    table.add_column("metric", no_wrap=True)
    for side in (paired.first, paired.second):
        table.add_column(side.name, justify="right", overflow="fold")
    for name in ("difference", f"{confidence:g} % interval", "in %", "variance ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in COMPARED:
        row = _paired_row(paired, name)
        if row is not None:
            table.add_row(*row)
    return table


def _paired_row(paired: Paired, name: str) -> list[str] | None:
    spec, found = metric_spec(name), paired.difference(name)
    label = f"{spec.label} ({spec.unit})" if spec.unit else spec.label
    means = [r.interval(name) for r in (paired.first, paired.second)]
    if all(m.mean is None and m.reason != SATURATED for m in means):
        return None
    shown = [f"[yellow]{SATURATED}[/]" if m.reason == SATURATED else spec.text(m.mean) for m in means]
    gap = found.interval
    if gap.mean is None:
        return [label, *shown, "–", gap.reason, "", ""]
    if gap.half_width is None or gap.low is None or gap.high is None:
        return [label, *shown, _signed(gap.mean, spec), f"unavailable: {gap.reason}", "", ""]
    base = means[0].mean
    share = f"{gap.mean / abs(base):+.1%}".replace("-", "−") if base else "–"
    colour = _colour(gap, spec)
    ratio = "–" if found.variance_ratio is None else f"{found.variance_ratio:,.1f}"
    interval = f"{_signed(gap.low, spec)} … {_signed(gap.high, spec)}"
    difference = f"[{colour}]{_signed(gap.mean, spec)}[/]" if colour else _signed(gap.mean, spec)
    return [label, *shown, difference, interval, share, ratio]


def _signed(value: float, spec: MetricSpec) -> str:
    text = spec.text(abs(value))
    return text if not value else ("+" if value > 0 else "−") + text


def _colour(gap: Interval, spec: MetricSpec) -> str:
    """Green for surely better, red for surely worse, none where the interval holds 0 or neither is better."""
    if spec.better == "neither" or gap.mean is None or gap.holds(0.0):
        return ""
    return "green" if (gap.mean > 0) == (spec.better == "higher") else "red"


def print_paired(paired: Paired) -> None:
    """Table of differences and what to know about it."""
    from heliosim.console import console

    out = console()
    out.print(paired_table(paired))
    rule = paired.first.rule
    for side in (paired.first, paired.second):
        if side.is_saturated:
            out.print(f"[yellow]{side.name} is saturated: waiting grows without end, and percentiles with it.[/]")
    if not paired.same_workload:
        out.print("[yellow]the workloads differ: requests are the same only as far as both draw them alike.[/]")
    if paired.first.horizon == "steady":
        cuts = dict.fromkeys(f"{side.warm_up.requests:,}" for side in (paired.first, paired.second))
        out.print(f"steady: the first {' and '.join(cuts)} requests are left out as warm-up.")
    else:
        out.print("terminating: nothing is left out.")
    out.print(
        "variance ratio: variance that independent seeds would give the difference, over what it is; so many times "
        "fewer replications were needed."
    )
    widest = rule.widest(paired.samples, paired.sizes) if paired.samples else 0.0
    if rule.least != rule.most and widest > 1:
        out.print(
            f"[yellow]stopped at {rule.most} pairs: the widest watched difference is ± "
            f"{widest * rule.relative_half_width:.1%} of the mean, not within ± {rule.relative_half_width:.1%}.[/]"
        )


def print_coverage(rows: Sequence[CoverageRow]) -> None:
    """The table of the coverage study; times in mean service times."""
    from heliosim.console import console
    from heliosim.coverage import LEAST, MOST, REPLICATIONS

    seeds = rows[0].seeds if rows else 0
    table = _new_table(f"Coverage of nominal 95 % intervals · {REPLICATIONS} replications each, {seeds} seeds")
    for name in ("queue", "load", "waiting time"):
        table.add_column(name)
    for name in ("customers", "left out", "closed form", "mean estimate", "mean ±", "hold the truth"):
        table.add_column(name, justify="right", no_wrap=True)
    for k, row in enumerate(rows):
        is_new = row.statistic == "mean"
        share = f"{row.share:.1%}"
        table.add_row(
            row.queue if is_new else "", f"{row.load:.0%}" if is_new else "", row.statistic,
            f"{row.customers:,}" if is_new else "", f"{row.mean_cut:,.0f}" if is_new else "",
            f"{row.truth:.3f}", f"{row.mean_estimate:.3f}", f"{row.mean_half_width:.3f}",
            share if row.passes else f"[red]{share}[/]",
            end_section=k % 6 == 5,
        )  # fmt: skip
    out = console()
    out.print(table)
    passed = sum(row.passes for row in rows)
    out.print(f"{passed} of {len(rows)} between {LEAST:.0%} and {MOST:.0%}; times in mean service times.")


def print_crn(rows: Sequence[CrnRow], pairs: int) -> None:
    """The table of the study of common random numbers."""
    from heliosim.console import console

    table = _new_table(f"Differences of policies · {pairs} pairs, common random numbers against independent seeds")
    table.add_column("second less first")
    table.add_column("metric")
    for name in ("difference", "± common", "± independent", "variance ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("unit")
    last = ""
    for k, row in enumerate(rows):
        spec = metric_spec(row.metric)
        pair = f"{row.second} − {row.first}"
        mean = "–" if row.difference.mean is None else _signed(row.difference.mean, spec)
        common = row.difference.half_width
        widths = ["–" if common is None else significant(common * spec.scale, 2)]
        widths.append(significant(row.independent_half_width * spec.scale, 2))
        ratio = "always equal" if row.variance_ratio is None else f"{row.variance_ratio:,.1f}"
        table.add_row(
            pair if pair != last else "", spec.label, mean, *widths, ratio if row.passes else f"[red]{ratio}[/]",
            spec.unit, end_section=k % 3 == 2,
        )  # fmt: skip
        last = pair
    console().print(table)
