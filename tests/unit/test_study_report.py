"""A study as one HTML file: every figure with its words, every number with what it rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from heliosim.study_report import focus_rows, slo_text, study_sections, write_study_report
from tests.studies import study


def test_rows_have_half_widths_and_say_overload() -> None:
    rows = {row[0]: row[1:] for row in focus_rows(study(), ("p99_ttft_ms", "agreement", "perplexity"))}
    assert rows["vanilla m"][0].startswith("210 ± ")
    assert rows["vanilla m"][1] == "100"  # the same in every run: no half-width
    assert rows["HELIOS"][2] == "–"
    over = replace(study(), focus_per_s=4.0)
    assert focus_rows(over, ("p99_ttft_ms",))[0] == ["vanilla m", "overloaded"]


def test_limits_in_words() -> None:
    assert slo_text(study()) == "TTFT 150 ms"
    assert slo_text(replace(study(), slo={"tpot_ms": 50.0, "ttft_ms": 500.0})) == "TTFT 500 ms, TPOT 50 ms"
    assert slo_text(replace(study(), slo={})) == "no limit"


@pytest.mark.parametrize(
    ("change", "titles"),
    [
        ({}, ["At 2 requests/s", "What each gains", "Load", "Trade-offs", "Fleets"]),
        ({"fleet_of": None}, ["At 2 requests/s", "What each gains", "Load", "Trade-offs"]),
        ({"systems": ("vanilla m",)}, ["At 2 requests/s", "Load", "Trade-offs", "Fleets"]),
    ],
)
def test_sections_are_those_there_is_something_to_say_of(change: dict[str, object], titles: list[str]) -> None:
    base = replace(study(), fleet_of="vanilla m") if "systems" in change else study()
    made = replace(base, **change)  # type: ignore[arg-type]
    assert [section.title for section in study_sections(made, "vanilla m")] == titles


def test_the_file_is_whole(tmp_path: Path) -> None:
    write_study_report(tmp_path / "study.html", study(), "vanilla m")
    page = (tmp_path / "study.html").read_text()
    assert page.count("<figure") == page.count('role="img"') == 9
    for word in ("50 requests per server and run", "seed 7", "profile derived, not measured"):
        assert word in page
    assert list(tmp_path.iterdir()) == [tmp_path / "study.html"]
