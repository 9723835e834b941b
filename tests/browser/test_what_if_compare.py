"""What if and Compare in a real browser: inputs change outputs, links restore state, downloads open."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import yaml

from tests.browser.driving import Driver

TILES = ".hs-tiles"
FEW = "/what-if?models=llama2-small&device=H100-80GB&total=200&reps=2&rate=8"


def asked(drive: Driver) -> dict[str, list[str]]:
    return parse_qs(urlsplit(drive.page.url).query)


def push(drive: Driver, label: str, key: str, times: int) -> None:
    """Move a slider with the keyboard."""
    slider = drive.page.get_by_role("slider", name=label)
    slider.focus()
    for _ in range(times):
        slider.press(key)
    drive.settle()


def test_a_slider_leaves_a_ghost_and_the_link_restores_it(drive: Driver) -> None:
    drive.open(FEW, wait_for=TILES)
    before = drive.text(TILES)
    push(drive, "Threshold TH (confidence)", "ArrowLeft", 6)
    drive.page.get_by_text("Changed:").wait_for()
    drive.settle()
    after = drive.text(TILES)
    assert after != before
    assert asked(drive)["th"] == ["0.5"]
    assert drive.page.get_by_text("What changes", exact=True).is_visible()
    drive.open(drive.page.url.removeprefix(drive.server), wait_for=TILES)
    assert drive.page.get_by_role("slider", name="Threshold TH (confidence)").input_value() == "0.5"
    shown = [line for line in drive.text(TILES).splitlines() if line in after.splitlines()]
    assert len(shown) >= 16  # every number is the same; only what was said of the ghost is gone


def test_what_if_downloads_open(drive: Driver, tmp_path: Path) -> None:
    drive.open(FEW, wait_for=TILES)
    scenario = yaml.safe_load(drive.download("Scenario", tmp_path).read_text())
    assert scenario["workload"]["requests"] == 100
    assert len(pd.read_csv(drive.download("Runs, CSV", tmp_path))) == 2
    assert len(pd.read_parquet(drive.download("Runs, Parquet", tmp_path))) == 2


def test_compare_opens_computed_and_shows_every_part(drive: Driver) -> None:
    drive.open("/compare")
    assert "HELIOS" in drive.text()
    for part, title in (
        ("Latency", "Time to first token"),
        ("Load", "Throughput against"),
        ("Fleets", "SLO attainment of"),
    ):
        drive.page.get_by_role("radio", name=part, exact=True).or_(
            drive.page.get_by_role("button", name=part, exact=True)
        ).first.click()
        drive.page.get_by_text(title).first.wait_for()
        drive.settle()
    assert asked(drive)["view"] == ["fleets"]
    chart = drive.page.get_by_test_id("stPlotlyChart").first
    assert "Smallest fleets" in (chart.inner_html() + str(chart.evaluate("e => e.outerHTML")))


def test_compare_downloads_open(drive: Driver, tmp_path: Path) -> None:
    drive.open("/compare?view=trades")
    report = drive.download("HTML report", tmp_path).read_text()
    assert "What each gains" in report
    table = pd.read_csv(drive.download("Runs, CSV", tmp_path))
    assert pd.read_parquet(drive.download("Runs, Parquet", tmp_path)).shape == table.shape
    assert {"system", "rate_per_s", "p99_ttft_ms"} <= set(table.columns)


def test_trouble_is_said_in_words(drive: Driver) -> None:
    drive.open("/what-if?mix=chess%3A1", wait_for='[data-testid="stAlert"]')
    assert "chess" in drive.text('[data-testid="stAlert"]')
    drive.press("Use one task instead")
    drive.page.wait_for_selector(TILES)
    assert "mix" not in asked(drive)
