"""The report as a Markdown page, its plots beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliosim.formats.files import write_json, write_text
from heliosim.metrics import significant
from heliosim.reproduction.plots import svg

DATA, PAGE, IMAGES = "reproduction.json", "reproduction.md", "images/reproduction"
CLASSES = {
    "exact": "exact: follows from published inputs",
    "calibrated": "calibrated: needs an assumption, which is named",
    "shape": "shape: direction only",
    "input": "input: shown, not reproduced",
}


def write(folder: Path, data: Mapping[str, Any]) -> list[Path]:
    """Write page, data and plots; returns their paths. What is no longer part of the report is removed."""
    images = folder / IMAGES
    wanted = {}
    for row in data["rows"]:
        for number, plot in enumerate(row["plots"]):
            wanted[f"{row['id']}-{number}.svg"] = svg(plot)
    for old in images.glob("*.svg") if images.is_dir() else ():
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        write_text(images / name, text)
    write_json(folder / DATA, data)
    write_text(folder / PAGE, markdown(data))
    return [folder / PAGE, folder / DATA, *(images / name for name in wanted)]


def markdown(data: Mapping[str, Any]) -> str:
    """The whole page."""
    of_paper = [row for row in data["rows"] if not row["is_ours"]]
    ours = [row for row in data["rows"] if row["is_ours"]]
    lines = [
        "# The paper's numbers",
        "",
        f"Written by `{data['command']}` ({data['replications']} replications of each simulated system"
        + (f", {data['share_of_requests']:.0%} of the requests: a quick look" if data["share_of_requests"] < 1 else "")
        + "). Claims of HELIOS ([arXiv 2504.10724](https://arxiv.org/abs/2504.10724)), what they follow from, and our "
        "value "
        "with its 95 % interval. **P**: the paper or its slides say so, **D**: derived from its numbers, **C**: our "
        "choice. "
        "Exits are synthetic, times are derived: nothing on this page was measured on the paper's GPUs.",
        "",
        *_summary(data["summary"]),
        "",
    ]
    for row in of_paper:
        lines += _row(row)
    if ours:
        lines += ["## What the paper does not have", ""]
        for row in ours:
            lines += _row(row)
    lines += ["## Inputs", "", *_basis(data["inputs"]), "", "## Assumptions", "", *_basis(data["assumptions"]), ""]
    lines += ["## Contradictions in the sources", "", *(f"- {text}" for text in data["contradictions"])]
    return "\n".join(lines).rstrip() + "\n"


def _summary(summary: Mapping[str, Mapping[str, int]]) -> list[str]:
    lines = [
        "| class | rows | within | beyond | checks that hold | that do not |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, text in CLASSES.items():
        if kind in summary:
            c = summary[kind]
            lines.append(f"| {text} | {c['rows']} | {c['within']} | {c['beyond']} | {c['holds']} | {c['fails']} |")
    tail = (
        "*within*: parts of a claim whose relative error is at most 2 % (exact) or 10 % (calibrated, where the state "
        "shares say what to expect)."
    )
    return [*lines, "", tail]


def _row(row: Mapping[str, Any]) -> list[str]:
    unit = f", {row['unit']}" if row["unit"] else ""
    lines = [f"### {row['claim']}", "", f"`{row['id']}` · {row['class']}{unit}", ""]
    if row["values"]:
        lines += ["| part | paper | ours | 95 % interval | relative error | |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [_part(part) for part in row["values"]]
        lines.append("")
    if row["checks"]:
        lines += ["| claim | mean difference | 95 % interval | of replications | |", "| --- | --- | --- | --- | --- |"]
        for c in row["checks"]:
            interval = f"{_number(c['low'])} to {_number(c['high'])}"
            word = "holds" if c["holds"] else "**does not hold**"
            lines.append(f"| {c['says']} | {_number(c['mean'])} | {interval} | {c['share']:.0%} | {word} |")
        lines.append("")
    lines += [
        line for n, p in enumerate(row["plots"]) for line in (f"![{p['title']}]({IMAGES}/{row['id']}-{n}.svg)", "")
    ]
    if row["beside"]:
        title = "Inputs, as published:" if row["class"] == "input" else "Beside it:"
        lines += [title, "", "| | value | 95 % interval |", "| --- | --- | --- |"]
        lines += [f"| {v['part']} | {_number(v['value'])} | {_interval(v)} |" for v in row["beside"]]
        lines.append("")
    if row["remark"]:
        lines += [row["remark"], ""]
    basis = [f"inputs: {', '.join(row['inputs'])}"] if row["inputs"] else []
    basis += [f"assumptions: {', '.join(row['assumptions'])}"] if row["assumptions"] else []
    if basis:
        lines += [f"From {'; '.join(basis)}.", ""]
    return [*lines, f"`{row['command']}`", ""]


def _part(part: Mapping[str, Any]) -> str:
    paper = "–" if part["paper"] is None else f"{part['paper']:g} ({part['paper_mark']})"
    error = "–" if part["relative_error"] is None else f"{part['relative_error']:+.1%}"
    verdict = {"within": f"within {part['tolerance'] or 0:.0%}", "beyond": f"**beyond {part['tolerance'] or 0:.0%}**"}
    word = verdict.get(part["verdict"] or "", "")
    return f"| {part['part']} | {paper} | {_number(part['value'])} | {_interval(part)} | {error} | {word} |"


def _interval(value: Mapping[str, Any]) -> str:
    return "–" if value["low"] is None else f"{_number(value['low'])} to {_number(value['high'])}"


def _number(value: float) -> str:
    return significant(value, 4)


def _basis(named: Mapping[str, Mapping[str, str]]) -> Sequence[str]:
    lines = ["| name | | what |", "| --- | --- | --- |"]
    return [*lines, *(f"| {name} | {b['mark']} | {b['text']} |" for name, b in sorted(named.items()))]
