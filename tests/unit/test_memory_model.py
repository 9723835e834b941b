"""Rows that fit beside each depth, by hand, and throughput where KV ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from heliosim.costs import TERMS, StepCost
from heliosim.memory_model import MemoryNeeds, cliff, largest_batch
from tests.helpers import spec

MODEL = spec("m", 6, (2, 6), max_context=4096)
"""A layer has 1,000 B, the rest 500 B."""


def test_largest_batch_by_hand() -> None:
    block = MODEL.block_bytes(2)
    assert MODEL.weights_bytes(2) == 2500
    budget = 2500 + 10 * 2 * block  # ten rows of two blocks
    assert largest_batch(MODEL, 2, 32, budget) == 10
    assert largest_batch(MODEL, 2, 17, budget) == 10
    assert largest_batch(MODEL, 2, 33, budget) == 6
    assert largest_batch(MODEL, 2, 32, budget - 1) == 9
    assert largest_batch(MODEL, 6, 32, 6499) == 0


def test_what_a_step_and_a_request_need_is_taken_off() -> None:
    block = MODEL.block_bytes(2)
    costly = replace(MODEL, request_bytes=block + 1)  # two blocks beside the KV
    budget = 2500 + 700 + 10 * 4 * block
    assert largest_batch(costly, 2, 32, budget, MemoryNeeds(700)) == 10
    assert largest_batch(costly, 2, 32, budget, MemoryNeeds(701)) == 9
    assert largest_batch(costly, 2, 32, budget, MemoryNeeds(700, cap=3)) == 3
    assert largest_batch(MODEL, 2, 32, budget, MemoryNeeds(700)) == 20


def test_depth_gives_rows_twice_over() -> None:
    """Fewer layers leave more bytes, and each row needs fewer of them."""
    budget = 6500 + 4 * 2 * MODEL.block_bytes(6)
    assert largest_batch(MODEL, 6, 32, budget) == 4
    expected = (budget - 2500) // (2 * MODEL.block_bytes(2))
    assert largest_batch(MODEL, 2, 32, budget) == expected
    assert expected > 3 * 4


def test_the_cliff() -> None:
    """Steps of 1 ms whatever their rows: throughput is rows, so what KV cannot hold is lost."""
    cost = StepCost(tuple(1e-3 if t == "step" else 0.0 for t in TERMS), 100, 4096, 4096)
    budget = 6500 + 10 * 2 * MODEL.block_bytes(6)
    deep = [row for row in cliff(MODEL, cost, budget, (32, 320), 40) if row.depth == 6]
    assert [row.rows for row in deep] == [10, 1]
    assert deep[0].tok_per_s == pytest.approx(10_000)
    assert deep[0].lost == pytest.approx(0.75)
    assert cliff(MODEL, cost, budget, (32,), 1000)[0].wanted == 100  # no further than the costs reach


def test_the_command_fits_80_columns_and_names_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from heliosim.cli import app
    from heliosim.console import console
    from heliosim.errors import InputError

    monkeypatch.setenv("COLUMNS", "80")
    console.cache_clear()
    done = CliRunner().invoke(app, ["profile", "memory", "llama2-a100-80gb", "--context", "1024,4096"])
    console.cache_clear()
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "derived, not measured" in done.output
    assert "the profile knows no activations" in " ".join(done.output.split())
    for options, said in (
        (["tiny-opt-cpu"], "names no device memory"),
        (["llama2-a100-80gb", "--context", "x"], "must be whole numbers"),
        (["llama2-a100-80gb", "--budget", "much"], "--budget"),
    ):
        failed = CliRunner().invoke(app, ["profile", "memory", *options])
        assert isinstance(failed.exception, InputError)
        assert said in str(failed.exception)
