"""A small study of coverage: what it writes, that it can be interrupted, and that intervals hold the truth."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliosim.coverage import CoverageRow, SeedResult, cases, rows_of, run_coverage, study_seed
from heliosim.errors import InputError
from heliosim.executors import InlineExecutor
from heliosim.formats.files import read_json


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Twelve seeds of the four queues at half load. 96 intervals, two of each run: wide bounds, which halved intervals
    or biased means would leave all the same.
    """
    rows = [
        row
        for case in cases(0.5)
        if case.queue.load == 0.5
        for row in rows_of(case, [study_seed((case, seed)) for seed in range(12)])
    ]
    assert {row.queue for row in rows} == {"M/M/1", "M/D/1", "M/E2/1", "M/M/4"}
    held = sum(row.covered for row in rows) / sum(row.seeds for row in rows)
    assert 0.83 < held < 1.0
    for row in rows:
        assert row.mean_estimate == pytest.approx(row.truth, rel=0.1)
        assert 0 < row.mean_half_width < row.truth


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = run_coverage(tmp_path / "whole.json", seeds=2, length=0.03, executor=InlineExecutor())
    seen: list[float] = []

    def interrupt(what: str, share: float) -> None:
        seen.append(share)
        if len(seen) == 9:
            raise KeyboardInterrupt

    out = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        run_coverage(out, seeds=2, length=0.03, executor=InlineExecutor(), on_progress=interrupt)
    assert sum(len(v) for v in read_json(out)["results"].values()) == 9
    more: list[float] = []
    rows = run_coverage(
        out, seeds=2, length=0.03, executor=InlineExecutor(), on_progress=lambda what, share: more.append(share)
    )
    assert len(more) == 24 - 9
    assert rows == whole
    assert read_json(out) == read_json(tmp_path / "whole.json")
    with pytest.raises(InputError, match="other settings"):
        run_coverage(out, seeds=3, length=0.03, executor=InlineExecutor())


@pytest.mark.parametrize(("covered", "passes"), [(179, False), (180, True), (198, True), (199, False)])
def test_what_passes(covered: int, passes: bool) -> None:
    row = CoverageRow("M/M/1", 0.5, "mean", 1.0, 1000, 200, covered, 1.0, 0.2, 50.0)
    assert row.passes == passes


def test_rows_count_intervals_that_hold_the_closed_form() -> None:
    case = next(c for c in cases() if c.queue.name == "M/M/1" and c.queue.load == 0.5)  # mean wait 1, p95 ln(10) / 0.5
    results = [
        SeedResult(mean=(0.9, 0.2), p95=(4.6, 0.1), cut=5),
        SeedResult(mean=(0.7, 0.2), p95=(4.2, 0.3), cut=15),
    ]
    mean, top = rows_of(case, results)
    assert (mean.covered, top.covered, mean.seeds) == (1, 1, 2)
    assert (mean.mean_estimate, mean.mean_half_width, mean.mean_cut) == pytest.approx((0.8, 0.2, 10.0))
