"""The table of coming tokens: whatever happens to columns and rows, steps read as lists of lanes would."""

from __future__ import annotations

import numpy as np
import pytest

from heliosim.behaviour import Walk
from heliosim.engines.token_table import Lane, TokenTable


def walk(tokens: int, seed: int) -> Walk:
    rng = np.random.default_rng(seed)
    confidences = rng.random(tokens)
    return Walk(rng.integers(1, 9, tokens), confidences, np.log(confidences), rng.random(tokens) < 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_steps_read_as_the_lanes_say(seed: int) -> None:
    """Requests come and go for 400 ticks through a table of 8 rows and 4 columns, so it is remade again and again."""
    rng = np.random.default_rng(seed)
    table, going, now = TokenTable(8, 4), list[Lane](), 0
    for request in range(400):
        lane = Lane(
            request, walk(int(rng.integers(3, 20)), request), int(rng.integers(0, 30)), now, 1 + int(rng.integers(25))
        )
        table.enter(lane, now)
        going.append(lane)
        steps = int(rng.integers(1, 4))
        block = table.read(now, steps)
        expected = [
            (lane.request, (lane.position + at - lane.tick) % len(lane.walk.exit_layers), lane.walk)
            for at in range(now, now + steps)
            for lane in going
            if lane.tick <= at < lane.tick + lane.count
        ]
        assert block.requests.tolist() == [r for r, _, _ in expected]
        assert block.confidences.tolist() == [w.confidences[k] for _, k, w in expected]
        if request % 3:  # quantities join later, and are forgotten, without harm
            assert block.exit_layers.tolist() == [w.exit_layers[k] for _, k, w in expected]
            assert block.logprobs.tolist() == [w.logprobs[k] for _, k, w in expected]
            assert block.agrees().tolist() == [w.agrees[k] for _, k, w in expected]
        if request % 50 == 0:
            table.forget_planes()
        now += steps
        for lane in [lane for lane in going if lane.tick + lane.count <= now or rng.random() < 0.05]:
            table.leave(lane, now)
            going.remove(lane)


def test_a_lane_that_was_never_read_gives_its_column_back() -> None:
    table = TokenTable(64, 4)
    kept = Lane(0, walk(9, 0), 0, 0, 5)
    table.enter(kept, 0)
    for k in range(10):
        tried = Lane(k, walk(9, k), 0, 2, 5)
        table.enter(tried, 0)
        assert tried.column == 1
        table.leave(tried, 0)
    assert table.read(0, 4).requests.tolist() == [0, 0, 0, 0]
