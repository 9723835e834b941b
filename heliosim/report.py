"""One HTML file that explains a comparison: no network, no second file, readable on a telephone.

``write_report`` lays out sections of cards, text, tables and figures; ``demo_report`` fills them for a set of
systems that were simulated and run live. Plotly's script is embedded once, styles are inline, fonts are the
reader's own. plotly and pandas are imported when a report is made, not with this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from heliosim.formats.files import write_text
from heliosim.formats.profile import CAUTIONS, least_sure
from heliosim.formats.results import replay_caution
from heliosim.metrics import HEADLINE, ComparisonRow, SystemResult, metric_spec, significant
from heliosim.tables import inside, percent, spread

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "Card",
    "Cards",
    "Code",
    "Column",
    "Details",
    "Figure",
    "Html",
    "Section",
    "SystemResult",
    "Table",
    "Text",
    "demo_report",
    "write_report",
]


NEAR = 0.05
"""Relative error up to which a value outside the spread of the repeats is not marked, 5 %."""


class Html(str):
    """Text that is markup already and is not escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Card:
    """A number worth a glance: what it is, its value with unit, and what to hold it against."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]


@dataclass(frozen=True)
class Text:
    paragraphs: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines to copy into a shell."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Column:
    """A table column; numbers stand at the right, notes are small and may wrap."""

    title: str
    kind: Literal["text", "number", "note"] = "text"


@dataclass(frozen=True)
class Table:
    """Cells are text (escaped) or ``Html``; None shows as an en dash."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str | None]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A plotly figure; its own title and caption say what it is. ``alt``: the same in words, for who cannot see it."""

    figure: go.Figure
    alt: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks folded away behind one line. No figures: a hidden figure does not know its width."""

    summary: str
    blocks: Sequence[Cards | Text | Code | Table]


Block = Cards | Text | Code | Table | Figure | Details


@dataclass(frozen=True)
class Section:
    """``reading`` answers "what am I looking at?" in a line or two."""

    title: str
    reading: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def write_report(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write one self-contained HTML file, all of it or nothing. ``provenance`` becomes the footer."""
    from plotly.offline import get_plotlyjs

    writer = _Writer()
    body = "\n".join(writer.section(s) for s in sections)
    script = f"<script>{get_plotlyjs()}</script>" if writer.figures else ""
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in (provenance or {}).items())
    footer = f"<footer><h2>Where this comes from</h2><dl>{facts}</dl></footer>" if facts else ""
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_CSS}</style>{script}</head>\n<body><main><header><h1>{escape(title)}</h1>"
        f'<p class="subtitle">{escape(subtitle)}</p><nav>{links}</nav></header>\n'
        f"{body}\n{footer}"
        "</main></body></html>\n",
    )


class _Writer:
    """Turns blocks into markup and numbers the figures."""

    def __init__(self) -> None:
        self.figures = 0

    def section(self, section: Section) -> str:
        blocks = "\n".join(self.block(b) for b in section.blocks)
        return (
            f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>'
            f'<p class="reading">{_text(section.reading)}</p>\n{blocks}</section>'
        )

    def block(self, block: Block) -> str:
        match block:
            case Cards():
                return f'<div class="cards">{"".join(_card(c) for c in block.cards)}</div>'
            case Text():
                return "".join(f"<p>{_text(p)}</p>" for p in block.paragraphs)
            case Code():
                return f"<pre><code>{escape(chr(10).join(block.lines))}</code></pre>"
            case Table():
                return _table(block)
            case Figure():
                return self.figure(block)
            case Details():
                inner = "\n".join(self.block(b) for b in block.blocks)
                return f"<details><summary>{escape(block.summary)}</summary>{inner}</details>"

    def figure(self, block: Figure) -> str:
        self.figures += 1
        markup = block.figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{self.figures}",
            config={
                "responsive": True,
                "displaylogo": False,
                "displayModeBar": "hover",
                "modeBarButtons": [["toImage", "resetScale2d"]],
            },
        )
        said = f' role="img" aria-label="{escape(block.alt)}"' if block.alt else ""
        return f'<figure{said}><div class="wide">{markup}</div></figure>'


