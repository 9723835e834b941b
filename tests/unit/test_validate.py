"""How a validation judges, and what its page says: on evidence made by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from heliosim_calibrate import validate
from heliosim_calibrate.validation_page import page

from heliosim.formats.profile import Profile
from heliosim.metrics import Summary, summarise
from heliosim.runs import run_simulated
from tests.profiles import scenario, write_synthetic_profile


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    profile: Profile = write_synthetic_profile(tmp_path_factory.mktemp("profile") / "synthetic")
    return summarise(run_simulated(scenario(profile), profile))


@dataclass
class Item:
    """What ``_judge`` asks of a measured system."""

    predicted: Summary
    draws: list[Summary]
    live: list[Summary]
    name: str = "HELIOS"

    @property
    def scenario(self) -> Any:
        return SimpleNamespace(clock="cpu")

    def predicted_draws(self) -> list[Summary]:
        return self.draws

    def measured(self) -> list[Summary]:
        return self.live


def evidence() -> validate.Evidence:
    fit = {
        "steps": 10, "cell_spread": 0.2,
        "holdout": {"cells": 4, "median_abs_error": 0.06, "p90_abs_error": 0.1, "mean_signed_error": 0.0,
                    "repeat_error": 0.03, "by_region": {"decode 1": 0.05}},
    }  # fmt: skip
    facts = {
        "device": {"device": "cpu", "host_cpu": "made up", "threads": 1, "host_cores": 2}, "versions": {},
        "hash": "0" * 64, "premises": [], "fits": {"m": {"cpu": fit}}, "largest_batch": {},
        "loads": {"m": {"cpu": {"loads": 3, "median_abs_error": 0.1}}},
    }  # fmt: skip
    return validate.Evidence(facts, "cpu", 0.05, {"drawn": 0.05, "replayed": 0.02}, 100, 3, 0)


def judged(summary: Summary, draws: list[float], live: list[float]) -> dict[str, Any]:
    item = Item(
        summary,
        [replace(summary, mean_tpot_ms=v) for v in draws],
        [replace(summary, mean_tpot_ms=v) for v in live],
    )
    found = evidence()
    validate._judge(found, item, "80%")  # type: ignore[arg-type]
    return next(r for r in found.rows if r["metric"] == "mean_tpot_ms")


@pytest.mark.parametrize(
    ("draws", "live", "error", "passes"),
    [
        ([2.0, 2.2], [2.0, 2.0, 2.0], 0.05, True),  # within 7 %
        ([2.0, 2.4], [2.0, 2.0, 2.0], 0.10, False),
        ([2.0, 2.4], [1.5, 2.0, 2.5], 0.10, True),  # inside the spread
        ([2.6, 2.6], [1.5, 2.0, 2.5], 0.30, False),
        ([1.0, 1.8], [2.0, 2.0, 2.0], -0.30, False),
    ],
)
def test_a_prediction_is_the_mean_of_its_draws(
    summary: Summary, draws: list[float], live: list[float], error: float, passes: bool
) -> None:
    row = judged(summary, draws, live)
    assert row["error"] == pytest.approx(error)
    assert row["passes"] is passes
    assert row["without_noise"] == summary.mean_tpot_ms
    assert (row["predicted_min"], row["predicted_max"]) == (min(draws), max(draws))


def test_the_page_names_misses_with_the_ratio_of_step_times(summary: Summary) -> None:
    found = evidence()
    item = Item(summary, [replace(summary, mean_tpot_ms=2.6)] * 2, [replace(summary, mean_tpot_ms=2.0)] * 3)
    for load in ("saturated", "50%", "80%"):
        validate._judge(found, item, load)  # type: ignore[arg-type]
        found.step_time.append({"system": "HELIOS", "load": load, "ratios": [0.7, 0.8]})
    found.exits.append({"system": "HELIOS", "load": "80%", "drawn_points": 1, "replayed_points": 3, "repeat_points": 0})
    found.transitions.append({"load": "80%", "live": ["a"], "replayed": ["b"], "drawn": ["a"]})
    found.parity.append({"system": "HELIOS", "load": "80%", "identical": True})
    text = page(vars(found), "heliosim validate")
    assert "HELIOS at 80%: mean TPOT, ms +30.0 % (bar 7%); its steps took 0.75 of what the profile expects" in text
    assert "8 of 10 predictions within their bar, 8 within it or inside the spread of 3 live repeats" in text
    assert "| HELIOS | 80% | 0.75 | 0.70 … 0.80 | +30.0 % |" in text
    assert "0 of 1 runs within 2 points, worst 3.0" in text
    assert "same order in 0 of 1 runs" in text
    assert "median error 6.0 %, noise floor 3.0 % (bar 5%: **missed**)" in text
