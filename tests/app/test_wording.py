"""How an answer is said, from hand-made answers."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("streamlit")
from heliosim_app import wording
from heliosim_app.answer import UNPRICED, repriced
from heliosim_app.question import Question

from heliosim.prices import Price


def interval(mean: float, half: float | None) -> dict[str, Any]:
    return {"mean": mean, "half_width": half, "confidence": 0.95}


def judgement(verdict: str, ttft: float, half: float = 30.0) -> dict[str, Any]:
    limit = {"metric": "p99_ttft_ms", "most": 500.0, "interval": interval(ttft, half), "verdict": verdict}
    return {
        "verdict": verdict,
        "reason": f"p99 TTFT {ttft:g}",
        "replications": 6,
        "limits": [limit],
        "figures": {"output_tokens_per_s": interval(1000, 10), "agreement": interval(0.95, 0.01)},
    }


def answer(count: int = 3, fewer: str | None = "misses", source: str = "a list", gpus: int = 1) -> dict[str, Any]:
    option = {
        "candidate": {"name": "helios", "gpu": "H200-141GB", "gpus_per_replica": gpus},
        "price": {
            "gpu": "H200-141GB",
            "price_per_gpu_hour": 4.0,
            "provider": "x",
            "region": "any",
            "date": "2026-04",
            "source": source,
        },
        "count": count,
        "price_per_hour": 4.0 * count,
        "price_per_million_output_tokens": 3.3,
        "status": "keeps",
        "least_count": 1,
        "judgement": judgement("meets", 410),
    }
    return {
        "answer": "feasible",
        "currency": "USD",
        "winner": option,
        "verified_with_fresh_seeds": judgement("meets", 410),
        "one_fewer": None if fewer is None else judgement(fewer, 595, 40),
        "runner_up": None,
        "sensitivity": [{"load": 0.8, "count": 2, "same_count": judgement("meets", 300)}],
        "candidates": [option],
        "notes": ["composed, not measured (x): y", "prices older; bring your own with --prices"],
    }


ASKED = Question(models="opt-pair", device="H200-141GB", system="HELIOS")


def test_the_sentence_has_the_fleet_the_interval_and_what_one_fewer_misses() -> None:
    assert wording.sentence(ASKED, answer()) == (
        "3 × H200-141GB with HELIOS over OPT-1.3B + 6.7B: p99 TTFT 410 ± 30 ms; "
        "2 would miss the p99 TTFT limit by 95 ± 40 ms."
    )


def test_one_replica_has_none_fewer() -> None:
    assert "none fewer" in wording.sentence(ASKED, answer(count=1, fewer=None))


def test_undecided_is_not_called_a_miss() -> None:
    said = wording.sentence(ASKED, answer(fewer="undecided"))
    assert "2 may do too" in said
    assert "miss" not in said


def test_no_fleet_is_said_with_the_reason() -> None:
    none = {**answer(), "answer": "infeasible", "winner": None, "verified_with_fresh_seeds": None}
    assert wording.sentence(ASKED, none).startswith("No fleet of up to 16 H200-141GB")
    assert "cannot keep" in wording.sentence(ASKED, none)
    assert "keeps the limits" in wording.plan_sentence(ASKED, none)


def test_several_gpus_a_replica_are_said() -> None:
    assert wording.sentence(ASKED, answer(gpus=4)).startswith("3 × 4 H200-141GB")


def test_tiles_have_intervals_units_and_verdicts() -> None:
    tiles = {tile.label: tile for tile in wording.answer_tiles(ASKED, answer(), "USD")}
    assert (tiles["p99 TTFT"].value, tiles["p99 TTFT"].spread, tiles["p99 TTFT"].verdict) == (
        "410 ms",
        "± 30 ms",
        "meets",
    )
    assert tiles["Cost per hour"].value == "12.00 USD"
    assert tiles["Agreement"].value == "95 %"
    assert (tiles["Energy"].value, tiles["Energy"].spread) == ("–", "unavailable")


def test_a_stand_in_price_is_never_shown() -> None:
    tiles = wording.answer_tiles(ASKED, answer(source=UNPRICED), "USD")
    assert not any("USD" in tile.value for tile in tiles)
    rows = wording.sensitivity_rows(answer(source=UNPRICED), "USD")
    assert rows[0]["USD/h"] == "–"


def test_notes_leave_out_what_badges_say_and_speak_of_this_page() -> None:
    old = answer()
    old["winner"]["price"]["date"] = "2020-01"
    assert wording.notes_of(old) == ["prices older than half a year (H200-141GB: 2020-01); edit them on the page Plan"]
    assert wording.notes_of(repriced(answer(), None)) == []


def test_one_fewer_is_a_sentence_with_what_it_rests_on() -> None:
    said = wording.fewer_sentence(answer())
    assert said == "2 would miss the p99 TTFT limit by 95 ± 40 ms: p99 TTFT 595 (6 runs)."


def test_sensitivity_says_what_another_load_needs() -> None:
    assert wording.sensitivity_rows(answer(), "USD") == [
        {
            "Load": "−20\u00a0%",
            "Replicas needed": "2",
            "USD/h": "8.00",
            "With 3 replicas": "meets",
            "Because": "p99 TTFT 300",
        }
    ]


def test_another_price_changes_the_cost_and_nothing_else() -> None:
    price = Price(gpu="H200-141GB", provider="me", region="any", price_per_gpu_hour=2.0, date="2026-11", source="mine")
    changed = repriced(answer(), price)
    assert changed["winner"]["price_per_hour"] == 6.0
    assert changed["winner"]["price_per_million_output_tokens"] == pytest.approx(6e6 / 3.6e6)
    assert changed["one_fewer"] == answer()["one_fewer"]
    unknown = wording.answer_tiles(ASKED, repriced(answer(), None), "USD")
    assert not any("USD" in tile.value for tile in unknown)


def test_a_plan_names_systems_as_pages_do() -> None:
    plain = answer()
    plain["winner"]["candidate"]["name"] = "h200-141gb-early-exit-opt-1.3b"
    assert wording.plan_sentence(ASKED, plain).startswith("3 × H200-141GB with early exit opt-1.3b at 12.00 USD/h: ")


def test_a_fleet_that_drowns_is_said() -> None:
    drowned = answer()
    drowned["one_fewer"]["reason"] = "saturated, waiting grows by 0.2 ± 0.1 s per second of arrivals"
    assert "2 would not keep up: waiting grows by 0.2" in wording.sentence(ASKED, drowned)
