"""Shapes of hand-made steps, and the terms of their cost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from heliosim.costs import LOAD_TERMS, TERMS, StepCost, StepShape, load_seconds, load_terms, shape_of
from heliosim.curves import Curve
from heliosim.types import Batch, ExitRule, Load, Outcome, Placement, Run, Tokens
from tests.helpers import spec

MODEL = spec("m", 6, (2, 4, 6))
GREEDY, THRESHOLD = ExitRule("greedy"), ExitRule("threshold", 0.8)


def batch(*rows: tuple[int, int, bool]) -> Batch:
    """Rows as (tokens in KV before, tokens computed, whether a token comes out)."""
    return Batch(
        tuple(range(len(rows))), tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows)
    )


def outcome(exits: tuple[int, ...], layers_run: int, lasts: tuple[bool, ...] | None = None) -> Outcome:
    ones = (1.0,) * len(exits)
    return Outcome(0.0, Tokens(tuple(range(len(exits))), exits, ones, ones, lasts or (False,) * len(exits)), layers_run)


def shape(rows: Batch, exits: ExitRule, out: Outcome, depth: int = 6) -> StepShape:
    return shape_of(Run(Placement("m", depth), exits, rows), out, MODEL)


def test_decode() -> None:
    """Three requests make their next token at depth 4; KV is gathered in blocks of 16 up to the longest."""
    got = shape(batch((10, 1, True), (40, 1, True), (15, 1, True)), GREEDY, outcome((4, 4, 4), 4), depth=4)
    assert got == StepShape(
        rows=3,
        tokens=3,
        decode_rows=3,
        gathered=3 * 48,
        prefill_rows=0,
        prefill_products=0,
        layers=4,
        checks=1,
        checked_rows=3,
        filled_layers=0,
        started=0,
        ended=0,
        longest=41,
        context=11 + 41 + 16,
    )


def test_prefill_in_chunks() -> None:
    """A first chunk that emits nothing costs no head; the chunk that ends the prompt does."""
    first = shape(batch((0, 20, False)), GREEDY, outcome((), 6))
    assert (first.prefill_rows, first.prefill_products, first.started) == (1, 20 * 20, 1)
    assert (first.decode_rows, first.gathered, first.checks, first.checked_rows) == (0, 0, 0, 0)
    second = shape(batch((20, 10, True)), GREEDY, outcome((6,), 6, (True,)))
    assert (second.prefill_products, second.started, second.ended, second.checks) == (10 * 30, 0, 1, 1)


def test_a_prompt_of_one_token_is_prefill_and_a_last_chunk_of_one_is_decode() -> None:
    assert shape(batch((0, 1, True)), GREEDY, outcome((6,), 6)).prefill_rows == 1
    assert shape(batch((20, 1, True)), GREEDY, outcome((6,), 6)).decode_rows == 1
    assert shape(batch((20, 1, False)), GREEDY, outcome((), 6)).prefill_rows == 1


def test_mixed() -> None:
    got = shape(
        batch((30, 1, True), (5, 1, True), (0, 8, False), (8, 4, True)),
        GREEDY,
        outcome((6, 6, 6), 6, (True, False, True)),
    )
    assert (got.rows, got.tokens, got.decode_rows, got.prefill_rows) == (4, 14, 2, 2)
    assert (got.gathered, got.context) == (2 * 32, 31 + 6)
    assert got.prefill_products == 8 * 8 + 4 * 12
    assert (got.started, got.ended, got.longest, got.checked_rows) == (1, 2, 31, 3)


def test_threshold_that_stops_early() -> None:
    """Exits 2, 2, 4 of 6: three rows checked at 2, one at 4; layers 5 and 6 are skipped and their KV filled."""
    got = shape(batch((9, 1, True), (9, 1, True), (9, 1, True)), THRESHOLD, outcome((2, 2, 4), 4))
    assert (got.layers, got.checks, got.checked_rows, got.filled_layers) == (4, 2, 4, 2)


def test_threshold_that_reaches_the_end_or_does_not_stop() -> None:
    deep = shape(batch((9, 1, True), (9, 1, True)), THRESHOLD, outcome((2, 6), 6))
    assert (deep.checks, deep.checked_rows, deep.filled_layers) == (3, 2 + 1 + 1, 0)
    full = shape(batch((9, 1, True), (9, 1, True)), ExitRule("threshold", 0.8, "full"), outcome((2, 2), 6))
    assert (full.layers, full.checks, full.checked_rows, full.filled_layers) == (6, 1, 2, 0)


def test_terms_are_what_the_shape_says() -> None:
    got = shape(batch((30, 1, True), (0, 8, True)), THRESHOLD, outcome((2, 4), 6, (False, True)))
    terms = dict(zip(TERMS, got.terms(), strict=True))
    assert terms == {
        "step": 1,
        "row": 2,
        "token": 9,
        "layer": 6,
        "layer_many": 6,
        "layer_token": 54,
        "layer_token_more": 0,
        "gathered": 32,
        "layer_decode": 6,
        "layer_decode_many": 0,
        "layer_decode_row": 6,
        "layer_decode_kv": 6 * 32,
        "layer_decode_many_kv": 0,
        "layer_prefill_row": 6,
        "layer_prefill_kv": 6 * 64,
        "check": 2,
        "check_row": 3,
        "fill_layer": 0,
        "fill_layer_token": 0,
        "started": 1,
        "ended": 1,
        "layer_mixed_context": 6 * 31,
        "layer_decode_context": 6 * 31,
    }


def test_many_tokens_and_rows_have_terms_of_their_own() -> None:
    got = shape(batch((30, 1, True), (5, 1, True), (0, 20, True)), GREEDY, outcome((6, 6, 6), 6))
    terms = dict(zip(TERMS, got.terms(), strict=True))
    assert (terms["layer_many"], terms["layer_token"], terms["layer_token_more"]) == (6, 6 * 16, 6 * 6)
    assert (terms["layer_decode_many"], terms["gathered"]) == (6, 64)
    assert terms["layer_decode_many_kv"] == 6 * 64


def test_a_cost_is_the_sum_of_its_terms() -> None:
    got = shape(batch((9, 1, True)), THRESHOLD, outcome((2,), 2))
    per = {"step": 1e-3, "layer": 1e-4, "check_row": 5e-5, "fill_layer": 1e-5}
    cost = StepCost(tuple(per.get(t, 0.0) for t in TERMS), max_rows=1, max_context=16, max_tokens=1)
    assert cost.seconds(got) == pytest.approx(1e-3 + 2 * 1e-4 + 5e-5 + 4 * 1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_seconds_are_the_product_of_coefficients_and_terms(seed: int) -> None:
    """The formula written out for speed and the terms that calibration fits are the same sum."""
    rng = np.random.default_rng(seed)
    cost = StepCost(tuple(rng.random(len(TERMS)).tolist()), 100, 1000, 1000)
    for _ in range(20):
        got = StepShape(*rng.integers(0, 40, size=len(StepShape._fields)).tolist())
        if not got.decode_rows:  # without such rows there is nothing to gather, nor a chunk's products
            got = got._replace(gathered=0)
        if not got.prefill_rows:
            got = got._replace(prefill_products=0)
        assert cost.seconds(got) == pytest.approx(float(np.dot(cost.coefficients, got.terms())), rel=1e-12)


def test_curves_are_added_per_layer_and_per_check() -> None:
    """Two checks of 3 rows in all cost twice what one of 1.5 rows does."""
    layer, head = Curve.of([(1, 1.0), (11, 6.0)]), Curve.of([(1, 0.1), (2, 0.3)])
    plain = StepCost((0.0,) * len(TERMS), 8, 64, 64)
    cost = dataclasses.replace(plain, layer_curve=layer, head_curve=head)
    got = shape(batch((30, 1, True), (0, 8, True)), THRESHOLD, outcome((2, 4), 6, (False, True)))
    assert (got.tokens, got.layers, got.checks, got.checked_rows) == (9, 6, 2, 3)
    assert cost.seconds(got) == pytest.approx(6 * (1.0 + 8 * 0.5) + 2 * 0.2)
    nothing = shape(batch((0, 20, False)), GREEDY, outcome((), 6))  # no check: no head; beyond the last point
    assert cost.seconds(nothing) == pytest.approx(6 * (1.0 + 19 * 0.5))


@pytest.mark.parametrize(
    ("depth", "resident", "kept", "expected"),
    [
        (4, 0, (), (1.0, 4, 500 + 4000, 64, 0)),  # another model, or none, was there
        (6, 2, (), (1.0, 4, 4000, 64, 0)),  # deeper: only new layers move
        (2, 6, (), (1.0, 0, 0, 64, 0)),  # shallower: nothing moves
        (6, 4, ((1, 10), (2, 7)), (1.0, 2, 2000, 64, 17 * 2)),  # kept requests run through the new layers
    ],
)
def test_load_terms(depth: int, resident: int, kept: tuple[tuple[int, int], ...], expected: tuple[float, ...]) -> None:
    load = Load(Placement("m", depth), 3, "test", kept=kept)
    assert load_terms(load, MODEL, resident, kv_bytes=64) == expected


def test_heads_of_exits_are_loaded_with_their_layers() -> None:
    model = spec("m", 6, (2, 4, 6), exit_head_bytes={2: 30, 4: 50})
    assert load_terms(Load(Placement("m", 4), 1, ""), model, 2, 0)[2] == 2 * 1000 + 50


def test_load_seconds() -> None:
    coefficients = dict(zip(LOAD_TERMS, (1.0, 0.1, 0.01, 0.001, 0.0001), strict=True))
    assert load_seconds(coefficients, (1, 2, 3, 4, 5)) == pytest.approx(1.2345)
