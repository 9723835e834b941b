"""The comparison of simulated and measured runs for a terminal; the same numbers as in the HTML report.

Fits 120 columns, and stays readable when piped: without a terminal there is no colour and the width is 120.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

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
    title: str = "Simulated beside measured",
) -> Table:
    """Grouped by metric, one line per system: simulated, measured mean, error, spread of the repeats."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=_caption(systems),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("metric", overflow="fold")
    table.add_column("system", overflow="fold")
    for name in ("simulated", "measured", "error", "repeats from … to"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("in spread")
    rows = [system.comparison(metrics) for system in systems]
    for i, name in enumerate(metrics):
        spec = metric_spec(name)
        label = f"{spec.label} ({spec.unit})" if spec.unit else spec.label
        for k, system in enumerate(systems):
            row = rows[k][i]
            word = inside(row)
            table.add_row(
                Text(label if k == 0 else "", style="bold"),
                Text(system.name),
                spec.text(row.simulated),
                spec.text(row.measured_mean),
                percent(row.relative_error),
                spread(row, spec),
                Text(word, style={"inside": "green", "outside": "yellow"}.get(word, "dim")),
                end_section=k == len(systems) - 1,
            )
    return table


def print_comparison(
    systems: Sequence[SystemResult], metrics: Sequence[str] = HEADLINE, *, file: TextIO | None = None
) -> None:
    """Print the table; coloured on a terminal, plain text of 120 columns elsewhere."""
    _console(file).print(comparison_table(systems, metrics))


def comparison_text(systems: Sequence[SystemResult], metrics: Sequence[str] = HEADLINE) -> str:
    """The table as plain text, 120 columns at most."""
    out = io.StringIO()
    print_comparison(systems, metrics, file=out)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _console(file: TextIO | None) -> Console:
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        return Console(file=file, highlight=False, width=WIDTH, color_system=None)
    return Console(file=file, highlight=False, width=min(WIDTH, console.width))


def _caption(systems: Sequence[SystemResult]) -> str:
    live = sorted({len(s.live) for s in systems})
    seeds = sorted({run.info.seed for s in systems for run in s.runs})
    requests = sorted({run.requests.num_rows for s in systems for run in s.runs})
    clocks = sorted({s.clock for s in systems if s.live})

    def span(values: list[int]) -> str:
        return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"

    derived = "\nderived, not measured: the profile rests on published kernel times and synthetic exits"
    derived = derived if any(run.info.profile_kind == "derived" for s in systems for run in s.runs) else ""
    measured = f"measured: mean of {span(live)} repeats ({'/'.join(clocks)} clock)" if clocks else "not measured"
    return (
        f"{span(requests)} requests per run, seed {span(seeds)}; {measured}; error = (simulated − measured) / measured"
        f"{derived}"
    )
