"""A behaviour summary for a terminal."""

from __future__ import annotations

from collections.abc import Collection

from heliosim import behaviour_rows as rows
from heliosim.behaviour_source import Opened
from heliosim.behaviour_summary import BehaviourSummary
from heliosim.console import console
from heliosim.fitted import Column, print_fitted

PARTS = {
    "shares": rows.share_rows,
    "depth": rows.depth_rows,
    "confidence": rows.confidence_rows,
    "reliability": rows.reliability_rows,
    "joint": rows.joint_rows,
    "complement": rows.complement_rows,
    "correlation": rows.correlation_rows,
    "runs": rows.run_rows,
    "breaches": rows.breach_rows,
    "quality": rows.quality_rows,
    "lengths": rows.length_rows,
    "fits": rows.fit_rows,
}
"""Tables to choose from, by name."""


def print_behaviour(opened: Opened, summary: BehaviourSummary, parts: Collection[str] = tuple(PARTS)) -> None:
    """Title, what must be said of the table, and the chosen tables that say anything."""
    from rich.markup import escape

    out = console()
    origin = opened.origin if opened.origin == "measured" else f"[yellow]{escape(opened.origin)}[/]"
    out.print(f"[bold]{escape(opened.name)}[/] · {origin} · threshold {summary.threshold:g}")
    out.print(f"{summary.requests:,} prompts, {summary.tokens:,} tokens; intervals: 95 %, prompts drawn again\n")
    for name, made in PARTS.items():
        if name not in parts:
            continue
        table = made(summary)
        if table.rows:
            print_fitted(out, escape(table.title), _columns(table), table.rows, ends=_ends(table))
    if "fits" in parts:
        for line in rows.verdict_lines(summary):
            out.print(escape(line))
    for note in opened.notes:
        out.print(f"  {escape(note)}")


def _columns(table: rows.TableRows) -> list[Column]:
    wide = {"share by exit layer": 60, "statistic": 30, "policy": 36, "texts of": 44}
    return [
        Column(name, is_name=i < table.names, wrap=wide.get(name, 22 if i < table.names else 26))
        for i, name in enumerate(table.columns)
    ]


def _ends(table: rows.TableRows) -> list[int]:
    return [i for i in range(len(table.rows) - 1) if table.rows[i][0] != table.rows[i + 1][0]]
