"""Studies as plain data and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from heliosim.comparing import Cell, Study


def plain_study(study: Study) -> dict[str, Any]:
    """A study as plain data, to be kept or sent."""
    return asdict(study)


def study_of(plain: Mapping[str, Any]) -> Study:
    """A study from plain data, as ``plain_study`` made it."""
    lists = {k: tuple(plain[k]) for k in ("systems", "rates_per_s", "fleet_rates_per_s", "replicas")}
    return Study(**{**plain, **lists, "cells": tuple(Cell(**cell) for cell in plain["cells"])})


def study_table(study: Study) -> pd.DataFrame:
    """Every run as a row, every metric a column: what a spreadsheet takes."""
    rows = [
        {
            "system": c.system,
            "rate_per_s": c.rate_per_s,
            "replicas": c.replicas,
            "replication": c.replication,
            "seed": str(c.seed),
            "requests": c.requests,
            "waiting_grew": c.grew,
            **c.values,
        }
        for c in study.cells
    ]
    return pd.DataFrame(rows)
