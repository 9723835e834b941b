"""What came out, as Markdown, HTML and JSON, with raw rows and profiles beside it: a flat folder of few files."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heliosim.formats.files import write_text
from heliosim.report import Card, Cards, Column, Section, Table, Text, write_report

from .book import read_book
from .figures import VERDICTS, Figure, Got
from .plan import Group, Measure, Options, groups

MOST_BYTES = 16_000_000
FILES = ("report.md", "report.html", "report.json", "rows.jsonl.gz", "profiles.zip", "log.txt.gz")
_COLUMNS = ("figure", "value", "bar", "verdict", "note")
_KINDS: dict[str, Literal["text", "number", "note"]] = {"value": "number", "note": "note"}


@dataclass(frozen=True)
class Outcome:
    """One measure: how it went, and its figures; those it did not give say why."""

    group: Group
    measure: Measure
    state: str
    error: str
    seconds: float
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]


def outcomes(options: Options, work: Path) -> list[Outcome]:
    """Everything planned, in order, measured or not."""
    return [_outcome(group, measure, work) for group in groups(options) for measure in group.measures]


def _outcome(group: Group, measure: Measure, work: Path) -> Outcome:
    book = read_book(work / group.name, measure.name) or {}
    state, error = str(book.get("state", "not begun")), str(book.get("error", ""))
    found = {g["key"]: Got(**g) for g in book.get("got", [])}
    why = error or {"done": "the measure gave none"}.get(state, "not begun")
    figures = tuple(
        Figure(group.name, measure.name, asked, found.get(asked.key) or Got(asked.key, why=why))
        for asked in measure.asked
    )
    notes = tuple(dict.fromkeys(book.get("notes", [])))
    return Outcome(group, measure, state, error, float(book.get("seconds", 0.0)), notes, figures)


def counts(found: list[Outcome]) -> Counter[str]:
    """Figures by verdict."""
    return Counter(f.verdict for o in found for f in o.figures)


def failures(found: list[Outcome]) -> list[Outcome]:
    """Measures that broke, as against figures that miss their bar."""
    return [o for o in found if o.state != "done"]


def write(options: Options, work: Path, out: Path) -> list[Outcome]:
    """Write all files into ``out``; returns the outcomes."""
    found = outcomes(options, work)
    facts = _facts(work)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.md", markdown(options, facts, found))
    write_text(out / "report.json", json.dumps(_json(options, facts, found), indent=1))
    _html(options, facts, found, out / "report.html")
    _pack(work, out)
    return found


def _facts(work: Path) -> dict[str, Any]:
    file = work / "machine" / "device.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _about(options: Options) -> str:
    if options.is_gpu:
        return "Measured on the GPU named below. Models have random weights unless said otherwise; exits are replayed."
    return (
        "Run on a CPU, with narrow stand-ins for the named models: it shows that the check works. **Nothing here is a "
        "figure of a GPU**, and bars, which are about GPUs, are left out."
    )


def markdown(options: Options, facts: dict[str, Any], found: list[Outcome]) -> str:
    """The report as Markdown."""
    lines = ["# GPU check", "", _about(options), "", _summary(found), ""]
    lines += ["| of the machine | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()] or ["| – | not known |"]
    for outcome in found:
        lines += ["", f"## {outcome.group.title}: {outcome.measure.title}", "", _state(outcome), ""]
        lines += [f"{note}\n" for note in outcome.notes]
        if outcome.figures:
            lines += [f"| {' | '.join(_COLUMNS)} |", "| --- | ---: | --- | --- | --- |"]
            lines += [f"| {' | '.join(_cells(f))} |" for f in outcome.figures]
    return "\n".join(lines) + "\n"


def _summary(found: list[Outcome]) -> str:
    many = counts(found)
    told = ", ".join(f"{many[v]} {v}" for v in VERDICTS if many[v])
    broken = failures(found)
    measures = f"{len(found) - len(broken)} of {len(found)} measures ran"
    return f"Figures: {told or 'none'}. {measures}, in {sum(o.seconds for o in found):.0f} s."


def _state(outcome: Outcome) -> str:
    if outcome.state == "done":
        return f"Took {outcome.seconds:.1f} s."
    return f"**{outcome.state}**: {outcome.error or 'not begun'}"


def _cells(figure: Figure) -> list[str]:
    note = figure.got.why or figure.got.note
    return [figure.asked.what, figure.shown, figure.bar_shown, figure.verdict, note.replace("|", "/") or "–"]


def _json(options: Options, facts: dict[str, Any], found: list[Outcome]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "options": json.loads(options.as_json()),
        "machine": facts,
        "verdicts": dict(counts(found)),
        "measures": [
            {
                "group": o.group.name,
                "measure": o.measure.name,
                "state": o.state,
                "error": o.error,
                "seconds": o.seconds,
                "budget_s": o.measure.seconds,
                "notes": list(o.notes),
                "figures": [f.row() for f in o.figures],
            }
            for o in found
        ],
    }


def _html(options: Options, facts: dict[str, Any], found: list[Outcome], path: Path) -> None:
    many = counts(found)
    cards = Cards(tuple(Card(v, str(many[v])) for v in VERDICTS))
    sections = [Section("At a glance", _about(options).replace("**", ""), (cards, Text((_summary(found),))))]
    for group in groups(options):
        blocks: list[Any] = []
        for outcome in (o for o in found if o.group.name == group.name):
            blocks.append(Text((f"{outcome.measure.title}. {_state(outcome).replace('**', '')}", *outcome.notes)))
            if outcome.figures:
                columns = [Column(name, _KINDS.get(name, "text")) for name in _COLUMNS]
                blocks.append(Table(columns, [_cells(f) for f in outcome.figures]))
        sections.append(Section(group.title, "", blocks))
    write_report(path, "GPU check", sections, provenance={key: str(value) for key, value in facts.items()})


def _pack(work: Path, out: Path) -> None:
    """Rows, profiles and the log. Rows are cut, and said to be, where everything together would be too much."""
    with gzip.open(out / "rows.jsonl.gz", "wt", encoding="utf-8") as made:
        for file in sorted(work.glob("*/*.rows.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                made.write(json.dumps({"group": file.parent.name, **json.loads(line)}) + "\n")
    with zipfile.ZipFile(out / "profiles.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((work / "profiles").rglob("*")):
            name = str(file.relative_to(work / "profiles"))
            if file.is_file() and ".partial/" not in name:
                archive.write(file, name)
    log = work / "log.txt"
    with gzip.open(out / "log.txt.gz", "wb") as packed:
        if log.exists():
            packed.write(log.read_bytes()[-4_000_000:])
    for name in ("rows.jsonl.gz", "log.txt.gz", "profiles.zip"):
        if sum(f.stat().st_size for f in out.iterdir() if f.name in FILES) <= MOST_BYTES:
            return
        shutil.copy(out / name, work / name)
        (out / name).unlink()
        write_text(out / "LEFT_OUT.txt", f"{name} would have made this folder larger than {MOST_BYTES:,} bytes.\n")
