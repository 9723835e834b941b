"""The comparison that the page Compare opens with, computed beforehand: ``python -m heliosim_app.shipped_studies``.

It counts only while it is what would be computed: it is kept under the key of everything it depends on (scenarios,
profile, version), and with another key the page computes anew. Tests compute parts of it again.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from heliosim_app.comparisons import Comparison
from heliosim_app.study_jobs import compare, fleet_map

FOLDER = Path(__file__).parent / "shipped"
DIGITS = 6
"""Significant digits that are kept."""
QUANTILES = 100
"""Points of a distribution that are kept."""


def shipped_key(what: str = "compare") -> str:
    """The key of a shipped study; empty if there is none."""
    return str(_read(what).get("key", ""))


def shipped_study(what: str = "compare") -> dict[str, Any]:
    """A shipped study as plain data. Raises KeyError if there is none."""
    found: dict[str, Any] = _read(what)["study"]
    return found


@lru_cache(maxsize=4)
def _read(what: str) -> dict[str, Any]:
    file = FOLDER / f"{what}.json.gz"
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return found


def thinned(study: dict[str, Any]) -> dict[str, Any]:
    """A study with fewer digits and fewer points of its distributions."""
    cells = []
    for cell in study["cells"]:
        latencies = {name: _some(values) for name, values in cell["latencies"].items()}
        cells.append({**cell, "latencies": latencies})
    rounded: dict[str, Any] = _rounded({**study, "cells": cells})
    return rounded


def _some(values: list[float]) -> list[float]:
    if len(values) <= QUANTILES:
        return values
    return [values[round(k * (len(values) - 1) / (QUANTILES - 1))] for k in range(QUANTILES)]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def write(what: str, key: str, study: dict[str, Any]) -> Path:
    """Keep a study in the package; the same study gives the same bytes."""
    file = FOLDER / f"{what}.json.gz"
    text = json.dumps({"key": key, "study": thinned(study)}, separators=(",", ":"), sort_keys=True)
    FOLDER.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    part.replace(file)
    return file


def main() -> None:
    """Compute the shipped studies and write them."""

    def say(text: str, share: float) -> None:
        print(f"\r{100 * share:3.0f} %  {text:60}", end="", flush=True)

    asked_for = Comparison()
    scenarios = asked_for.scenarios()
    study = compare(scenarios, asked_for.focus_per_s, asked_for.replications, report=say)
    print(f"\r{write('compare', asked_for.key(), study)}{'':40}")
    name, most = asked_for.names[0], asked_for.most_replicas
    fleet = fleet_map(name, scenarios[name], study["focus_per_s"], asked_for.replications, most, report=say)
    print(f"\r{write('fleet', asked_for.key('fleet', name, most), fleet)}{'':40}")


if __name__ == "__main__":
    main()
