"""The report as a Markdown page, its plots beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliosim.formats.files import write_json, write_text
from heliosim.metrics import significant
from heliosim.reproduction.plots import svg

DATA, PAGE, IMAGES = "reproduction.json", "reproduction.md", "images/reproduction"


def write(folder: Path, data: Mapping[str, Any]) -> list[Path]:
    """Write page, data and plots; returns their paths. What is no longer part of the report is removed."""
    images = folder / IMAGES
    wanted = {name: svg(plot) for row in data["rows"] for name, plot in _plots(row)}
    for old in images.glob("*.svg") if images.is_dir() else ():
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        write_text(images / name, text)
    write_json(folder / DATA, data)
    write_text(folder / PAGE, markdown(data))
    return [folder / PAGE, folder / DATA, *(images / name for name in wanted)]


def _plots(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """File names and plots of a row, those of the calibrated set-up behind those of the defaults."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for word, key in (("", "plots"), ("calibrated-", "calibrated_plots")):
        for number, plot in enumerate(row[key]):
            setup = "" if not row["has_setups"] else f" ({'calibrated' if word else 'defaults'})"
            found.append((f"{row['id']}-{word}{number}.svg", {**plot, "title": plot["title"] + setup}))
    return found


def markdown(data: Mapping[str, Any]) -> str:
    """The whole page."""
    of_paper = [row for row in data["rows"] if not row["is_ours"]]
    ours = [row for row in data["rows"] if row["is_ours"]]
    lines = [
        "# The paper's numbers",
        "",
        f"Written by `{data['command']}` ({data['replications']} replications of each simulated system"
        + (f"; {data['share_of_requests']:.0%} of the requests: a quick look" if data["share_of_requests"] < 1 else "")
        + "). Claims of HELIOS ([arXiv 2504.10724](https://arxiv.org/abs/2504.10724)) and what comes out when they are "
        "computed from their inputs. Exits are synthetic, times derived or composed: nothing on this page was measured "
        "on the paper's GPUs.",
        "",
        f"Two set-ups: **defaults** ({data['setups']['defaults']}) are as they were before any result was seen, and "
        f"verdicts count for them; **calibrated** ({data['setups']['calibrated']}) is chosen by the shares of tokens "
        "that the paper's placements serve ([how](#how-the-calibrated-set-up-was-chosen)), and what it was fitted to "
        "is called *fitted*, which is no evidence. Percentages are relative errors where no tolerance is claimed.",
        "",
        *_summary(data["summary"]),
        "",
        "## The claims one by one",
        "",
        "**P**: the paper or its slides say so, **D**: derived from its numbers, **C**: our choice. Intervals: 95 %, "
        "over replications. *within*: a relative error of at most 2 % (exact) or 10 % (calibrated, where shares of "
        "placements or published bounds say what to expect).",
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


def _summary(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per row."""
    found = ["| claim | class | defaults | calibrated | why, where it misses |", "| --- | --- | --- | --- | --- |"]
    for line in lines:
        kind = "ours" if line["is_ours"] else line["class"]
        name = f"[{line['claim']}](#{_anchor(line['claim'])})"
        outcome = line["defaults"] or ("input" if line["class"] == "input" else "–")
        found.append(f"| {name} | {kind} | {outcome} | {line['calibrated'] or '–'} | {line['why']} |")
    return found


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _row(row: Mapping[str, Any]) -> list[str]:
    unit = f", {row['unit']}" if row["unit"] else ""
    lines = [f"### {row['claim']}", "", f"`{row['id']}` · {row['class']}{unit}", ""]
    two = row["has_setups"]
    if row["values"]:
        head = "| part | paper | " + ("defaults | error | | calibrated | error | |" if two else "ours | error | |")
        lines += [head, _rule(head), *(_part(part, two) for part in row["values"]), ""]
    if row["checks"]:
        head = "| claim | " + (
            "defaults: mean difference | of runs | | calibrated | of runs | |"
            if two
            else "mean difference | of runs | |"
        )
        lines += [head, _rule(head)]
        for c in row["checks"]:
            lines.append(f"| {c['says']} | {_check(c)} |" + (f" {_check(c['calibrated'])} |" if two else ""))
        lines.append("")
    lines += [line for name, plot in _plots(row) for line in (f"![{plot['title']}]({IMAGES}/{name})", "")]
    if row["beside"]:
        title = "Inputs, as published:" if row["class"] == "input" else "Beside it:"
        head = "| | defaults | calibrated |" if two else "| | value |"
        lines += [title, "", head, _rule(head)]
        for v in row["beside"]:
            other = f" {_figure(v['calibrated'])} |" if two else ""
            lines.append(f"| {v['part']} | {_figure(v)} |{other}")
        lines.append("")
    if row["remark"]:
        lines += [row["remark"], ""]
    basis = [f"inputs: {', '.join(row['inputs'])}"] if row["inputs"] else []
    basis += [f"assumptions: {', '.join(row['assumptions'])}"] if row["assumptions"] else []
    if basis:
        lines += [f"From {'; '.join(basis)}.", ""]
    return [*lines, f"`{row['command']}`", ""]


def _rule(head: str) -> str:
    return "|" + " --- |" * (head.count("|") - 1)


def _part(part: Mapping[str, Any], two: bool) -> str:
    paper = "–" if part["paper"] is None else f"{part['paper']:g} ({part['paper_mark']})"
    cells = [part["part"], paper, *_judged(part, part["tolerance"])]
    if two:
        cells += _judged(part["calibrated"], part["tolerance"])
    return f"| {' | '.join(cells)} |"


def _judged(value: Mapping[str, Any] | None, tolerance: float | None) -> list[str]:
    """A figure, its error and its verdict."""
    if value is None:
        return ["–", "", ""]
    error = "" if value["relative_error"] is None else f"{value['relative_error']:+.1%}"
    words = {
        "within": f"within {tolerance or 0:.0%}",
        "beyond": f"**beyond {tolerance or 0:.0%}**",
        "fitted": "*fitted*",
    }
    return [_figure(value), error, words.get(value["verdict"] or "", "")]


def _check(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return "– | | "
    word = "holds" if check["holds"] else "**does not hold**"
    interval = f"({_number(check['low'])} to {_number(check['high'])})"
    return f"{_number(check['mean'])} {interval} | {check['share']:.0%} | {word}"


def _figure(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    interval = "" if value["low"] is None else f" ({_number(value['low'])} to {_number(value['high'])})"
    return f"{_number(value['value'])}{interval}"


def _number(value: float) -> str:
    return significant(value, 4)


def _basis(named: Mapping[str, Mapping[str, str]]) -> Sequence[str]:
    lines = ["| name | | what |", "| --- | --- | --- |"]
    return [*lines, *(f"| {name} | {b['mark']} | {b['text']} |" for name, b in sorted(named.items()))]
