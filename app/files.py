"""Files to take away: a scenario with its profile, tables, a report that stands alone."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliosim_app.question import SHIPPED, Question

from heliosim.planfile import PlanFile
from heliosim.prices import PriceTable
from heliosim.profile_view import open_profile
from heliosim.report import Card, Cards, Figure, Section, Table, Text, write_report
from heliosim.report import Column as ReportColumn


def scenario_zip(question: Question, count: int) -> bytes:
    """The fleet's scenario as YAML; with it the profile, unless HelioSim ships that. ``heliosim run`` takes it so."""
    scenario = question.scenario(count)
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as out:
        if question.models in SHIPPED:
            out.writestr("scenario.yaml", scenario.to_yaml())
            return _closed(out, held)
        folder = Path(question.profile_name)
        out.writestr("scenario.yaml", scenario.model_copy(update={"profile": "profile"}).to_yaml())
        for file in sorted(folder.iterdir()):
            out.write(file, f"profile/{file.name}")
    return held.getvalue()


def _closed(out: zipfile.ZipFile, held: io.BytesIO) -> bytes:
    out.close()
    return held.getvalue()


def run_tables(run: Any) -> Any:
    """One row per request: times in seconds, counts of tokens."""
    return run.requests.to_pandas()


def report_html(question: Question, answer: Mapping[str, Any], run: Any) -> bytes:
    """The answer as one HTML file that needs no network."""
    from heliosim_app import wording

    from heliosim import charts
    from heliosim.metrics import Slo, SystemResult

    currency = answer["currency"]
    systems = [SystemResult(question.system, run, clock="cpu")]
    style = charts.Style.of(systems)
    slo = Slo(question.ttft_ms, question.tpot_ms)
    cards = [
        Card(t.label, t.value, f"{t.spread}; {t.note}".strip("; "))
        for t in wording.answer_tiles(question, answer, currency)
    ]
    rows = wording.sensitivity_rows(answer, currency)
    around = [_table(rows)]
    figures = [
        Figure(charts.latency_figure(charts.latency_data(systems), style, slo)),
        Figure(charts.exit_figure(charts.exit_data(systems), style)),
    ]
    sections = [
        Section("Answer", wording.sentence(question, answer), [Cards(cards)]),
        Section("Another load", "What 20 % less and more load need.", around),
        Section("One run", "How the latencies of one run are spread, and where tokens left.", figures),
        Section("Notes", "What these numbers rest on.", [Text([str(n) for n in answer["notes"]] or ["None."])]),
    ]
    return written(sections, "HelioSim: how many GPUs", charts.caption_of(systems), provenance(question, run))


def _cards(shown: Sequence[Any]) -> Cards:
    return Cards([Card(t.label, t.value, f"{t.spread}; {t.note}".strip("; ")) for t in shown])


def _table(rows: Sequence[Mapping[str, Any]]) -> Table | Text:
    """Rows of equal keys as a table; numbers to two decimals."""
    if not rows:
        return Text(["None."])
    cells = [[None if v is None else f"{v:,.2f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return Table([ReportColumn(name) for name in rows[0]], cells)


def plan_zip(plan: PlanFile, table: PriceTable, answer: Mapping[str, Any]) -> bytes:
    """The plan, its prices and the winner's scenario, with the profiles that HelioSim does not ship beside them."""
    import yaml

    shipped = {name for held in SHIPPED.values() for name in held.values()}
    folders = {c.profile: Path(c.profile) for c in plan.candidates if c.profile not in shipped}
    beside = {name: f"profiles/{folder.name}" for name, folder in folders.items()}
    moved = [c.model_copy(update={"profile": beside.get(c.profile, c.profile)}) for c in plan.candidates]
    content = plan.model_copy(update={"candidates": tuple(moved)}).model_dump(mode="json", exclude_none=True)
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("plan.yaml", yaml.safe_dump(content, sort_keys=False))
        out.writestr("prices.yaml", yaml.safe_dump(table.model_dump(mode="json"), sort_keys=False))
        for name, folder in folders.items():
            for file in sorted(folder.iterdir()):
                out.write(file, f"{beside[name]}/{file.name}")
        winner = answer["winner"]
        if winner is not None:
            chosen = next(c for c in plan.candidates if c.name == winner["candidate"]["name"])
            fleet = plan.scenario(chosen, open_profile(chosen.profile), winner["count"])
            fleet = fleet.model_copy(update={"profile": beside.get(fleet.profile, fleet.profile)})
            out.writestr("fleet.yaml", fleet.to_yaml())
    return held.getvalue()


def plan_report_html(question: Question, plan: PlanFile, answer: Mapping[str, Any]) -> bytes:
    """The plan's answer as one HTML file that needs no network."""
    from heliosim_app import wording

    from heliosim import __version__

    currency = answer["currency"]
    told = [wording.fewer_sentence(answer), wording.runner_up(question, answer, currency)] if answer["winner"] else []
    cards = _cards(wording.answer_tiles(question, answer, currency))
    around = _table(wording.sensitivity_rows(answer, currency))
    rows = wording.candidate_rows(question, answer, currency)
    rule = plan.replications
    sections = [
        Section("Answer", wording.plan_sentence(question, answer), [cards, Text(told)]),
        Section("Another load", "What 20 % less and more load need.", [around]),
        Section("Candidates", "All fleets that were looked at.", [_table(rows)]),
        Section("Notes", "What these numbers rest on.", [Text([str(n) for n in answer["notes"]] or ["None."])]),
    ]
    subtitle = f"{rule.least} to {rule.most} runs of {question.requests:,} requests each, seed {question.seed}"
    facts = {
        "HelioSim": __version__,
        "Profiles": ", ".join(sorted({Path(c.profile).name for c in plan.candidates})),
        "Workload": f"{question.load}, {question.rate_per_s:g} requests/s",
    }
    return written(sections, "HelioSim: the cheapest fleet", subtitle, facts)


def provenance(question: Question, run: Any) -> dict[str, str]:
    """Where a report's numbers come from."""
    return {
        "HelioSim": str(run.info.versions.get("heliosim", "")),
        "Profile": f"{question.models} on {question.device}, {run.info.profile_kind} ({run.info.profile_hash[:12]})",
        "Scenario": run.info.scenario_hash[:12],
        "Seed": str(question.seed),
        "Workload": f"{question.load}, {question.rate_per_s:g} requests/s, {question.requests:,} requests per run",
    }


def written(sections: list[Section], title: str, subtitle: str, facts: Mapping[str, str]) -> bytes:
    """A report as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        write_report(path, title, sections, subtitle=subtitle, provenance=facts)
        return path.read_bytes()