def _text(value: str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, Html) else escape(value)


def _card(card: Card) -> str:
    note = f'<div class="note">{_text(card.note)}</div>' if card.note else ""
    return (
        f'<div class="card"><div class="label">{_text(card.label)}</div>'
        f'<div class="value">{_text(card.value)}</div>{note}</div>'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th class="{c.kind}">{_text(c.title)}</th>' for c in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="{c.kind}">{_text(v)}</td>' for c, v in zip(table.columns, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


# -- the report of a demo or comparison ------------------------------------------------------------


def demo_report(
    path: Path,
    systems: Sequence[SystemResult],
    profile_facts: Mapping[str, Any],
    premises: Sequence[Mapping[str, Any]],
    commands: Sequence[str],
    *,
    title: str = "HelioSim: simulated beside measured",
    metrics: Sequence[str] = HEADLINE,
    limits: Sequence[str] = (),
) -> None:
    """Everything about a set of systems on one page.

    ``profile_facts``: shown as they are (name: value), except ``step_fit``: a mapping with the sequences
    ``measured_s``, ``predicted_s`` and, if known, ``groups`` (a name per point) and ``caption`` (which cells,
    which seed), which is drawn. ``premises``: mappings with ``premise``, ``subject``, ``value``,
    ``holds_from``, ``partly_from``, ``verdict``, ``detail``, ``tokens``. ``limits``: sentences added to what
    the page says of its own limits.
    """
    from heliosim.charts import Style, caption_of

    rows = {s.name: s.comparison(metrics) for s in systems}
    style = Style.of(systems)
    sections = [
        _glance(systems, rows, premises),
        _headline(systems, rows, metrics, style.colours),
        *_figure_sections(systems, profile_facts, style),
        *_energy_sections(systems),
        *([_premises_section(premises)] if premises else []),
        Section("Limits", "What these numbers do not say.", [Text([*_limits(systems), *limits])]),
    ]
    if commands:
        sections.append(Section("Go on", "Commands to try next.", [Code(commands)]))
    write_report(path, title, sections, subtitle=caption_of(systems), provenance=_provenance(systems, profile_facts))


def _focus(systems: Sequence[SystemResult]) -> SystemResult:
    """The system the page is about: of those named after HELIOS the one with the shortest name, else the last."""
    named = [s for s in systems if "helios" in s.name.lower()]
    return min(named, key=lambda s: len(s.name)) if named else systems[-1]


def _best(row: ComparisonRow) -> tuple[float | None, str]:
    """The measured value where there is one, and what kind it is."""
    return (row.simulated, "simulated") if row.measured_mean is None else (row.measured_mean, "measured")


def _glance(
    systems: Sequence[SystemResult],
    rows: Mapping[str, Sequence[ComparisonRow]],
    premises: Sequence[Mapping[str, Any]],
) -> Section:
    focus = _focus(systems)
    cards = [*_speed_card(focus, systems), *_quality_card(focus), *_fidelity_cards(rows)]
    if premises:
        held = sum(1 for p in premises if p.get("verdict") == "holds")
        partly, weak = (sum(1 for p in premises if p.get("verdict") == v) for v in ("partly", "weak"))
        cards.append(
            Card("Premises of HELIOS that hold here", f"{held} of {len(premises)}", f"{partly} partly, {weak} weak")
        )
    return Section("At a glance", "The numbers to remember. Everything below says how they came about.", [Cards(cards)])


def _speed_card(focus: SystemResult, systems: Sequence[SystemResult]) -> list[Card]:
    name = "output_throughput"
    value, kind = _best(focus.comparison([name])[0])
    if value is None:
        return []
    others = [(v, s.name) for s in systems if s is not focus and (v := _best(s.comparison([name])[0])[0])]
    note = kind
    if others:
        fastest, other = max(others)
        note = f"{kind}; {value / fastest:.2f}× the fastest other system ({other})"
    return [Card(f"Output throughput of {focus.name}", f"{significant(value)} tok/s", note)]


def _quality_card(focus: SystemResult) -> list[Card]:
    agreement, perplexity = (_best(row)[0] for row in focus.comparison(["agreement", "perplexity"]))
    note = "" if perplexity is None else f"perplexity {significant(perplexity)}"
    if agreement is None:
        return [Card(f"Quality of {focus.name}", note or "unknown", "agreement was not measured")]
    return [Card(f"Tokens of {focus.name} equal to the full model's", percent(agreement, signed=False), note)]


def _fidelity_cards(rows: Mapping[str, Sequence[ComparisonRow]]) -> list[Card]:
    """How far the simulation is from the measurement, over all systems and headline metrics."""
    errors = [
        (abs(r.relative_error), metric_spec(r.metric).label, name)
        for name, found in rows.items()
        for r in found
        if r.relative_error is not None
    ]
    if not errors:
        return []
    worst, label, name = max(errors)
    cards = [
        Card(
            "Simulation error, median",
            percent(median(e for e, *_ in errors), signed=False),
            f"over {len(errors)} values; largest {percent(worst, signed=False)} ({label}, {name})",
        )
    ]
    judged = [r for found in rows.values() for r in found if r.repeats >= 2 and r.is_inside_spread is not None]
    if judged:
        held = sum(1 for r in judged if r.is_inside_spread)
        cards.append(Card("Inside the spread of repeats", f"{held} of {len(judged)}", "simulated values"))
    return cards


def _headline(
    systems: Sequence[SystemResult],
    rows: Mapping[str, Sequence[ComparisonRow]],
    metrics: Sequence[str],
    colours: Mapping[str, str],
) -> Section:
    columns = [Column("System")]
    for name in metrics:
        spec = metric_spec(name)
        unit = f"<br><span class='unit'>{escape(spec.unit)}</span>" if spec.unit else ""
        columns.append(Column(Html(escape(spec.label) + unit), "number"))
    columns.append(Column("Note", "note"))
    cells: list[list[str]] = []
    for system in systems:
        swatch = f"<span class='swatch' style='background:{colours[system.name]}'></span>"
        cells.append([Html(f"<span class='system'>{swatch}{escape(system.name)}</span>")])
        cells[-1] += [_cell(row) for row in rows[system.name]]
        cells[-1].append(_note(system))
    reading = Html(
        "One row per system. In each cell: <b>simulated</b>, then measured (mean of the repeats, with the "
        "least and "
        "the greatest), then the signed error (simulated − measured) / measured. "
        "<span class='in'>Green</span>: the simulation lies inside the repeats. "
        f"<span class='plain'>Grey</span>: outside, but within {100 * NEAR:.0f} %. "
        "<span class='out'>Amber</span>: further off."
    )
    long = Details("The same numbers as a long table", [_long_table(rows)])
    return Section("Simulated beside measured", reading, [Table(columns, cells), long])


def _cell(row: ComparisonRow) -> Html:
    spec = metric_spec(row.metric)
    lines = [f"<div class='simulated'>{spec.text(row.simulated)}</div>"]
    if row.measured_mean is not None:
        span = f"<div class='range'>{spread(row, spec)}</div>" if row.repeats >= 2 else ""
        lines.append(f"<div class='measured'>{spec.text(row.measured_mean)}</div>{span}")
    if row.relative_error is not None:
        is_far = abs(row.relative_error) > NEAR
        tone = "in" if inside(row) == "inside" else "out" if is_far else "plain"
        lines.append(f"<div><span class='{tone}'>{percent(row.relative_error)}</span></div>")
    return Html("".join(lines))


def _note(system: SystemResult) -> str:
    if not system.live:
        return "simulated only"
    said = f"{len(system.live)} repeat{'s' if len(system.live) > 1 else ''}, {system.clock} clock"
    return said if system.simulated is not None else f"{said}; not simulated"


def _long_table(rows: Mapping[str, Sequence[ComparisonRow]]) -> Table:
    kinds: list[tuple[str, Literal["text", "number", "note"]]] = [
        ("System", "text"),
        ("Metric", "text"),
        ("Simulated", "number"),
        ("Measured", "number"),
        ("Repeats from … to", "number"),
        ("Error", "number"),
        ("Note", "note"),
    ]
    cells = []
    for name, found in rows.items():
        for row in found:
            spec = metric_spec(row.metric)
            label = f"{spec.label} ({spec.unit})" if spec.unit else spec.label
            values = [spec.text(row.simulated), spec.text(row.measured_mean), spread(row, spec)]
            word = inside(row)
            note = "" if word == "–" else f"simulation {word} the repeats"
            cells.append([name, label, *values, percent(row.relative_error), note])
    return Table([Column(title, kind) for title, kind in kinds], cells)


def _figure_sections(systems: Sequence[SystemResult], profile_facts: Mapping[str, Any], style: Any) -> list[Section]:
    from heliosim import charts

    focus = _focus(systems)
    sections = [
        Section(
            "Systems side by side",
            "Each panel is one metric. Filled dot: simulated. Hollow diamond: measured mean, with a line "
            "from the least to "
            "the greatest repeat. Where dot and diamond meet, the simulation is right.",
            [Figure(charts.systems_figure(charts.systems_data(systems), style))],
        ),
        Section(
            "Latency",
            "For each time on the horizontal axis, the share of requests that were served within it; "
            "further left is faster. "
            "Solid: simulated. Dashed: measured, repeats pooled.",
            [Figure(charts.latency_figure(charts.latency_data(systems), style, _common_slo(systems)))],
        ),
        Section(
            "Quality beside speed",
            "Speed alone is never the goal: leaving early changes the text. Right is faster; on the left "
            "panel higher is "
            "better, on the right panel lower. A line joins the simulated and the measured point of one "
            "system.",
            [Figure(charts.quality_figure(charts.quality_data(systems), style))],
        ),
        Section(
            "Exit depth",
            "At which layer tokens left, by task. Darker is deeper. Early exits save the layers behind them.",
            [Figure(charts.exit_figure(charts.exit_data(systems), style))],
        ),
        _timeline_section(focus),
    ]
    first = [s.live[0] if s.live else s.simulated for s in systems]
    agreement = charts.agreement_data(run for run in first if run is not None)
    if not agreement.empty:
        note = charts.Style(style.colours, f"one run per system · {style.caption}")
        sections.append(
            Section(
                "Is low confidence wrong?",
                "Share of tokens that equal the full model's choice, by the confidence of the exit they "
                "left at. A flat, high "
                "line means that leaving early is safe even when the exit is unsure; the dotted line is "
                "what a perfectly "
                "calibrated exit would show.",
                [Figure(charts.agreement_figure(agreement, note))],
            )
        )
    fit = profile_facts.get("step_fit")
    if isinstance(fit, Mapping):
        data = charts.fit_data(fit["measured_s"], fit["predicted_s"], fit.get("groups"))
        caption = charts.Style({}, str(fit.get("caption", "")))
        reading = "Each point is one measured cell of the profile. On the dotted line the cost model is right."
        sections.append(Section("Step times", reading, [Figure(charts.fit_figure(data, caption))]))
    return sections


def _timeline_section(focus: SystemResult) -> Section:
    """The simulated and the first measured run of one system, each on its own time axis."""
    from heliosim import charts

    runs = [focus.simulated] if focus.simulated is not None else []
    runs += list(focus.live[:1])
    figures = []
    for run in runs:
        style = charts.Style({}, charts.run_caption(run))
        kind = "simulated" if run.info.mode == "simulated" else "measured"
        kind += ", exits replayed" if run.info.replayed_exits else ""
        figures.append(Figure(charts.timeline_figure(charts.timeline_data(run), style, f"{focus.name}, {kind}")))
    reading = (
        "What was resident when (model@layers), how many requests ran and waited, how memory was shared, "
        "and how often "
        "tokens left unsure. A triangle is a load; hatched bands are evaluation. When the counter passes "
        "its limit "
        "the controller loads more layers or switches model."
    )
    return Section("One run over time", reading, figures)


def _common_slo(systems: Sequence[SystemResult]) -> Any:
    found = {s.slo for s in systems}
    return found.pop() if len(found) == 1 else None


def _energy_sections(systems: Sequence[SystemResult]) -> list[Section]:
    """Joules and money, where they are known of any system."""
    from heliosim.costing import ENERGY_COLUMNS, energy_rows

    rows = energy_rows(systems)
    if not rows:
        return []
    first, *numbers, last = ENERGY_COLUMNS
    columns = [Column(first), *(Column(title, "number") for title in numbers), Column(last, "note")]
    reading = (
        "Energy of steps and loads per completed token and prompt, its shares by cause, what the servers drew "
        "beside it while idle, and what the GPUs cost in the meantime."
    )
    return [Section("Energy and cost", reading, [Table(columns, rows)])]


def _premises_section(premises: Sequence[Mapping[str, Any]]) -> Section:
    columns = [
        Column("Premise"),
        Column("Of"),
        Column("Value", "number"),
        Column("Holds from", "number"),
        Column("Partly from", "number"),
        Column("Verdict"),
        Column("Note", "note"),
    ]
    tones = {"holds": "in", "partly": "out", "weak": "bad"}
    rows: list[list[str | None]] = []
    for p in premises:
        verdict = str(p.get("verdict", "unknown"))
        tokens = p.get("tokens")
        note = str(p.get("detail", ""))
        note += f" ({tokens:,} tokens)" if isinstance(tokens, int) else ""
        rows.append(
            [
                str(p.get("premise", "")),
                str(p.get("subject", "")),
                *(_number(p.get(key)) for key in ("value", "holds_from", "partly_from")),
                Html(f"<span class='{tones.get(verdict, 'plain')}'>{escape(verdict)}</span>"),
                note,
            ]
        )
    reading = (
        "HELIOS takes these for granted. Whether they hold for the models of this profile decides what it can gain."
    )
    return Section("Premises", reading, [Table(columns, rows)])


def _number(value: Any) -> str | None:
    return significant(float(value)) if isinstance(value, (int, float)) else None if value is None else str(value)


def _limits(systems: Sequence[SystemResult]) -> list[str]:
    """What holds for every such page, and what is missing from this one."""
    said = [
        "The simulation knows the machine only through its profile: step times come from a fitted cost "
        "model, texts and "
        "confidences are those recorded when the profile was made. Another machine, other models or other "
        "texts need "
        "another profile.",
        "Measured values are those of one machine. The spread is the range of the repeats shown, not a "
        "confidence "
        "interval; with few repeats it is narrow by chance, and a simulated value just outside it need not "
        "be wrong.",
        "Agreement and perplexity judge tokens against the models' own choices. They do not say whether a "
        "text is useful.",
    ]
    clocks = {s.clock for s in systems if s.live}
    if "cpu" in clocks:
        said.append(
            "On the cpu clock every step really executes and is charged the processor time it took; idle "
            "time is skipped "
            "and arrivals advance on that clock. It repeats better than wall time, and is not what a user "
            "would wait."
        )
    lonely = [s.name for s in systems if not s.live]
    if lonely:
        said.append(f"Simulated only, never measured here: {', '.join(lonely)}.")
    energy = [row.measured_mean or row.simulated for s in systems for row in s.comparison(["energy_j"])]
    if all(e is None for e in energy):
        said.append("Energy is unavailable: no meter could be read, and none was guessed.")
    if replayed := replay_caution(run.info for s in systems for run in s.runs):
        said.append(replayed)
    return said


def _provenance(systems: Sequence[SystemResult], profile_facts: Mapping[str, Any]) -> dict[str, str]:
    runs = [run for s in systems for run in s.runs]
    given = {str(k): _fact(v) for k, v in profile_facts.items() if k != "step_fit"}
    facts = {"Profile": ", ".join(sorted({run.info.profile_hash[:16] for run in runs}))}
    kind = least_sure(run.info.profile_kind for run in runs)
    if kind in CAUTIONS:
        facts["Origin of the profile"] = CAUTIONS[kind][0].lower() + CAUTIONS[kind][1:].rstrip(".")
    if replayed := replay_caution(run.info for run in runs):
        facts["Exits"] = replayed
    facts["Scenarios"] = ", ".join(
        dict.fromkeys(f"{s.name} {run.info.scenario_hash[:12]}" for s in systems for run in s.runs)
    )
    facts["Seeds"] = ", ".join(str(seed) for seed in sorted({run.info.seed for run in runs}))
    facts["Versions"] = ", ".join(sorted({f"{k} {v}" for run in runs for k, v in run.info.versions.items()}))
    hosts = sorted({f"{k} {v}" for run in runs for k, v in run.host.items() if isinstance(v, str)})
    facts |= {"Host": ", ".join(hosts)} if hosts else {}
    said = {k.lower() for k in given}
    return given | {k: v for k, v in facts.items() if k.lower() not in said}


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_fact(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(v) for v in value)
    return significant(value) if isinstance(value, float) else str(value)


_CSS = """
:root{--ink:#1f2933;--muted:#5f6b76;--line:#e3e8ed;--soft:#f6f8fa;--in:#0b6b4f;--in-bg:#e3f4ed;--out:#8a4b08;
--out-bg:#fdf0d9;--bad:#8e1b14;--bad-bg:#fbe6e4}
*{box-sizing:border-box}html{scroll-behavior:smooth}
body{margin:0;background:#fff;color:var(--ink);
font:16px/1.55 Inter,'Segoe UI','Helvetica Neue',Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:40px 28px 56px}
h1{font-size:32px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:22px;margin:0 0 6px;letter-spacing:-.005em}
.subtitle{color:var(--muted);margin:0 0 18px}
nav{display:flex;flex-wrap:wrap;gap:8px;margin-bottom:8px}
nav a{color:var(--ink);text-decoration:none;font-size:14px;padding:4px 12px;border:1px solid var(--line);
border-radius:999px}
nav a:hover{background:var(--soft)}
section{padding:30px 0 10px;border-top:1px solid var(--line);margin-top:26px}
.reading{color:var(--muted);margin:0 0 16px;max-width:86ch}
section>p{max-width:86ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px}
.card{border:1px solid var(--line);border-radius:12px;padding:16px 18px;background:var(--soft)}
.card .label{font-size:13.5px;color:var(--muted);line-height:1.35;min-height:2.7em}
.card .value{font-size:29px;font-weight:650;line-height:1.3;margin:5px 0 3px;
font-variant-numeric:tabular-nums}
.card .note{font-size:13px;color:var(--muted);line-height:1.4}
.wide{overflow-x:auto}figure{margin:0 0 12px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding-bottom:6px}
th{font-weight:600;font-size:13px;text-align:left;vertical-align:bottom;padding:8px 10px;
border-bottom:2px solid var(--line);
line-height:1.3}
td{padding:9px 10px;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:hover{background:var(--soft)}
.number{text-align:right;white-space:nowrap}th.number{white-space:normal}
td.note{color:var(--muted);font-size:13px;min-width:110px}.unit{color:var(--muted);font-weight:400}
.system{font-weight:600;white-space:nowrap}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px}
.simulated{font-weight:650;font-size:15px}.measured{margin-top:1px}.range{color:var(--muted);font-size:12px}
.in,.out,.bad,.plain{display:inline-block;border-radius:6px;padding:0 6px;font-size:12.5px;font-weight:600}
.in{color:var(--in);background:var(--in-bg)}.out{color:var(--out);background:var(--out-bg)}
.bad{color:var(--bad);background:var(--bad-bg)}.plain{background:var(--soft)}
details{margin:16px 0}summary{cursor:pointer;color:var(--muted);padding:4px 0}
pre{background:var(--soft);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-x:auto;
font-size:13.5px}
footer{margin-top:40px;padding-top:24px;border-top:1px solid var(--line);color:var(--muted);font-size:13.5px}
footer h2{font-size:16px;color:var(--ink)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:8px 0}dt{font-weight:600}
dd{margin:0;overflow-wrap:anywhere}
@media(max-width:720px){main{padding:24px 16px}h1{font-size:26px}dl{grid-template-columns:1fr}
dd{margin-bottom:6px}
}
@media(max-width:1000px){figure .wide>div{min-width:940px}}
@media print{nav{display:none}section{break-inside:avoid}}
"""
