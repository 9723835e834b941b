"""Keeps the parts of a behaviour measurement on disk, so that one that was interrupted goes on, and puts them together.

A part is one job's rows. The folder says what it is of; parts of another measurement are thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliosim.errors import InputError
from heliosim.formats.files import read_json, write_json
from heliosim.types import ExitRule

from .behaviour import Columns, Job, table

PLAN = "parts.json"


class Parts:
    """Parts in a folder of their own, ``digest`` telling one measurement from another. Raises InputError if the folder
    is there and holds anything else.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest = folder, digest
        if folder.exists():
            self._require_own()
            if read_json(folder / PLAN) != {"digest": digest}:
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, {"digest": digest})

    def _require_own(self) -> None:
        held = list(self.folder.iterdir()) if self.folder.is_dir() else [self.folder]
        odd = [p.name for p in held if p.name != PLAN and not p.name.startswith("part-")]
        if odd or not (self.folder / PLAN).is_file():
            problem = "is in the way of parts to go on from"
            raise InputError(str(self.folder), odd[0] if odd else PLAN, problem, "Move it away.")

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def keep(self, number: int, columns: Columns) -> None:
        """Write a part under a temporary name, then rename it."""
        import pyarrow.parquet as pq

        temporary = self.folder / f"part-{number:05d}.new"
        pq.write_table(table(columns), temporary, compression="zstd")
        os.replace(temporary, self.path(number))

    def join(self, count: int, path: Path) -> int:
        """All parts as one table at ``path``, one part in memory at a time; returns its rows."""
        import pyarrow.parquet as pq

        rows, writer = 0, None
        try:
            for number in range(count):
                part = pq.read_table(self.path(number))
                writer = writer or pq.ParquetWriter(path, part.schema, compression="zstd")
                writer.write_table(part)
                rows += part.num_rows
        finally:
            if writer is not None:
                writer.close()
        return rows

    @staticmethod
    def remove_at(folder: Path) -> None:
        """Throw a folder of parts away: they stand elsewhere now."""
        shutil.rmtree(folder, ignore_errors=True)


def digest_of(jobs: Sequence[Job], weights: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """What a measurement is: prompts, sources, weights and settings."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([dict(weights), dict(settings)], sort_keys=True).encode())
    for job in jobs:
        rule: ExitRule | None = None if job.policy is None else job.policy[2]
        digest.update(f"|{job.source}|{rule}".encode())
        for prompt in job.prompts:
            digest.update(f"{prompt.sequence}|{prompt.task}|{prompt.ids}|{prompt.reference}|{prompt.is_exact}".encode())
    return digest.hexdigest()
