"""Rows beside what the paper says: relative errors, verdicts, and the report as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heliosim.reproduction.inputs import ASSUMPTIONS, INPUTS
from heliosim.reproduction.paper import CONTRADICTIONS, PAPER, Said
from heliosim.reproduction.rows import Answer, Check, Plot, Row, Value


def relative_error(ours: float, said: float) -> float | None:
    """Signed, of the paper's figure; None if that is 0."""
    return None if said == 0 else (ours - said) / abs(said)


def verdict_of(value: Value, said: Said) -> str | None:
    """``within`` or ``beyond`` the tolerance; None where none is claimed."""
    error = relative_error(value.value, said.value)
    if said.tolerance is None or error is None:
        return None
    return "within" if abs(error) <= said.tolerance else "beyond"


def row_data(row: Row, answer: Answer, command: str) -> dict[str, Any]:
    """One row of the report. Parts that the paper does not name have no figure beside them."""
    said = PAPER.get(row.id, {})
    parts = []
    for value in answer.values:
        paper = said.get(value.part)
        parts.append(
            {
                **_value(value),
                "paper": None if paper is None else paper.value,
                "paper_mark": None if paper is None else paper.mark,
                "tolerance": None if paper is None else paper.tolerance,
                "relative_error": None if paper is None else relative_error(value.value, paper.value),
                "verdict": None if paper is None else verdict_of(value, paper),
            }
        )
    return {
        "id": row.id,
        "claim": row.claim,
        "class": row.kind,
        "unit": row.unit,
        "is_ours": row.is_ours,
        "inputs": list(row.inputs),
        "assumptions": list(row.assumptions),
        "values": parts,
        "beside": [_value(v) for v in answer.beside],
        "checks": [_check(c) for c in answer.checks],
        "plots": [_plot(p) for p in answer.plots],
        "remark": row.remark,
        "command": command,
    }


def _value(value: Value) -> dict[str, Any]:
    return {"part": value.part, "value": value.value, "low": value.low, "high": value.high}


def _check(check: Check) -> dict[str, Any]:
    return {
        "says": check.says, "mean": check.mean, "low": check.low, "high": check.high, "share": check.share,
        "holds": bool(check.holds),
    }  # fmt: skip


def _plot(plot: Plot) -> dict[str, Any]:
    series = [
        {"name": s.name, "x": list(s.x), "y": list(s.y), "low": list(s.low), "high": list(s.high)} for s in plot.series
    ]
    return {"title": plot.title, "x_title": plot.x_title, "y_title": plot.y_title, "series": series}


def report_data(
    rows: Sequence[Row], answers: Mapping[str, Answer], replications: int, share: float, command: str
) -> dict[str, Any]:
    """The whole report. ``share``: of the requests each run served (1: all)."""
    made = [row_data(row, answers[row.id], f"{command} --rows {row.id}") for row in rows]
    used = {name for row in rows for name in (*row.inputs, *row.assumptions)}
    return {
        "schema_version": 1,
        "replications": replications,
        "share_of_requests": share,
        "command": command,
        "rows": made,
        "inputs": {k: {"text": b.text, "mark": b.mark} for k, b in INPUTS.items() if k in used},
        "assumptions": {k: {"text": b.text, "mark": b.mark} for k, b in ASSUMPTIONS.items() if k in used},
        "contradictions": list(CONTRADICTIONS),
        "summary": summary(made),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many parts lie within their tolerance, and how many checks hold, by class."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = found.setdefault(row["class"], {"rows": 0, "within": 0, "beyond": 0, "holds": 0, "fails": 0})
        counts["rows"] += 1
        for part in row["values"]:
            if part["verdict"] is not None:
                counts[part["verdict"]] += 1
        for check in row["checks"]:
            counts["holds" if check["holds"] else "fails"] += 1
    return found
