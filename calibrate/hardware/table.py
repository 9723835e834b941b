"""Raw rows as a table beside the profile, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from heliosim.errors import InputError

from .cell import Row, row_of

TABLE = "hardware.parquet"


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """One line for each cell: its coordinates and facts as JSON, every sample, and what came of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = []
    for row in rows:
        plain = row.plain()
        made = {"value": row.value, "spread": row.spread} if row.is_measured else {"value": None, "spread": None}
        plain |= {"at": json.dumps(plain["at"]), "facts": json.dumps(plain["facts"]), **made}
        lines.append(plain)
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("model", "kind", "region", "at", "unit", "reason", "facts")),
            ("values", pa.list_(pa.float64())),
            *((name, pa.float64()) for name in ("value", "spread", "drift")),
            ("is_steady", pa.bool_()),
            ("tries", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), path, compression="zstd")


def read_rows(folder: Path) -> list[Row]:
    """Rows of a profile's folder. Raises InputError where it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / TABLE
    remedy = "Calibrate with --hardware quick or full."
    if not path.is_file():
        raise InputError(str(path), path.name, "the profile holds no hardware cells", remedy)
    try:
        lines = pq.read_table(path).to_pylist()
        return [row_of({**line, "at": json.loads(line["at"]), "facts": json.loads(line["facts"])}) for line in lines]
    except (OSError, KeyError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(str(path), path.name, f"not a readable table: {error}", "Calibrate again.") from None
