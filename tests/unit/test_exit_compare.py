"""Comparing and calibrating exit methods: the fit of their costs, the judges of text, and the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from heliosim_calibrate.exit_costs import PAIRS, MethodSample, fit_methods
from heliosim_calibrate.exit_methods import Trial, right_lines, speed_table, table, task_table, write_part
from heliosim_calibrate.plan import method_modes

from heliosim.costs import TERMS, ExitCosts, StepCost
from heliosim.errors import InputError, UnknownNameError
from heliosim.exits.pricing import Counts, Row, parts_of
from heliosim.types import ExitRule
from tests.profiles import LARGE, STEP_SECONDS

ENDS = (4, 8, 12)
COST = StepCost(tuple(STEP_SECONDS.get(t, 0.0) for t in TERMS), 64, 256, 256)


def samples(truth: ExitCosts) -> list[MethodSample]:
    """Decode steps of two to nine rows that take what costs with ``truth`` in them say, 0.1 % of noise apart."""
    rng, found = np.random.default_rng(0), []
    cost = StepCost(COST.coefficients, 64, 256, 256, exits=truth)
    for k in range(240):
        batching, method = PAIRS[k % 3]
        rule = ExitRule("threshold", 0.8, batching, method)
        exits = rng.choice(ENDS, 2 + k % 8, p=[0.7, 0.2, 0.1]).tolist()
        rows = [Row(30, 31)] * len(exits)
        parts, _ = parts_of(rule, ENDS, rows, exits, Counts(len(rows), len(rows), 1, len(rows), 0, 0))
        seconds = parts.seconds(cost, rule) * (1 + 0.001 * rng.standard_normal())
        found.append(MethodSample("large", rule, parts, {"cpu": seconds}))
    return found


def test_fit_finds_what_a_regrouping_and_a_copy_cost() -> None:
    truth = ExitCosts(4e-4, 3e-5, 2e-6)
    fit = fit_methods(samples(truth), COST, "cpu")
    assert fit is not None
    assert fit.regroup == pytest.approx(truth.regroup, rel=0.1)
    assert fit.copy_layer == pytest.approx(truth.copy_layer, rel=0.2)
    assert fit.copy_layer_token == pytest.approx(truth.copy_layer_token, rel=0.3)
    assert fit.steps == 240


def test_fit_says_nothing_of_what_was_not_seen() -> None:
    seen = [s for s in samples(ExitCosts(4e-4, 3e-5, 2e-6)) if s.rule.skipped_kv != "copy"]
    assert fit_methods(seen, COST, "cpu") is None


@pytest.mark.parametrize(
    ("said", "wanted", "share"),
    [
        ("\na\nb", "\na\nb", 1.0),
        ("a\nx", "a\nb", 0.5),
        ("a\nb\nc\nd", "a\nb", 0.5),
        ("", "a", 0.0),
        ("b\na", "a\nb", 0.0),
    ],
)
def test_right_lines(said: str, wanted: str, share: float) -> None:
    assert right_lines(said, wanted) == share


def trial(batching: str, method: str, predicted: float | None) -> Trial:
    right = dict.fromkeys(("qa", "arithmetic", "lists", "code"), 1.0)
    return Trial(batching, method, 123456.0, predicted, 12.0, 1.0, 1.0, 1234.567, 512.0, right)


def test_tables_fit_80_columns() -> None:
    trials = [trial("-", "-", 100.0), trial("wait-for-deepest", "propagate", 100.0)]
    for lines in (table(trials), task_table(trials), speed_table(trials)):
        assert len(lines) == 4
        assert len({len(line) for line in lines}) == 1
        assert len(lines[0]) <= 80
    assert speed_table([trial("-", "-", None)]) == []


def test_a_part_of_the_page_replaces_its_older_self(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Head\n\nWords.\n")
    write_part(page, "## a, batch 1\n\nfirst\n", "a, batch 1")
    write_part(page, "## b, batch 1\n\nother\n", "b, batch 1")
    write_part(page, "## a, batch 1\n\nsecond\n", "a, batch 1")
    assert page.read_text() == "# Head\n\nWords.\n\n## a, batch 1\n\nsecond\n\n## b, batch 1\n\nother\n"


def test_further_methods_are_named_in_pairs() -> None:
    (mode,) = method_modes(LARGE, 0.7, ["eager+copy"])
    assert mode.exits == ExitRule("threshold", 0.7, "eager", "copy")
    with pytest.raises(InputError, match=r"batching\+skipped_kv"):
        method_modes(LARGE, 0.7, ["eager"])
    with pytest.raises(UnknownNameError, match="propagate"):
        method_modes(LARGE, 0.7, ["eager+propagat"])
