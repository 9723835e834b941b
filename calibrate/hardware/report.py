"""``calibration.html`` and ``calibration.md`` beside a profile: what was measured, how fits fare, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliosim.formats.files import write_text
from heliosim.formats.hardware_facts import HardwareFacts, Quantity
from heliosim.formats.profile import Profile
from heliosim.hold_out import BAR, sentence, verdict
from heliosim.report import Block, Card, Cards, Column, Figure, Section, Table, Text, write_report

from ..fit import fitted_cells
from .cell import Row
from .fit import fit_layer, held_out, predict, usable
from .grid import LAYER_KINDS
from .passes import shape_of
from .table import read_rows

Cells = Sequence[Sequence[str | None]]


def write_calibration_report(profile: Profile, folder: Path) -> None:
    """Write both files into ``folder``."""
    sections = sections_of(profile)
    device = profile.facts.device
    name = str(device.get("gpu") or device.get("host_cpu"))
    provenance = {
        "device": name,
        "threads": str(device.get("threads")),
        "models": ", ".join(profile.facts.models),
        "seed": str(profile.facts.seed),
        "versions": ", ".join(f"{k} {v}" for k, v in sorted(profile.facts.versions.items())),
    }
    title = f"Calibration of {', '.join(profile.facts.models)}"
    write_report(
        folder / "calibration.html", title, sections, subtitle=f"{profile.origin} on {name}", provenance=provenance
    )
    write_text(folder / "calibration.md", as_markdown(title, sections, provenance))


def sections_of(profile: Profile) -> list[Section]:
    """All sections; hardware cells only where they were measured."""
    found = [_glance(profile), _steps(profile)]
    hardware = profile.facts.hardware
    if hardware is not None:
        rows = read_rows(profile.folder)
        found += [_layers(profile, hardware, rows), _parts(hardware), _memory(hardware), _links(hardware)]
        found += [_energy(profile, hardware), _steadiness(hardware, rows)]
    return found


# --- steps -----------------------------------------------------------------------------------------------------------


def _glance(profile: Profile) -> Section:
    clock = profile.clock()
    cards = []
    for name, model in profile.facts.models.items():
        h = model.step[clock].holdout
        cards.append(Card(f"{name}: held-out step times", f"{h.median_abs_error:.1%}", sentence(h)))
    hardware = profile.facts.hardware
    if hardware is not None:
        more = f"{hardware.skipped} skipped for the budget, {hardware.saved} not needed"
        cards.append(Card("hardware cells", f"{hardware.cells}", f"{hardware.mode}, {hardware.spent_s:.0f} s; {more}"))
    reading = (
        f"Step costs were measured inside the serving loop, hardware cells beside it. Bar: {BAR:.0%} median error on "
        "cells the fit never saw, or within what their own visits differ by."
    )
    return Section("At a glance", reading, [Cards(cards)])


def _steps(profile: Profile) -> Section:
    from heliosim.charts import Style, fit_data, fit_figure

    clock = profile.clock()
    cells = fitted_cells(profile, clock)
    blocks: list[Block] = []
    if cells["groups"]:
        data = fit_data(cells["measured_s"], cells["predicted_s"], cells["groups"])
        blocks.append(Figure(fit_figure(data, Style({}, f"{clock} clock · mean of 20 or more steps a cell"))))
    rows: list[list[str | None]] = []
    for name, model in profile.facts.models.items():
        for which, fit in model.step.items():
            h = fit.holdout
            regions = ", ".join(f"{region} {error:.1%}" for region, error in h.by_region.items())
            floor = None if h.repeat_error is None else f"{h.repeat_error:.1%}"
            rows.append(
                [
                    name, which, f"{fit.steps:,}", str(h.cells), f"{fit.cell_spread:.1%}", floor,
                    f"{h.median_abs_error:.1%}", f"{h.p90_abs_error:.1%}", f"{h.mean_signed_error:+.1%}", verdict(h),
                    regions,
                ]
            )  # fmt: skip
    columns = [
        Column("model"), Column("clock"), Column("steps", "number"), Column("held-out cells", "number"),
        Column("spread in a cell", "number"), Column("noise floor", "number"), Column("median error", "number"),
        Column("p90 error", "number"), Column("signed mean", "number"), Column("verdict"),
        Column("median error by region", "note"),
    ]  # fmt: skip
    blocks.append(Table(columns, rows, "Step times: one cell in five is kept out of the fit that is scored here"))
    loads = [
        [name, which, str(fit.loads), None if fit.median_abs_error is None else f"{fit.median_abs_error:.1%}"]
        for name, model in profile.facts.models.items()
        for which, fit in model.load.items()
    ]
    columns = [Column("model"), Column("clock"), Column("loads", "number"), Column("median error", "number")]
    blocks.append(Table(columns, loads, "Loads and switches (in sample)"))
    return Section("Steps in the serving loop", "What a simulation charges, and how far it is off.", blocks)


# --- hardware cells --------------------------------------------------------------------------------------------------


def _layers(profile: Profile, hardware: HardwareFacts, rows: Sequence[Row]) -> Section:
    from heliosim.charts import Style
    from heliosim.charts.calibration import (
        Point,
        Residual,
        layer_data,
        layer_figure,
        residual_data,
        residual_figure,
    )

    blocks: list[Block] = []
    table: list[list[str | None]] = []
    for name, model in hardware.models.items():
        mine = usable([r for r in rows if r.cell.model == name and r.cell.kind in LAYER_KINDS])
        if model.layer is None or len(mine) < 2:
            continue
        coefficients = fit_layer(mine)
        points = []
        for row in mine:
            s = shape_of(row.cell)
            if row.cell.kind == "mixed_layer":
                continue
            is_decode = row.cell.kind == "decode_layer"
            panel = "decode" if is_decode else "prefill"
            series = s.decode if is_decode else s.prefix
            count = s.context if is_decode else s.count
            points.append(Point(panel, series, count, row.value, row.spread, predict(coefficients, row)))
        caption = f"{name} · {len(mine)} cells of 3 to 30 repeats · {hardware.clock} clock · bars: half the spread"
        blocks.append(Figure(layer_figure(layer_data(points), Style({}, caption))))
        pairs = held_out(mine)
        residuals = [Residual(r.cell.region, said / r.value - 1) for r, said in pairs]
        if residuals:
            text = f"{name} · {len(residuals)} cells inside the grid, each left out of the fit that predicts it"
            blocks.append(Figure(residual_figure(residual_data(residuals), Style({}, text))))
        for region in dict.fromkeys((*model.layer.holdout, *model.layer.against_steps)):
            score = model.layer.holdout.get(region)
            against = model.layer.against_steps.get(region)
            table.append(
                [
                    name, region,
                    *([None] * 4 if score is None else [
                        str(score.cells), f"{score.median_abs_error:.1%}", f"{score.p90_abs_error:.1%}",
                        f"{score.noise:.1%}",
                    ]),
                    None if against is None else f"{against:+.1%}",
                    model.layer.ended.get(region),
                ]
            )  # fmt: skip
    columns = [
        Column("model"), Column("region"), Column("held-out cells", "number"), Column("median error", "number"),
        Column("p90 error", "number"), Column("noise of a cell", "number"),
        Column("parts against whole steps", "number"), Column("no more cells because", "note"),
    ]  # fmt: skip
    blocks.append(
        Table(columns, table, "One layer: fit of the physical form; last: layers, head and host added up over a step")
    )
    reading = (
        "One layer is the slope between runs of few and of more layers. Parts added up are what a step would take if "
        "nothing but them took time; the serving loop shows the rest."
    )
    return Section("Layers", reading, blocks)


def _parts(hardware: HardwareFacts) -> Section:
    rows: list[list[str | None]] = []
    for name, model in hardware.models.items():
        groups = {"": model.parts, "KV fill, ": model.kv_fill, "host, ": model.host}
        for prefix, lines in groups.items():
            for what, line in lines.items():
                label = f"{prefix}{what.replace('_', ' ')}"
                rows.append(
                    [
                        name, label, _us(line.fixed_s), f"{_us(line.per_unit_s)} a {line.unit}", str(line.cells),
                        f"{line.spread:.1%}",
                    ]
                )  # fmt: skip
        for graph in model.graphs:
            facts = f"replay {_us(graph.replay.value)} (launched singly {_us(graph.eager_s)})"
            held = f"captured in {graph.capture_s:.2f} s, holds {graph.memory_bytes / 2**20:.0f} MiB"
            rows.append([name, f"graph of {graph.rows} rows", facts, held, "1", f"{graph.replay.spread:.1%}"])
    if hardware.decision is not None:
        q = hardware.decision
        rows.append(["machine", "decision reaches the host", _us(q.value), None, str(q.repeats), f"{q.spread:.1%}"])
    columns = [
        Column("model"), Column("part"), Column("fixed", "number"), Column("and", "number"), Column("cells", "number"),
        Column("spread", "number"),
    ]  # fmt: skip
    missing = [f"{kind.replace('_', ' ')}: {reason}." for kind, reason in hardware.unavailable.items()]
    blocks: list[Block] = [Table(columns, rows, "Lines through the cells of each part")]
    if missing:
        blocks.append(Text(["Not measured here:", *missing]))
    return Section("Parts of a step, and the host", "Everything a step does beside its layers.", blocks)


def _memory(hardware: HardwareFacts) -> Section:
    rows: list[list[str | None]] = []
    for name, model in hardware.models.items():
        for what, check in model.bytes.items():
            formula = None if check.formula_bytes is None else f"{check.formula_bytes:,.0f}"
            rows.append([name, what, f"{check.measured_bytes:,.0f}", formula])
    batches: list[list[str | None]] = []
    for name, model in hardware.models.items():
        for b in model.largest_batch:
            budget = f"{b.budget_bytes:,}"
            batches.append(
                [name, str(b.depth), f"{b.context_tokens:,}", budget, str(b.rows), str(b.formula_rows), b.limit]
            )
    columns = [Column("model"), Column("what"), Column("measured, B", "number"), Column("byte model, B", "number")]
    more = [
        Column("model"), Column("depth", "number"), Column("context", "number"), Column("budget, B", "number"),
        Column("rows found", "number"), Column("rows by the byte model", "number"), Column("limit"),
    ]  # fmt: skip
    blocks: list[Block] = [Table(columns, rows, "Bytes"), Table(more, batches, "Largest batches, by allocation")]
    return Section("Memory", "Bytes that were really held, against the byte model.", blocks)


def _links(hardware: HardwareFacts) -> Section:
    rows: list[list[str | None]] = []
    for source, link in hardware.links.items():
        beside = None if link.beside_decode is None else _rate(link.beside_decode)
        slow = None if link.decode_slowdown is None else f"{link.decode_slowdown:.2f}"
        other = None if link.transfer_slowdown is None else f"{link.transfer_slowdown:.2f}"
        rows.append([source, _rate(link.alone), f"{link.alone.spread:.1%}", beside, slow, other])
    columns = [
        Column("source"), Column("alone", "number"), Column("spread", "number"), Column("beside decoding", "number"),
        Column("decode slows by", "number"), Column("transfer slows by", "number"),
    ]  # fmt: skip
    loads: list[list[str | None]] = []
    for name, model in hardware.models.items():
        for load in model.layer_loads:
            seconds = load.seconds.value
            rate = f"{load.bytes / seconds / 1e9:.2f} GB/s" if seconds > 0 else None
            loads.append(
                [name, load.source, str(load.layers), f"{1e3 * seconds:.2f} ms", f"{load.seconds.spread:.1%}", rate]
            )
    more = [
        Column("model"), Column("source"), Column("layers", "number"), Column("until usable", "number"),
        Column("spread", "number"), Column("rate", "number"),
    ]  # fmt: skip
    blocks: list[Block] = [Table(columns, rows, "Ways to the device"), Table(more, loads, "Loads of layers")]
    reading = "How fast weights come, what decoding and transfers do to each other (1: nothing)."
    return Section("Links and loads", reading, blocks)


def _energy(profile: Profile, hardware: HardwareFacts) -> Section:
    rows: list[list[str | None]] = [
        [name, w.phase, f"{w.per_call_j.value:.4g} J", f"{w.mean_w:.1f} W", f"{w.window_s:.1f} s"]
        for name, model in hardware.models.items()
        for w in model.energy
    ]
    energy = profile.facts.energy
    if not rows:
        return Section(
            "Energy", f"Unavailable: {energy.reason or hardware.unavailable.get('energy', 'not asked for')}."
        )
    columns = [
        Column("model"), Column("phase"), Column("above idle, a call", "number"), Column("mean power", "number"),
        Column("window", "number"),
    ]  # fmt: skip
    idle = "unknown" if hardware.idle_w is None else f"{hardware.idle_w.value:.1f} W"
    return Section("Energy", f"Cumulative counter ({energy.source}), idle {idle} taken off.", [Table(columns, rows)])


def _steadiness(hardware: HardwareFacts, rows: Sequence[Row]) -> Section:
    from heliosim.charts import Style
    from heliosim.charts.calibration import drift_data, drift_figure, spread_data, spread_figure

    repeated = [r for r in rows if r.is_measured and len(r.values) > 1]
    blocks: list[Block] = []
    d = hardware.drift
    if d is not None:
        said = (
            f"{d.readings} readings, {d.low:.2f} to {d.high:.2f} of the usual time; outside ±{d.tolerance:.0%} cells "
        )
        said += f"are measured again: {d.rejected} were rejected, {d.unsteady} stayed unsteady"
        data = drift_data([r.drift for r in repeated], d.tolerance)
        blocks.append(Figure(drift_figure(data, d.tolerance, Style({}, said))))
    if repeated:
        spreads = spread_data([r.cell.kind for r in repeated], [r.spread for r in repeated])
        blocks.append(Figure(spread_figure(spreads, Style({}, f"{len(repeated)} cells with repeats"))))
    sensors: list[list[str | None]] = [
        [name, *(str(s.get(name, "–")) for s in hardware.sensors)] for name in _names(hardware.sensors)
    ]
    columns = [Column("sensor"), Column("at the start", "number"), Column("at the end", "number")]
    if sensors and len(hardware.sensors) == 2:
        blocks.append(Table(columns, sensors, "Clocks, temperature, load"))
    return Section("Steadiness", "Whether the machine stayed the same, and how much repeats differ.", blocks)


def _names(sensors: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for s in sensors for name in s))


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} µs"


def _rate(quantity: Quantity) -> str:
    return f"{quantity.value / 1e9:.2f} GB/s"


# --- markdown --------------------------------------------------------------------------------------------------------


def as_markdown(title: str, sections: Sequence[Section], provenance: Mapping[str, str]) -> str:
    """The report without its pictures."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.reading, ""]
        for block in section.blocks:
            lines += _block(block)
    lines += ["## Where this comes from", "", *(f"- {name}: {value}" for name, value in provenance.items()), ""]
    return "\n".join(lines)


def _block(block: Block) -> list[str]:
    match block:
        case Cards():
            return [*(f"- **{c.label}**: {c.value}. {c.note}" for c in block.cards), ""]
        case Text():
            return [*(f"- {p}" for p in block.paragraphs), ""]
        case Table():
            head = "| " + " | ".join(c.title for c in block.columns) + " |"
            rule = "| " + " | ".join("---:" if c.kind == "number" else "---" for c in block.columns) + " |"
            rows = ["| " + " | ".join("–" if v is None else str(v) for v in row) + " |" for row in block.rows]
            return [f"{block.caption}:" if block.caption else "", "", head, rule, *rows, ""]
        case Figure():
            return [f"(Figure in calibration.html: {block.figure.layout.title.subtitle.text})", ""]
    return []
