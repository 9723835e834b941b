"""What the command line prints of a fleet: a line per replica, and what a reader should know about failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heliosim.fitted import Column, print_fitted
from heliosim.fleet_metrics import ReplicaSummary, by_replica
from heliosim.metrics import significant
from heliosim.tables import counted

if TYPE_CHECKING:
    from heliosim.formats.results import RunResults
    from heliosim.scenario import Fleet

LONGEST = 40
"""Replicas a table lists one by one."""


def print_fleet(results: RunResults, fleet: Fleet) -> None:
    """The table of replicas, then notes."""
    from heliosim.console import console

    replicas = by_replica(results)
    out = console()
    title = f"{counted(len(fleet.names), 'replica')} behind a {fleet.router} router"
    print_fitted(out, title, COLUMNS, replica_rows(replicas))
    if len(replicas) > LONGEST:
        out.print(f"{counted(len(replicas) - LONGEST, 'more replica')} in the run folder.")
    for line in failure_notes(results, fleet, replicas):
        out.print(f"[yellow]{line}[/]")


COLUMNS = (
    Column("replica", is_name=True),
    Column("requests"),
    Column("share,\n%"),
    Column("utilisation,\n%"),
    Column("output,\ntok/s"),
    Column("TTFT\np99, ms"),
    Column("failures"),
    Column("requests\nlost"),
)


def replica_rows(replicas: list[ReplicaSummary]) -> list[list[str]]:
    """How each replica did."""
    return [
        [
            r.name,
            f"{r.requests:,}",
            _number(r.share, 100),
            _number(r.utilisation, 100),
            _number(r.output_throughput),
            _number(r.p99_ttft_ms),
            f"[yellow]{r.failures}[/]" if r.failures else "0",
            f"[yellow]{r.lost_requests:,}[/]" if r.lost_requests else "0",
        ]
        for r in replicas[:LONGEST]
    ]


def failure_notes(results: RunResults, fleet: Fleet, replicas: list[ReplicaSummary]) -> list[str]:
    """What failures did to requests, and failures that came after the last request had left."""
    notes = []
    routed_again = sum(retries > 0 for retries in results.requests["retries"].to_pylist())
    if routed_again:
        were = "was" if routed_again == 1 else "were"
        notes.append(
            f"{counted(routed_again, 'request')} {were} routed again after a failure and began anew; "
            "times count from arrival."
        )
    late = len(fleet.failures) - sum(r.failures for r in replicas)
    if late:
        notes.append(f"{late} of {counted(len(fleet.failures), 'failure')} came after the last request had left.")
    return notes


def _number(value: float | None, scale: float = 1.0) -> str:
    return "–" if value is None else significant(value * scale)
