"""A comparison of systems as one HTML file: who is how fast, at what quality and price, and where each gives in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heliosim.charts import (
    Style,
    attainment_alt,
    attainment_data,
    attainment_figure,
    cdf_alt,
    cdf_figure,
    difference_alt,
    difference_figure,
    difference_text,
    gain_data,
    limits_of,
    pareto_alt,
    pareto_data,
    pareto_figure,
    rates_alt,
    rates_data,
    rates_figure,
    saturation_alt,
    saturation_data,
    saturation_figure,
    study_cdf_data,
)
from heliosim.comparing import Study, cell_interval
from heliosim.formats.profile import CAUTIONS
from heliosim.metrics import metric_spec
from heliosim.report import Block, Column, Figure, Section, Table, Text, write_report

TABLE = ("p99_ttft_ms", "p99_tpot_ms", "output_throughput", "slo_attainment", "perplexity", "agreement",
         "layers_per_token", "joules_per_token")  # fmt: skip
TRADES = (("user", "gpu"), ("user", "cost"), ("gpu", "quality"), ("gpu", "perplexity"))


def slo_text(study: Study) -> str:
    """The limits in words."""
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "end-to-end latency"}
    limits = limits_of(study.slo)
    said = [f"{said} {limits[k]:g} ms" for k, said in names.items() if k in limits]
    return ", ".join(said) or "no limit"


def focus_rows(study: Study, metrics: Sequence[str] = TABLE) -> list[list[str]]:
    """A row per system at the rate in focus: its name, then each metric with its half-width."""
    rows = []
    for system in study.systems:
        cells = study.cells_of(system, study.focus_per_s)
        row = [system]
        for name in metrics:
            spec, found = metric_spec(name), cell_interval(cells, name)
            half = "" if found.half_width is None else f" ± {spec.width_text(found.half_width, found.mean)}"
            row.append("overloaded" if found.reason == "saturated" else spec.text(found.mean) + half)
        rows.append(row)
    return rows


def study_sections(study: Study, baseline: str, style: Style | None = None) -> list[Section]:
    """All figures of a study, in the order of the page."""
    style = style or Style.named(study.systems, study.caption)
    limits = limits_of(study.slo)
    columns = [Column("System"), *(Column(metric_spec(m).title, "number") for m in TABLE)]
    curves, rates, knees = study_cdf_data(study), rates_data(study), saturation_data(study)
    cdfs = [
        Figure(cdf_figure(curves, style, m, limits.get(m)), cdf_alt(curves, m, limits.get(m))) for m in ("ttft", "tpot")
    ]
    sections = [
        Section(
            f"At {study.focus_per_s:g} requests/s",
            f"One server each. Within the SLO means {slo_text(study)}. Agreement is with a model's own last layer, so "
            "a small model agrees with itself: compare models by perplexity.",
            [Table(columns, focus_rows(study)), *cdfs],
        ),
        Section(
            "Load",
            "Every system under the same arrivals at growing rates. A ring marks the last rate before overload.",
            [
                Figure(saturation_figure(knees, style, limits.get("ttft")), saturation_alt(knees)),
                Figure(rates_figure(rates, style, limits), rates_alt(rates)),
            ],
        ),
        Section("Trade-offs", "Each point is a system at a rate it keeps up with.", _trades(study, style)),
    ]
    if len(study.systems) > 1:
        gain = gain_data(study, baseline)
        texts = [f"{row['series']} · {difference_text(row)}" for row in gain.to_dict("records")]
        figure = difference_figure(gain, style, f"Against {baseline}", baseline)
        reading = "The same requests served by each, compared replication by replication."
        blocks: list[Block] = [Figure(figure, difference_alt(gain, baseline)), Text(texts)]
        sections.insert(1, Section("What each gains", reading, blocks))
    if study.fleet_of is not None and study.replicas:
        data = attainment_data(study)
        figure = attainment_figure(data, style, study.fleet_of, slo_text(study))
        reading = "Equal servers behind one router that sends each request to the least busy."
        sections.append(Section("Fleets", reading, [Figure(figure, attainment_alt(data, study.fleet_of))]))
    return sections


def _trades(study: Study, style: Style) -> list[Figure]:
    found = []
    for x, y in TRADES:
        data = pareto_data(study, x, y)
        if len(data):
            found.append(Figure(pareto_figure(data, style, study.currency), pareto_alt(data)))
    return found


def write_study_report(path: Path, study: Study, baseline: str, title: str = "Systems compared") -> None:
    """The study as one self-contained HTML file, all of it or nothing."""
    provenance = {"Seeds": ", ".join(sorted({str(cell.seed) for cell in study.cells}))}
    if study.profile_kind in CAUTIONS:
        provenance["Origin of the profile"] = CAUTIONS[study.profile_kind]  # type: ignore[index]
    sections = study_sections(study, baseline)
    write_report(path, title, sections, subtitle=study.caption, provenance=provenance)
