"""All rows in the order of the report, and which of them a name picks."""

from __future__ import annotations

from heliosim.errors import UnknownNameError
from heliosim.reproduction import (
    batch_size,
    choosing,
    energy,
    exits,
    large_pair,
    latency,
    load,
    memory,
    quality,
    sweeps,
    throughput,
    transitions,
)
from heliosim.reproduction.rows import Experiment, Row

ROWS: tuple[Row, ...] = (
    *memory.ROWS,
    *exits.ROWS,
    *latency.ROWS,
    *throughput.ROWS,
    *energy.ROWS,
    *transitions.ROWS,
    *batch_size.ROWS,
    *large_pair.ROWS,
    *(row for row in sweeps.ROWS if not row.is_ours),
    *quality.ROWS,
    *(row for row in sweeps.ROWS if row.is_ours),
    *load.ROWS,
    *choosing.ROWS,
)


def pick(names: tuple[str, ...] = ()) -> list[Row]:
    """Rows by id, or by the beginning of ids; all without names. Raises UnknownNameError."""
    if not names:
        return list(ROWS)
    for name in names:
        if not any(row.id.startswith(name) for row in ROWS):
            raise UnknownNameError("--rows", name, [row.id for row in ROWS])
    return [row for row in ROWS if any(row.id.startswith(name) for name in names)]


def experiments_of(rows: list[Row]) -> list[Experiment]:
    """What the rows need run, each once, in order."""
    return list(dict.fromkeys(x for row in rows for x in row.experiments))
