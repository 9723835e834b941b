"""The comparison of simulated and measured runs for a terminal; the same numbers as in the HTML report.

Fits 80 columns, and stays readable when piped: without a terminal there is no colour and the width is 120.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from heliosim.fitted import Column, print_tables
from heliosim.formats.profile import CAUTIONS, least_sure
from heliosim.formats.results import replay_caution
from heliosim.metrics import HEADLINE, ComparisonRow, MetricSpec, SystemResult, metric_spec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 120


def percent(share: float | None, *, signed: bool = True) -> str:
    """A share as percent with one decimal and a true minus sign; an en dash for None."""
    if share is None:
        return "–"
    if abs(share) < 0.0005:
        return "0.0 %"
    text = f"{100 * share:+.1f} %" if signed else f"{100 * share:.1f} %"
    return text.replace("-", "−")


def spread(row: ComparisonRow, spec: MetricSpec) -> str:
    """Least to greatest repeat; an en dash with fewer than two repeats."""
    if row.repeats < 2:
        return "–"
    return f"{spec.text(row.measured_min)} … {spec.text(row.measured_max)}"


def inside(row: ComparisonRow) -> str:
    """Whether the simulation lies within the repeats, as a word; it needs two repeats to say so."""
    if row.is_inside_spread is None or row.repeats < 2:
        return "–"
    return "inside" if row.is_inside_spread else "outside"


def comparison_table(
    systems: Sequence[SystemResult],
    metrics: Sequence[str] = HEADLINE,
    *,
    width: int = WIDTH,
) -> list[Table]:
    """Grouped by metric, one line per system: simulated, measured mean, error, spread of the repeats; what no run can
    say has no column. Several tables where ``width`` is too small for one.
    """
    from heliosim.fitted import fitted

    rows, ends = [], set()
    compared = [system.comparison(metrics) for system in systems]
    for i, name in enumerate(metrics):
        for k, system in enumerate(systems):
            rows.append([_bold(metric_spec(name).title) if k == 0 else "", *_cells(system, compared[k][i])])
        if len(systems) > 1:
            ends.add(len(rows) - 1)
    columns = _columns(width)
    absent = set()
    if not any(system.live for system in systems):
        absent = {"measured", "error", "repeats", "in spread"}
    elif not any(system.simulated for system in systems):
        absent = {"simulated", "error", "in spread"}
    kept = [k for k, column in enumerate(columns) if column.heading not in absent]
    return fitted([columns[k] for k in kept], [[row[k] for k in kept] for row in rows], width, ends=ends)


def _columns(width: int) -> list[Column]:
    return [
        Column("metric", is_name=True, wrap=29 if width >= WIDTH else 25),
        Column("system", is_name=True, wrap=32 if width >= WIDTH else 21),
        Column("simulated"),
        Column("measured"),
        Column("error"),
        Column("repeats", optional=1),
        Column("in spread", optional=2),
    ]


def _cells(system: SystemResult, row: ComparisonRow) -> list[str]:
    from rich.markup import escape

    spec, word = metric_spec(row.metric), inside(row)
    style = {"inside": "green", "outside": "yellow"}.get(word, "dim")
    return [
        escape(system.name),
        spec.text(row.simulated),
        spec.text(row.measured_mean),
        percent(row.relative_error),
        spread(row, spec),
        f"[{style}]{word}[/]",
    ]


def _bold(text: str) -> str:
    return f"[bold]{text}[/]"


def counted(count: int, what: str) -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def comparison_title(systems: Sequence[SystemResult]) -> str:
    """What is beside what."""
    if not any(system.live for system in systems):
        return "Simulated systems"
    return "Simulated beside measured" if any(system.simulated for system in systems) else "Measured systems"


def print_comparison(
    systems: Sequence[SystemResult], metrics: Sequence[str] = HEADLINE, *, file: TextIO | None = None
) -> None:
    """Print the table; coloured on a terminal, plain text elsewhere, of 120 columns unless COLUMNS says otherwise."""
    out = _console(file)
    out.print(f"[bold]{comparison_title(systems)}[/]")
    print_tables(out, comparison_table(systems, metrics, width=out.width))
    out.print(_caption(systems), style="dim")


def comparison_text(systems: Sequence[SystemResult], metrics: Sequence[str] = HEADLINE) -> str:
    """The table as plain text, 120 columns at most."""
    out = io.StringIO()
    print_comparison(systems, metrics, file=out)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _console(file: TextIO | None) -> Console:
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        return Console(file=file, highlight=False, width=int(os.environ.get("COLUMNS", WIDTH)), color_system=None)
    return Console(file=file, highlight=False, width=min(WIDTH, console.width))


def _caption(systems: Sequence[SystemResult]) -> str:
    live = sorted({len(s.live) for s in systems})
    seeds = sorted({run.info.seed for s in systems for run in s.runs})
    requests = sorted({run.requests.num_rows for s in systems for run in s.runs})
    clocks = sorted({s.clock for s in systems if s.live})

    def span(values: list[int]) -> str:
        return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"

    kind = least_sure(run.info.profile_kind for s in systems for run in s.runs)
    caution = f"\n{CAUTIONS[kind]}" if kind in CAUTIONS else ""
    replayed = replay_caution(run.info for s in systems for run in s.runs)
    caution += f"\n{replayed}" if replayed else ""
    said = [f"{span(requests)} requests per run, seed {span(seeds)}"]
    if clocks:
        said.append(f"measured: mean of {span(live)} repeats ({'/'.join(clocks)} clock)")
    if clocks and any(s.simulated for s in systems):
        said.append("error = (simulated − measured) / measured; repeats: least … greatest")
    return "; ".join(said) + caution
