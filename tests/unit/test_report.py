"""The HTML file stands alone and speaks of every system; the terminal table fits and is plain when piped."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from heliosim.formats.results import RunResults
from heliosim.metrics import SystemResult
from heliosim.recorder import TableRecorder
from heliosim.report import Card, Cards, Column, Html, Section, Table, Text, demo_report, write_report
from heliosim.tables import comparison_text, percent
from heliosim.types import Served
from tests.synthetic_runs import synthetic_run, synthetic_systems

PREMISES: list[dict[str, object]] = [
    {
        "premise": "Low confidence is usually not wrong",
        "subject": "tiny-opt-s@2",
        "value": 0.88,
        "holds_from": 0.85,
        "partly_from": 0.6,
        "verdict": "holds",
        "detail": "of <unsure> tokens",
        "tokens": 5123,
    },
    {"premise": "Temporal locality", "subject": "tiny-opt-m", "value": None, "verdict": "weak"},
]


@pytest.fixture(name="systems", scope="module")
def _systems() -> list[SystemResult]:
    return synthetic_systems(requests=30, repeats=2)


@pytest.fixture(name="page", scope="module")
def _page(systems: list[SystemResult], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    fit = {"measured_s": [0.001, 0.002], "predicted_s": [0.0011, 0.002], "caption": "seed 7"}
    facts = {"Device": "a <processor>", "step_fit": fit, "Error": 0.0312}
    demo_report(path, systems, facts, PREMISES, ["heliosim demo --out report.html"])
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


class _Tags(HTMLParser):
    """Every src and href outside scripts, every id, and what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in {"src", "href"}]
        self.ids += [v or "" for k, v in attrs if k == "id"]


@pytest.fixture(name="tags", scope="module")
def _tags(page: str) -> _Tags:
    tags = _Tags()
    tags.feed(page)
    return tags


def test_nothing_outside_the_file(page: str, tags: _Tags) -> None:
    assert all(link.startswith("#") for link in tags.links)
    assert not {"link", "img", "iframe", "object"} & set(tags.tags)
    assert "@import" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_links_lead_somewhere_and_ids_are_unique(tags: _Tags) -> None:
    assert {link[1:] for link in tags.links} <= set(tags.ids)
    assert len(tags.ids) == len(set(tags.ids))


def test_script_is_there_once(page: str) -> None:
    assert len(re.findall(r"<script>/\*\*\s*\n\* plotly\.js", page)) == 1
    assert page.count("Plotly.newPlot(") >= 8


def test_every_system_and_section_is_named(page: str, systems: list[SystemResult]) -> None:
    for system in systems:
        assert page.count(system.name) > 3
    for title in (
        "At a glance",
        "Simulated beside measured",
        "Premises",
        "Limits",
        "Go on",
        "Where this comes from",
    ):
        assert f">{title}</h2>" in page
    assert "Energy is unavailable" in page
    assert "heliosim demo --out report.html" in page


def test_every_section_says_what_it_shows(page: str) -> None:
    sections = page.count("<section ")
    assert sections >= 10
    assert len(re.findall(r'<p class="reading">[^<]', page)) == sections


def test_text_is_escaped(page: str) -> None:
    assert "a &lt;processor&gt;" in page
    assert "of &lt;unsure&gt; tokens" in page
    assert "<processor>" not in page


def test_simulated_only_has_no_error_and_says_so(systems: list[SystemResult], tmp_path: Path) -> None:
    alone = [SystemResult(s.name, s.simulated) for s in systems]
    demo_report(tmp_path / "r.html", alone, {}, [], [])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "simulated only" in text
    assert "Simulated only, never measured here" in text
    assert ">Premises</h2>" not in text
    assert "Simulation error" not in text


def test_measured_only_can_be_reported(systems: list[SystemResult], tmp_path: Path) -> None:
    demo_report(tmp_path / "r.html", [SystemResult("x", None, systems[0].live)], {}, [], [])
    assert "not simulated" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_runs_that_served_nobody_can_be_reported(tmp_path: Path) -> None:
    """Every request was refused: no token left anywhere, and no figure has anything to draw."""
    recorder = TableRecorder()
    refused = Served(0, 0.0, None, None, 1.0, 500, 10, 0, "refused", "larger than the memory pool")
    recorder.served(refused)
    info = synthetic_run("vanilla", "tiny-opt-s", requests=4).info
    demo_report(tmp_path / "r.html", [SystemResult("x", RunResults.of(recorder, info, ""))], {}, [], [])
    assert "no token was served" in (tmp_path / "r.html").read_text()


def test_plain_report_without_figures_has_no_script(tmp_path: Path) -> None:
    table = Table([Column("a"), Column("b", "number")], [["x & y", None], [Html("<b>z</b>"), "1"]], caption="c")
    blocks: list[Cards | Text | Table] = [Cards([Card("n", "1 s")]), Text(["t"]), table]
    write_report(tmp_path / "r.html", "T <1>", [Section("S", "r", blocks)], provenance={"seed": "7"})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<title>T &lt;1&gt;</title>" in text
    assert '<td class="text">x &amp; y</td><td class="number">–</td>' in text
    assert "<b>z</b>" in text
    assert "<dt>seed</dt><dd>7</dd>" in text


def test_failed_report_leaves_the_old_one(tmp_path: Path, systems: list[SystemResult]) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        demo_report(path, systems, {"step_fit": {}}, [], [])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_terminal_table_fits_and_is_plain(systems: list[SystemResult]) -> None:
    text = comparison_text(systems)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "\x1b" not in text
    for system in systems:
        assert text.count(system.name) == 8
    assert "Output throughput (tok/s)" in text
    assert "2 repeats (cpu clock)" in text


def test_long_system_names_do_not_cut_numbers(systems: list[SystemResult]) -> None:
    long = [
        SystemResult("early exit, wait for deepest, tiny-opt-m with a very long name indeed", s.simulated, s.live)
        for s in systems
    ]
    text = comparison_text(long)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "…" not in re.sub(r"[\d.,]+ … [\d.,]+|least … greatest", "", text)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.123, "+12.3 %"), (-0.051, "−5.1 %"), (0.0, "0.0 %"), (-0.0001, "0.0 %"), (None, "–")],
)
def test_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_importing_is_light() -> None:
    code = (
        "import sys, heliosim.report, heliosim.tables, heliosim.recorder, heliosim.metrics\n"
        "print([m for m in ('pandas', 'plotly', 'pyarrow', 'torch', 'simpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
