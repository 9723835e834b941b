"""Reads behaviour tables as tokens: of a profile, of a behaviour folder, or a Parquet file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heliosim.behaviour_tokens import FACTS, Tokens
from heliosim.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa


def read_tokens(path: Path, exits: Mapping[str, tuple[int, ...]]) -> Tokens:
    """A behaviour table with every fact it has, rows grouped by text. Raises InputError if it cannot be read or lacks a
    column that every table has.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["sequence", "task", "source", "prompt_tokens", "end"]
    keys = [f"{model}@{e}" for model, layers in exits.items() for e in layers]
    try:
        schema = pq.read_schema(path)
        known = set(schema.names)
        needed = [*names, *(f"{what}:{key}" for key in keys for what in ("confidence", "agrees"))]
        if absent := [name for name in needed if name not in known]:
            raise InputError(f"{path}, columns", absent[0], "missing column", "Measure behaviour again.")
        wanted = [f"{what}:{key}" for key in keys for what in FACTS] + ["token_id", "right"]
        columns = [*names, *(name for name in wanted if name in known)]
        table = pq.read_table(path, columns=columns, read_dictionary=["sequence", "task", "source"])
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(str(path), path.name, f"not a readable table: {error}", "Measure behaviour again.") from None
    return _tokens(table.combine_chunks(), exits)


def _tokens(table: pa.Table, exits: Mapping[str, tuple[int, ...]]) -> Tokens:
    codes = {name: _codes(table, name) for name in ("sequence", "task", "source")}
    sequence, source = codes["sequence"][0], codes["source"][0]
    starts = np.flatnonzero(
        np.concatenate(([table.num_rows > 0], (sequence[1:] != sequence[:-1]) | (source[1:] != source[:-1])))
    )
    counts = np.diff(np.append(starts, table.num_rows))
    per_text = {name: words[index[starts]] for name, (index, words) in codes.items()}
    first = table.take(starts)
    ends = first["end"].fill_null(0).to_numpy().astype(np.int64)
    right = np.full(len(starts), np.nan)
    if "right" in table.column_names:
        right = first["right"].cast("double").fill_null(np.nan).to_numpy()
    columns = {
        name: table[name].to_numpy()
        for name in table.column_names
        if ":" in name or name == "token_id"
    }  # fmt: skip
    return Tokens(
        dict(exits),
        per_text["sequence"],
        per_text["task"],
        per_text["source"],
        first["prompt_tokens"].to_numpy().astype(np.int64),
        counts.astype(np.int64),
        ends,
        right,
        columns,
    )


def _codes(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.str_]]:
    """A column of texts as numbers, and the texts they stand for."""
    import pyarrow as pa

    column = table[name].combine_chunks() if table.num_rows else pa.array([], pa.string()).dictionary_encode()
    column = column.unify_dictionaries().combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not isinstance(column, pa.DictionaryArray):
        column = column.dictionary_encode()
    return column.indices.to_numpy(), np.array(column.dictionary.to_pylist(), str)
