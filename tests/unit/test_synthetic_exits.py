"""Measured exits of others: readers, replay, and the family checked between thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from heliosim.errors import InputError, UnknownNameError
from heliosim.synthetic.check import cap_between, depth_of, fit_scores, fit_sweep, predict_between, thresholds_of
from heliosim.synthetic.exits import (
    GREEN_CODE,
    MeasuredExits,
    ThresholdRow,
    autocorrelation,
    read_alignments,
    read_ee_llama,
    read_evaluations,
    read_green_code,
    request_effect,
)
from heliosim.synthetic.family import ScoreFamily
from heliosim.synthetic.replay import import_green_code, spec_of_sweep
from heliosim.synthetic.solve import solve
from heliosim.synthetic.table import load_table
from heliosim.types import ExitRule, Placement

DATA = Path(__file__).parents[2].parent / "shared" / "data"
GREEN, LLAMA = DATA / "green_code", DATA / "ee_llama"
needs_data = pytest.mark.skipif(not (GREEN.is_dir() and LLAMA.is_dir()), reason="the folder ../shared/data is not here")


def write_run(folder: Path, layers: list[int], threshold: float = 0.9, task: str = "python") -> Path:
    name = f"eval_rl_model_opt27b_thresh_{threshold}_0.2ctx_1000_samples_15_maxnew_{task}_exit_layers.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(layers), encoding="utf-8")
    return folder / name


# --- readers ----------------------------------------------------------------------------------------------------


def test_layers_count_from_one_and_no_exit_is_the_last(tmp_path: Path) -> None:
    write_run(tmp_path, [3, 27, 32] * 5)
    (run,) = read_green_code(tmp_path)
    assert run.depths.tolist() == [4, 28, 32] * 5
    assert (run.model, run.task, run.threshold, run.layers) == ("OPT-2.7B", "python", 0.9, 32)
    assert run.left()[[0, -2, -1]] == pytest.approx([1 / 3] * 3)
    assert run.is_aligned


@pytest.mark.parametrize("content", [[], {"a": 1}, [3.5], [True], "x"])
def test_a_file_that_is_no_list_of_layers_is_refused(tmp_path: Path, content: object) -> None:
    path = write_run(tmp_path, [3])
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match="flat list of layers"):
        read_green_code(tmp_path)


def test_an_exit_that_is_none_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [3, 4])
    with pytest.raises(InputError, match="no exit behind layer 4"):
        read_green_code(tmp_path)


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path, "holds no"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(InputError, match=problem):
            read_green_code(folder)


def test_a_bad_line_of_the_sweep_is_named(tmp_path: Path) -> None:
    head = "softmax_threshold_first_exit,softmax_threshold_last_exit,ppl_mean,ppl_std,exit_point_mean,exit_point_std\n"
    path = tmp_path / "sweep.csv"
    path.write_text(head + "0.9,0.8,2,1,7,3\n0.9,x,2,1,7,3\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 3"):
        read_ee_llama(path)
    path.write_text(head + "0.9,0.8,2,1,7,3\n", encoding="utf-8")
    assert read_ee_llama(tmp_path) == [ThresholdRow(0.9, 0.8, 2.0, 8.0, 3.0)]


# --- correlations along a text ----------------------------------------------------------------------------------


def test_correlations_find_what_was_put_in() -> None:
    rng = np.random.default_rng(0)
    text = np.repeat(rng.standard_normal(2000), 15)
    own = rng.standard_normal(30_000)
    depths = np.where(0.5**0.5 * text + 0.5**0.5 * own > 0, 32, 4)
    run = MeasuredExits("m", "opt", "python", 0.9, 32, GREEN_CODE["opt"][2], depths)
    wanted = 2 / np.pi * np.arcsin(0.5)  # of the signs of two normals with correlation 0.5
    assert request_effect(run) == pytest.approx(wanted, abs=0.02)
    assert autocorrelation(depths) == pytest.approx(14 / 15 * wanted, abs=0.02)
    assert autocorrelation(np.full(9, 4)) is None


# --- the family between thresholds ------------------------------------------------------------------------------


def made_runs(thresholds: tuple[float, ...], cap: float = 0.95, tokens: int = 30_000) -> list[MeasuredExits]:
    """Runs drawn from the family itself."""
    exits = GREEN_CODE["opt"][2]
    mu = np.linspace(0.0, 2.0, len(exits))
    family = ScoreFamily(exits, mu, np.full(len(exits), 2.5), np.zeros(1), np.ones(1), cap=cap)
    rng = np.random.default_rng(5)
    return [
        MeasuredExits("m", "opt", "python", t, 32, exits, rng.choice(exits, tokens, p=family.left(t)))
        for t in thresholds
    ]


def test_a_fit_finds_the_family_again_and_predicts_between() -> None:
    runs = made_runs((0.5, 0.8, 0.9, 0.945, 0.955))
    assert cap_between(runs) == (0.945, 0.955)
    assert fit_scores(runs, 0.95).mu[0] == pytest.approx(0.0, abs=0.1)
    found = predict_between(runs)
    assert [p.run.threshold for p in found] == [0.8, 0.9, 0.945]
    assert all(abs(p.error_layers) < 0.35 for p in found[:2])
    assert all(p.run.threshold not in p.fitted_at for p in found)
    assert all(p.left.sum() == pytest.approx(1.0) for p in found)


def test_one_threshold_is_too_few_to_fit() -> None:
    with pytest.raises(InputError, match="two thresholds"):
        fit_scores(made_runs((0.8,)), 0.95)


@needs_data
def test_mean_depth_between_thresholds_is_within_a_layer() -> None:
    found = predict_between(read_green_code(GREEN))
    assert {(p.run.task, p.run.key, p.run.threshold) for p in found} == {
        ("java", "llama", 0.9), ("java", "llama", 0.92), ("java", "opt", 0.9), ("java", "opt", 0.92),
        ("python", "opt", 0.9), ("python", "opt", 0.92),
    }  # fmt: skip
    for p in found:
        assert abs(p.error_layers) <= 1.0
        assert max(abs(x - p.measured_depth) for x in p.range) <= 1.0
        assert p.misplaced < 0.2


@needs_data
def test_the_sweep_of_softmax_thresholds_is_predicted_from_a_few_rows() -> None:
    rows = read_ee_llama(LLAMA)[1:]
    fitted = rows[::7]
    family = fit_sweep(fitted)
    tested = [row for row in rows if row not in fitted]
    assert len(tested) == 42
    for row in tested:
        mean, std = depth_of(family, row)
        assert abs(mean - row.mean_depth) <= 1.0
        assert abs(std - row.std_depth) <= 0.5
    assert 2 < family.sigma[0] < 5


def test_thresholds_of_a_row_decay_geometrically() -> None:
    found = thresholds_of(ThresholdRow(0.9, 0.6, 2.0, 8.0, 3.0))
    assert len(found) == 16
    assert found[[0, 14]] == pytest.approx([0.9, 0.6])
    assert found[1:15] / found[:14] == pytest.approx(np.full(14, (0.6 / 0.9) ** (1 / 14)))


# --- replay -----------------------------------------------------------------------------------------------------


def test_replayed_tokens_leave_where_they_left(tmp_path: Path) -> None:
    layers = np.random.default_rng(0).choice([3, 7, 13, 27, 32], 60).tolist()
    write_run(tmp_path / "data", layers)
    (tmp_path / "data" / "avg_align_opt_python_x_opt_with_weighted.json").write_text(
        json.dumps({"acc": [0.5] * 31 + [1.0], "stds": []}), encoding="utf-8"
    )
    import_green_code(tmp_path / "data", "opt", None).save(tmp_path / "out")
    said, behaviour = load_table(tmp_path / "out")
    assert said.origin == "imported"
    assert any("confidence is not recorded" in line for line in said.about)
    assert any("drawn (synthetic)" in line for line in said.about)
    assert len(behaviour.sequences["python"]) == 4
    for threshold in (0.3, 0.9, 1.0):
        walks = [
            behaviour.walk(behaviour.text(q, "any"), Placement("opt-2.7b", 32), ExitRule("threshold", threshold))
            for q in behaviour.sequences["python"]
        ]
        found = np.concatenate([w.exit_layers for w in walks])
        assert (found == np.minimum(np.array(layers) + 1, 32)).all()
    agrees = np.concatenate([t.agrees["opt-2.7b@4"] for t in behaviour.texts.values()])
    assert 0.3 < agrees.mean() < 0.7


def test_one_threshold_and_a_known_model_are_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, [3] * 15, 0.6)
    write_run(tmp_path, [3] * 15, 0.9)
    with pytest.raises(InputError, match=r"Choose with --threshold one of: 0\.6, 0\.9"):
        import_green_code(tmp_path, "opt", None)
    with pytest.raises(InputError, match="one recorded threshold"):
        import_green_code(tmp_path, "opt", 0.8)
    with pytest.raises(UnknownNameError, match="Known: opt"):
        import_green_code(tmp_path, "llama", 0.9)


@needs_data
def test_everything_that_is_published_is_read() -> None:
    runs = read_green_code(GREEN)
    assert len(runs) == 12
    assert [round(float(r.depths.mean()), 2) for r in runs if r.never_exits] == [28.0, 32.0]
    assert len(read_evaluations(GREEN)) == 12
    alignments = read_alignments(GREEN)
    assert len(alignments) == 4
    for a in alignments:
        assert a.by_depth[-1] == 1.0
        assert min(np.diff(a.by_depth)) < 0  # not monotone in depth


@needs_data
def test_the_published_sweep_becomes_a_spec() -> None:
    rows = read_ee_llama(LLAMA)
    spec = spec_of_sweep(rows, 0.8)
    family = solve(spec).families["llama-3.2-1b"]
    assert family.mean_depth(0.5) < family.mean_depth(0.8) < family.mean_depth(0.95)
    assert "fitted" in spec.models["llama-3.2-1b"].left.source
