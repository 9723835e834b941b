"""Intervals, differences and studies for a terminal: tables that fit it, with a word where a number cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from heliosim.fitted import Column, broken, print_fitted
from heliosim.metrics import MetricSpec, metric_spec, significant
from heliosim.replicated import SATURATED, Replicated
from heliosim.stats import Interval
from heliosim.tables import counted, percent

if TYPE_CHECKING:
    from heliosim.coverage import CoverageRow
    from heliosim.formats.results import RunResults
    from heliosim.metrics import Slo
    from heliosim.paired import Paired
    from heliosim.randomness import CrnRow

SHOWN: tuple[str, ...] = (
    "output_throughput", "request_throughput", "mean_ttft_ms", "median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "p90_tpot_ms", "p99_tpot_ms", "mean_e2el_ms", "p90_e2el_ms", "p99_e2el_ms",
    "mean_queue_ms", "slo_attainment", "request_goodput", "mean_batch_size", "peak_kv_bytes", "layers_per_token",
    "low_confidence_share", "perplexity", "agreement", "transitions", "preemptions", "energy_j",
    "joules_per_token", "wh_per_prompt", "utilisation",
)  # fmt: skip
"""Metrics of a summary of replications, in order."""
_ONLY_WITH_SLO = ("slo_attainment", "request_goodput")
_QUIET = ("energy_j", "joules_per_token", "wh_per_prompt")


_NAMES_WRAP = 25
_REPLICATED = (
    Column("metric", is_name=True),
    Column("mean"),
    Column("±"),
    Column("±, %", optional=1),
    Column("least … greatest", optional=2),
)
NO_POWER = "no power figures"


def replicated_rows(replicated: Replicated, *, has_slo: bool) -> list[list[str]]:
    """One metric a line: mean, half-width, the same in percent, spread of the replications."""
    return [_replicated_row(replicated, name) for name in _shown(has_slo=has_slo)]


def _shown(*, has_slo: bool) -> list[str]:
    return [name for name in SHOWN if has_slo or name not in _ONLY_WITH_SLO]


def _replicated_row(replicated: Replicated, name: str) -> list[str]:
    interval = replicated.interval(name)
    spec = _of_means(metric_spec(name), interval)
    known = [v for v in replicated.values(name) if v is not None]
    if interval.reason == SATURATED:
        return [spec.title, f"[yellow]{SATURATED}[/]", "", "", ""]
    if name in _QUIET and not known:
        return [spec.title, "unavailable", "", "", ""]
    spread = f"{spec.text(min(known))} … {spec.text(max(known))}" if known and min(known) != max(known) else "–"
    return [spec.title, spec.text(interval.mean), *_half_width(interval, spec), spread]


def _of_means(spec: MetricSpec, interval: Interval) -> MetricSpec:
    """A mean of counts that differ is no count."""
    return spec if interval.half_width is None else replace(spec, is_count=False)


def reason_lines(replicated: Replicated, *, has_slo: bool) -> list[str]:
    """Why metrics have no interval or no figure, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name in _shown(has_slo=has_slo):
        interval = replicated.interval(name)
        if interval.half_width is not None or interval.reason == SATURATED:
            continue
        is_quiet = name in _QUIET and interval.mean is None
        reasons.setdefault(NO_POWER if is_quiet else interval.reason, []).append(metric_spec(name).label)
    return [f"unavailable, {reason}: {'; '.join(labels)}." for reason, labels in reasons.items()]


def _title(replicated: Replicated) -> str:
    requests = counted(replicated.replications[0].requests, "counted request")
    runs = counted(replicated.count, "replication")
    return f"{replicated.name} · simulated, {runs} of {requests}, {_level(replicated)} intervals"


def _level(replicated: Replicated) -> str:
    return f"{100 * replicated.rule.confidence:g} %"


def _half_width(interval: Interval, spec: MetricSpec) -> tuple[str, str]:
    if interval.half_width is None:
        return "unavailable" if interval.mean is not None else "–", "–"
    return spec.width_text(interval.half_width, interval.mean), percent(interval.relative_half_width, signed=False)


