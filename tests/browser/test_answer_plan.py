"""Answer and Plan in a real browser: inputs change outputs, links restore state, downloads open, no console error."""

from __future__ import annotations

import io
import json
import time
import zipfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest

from tests.browser.driving import SENTENCE, Driver


def asked(drive: Driver) -> dict[str, list[str]]:
    return parse_qs(urlsplit(drive.page.url).query)


def test_the_first_page_opens_answered(drive: Driver) -> None:
    drive.open()  # the first reader of a server pays for its imports
    started = time.monotonic()
    drive.page.goto(drive.server)
    drive.page.wait_for_selector(SENTENCE)
    assert time.monotonic() - started < 3 * 4  # 3 s on a machine of one's own; this one may be busy
    assert "A100-80GB with HELIOS offline" in drive.text()
    assert "±" in drive.text()
    assert drive.page.locator(".hs-tile").count() == 8
    assert drive.page.get_by_text("derived, not measured").first.is_visible()


def test_inputs_change_the_answer_and_the_link_restores_it(drive: Driver) -> None:
    drive.open()
    before = drive.text()
    drive.choose("System", "early exit llama2-7b")
    drive.page.wait_for_function("before => document.querySelector('.hs-sentence')?.innerText !== before", arg=before)
    after = drive.text()
    assert asked(drive) == {"system": ["early exit llama2-7b"]}
    drive.page.goto(drive.page.url)
    drive.page.wait_for_selector(SENTENCE)
    assert drive.text() == after


def test_a_link_that_says_nonsense_is_answered_in_words(drive: Driver) -> None:
    drive.open("/plan?rate=fast&colour=red", "h1")
    said = drive.page.get_by_role("alert").all_inner_texts()
    assert any("rate=fast" in text and "is no number" in text for text in said)
    assert any("colour=red" in text for text in said)


def test_downloads_of_an_answer_open(drive: Driver, tmp_path: Path) -> None:
    drive.open()
    drive.page.get_by_role("button", name="Report (HTML)").wait_for()
    drive.settle()
    with zipfile.ZipFile(drive.download("Scenario", tmp_path)) as held:
        assert "scenario.yaml" in held.namelist()
        assert b"llama2-a100-80gb" in held.read("scenario.yaml")
    assert json.loads(drive.download("Answer (JSON)", tmp_path).read_text())["answer"] == "feasible"
    comma = pd.read_csv(drive.download("Requests (CSV)", tmp_path))
    parquet = pd.read_parquet(io.BytesIO(drive.download("Requests (Parquet)", tmp_path).read_bytes()))
    assert len(comma) == len(parquet) == 800
    report = drive.download("Report (HTML)", tmp_path)
    drive.page.goto(report.as_uri())
    assert "how many GPUs" in drive.page.title()
    drive.complaints.clear()  # a file is not the server, and asks it for nothing
    assert drive.page.locator(".plotly").count() >= 1


def test_pages_carry_the_question(drive: Driver) -> None:
    drive.open("/?system=early exit llama2-7b")
    drive.press("Is there a cheaper fleet?")
    drive.page.get_by_role("heading", name="Which fleet is cheapest?").wait_for()
    drive.fill("Rate (requests/s)", "7")
    assert asked(drive) == {"system": ["early exit llama2-7b"], "rate": ["7"]}
    drive.go("Runs")
    drive.page.get_by_role("heading", name="Runs").wait_for()
    drive.settle()
    assert asked(drive) == {"system": ["early exit llama2-7b"], "rate": ["7"]}
    drive.go("Plan")
    assert drive.page.get_by_label("Rate (requests/s)", exact=True).input_value() == "7"


def test_a_plan_opens_answered_and_a_new_one_is_searched(drive: Driver, tmp_path: Path) -> None:
    drive.open("/plan")
    assert "USD/h" in drive.text()
    for heading in ("One replica fewer", "Runner-up", "If the load is 20 % off", "Every candidate"):
        assert drive.page.get_by_text(heading).first.is_visible(), heading
    drive.open(
        "/plan?rate=5&requests=100&plan_devices=A100-80GB&plan_systems=vanilla llama2-2.7b", "[data-testid=stButton]"
    )
    drive.press("Search the cheapest fleet")
    drive.page.wait_for_selector(SENTENCE)
    drive.settle()
    assert "A100-80GB" in drive.text()
    with zipfile.ZipFile(drive.download("Plan and fleets", tmp_path)) as held:
        assert {"plan.yaml", "prices.yaml", "fleet.yaml"} <= set(held.namelist())


def test_a_search_can_be_cancelled(drive: Driver) -> None:
    drive.open("/plan?rate=19&requests=2000", "[data-testid=stButton]")
    drive.page.get_by_role("button", name="Search the cheapest fleet").click()
    drive.page.get_by_role("button", name="Cancel").click()
    drive.page.get_by_text("was cancelled").wait_for()
    assert drive.page.get_by_role("button", name="Try again").is_visible()


@pytest.mark.parametrize("path", ["", "plan", "runs"])
def test_charts_and_tables_have_words(drive: Driver, path: str) -> None:
    drive.open(f"/{path}", "h1")
    for chart in drive.page.get_by_test_id("stPlotlyChart").all():
        assert chart.locator("[aria-label], [alt]").count() or chart.get_attribute("aria-label")
