"""Rows beside what the paper says: relative errors, verdicts, and the report as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from heliosim.reproduction.inputs import ASSUMPTIONS, INPUTS
from heliosim.reproduction.paper import CONTRADICTIONS, PAPER, Said
from heliosim.reproduction.rows import CALIBRATED, DEFAULTS, Answer, Check, Plot, Row, Value
from heliosim.reproduction.setups import SETUPS


def relative_error(ours: float, said: float) -> float | None:
    """Signed, of the paper's figure; None if that is 0."""
    return None if said == 0 else (ours - said) / abs(said)


def verdict_of(value: Value, said: Said) -> str | None:
    """``within`` or ``beyond`` the tolerance; None where none is claimed."""
    error = relative_error(value.value, said.value)
    if said.tolerance is None or error is None:
        return None
    return "within" if abs(error) <= said.tolerance else "beyond"


def row_data(row: Row, answer: Answer, command: str, calibrated: Answer | None = None) -> dict[str, Any]:
    """One row of the report. Parts that the paper does not name have no figure beside them. ``calibrated``: the same
    under the calibrated set-up, None where there is one set-up.
    """
    said = PAPER.get(row.id, {})
    parts = []
    others = {} if calibrated is None else {v.part: v for v in calibrated.values}
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
                "calibrated": _other(row, others.get(value.part), paper),
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
        "has_setups": calibrated is not None,
        "beside": _beside(answer, calibrated),
        "checks": _checks(answer, calibrated),
        "plots": [_plot(p) for p in answer.plots],
        "calibrated_plots": [] if calibrated is None else [_plot(p) for p in calibrated.plots],
        "why": row.why,
        "remark": row.remark,
        "command": command,
    }


def _other(row: Row, value: Value | None, paper: Said | None) -> dict[str, Any] | None:
    """A part under the calibrated set-up: what was fitted has no verdict but that."""
    if value is None:
        return None
    verdict = None if paper is None else "fitted" if row.is_fitted(value.part) else verdict_of(value, paper)
    return {
        **_value(value),
        "relative_error": None if paper is None else relative_error(value.value, paper.value),
        "verdict": verdict,
    }


def _beside(answer: Answer, calibrated: Answer | None) -> list[dict[str, Any]]:
    """Figures that stand beside, those of both set-ups in one line."""
    others = {} if calibrated is None else {v.part: v for v in calibrated.beside}
    return [{**_value(v), "calibrated": _value(others[v.part]) if v.part in others else None} for v in answer.beside]


def _checks(answer: Answer, calibrated: Answer | None) -> list[dict[str, Any]]:
    others = {} if calibrated is None else {c.says: c for c in calibrated.checks}
    return [{**_check(c), "calibrated": _check(others[c.says]) if c.says in others else None} for c in answer.checks]


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
    return {
        "title": plot.title, "x_title": plot.x_title, "y_title": plot.y_title, "is_log": plot.is_log, "series": series,
    }  # fmt: skip


def report_data(
    rows: Sequence[Row],
    answers: Mapping[str, tuple[Answer, Answer | None]],
    replications: int,
    share: float,
    command: str,
) -> dict[str, Any]:
    """The whole report. ``share``: of the requests each run served (1: all)."""
    made = [row_data(row, answers[row.id][0], f"{command} --rows {row.id}", answers[row.id][1]) for row in rows]
    used = {name for row in rows for name in (*row.inputs, *row.assumptions)}
    return {
        "schema_version": 2,
        "setups": {name: SETUPS[name].name for name in (DEFAULTS, CALIBRATED)},
        "replications": replications,
        "share_of_requests": share,
        "command": command,
        "rows": made,
        "inputs": {k: {"text": b.text, "mark": b.mark} for k, b in INPUTS.items() if k in used},
        "assumptions": {k: {"text": b.text, "mark": b.mark} for k, b in ASSUMPTIONS.items() if k in used},
        "contradictions": list(CONTRADICTIONS),
        "summary": summary(made),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per row: what comes out under each set-up, in words, and why where it misses."""
    return [
        {
            "id": row["id"],
            "claim": row["claim"],
            "class": row["class"],
            "is_ours": row["is_ours"],
            "defaults": in_words(row, lambda part: part),
            "calibrated": in_words(row, lambda part: part["calibrated"]) if row["has_setups"] else "",
            "why": row["why"],
        }
        for row in rows
    ]


def in_words(row: Mapping[str, Any], of: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]) -> str:
    """A row's outcome in a few words: parts within their tolerance, checks that hold, largest errors of the rest."""
    words = []
    found = [(part, mine) for part in row["values"] if (mine := of(part)) is not None and part["paper"] is not None]
    judged = [(part, mine) for part, mine in found if mine["verdict"] in ("within", "beyond")]
    if judged:
        good = sum(mine["verdict"] == "within" for _, mine in judged)
        words.append(f"{good}/{len(judged)} within {judged[0][0]['tolerance']:.0%}")
    fitted = sum(mine["verdict"] == "fitted" for _, mine in found)
    if fitted:
        words.append(f"{fitted} fitted")
    errors = [mine["relative_error"] for part, mine in found if part["tolerance"] is None]
    errors = [e for e in errors if e is not None]
    if errors:
        low, high = min(errors), max(errors)
        words.append(f"{low:+.0%}" if len(errors) == 1 else f"{low:+.0%} to {high:+.0%}")
    checks = [mine for check in row["checks"] if (mine := of(check)) is not None]
    if checks:
        words.append(f"{sum(c['holds'] for c in checks)}/{len(checks)} hold")
    return ", ".join(words)
