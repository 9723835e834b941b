"""What the command line prints of a fleet: a line per replica, and what a reader should know about failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heliosim.fleet_metrics import ReplicaSummary, by_replica
from heliosim.metrics import significant

if TYPE_CHECKING:
    from rich.table import Table

    from heliosim.formats.results import RunResults
    from heliosim.scenario import Fleet

LONGEST = 40
"""Replicas a table lists one by one."""


def print_fleet(results: RunResults, fleet: Fleet) -> None:
    """The table of replicas, then notes."""
    from heliosim.console import console

    replicas = by_replica(results)
    out = console()
    out.print(replica_table(replicas, fleet))
    if len(replicas) > LONGEST:
        out.print(f"{len(replicas) - LONGEST} more replicas are in the run folder.")
    for line in failure_notes(results, fleet, replicas):
        out.print(f"[yellow]{line}[/]")


def replica_table(replicas: list[ReplicaSummary], fleet: Fleet) -> Table:
    """How each replica did."""
    from rich.table import Table

    table = Table(title=f"{len(fleet.names)} replicas behind a {fleet.router} router")
    table.add_column("replica")
    for name in ("requests", "share %", "utilisation %", "output tok/s", "TTFT p99 ms", "failures", "requests lost"):
        table.add_column(name, justify="right")
    for r in replicas[:LONGEST]:
        table.add_row(
            r.name,
            f"{r.requests:,}",
            _number(r.share, 100),
            _number(r.utilisation, 100),
            _number(r.output_throughput),
            _number(r.p99_ttft_ms),
            f"[yellow]{r.failures}[/]" if r.failures else "0",
            f"[yellow]{r.lost_requests:,}[/]" if r.lost_requests else "0",
        )
    return table


def failure_notes(results: RunResults, fleet: Fleet, replicas: list[ReplicaSummary]) -> list[str]:
    """What failures did to requests, and failures that came after the last request had left."""
    notes = []
    routed_again = sum(retries > 0 for retries in results.requests["retries"].to_pylist())
    if routed_again:
        are = "request was" if routed_again == 1 else "requests were"
        notes.append(f"{routed_again:,} {are} routed again after a failure and began anew; times count from arrival.")
    late = len(fleet.failures) - sum(r.failures for r in replicas)
    if late:
        notes.append(f"{late} of {len(fleet.failures)} failures lie after the last request had left.")
    return notes


def _number(value: float | None, scale: float = 1.0) -> str:
    return "–" if value is None else significant(value * scale)