def replicated_notes(replicated: Replicated) -> list[str]:
    """Sentences under the table: horizon, warm-up, why it stopped; rich markup."""
    rule, warm_up = replicated.rule, replicated.warm_up
    lines = []
    if replicated.horizon == "terminating":
        lines.append("terminating: replications run from their empty start to their last request; nothing is left out.")
    elif warm_up.source == "given" and not warm_up.requests:
        lines.append("steady: nothing is left out, as given.")
    elif warm_up.source == "given":
        lines.append(
            f"steady: the first {counted(warm_up.requests, 'request')} of each replication left out, as given."
        )
    elif warm_up.is_settled and not warm_up.requests:
        lines.append("steady: the delays of a pilot run show no warm-up (MSER-5); nothing is left out.")
    elif warm_up.is_settled:
        lines.append(
            f"steady: the first {counted(warm_up.requests, 'request')} of each replication left out as warm-up "
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
            f"[yellow]saturated: {gained} of arrivals, without end, in {saturated} of "
            f"{counted(replicated.count, 'replication')}. "
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
        return f"{counted(replicated.count, 'replication')} {'was' if rule.most == 1 else 'were'} asked for."
    watched = "; ".join(metric_spec(m).label for m in replicated.samples)
    if replicated.is_saturated:
        return "stopped: more replications would find it saturated, too."
    widest = rule.widest(replicated.samples)
    if widest <= 1:
        return f"stopped: every interval of {watched} is within ± {_share(target)} of its mean."
    return (
        f"[yellow]stopped at {counted(rule.most, 'replication')}: the widest interval of {watched} is "
        f"± {_share(widest * target)}, not within ± {_share(target)}. Run longer, or allow more.[/]"
    )


def print_replicated(replicated: Replicated, first: RunResults, slo: Slo | None) -> None:
    """Table and notes, and what only the first run says (exits, refusals), on standard output."""
    from heliosim.console import console, print_details, print_refused_first, say_behaviour, say_kind, say_quality
    from heliosim.metrics import summarise

    out, summary = console(), summarise(first, slo=slo)
    print_refused_first(first, summary)
    print_fitted(out, _title(replicated), _REPLICATED, replicated_rows(replicated, has_slo=slo is not None))
    for line in (*reason_lines(replicated, has_slo=slo is not None), *replicated_notes(replicated)):
        out.print(line)
    say_kind(first.info.profile_kind)
    say_quality(first.info.quality_unknown)
    say_behaviour(first.info.behaviour)
    out.print(f"of replication 0, seed {first.info.seed}, whose tables are kept:")
    print_details(first, summary)


def _share(share: float) -> str:
    return percent(share, signed=False)


def paired_columns(paired: Paired) -> list[Column]:
    """What a line of the table of differences holds: both means, the difference with its interval, what pairing
    saved.
    """
    return [
        Column("metric", is_name=True, wrap=_NAMES_WRAP),
        *(Column(broken(side.name)) for side in (paired.first, paired.second)),
        Column("difference"),
        Column("±"),
        Column("in %", optional=1),
        Column("variance\nratio"),
    ]


def paired_rows(paired: Paired) -> list[list[str]]:
    """One metric a line."""
    from heliosim.paired import COMPARED

    found = [_paired_row(paired, name) for name in COMPARED]
    return [row for row in found if row is not None]


def _paired_row(paired: Paired, name: str) -> list[str] | None:
    spec, found = metric_spec(name), paired.difference(name)
    means = [r.interval(name) for r in (paired.first, paired.second)]
    if all(value is None for r in (paired.first, paired.second) for value in r.values(name)):
        return None
    shown = [f"[yellow]{SATURATED}[/]" if m.reason == SATURATED else spec.text(m.mean) for m in means]
    gap = found.interval
    if gap.mean is None:
        return [spec.title, *shown, "–", "–", "", ""]
    if gap.half_width is None:
        return [spec.title, *shown, signed(gap.mean, spec), "–", "", ""]
    base = means[0].mean
    colour = _colour(gap, spec)
    ratio = "–" if found.variance_ratio is None else f"{found.variance_ratio:,.1f}"
    difference = f"[{colour}]{signed(gap.mean, spec)}[/]" if colour else signed(gap.mean, spec)
    width = spec.width_text(gap.half_width, gap.mean)
    return [spec.title, *shown, difference, width, percent(gap.mean / abs(base)) if base else "–", ratio]


def paired_reasons(paired: Paired) -> list[str]:
    """Why differences have no interval, each reason once."""
    from heliosim.paired import COMPARED

    reasons: dict[str, list[str]] = {}
    for name in COMPARED:
        gap = paired.difference(name).interval
        if gap.half_width is None and _paired_row(paired, name) is not None:
            reasons.setdefault(gap.reason, []).append(metric_spec(name).label)
    return [f"difference unavailable, {reason}: {'; '.join(labels)}." for reason, labels in reasons.items()]


def signed(value: float, spec: MetricSpec) -> str:
    """A difference with its sign, a true minus."""
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

    out, rule = console(), paired.first.rule
    title = f"{paired.second.name} against {paired.first.name} · {counted(paired.count, 'pair')}, common random numbers"
    print_fitted(out, title, paired_columns(paired), paired_rows(paired))
    out.print(
        f"difference: {paired.second.name} less {paired.first.name} (second less first), both simulated; "
        f"±: half-width of its {100 * rule.confidence:g} % interval."
    )
    for line in paired_reasons(paired):
        out.print(line)
    for side in (paired.first, paired.second):
        if side.is_saturated:
            out.print(f"[yellow]{side.name} is saturated: waiting grows without end, and percentiles with it.[/]")
    if not paired.same_workload:
        out.print("[yellow]the workloads differ: requests are the same only as far as both draw them alike.[/]")
    out.print(_horizon_line(paired))
    out.print(
        "variance ratio: variance that independent seeds would give the difference, over what it is; so many times "
        "fewer replications were needed."
    )
    widest = rule.widest(paired.samples, paired.sizes) if paired.samples else 0.0
    if rule.least != rule.most and widest > 1:
        out.print(
            f"[yellow]stopped at {counted(rule.most, 'pair')}: the widest watched difference is "
            f"± {_share(widest * rule.relative_half_width)} of the mean, not within "
            f"± {_share(rule.relative_half_width)}.[/]"
        )


def _horizon_line(paired: Paired) -> str:
    if paired.first.horizon == "terminating":
        return (
            "terminating: the question is this very day, from its empty start to its last request; nothing is left out."
        )
    question = "steady: the question is a system that goes on like this"
    cuts = [side.warm_up.requests for side in (paired.first, paired.second)]
    if not any(cuts):
        return f"{question}; nothing is left out."
    first, second = (counted(cut, "request") if cut else "none" for cut in cuts)
    if first == second:
        return f"{question}; the first {first} of each left out as warm-up."
    return f"{question}; first requests left out as warm-up: {first} of the first, {second} of the second."


_COVERAGE = (
    Column("queue", is_name=True),
    Column("load", is_name=True),
    Column("waiting\ntime", is_name=True),
    Column("customers"),
    Column("left\nout", optional=1),
    Column("closed\nform"),
    Column("mean\nestimate"),
    Column("mean ±"),
    Column("hold the\ntruth"),
)


def coverage_rows(rows: Sequence[CoverageRow]) -> list[list[str]]:
    """A line per queue, load and statistic."""
    return [
        [
            row.queue, percent_text(row.load), row.statistic, f"{row.customers:,}", f"{row.mean_cut:,.0f}",
            f"{row.truth:.3f}", f"{row.mean_estimate:.3f}", f"{row.mean_half_width:.3f}",
            _share(row.share) if row.passes else f"[red]{_share(row.share)}[/]",
        ]
        for row in rows
    ]  # fmt: skip


def percent_text(share: float) -> str:
    """A round share: ``90 %``."""
    return f"{100 * share:g} %"


def print_coverage(rows: Sequence[CoverageRow]) -> None:
    """The table of the coverage study; times in mean service times."""
    from heliosim.console import console
    from heliosim.coverage import LEAST, MOST, REPLICATIONS

    seeds = rows[0].seeds if rows else 0
    title = f"Coverage of 95 % intervals · {counted(REPLICATIONS, 'replication')} each, {counted(seeds, 'seed')}"
    out = console()
    print_fitted(out, title, _COVERAGE, coverage_rows(rows), ends=range(5, len(rows), 6))
    passed = sum(row.passes for row in rows)
    band = f"{percent_text(LEAST)} and {percent_text(MOST)}"
    out.print(f"{passed} of {len(rows)} between {band}; times in mean service times.")
    if 0 < seeds < ACCEPTANCE_SEEDS:
        out.print(f"[yellow]{few_seeds(seeds, len(rows))}[/]")


ACCEPTANCE_SEEDS = 200
"""Seeds of the study that intervals must pass."""


def few_seeds(seeds: int, lines: int) -> str:
    """What so few seeds can show of intervals that hold the truth in exactly 95 % of the cases."""
    share = _share_of_passes(seeds)
    step = f"{counted(seeds, 'seed')}: a share moves in steps of {significant(100 / seeds, 2)} %"
    study = f"The acceptance study has {ACCEPTANCE_SEEDS} seeds (there: {_share(_share_of_passes(ACCEPTANCE_SEEDS))})."
    if not share:
        return f"{step}, and none lies between the limits: so few cannot pass, whatever the intervals are. {study}"
    spread = math.sqrt(0.95 * 0.05 / seeds)
    exact, together = _share(share), _small(share**lines)
    return (
        f"{step} and scatters by {_share(spread)} (standard deviation) around 95 %: a line whose intervals are exact "
        f"lies between the limits with probability {exact}, all {lines} with {together} if independent. "
        f"{study}"
    )


def _small(share: float) -> str:
    return "less than 0.1 %" if share < 0.001 else _share(share)


def _share_of_passes(seeds: int) -> float:
    """Probability that a line of true coverage 95 % passes."""
    from heliosim.coverage import CONFIDENCE, LEAST, MOST

    return math.fsum(
        math.comb(seeds, k) * CONFIDENCE**k * (1 - CONFIDENCE) ** (seeds - k)
        for k in range(seeds + 1)
        if LEAST <= k / seeds <= MOST
    )


_CRN = (
    Column("second less first; metric", is_name=True, wrap=27),
    Column("difference"),
    Column("±,\ncommon"),
    Column("±,\nindependent"),
    Column("variance\nratio"),
    Column("target", optional=1),
)


def crn_rows(rows: Sequence[CrnRow]) -> tuple[list[list[str]], list[int]]:
    """A line per pair with its metrics below, and which lines end a pair."""
    lines: list[list[str]] = []
    ends = []
    last = None
    for row in rows:
        pair = (row.first, row.second)
        if pair != last:
            ends.append(len(lines) - 1)
            lines.append([f"[bold]{row.second} − {row.first}[/]", "", "", "", "", ""])
        lines.append(_crn_row(row))
        last = pair
    return lines, ends


def _crn_row(row: CrnRow) -> list[str]:
    spec, gap = metric_spec(row.metric), row.difference
    mean = "–" if gap.mean is None else signed(gap.mean, spec)
    common = "–" if gap.half_width is None else spec.width_text(gap.half_width, gap.mean)
    ratio = "always equal" if row.variance_ratio is None else f"{row.variance_ratio:,.1f}"
    target = "–" if row.target is None else f"≥ {row.target:g}"
    independent = significant(row.independent_half_width * spec.scale, 2)
    return [spec.title, mean, common, independent, ratio if row.passes else f"[red]{ratio}[/]", target]


def print_crn(rows: Sequence[CrnRow], pairs: int, rate_per_s: float, requests: int) -> None:
    """The table of the study of common random numbers, and why it passed or not."""
    from heliosim.console import console

    out = console()
    lines, ends = crn_rows(rows)
    print_fitted(out, f"Differences of policies · simulated, {counted(pairs, 'pair')} of runs", _CRN, lines, ends=ends)
    out.print(
        f"Each run: {counted(requests, 'request')}, Poisson arrivals at {rate_per_s:g} requests/s. "
        "±: half-widths of 95 % intervals, with common random numbers and with independent seeds; "
        "variance ratio: variance with independent seeds over variance with common random numbers."
    )
    for line in crn_verdict(rows):
        out.print(line)


def crn_verdict(rows: Sequence[CrnRow]) -> list[str]:
    """The target, the lines it holds for, and which of them miss it."""
    from heliosim.randomness import TARGET

    free = sorted({f"{row.second} − {row.first}" for row in rows if row.target is None})
    without = f", but {', '.join(free)}: there a policy's own chance decides" if free else ""
    lines = [f"target: a variance ratio of {TARGET:g} or more in every line{without}."]
    missed = [row for row in rows if not row.passes]
    for row in missed:
        ratio = "unknown" if row.variance_ratio is None else f"{row.variance_ratio:,.1f}"
        label = metric_spec(row.metric).label
        lines.append(f"[red]missed[/]: {row.second} − {row.first}, {label}: ratio {ratio}.")
    if missed:
        lines.append(f"[red]exit code 1: {counted(len(missed), 'line')} of {len(rows)} below the target.[/]")
    return lines
