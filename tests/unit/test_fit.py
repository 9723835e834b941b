"""The fit finds cost terms that are known because the samples were made from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from heliosim_calibrate.fit import cell_of, fit_loads, fit_steps, is_held_out, region_of, relative_nnls
from heliosim_calibrate.measure import LoadSample, StepSample

from heliosim.costs import LOAD_TERMS, TERMS, StepShape, load_terms
from heliosim.streams import stream
from heliosim.types import Load, Placement
from tests.helpers import spec
from tests.profiles import LOAD_SECONDS, STEP_SECONDS

TRUE = np.array([STEP_SECONDS[t] for t in TERMS])


def shapes(seed: int, count: int) -> list[StepShape]:
    """Shapes of decode, prefill and mixed steps under early exit, in all sizes."""
    rng = stream(seed, "shapes")
    found = []
    for _ in range(count):
        kind = rng.choice(["decode", "prefill", "mixed"])
        decode = int(rng.choice([1, 2, 4, 8, 16, 32])) if kind != "prefill" else 0
        chunks = int(rng.integers(1, 5)) if kind != "decode" else 0
        chunk = int(rng.choice([8, 32, 64]))
        context = int(rng.choice([32, 64, 128, 256]))
        layers, depth = int(rng.choice([2, 4, 6])), 6
        rows = decode + chunks
        found.append(
            StepShape(
                rows=rows,
                tokens=decode + chunks * chunk,
                decode_rows=decode,
                gathered=decode * context,
                prefill_rows=chunks,
                prefill_products=chunks * chunk * context,
                layers=layers,
                checks=int(rng.integers(1, 4)),
                checked_rows=int(rng.integers(rows, 3 * rows + 1)),
                filled_layers=int(rng.integers(0, depth - layers + 1)),
                started=int(rng.integers(0, chunks + 1)),
                ended=int(rng.integers(0, rows + 1)),
                longest=context,
            )
        )
    return found


def samples(seed: int, count: int, noise: float, repeats: int = 4) -> list[StepSample]:
    rng = stream(seed, "noise")
    made = []
    for shape in shapes(seed, count):
        seconds = float(TRUE @ np.array(shape.terms()))
        for _ in range(repeats):
            time = seconds * float(np.exp(noise * rng.standard_normal()))
            made.append(StepSample("m", "made", shape, {"cpu": time, "wall": 2 * time}))
    return made


def mean_time_error(coefficients: dict[str, float], seed: int = 99) -> float:
    """Median relative error of predictions for shapes that no fit here has seen."""
    fitted = np.array([coefficients[t] for t in TERMS])
    x = np.array([s.terms() for s in shapes(seed, 400)])
    return float(np.median(np.abs(x @ fitted / (x @ TRUE) - 1)))


def test_exact_samples_give_exact_terms() -> None:
    fit = fit_steps(samples(0, 300, noise=0.0), "cpu")
    for term, seconds in STEP_SECONDS.items():
        assert fit.seconds_per[term] == pytest.approx(seconds, rel=1e-3), term
    assert fit.holdout.p90_abs_error < 1e-3


def test_noisy_samples_give_terms_within_a_few_percent() -> None:
    fit = fit_steps(samples(1, 600, noise=0.05), "cpu")
    for term in ("layer", "layer_token", "layer_decode_row", "layer_prefill_kv"):
        assert fit.seconds_per[term] == pytest.approx(STEP_SECONDS[term], rel=0.15), term
    kv = fit.seconds_per["layer_decode_kv"] + fit.seconds_per["layer_decode_many_kv"]  # few steps hold one row alone
    assert kv == pytest.approx(STEP_SECONDS["layer_decode_kv"], rel=0.15)
    assert mean_time_error(fit.seconds_per) < 0.01
    assert all(seconds >= 0 for seconds in fit.seconds_per.values())


def test_one_row_and_many_may_read_their_kv_at_different_speeds() -> None:
    slower = {"layer_decode_many_kv": 2e-8}
    true = np.array([(STEP_SECONDS | slower)[t] for t in TERMS])
    made = [replace(s, clocks={"cpu": float(true @ np.array(s.shape.terms()))}) for s in samples(4, 600, noise=0.0)]
    fit = fit_steps(made, "cpu")
    assert fit.seconds_per["layer_decode_kv"] == pytest.approx(1e-8, rel=0.05)
    assert fit.seconds_per["layer_decode_many_kv"] == pytest.approx(2e-8, rel=0.05)


def test_the_hold_out_error_is_reported_and_of_the_size_of_the_noise() -> None:
    quiet = fit_steps(samples(2, 8000, noise=0.02), "cpu").holdout
    loud = fit_steps(samples(2, 8000, noise=0.2), "cpu").holdout
    assert quiet.cells > 5
    assert 0 < quiet.median_abs_error < 0.03
    assert quiet.median_abs_error < loud.median_abs_error < 0.2
    assert quiet.p90_abs_error > quiet.median_abs_error
    assert set(quiet.by_region) <= {region_of(s) for s in shapes(2, 8000)}


def test_outliers_do_not_bias() -> None:
    """One step in fifty meets a pause of ten times its length (garbage collection, another process)."""
    clean = samples(3, 600, noise=0.03)
    rng = stream(3, "outliers")
    struck = [replace(s, clocks={"cpu": s.clocks["cpu"] * (10 if rng.random() < 0.02 else 1)}) for s in clean]
    assert sum(a.clocks["cpu"] != b.clocks["cpu"] for a, b in zip(clean, struck, strict=True)) > 20
    fit = fit_steps(struck, "cpu")
    assert mean_time_error(fit.seconds_per) < 0.03


def test_the_total_time_is_unbiased_under_skewed_noise() -> None:
    """Noise only ever adds time; throughput depends on the mean step, so totals must agree."""
    rng = stream(4, "skew")
    made = [replace(s, clocks={"cpu": s.clocks["cpu"] * (1 + rng.exponential(0.1))}) for s in samples(4, 400, 0.0)]
    fit = fit_steps(made, "cpu")
    predicted = sum(float(np.array([fit.seconds_per[t] for t in TERMS]) @ np.array(s.shape.terms())) for s in made)
    assert predicted == pytest.approx(sum(s.clocks["cpu"] for s in made), rel=0.005)


def test_every_region_is_unbiased_where_small_batches_are_noisiest() -> None:
    """Weights of 1 / measurement**2, or a fit to medians, predict too little just where the noise is largest."""
    rng = stream(8, "regions")
    made = []
    for s in samples(8, 1200, 0.0):
        spread = 0.6 if s.shape.rows <= 2 else 0.1
        factor = float(np.exp(spread * rng.standard_normal() - spread**2 / 2))  # of mean 1
        made.append(replace(s, clocks={"cpu": s.clocks["cpu"] * factor}))
    fit = fit_steps(made, "cpu")
    coefficients = np.array([fit.seconds_per[t] for t in TERMS])
    for is_small in (True, False):
        mine = [s for s in made if (s.shape.rows <= 2) == is_small]
        predicted = sum(float(coefficients @ np.array(s.shape.terms())) for s in mine)
        assert predicted == pytest.approx(sum(s.clocks["cpu"] for s in mine), rel=0.05), is_small


def test_the_clock_and_the_range_are_those_of_the_samples() -> None:
    made = samples(5, 200, noise=0.0)
    cpu, wall = fit_steps(made, "cpu"), fit_steps(made, "wall")
    assert wall.seconds_per["layer"] == pytest.approx(2 * cpu.seconds_per["layer"], rel=1e-3)
    assert cpu.steps == len(made)
    assert cpu.max_rows == max(s.shape.rows for s in made)
    assert cpu.max_context == 256
    assert cpu.max_tokens == max(s.shape.tokens for s in made)


def test_held_out_cells_are_a_fixed_fifth() -> None:
    cells = {cell_of(s) for s in samples(6, 2000, 0.0, repeats=1)}
    share = sum(is_held_out(c) for c in cells) / len(cells)
    assert 0.12 < share < 0.28


def test_a_term_that_never_occurs_costs_nothing() -> None:
    x = np.array([[1.0, 2.0, 0.0], [1.0, 4.0, 0.0], [1.0, 8.0, 0.0]])
    got = relative_nnls(x, x @ np.array([0.5, 0.25, 0.0]))
    assert got == pytest.approx([0.5, 0.25, 0.0])


def test_loads() -> None:
    model = spec("m", 6, (2, 4, 6))
    rng = stream(7, "loads")
    made = []
    for k in range(300):
        depth, resident = (int(rng.choice([2, 4, 6])), int(rng.choice([0, 2, 4])))
        kept = ((1, int(rng.integers(200))),) if 0 < resident < depth else ()
        terms = load_terms(Load(Placement("m", depth), 1, "", kept=kept), model, resident, int(rng.integers(10**7)))
        seconds = sum(LOAD_SECONDS[name] * v for name, v in zip(LOAD_TERMS, terms, strict=True))
        seconds *= 20 if k % 50 == 0 else float(np.exp(0.03 * rng.standard_normal()))
        made.append(LoadSample("m", terms, {"cpu": seconds}))
    fit = fit_loads(made, "cpu")
    assert fit.seconds_per["load"] == pytest.approx(LOAD_SECONDS["load"], rel=0.05)
    assert fit.seconds_per["kv_byte"] == pytest.approx(LOAD_SECONDS["kv_byte"], rel=0.05)
    assert fit.loads == 300
    assert 0.01 < fit.median_abs_error < 0.05
