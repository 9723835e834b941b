"""What a measure is given: options, time, and where to write figures as soon as they are known."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heliosim.formats.files import write_text

from .figures import Got
from .plan import CPU_GRACE, Measure, Options


@dataclass
class Book:
    """Of one measure. Figures, notes and rows are written at once: what a killed measure knew is kept.

    ``shared``: what measures of one group hand each other (an engine, a profile).
    """

    options: Options
    measure: Measure
    folder: Path
    shared: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    got: dict[str, Got] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    state: str = "running"
    error: str = ""

    @property
    def left_s(self) -> float:
        """Seconds of the measure's own budget that are left; may be negative."""
        return self.measure.seconds - (time.monotonic() - self.began)

    @property
    def limit_s(self) -> float:
        """Seconds after which to stop waiting; on a CPU, where nothing is a figure, more."""
        return self.left_s if self.options.is_gpu else self.left_s + (CPU_GRACE - 1) * self.measure.seconds

    def is_late(self, needed_s: float = 0.0) -> bool:
        """Whether fewer than ``needed_s`` seconds are left."""
        return self.limit_s < needed_s

    def put(self, key: str, value: float, **rest: Any) -> None:
        """A figure that was asked for, with ``low``, ``high``, ``note``, ``passes``."""
        self._require(key)
        self.got[key] = Got(key, float(value), **rest)
        self.save()

    def cannot(self, key: str, why: str) -> None:
        """Say why a figure is not measured."""
        self._require(key)
        self.got[key] = Got(key, why=why)
        self.save()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.save()

    def row(self, **columns: Any) -> None:
        """A raw row, kept for whoever wants to look behind a figure."""
        with (self.folder / f"{self.measure.name}.rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"measure": self.measure.name, **columns}) + "\n")

    def save(self) -> None:
        made = {
            "state": self.state,
            "error": self.error,
            "seconds": round(time.monotonic() - self.began, 3),
            "got": [asdict(g) for g in self.got.values()],
            "notes": self.notes,
        }
        write_text(self.folder / f"{self.measure.name}.json", json.dumps(made, indent=1))

    def _require(self, key: str) -> None:
        assert key in {a.key for a in self.measure.asked}, f"{self.measure.name} is not asked for {key}"


def read_book(folder: Path, measure: str) -> dict[str, Any] | None:
    """What is known of a measure; None: it has not begun."""
    file = folder / f"{measure}.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
