"""Files that are replaced whole: an error in the middle leaves what was there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliosim.formats.replications import load_replications, save_replications
from heliosim.formats.whole import whole_file, write_whole_table
from heliosim.replicated import Replicated, Replication, WarmUp
from heliosim.stats import StoppingRule


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_whole_table(path, pa.table({"a": [1]}))
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(RuntimeError):
        _write_half(path)
    assert pq.read_table(path).to_pydict() == {"a": [1]}
    assert list(tmp_path.iterdir()) == [path]


def _write_half(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_replications_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Replication(0, 1, 10, 0.0, None, False, {})
    found = Replicated("x", "steady", WarmUp(0, "given"), StoppingRule(), (), (run,))
    save_replications(tmp_path, found)
    before = load_replications(tmp_path)

    def fail(table: object, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="no space left"):
        save_replications(tmp_path, dataclasses.replace(found, replications=(run, run)))
    assert load_replications(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["replications.json", "replications.parquet"]
