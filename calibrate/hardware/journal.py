"""Raw rows on disk while a calibration runs, so that one that was stopped goes on where it was.

``NAME.partial`` beside the profile to be: ``settings.json`` says what is being measured, ``rows.jsonl`` holds one line
for everything measured so far, flushed line by line. Both vanish when the profile is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliosim.errors import InputError
from heliosim.formats.files import read_json, write_json

SETTINGS, ROWS = "settings.json", "rows.jsonl"


class Journal:
    """What was measured, by name. ``resumed``: how many entries an earlier call left."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Raises InputError if what lies there was measured with other ``settings``."""
        self.folder = out.parent / f"{out.name}.partial"
        self._known: dict[str, Any] = {}
        plain = json.loads(json.dumps(settings, sort_keys=True))
        if (self.folder / SETTINGS).exists():
            self._require_same(plain)
            self._read()
        elif self.folder.exists() and any(self.folder.iterdir()):
            remedy = "Remove it, or choose another --out."
            raise InputError(str(self.folder), self.folder.name, "is no interrupted calibration", remedy)
        self.resumed = len(self._known)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS, plain)
        self._file = (self.folder / ROWS).open("a", encoding="utf-8")

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        found = read_json(self.folder / SETTINGS)
        differing = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
        if differing:
            problem = f"an interrupted calibration lies there that differs in {', '.join(differing)}"
            remedy = f"Repeat its command to finish it, or remove {self.folder} to begin anew."
            raise InputError(str(self.folder), differing[0], problem, remedy)

    def _read(self) -> None:
        """What is there; a last line that was cut short is dropped, from the file too."""
        path = self.folder / ROWS
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
            except ValueError:
                break
            self._known[entry["name"]] = entry["value"]
            whole += len(line)
        if path.exists():
            os.truncate(path, whole)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: str) -> Any:
        return self._known[name]

    def add(self, name: str, value: Any) -> None:
        """Note what came of ``name``; on disk when this returns."""
        self._known[name] = value
        self._file.write(json.dumps({"name": name, "value": value}, allow_nan=False) + "\n")
        self._file.flush()

    def named(self, prefix: str) -> Sequence[Any]:
        """Values whose names begin so, in the order they came."""
        return [v for k, v in self._known.items() if k.startswith(prefix)]

    def close(self) -> None:
        """Stop writing; an empty journal leaves nothing."""
        self._file.close()
        if not self._known:
            self.remove()

    def remove(self) -> None:
        """Close it and delete it: the profile holds everything now."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)
