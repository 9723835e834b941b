"""Replayed behaviour on hand-made texts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from heliosim.behaviour import Behaviour, Text, source_name
from heliosim.errors import UnknownNameError
from heliosim.types import ExitRule, Placement

EXITS = {"m": (2, 4, 6)}
FULL, PARTIAL = Placement("m", 6), Placement("m", 4)
CONFIDENCE = {"m@2": [0.9, 0.5, 0.5, 0.8], "m@4": [0.1, 0.85, 0.6, 0.9], "m@6": [0.4, 0.95, 0.7, 0.99]}
AGREES = {"m@2": [True, False, False, True], "m@4": [False, True, False, True], "m@6": [True] * 4}


def text(task: str = "chat", observed: dict[int, tuple[Placement, int, float]] | None = None) -> Text:
    return Text(
        task=task,
        prompt_tokens=10,
        tokens=4,
        end=None,
        confidence={k: np.array(v, np.float32) for k, v in CONFIDENCE.items()},
        agrees={k: np.array(v) for k, v in AGREES.items()},
        observed=observed or {},
    )


def behaviour(**texts: Text) -> Behaviour:
    found = {("one", source.replace("_", ":")): t for source, t in texts.items()}
    return Behaviour(found, {"chat": ["one", "two", "three"], "code": ["four"]}, EXITS)


@pytest.mark.parametrize(
    ("placement", "kind", "expected"),
    [
        (FULL, "none", "m:full"),
        (FULL, "greedy", "m:full"),
        (FULL, "threshold", "m:threshold"),
        (PARTIAL, "threshold", "m:threshold"),
        (PARTIAL, "greedy", "m:greedy@4"),
    ],
)
def test_source_names(placement: Placement, kind: str, expected: str) -> None:
    assert source_name(placement, ExitRule(kind), 6) == expected  # type: ignore[arg-type]


def leave(t: Text, placement: Placement, rule: ExitRule) -> list[tuple[int, float, bool]]:
    """Exit layer, confidence and agreement of each token."""
    walk = behaviour().walk(t, placement, rule)
    assert walk.logprobs == pytest.approx(np.log(walk.confidences))
    return list(zip(walk.exit_layers.tolist(), walk.confidences.tolist(), walk.agrees.tolist(), strict=True))


def test_a_token_leaves_at_the_first_confident_exit() -> None:
    left = leave(text(), FULL, ExitRule("threshold", 0.8))
    assert [e for e, _, _ in left] == [2, 4, 6, 2]
    assert [c for _, c, _ in left] == pytest.approx([0.9, 0.85, 0.7, 0.8])
    assert [a for _, _, a in left] == [True, True, True, True]


def test_a_token_never_leaves_below_the_resident_depth_unconfident() -> None:
    left = leave(text(), PARTIAL, ExitRule("threshold", 0.8))
    assert [e for e, _, _ in left] == [2, 4, 4, 2]
    assert left[2][1] == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["none", "greedy"])
def test_without_a_threshold_every_token_leaves_at_the_depth(kind: str) -> None:
    left = leave(text(), PARTIAL, ExitRule(kind))  # type: ignore[arg-type]
    assert [e for e, _, _ in left] == [4] * 4
    assert [a for _, _, a in left] == AGREES["m@4"]


def test_what_a_run_observed_goes_before_the_scores_under_its_own_placement_only() -> None:
    seen = text(observed={1: (FULL, 6, 0.33)})
    rule = ExitRule("threshold", 0.8)
    assert leave(seen, FULL, rule)[1] == (6, 0.33, True)
    assert leave(seen, PARTIAL, rule)[1][0] == 4
    assert leave(seen, FULL, rule)[0][0] == 2


def test_a_request_meets_one_prompt_of_its_task_whatever_else_changes() -> None:
    b = behaviour()
    met = [b.assign(k, "chat", 0) for k in range(60)]
    assert set(met) == {"one", "two", "three"}
    assert met == [b.assign(k, "chat", 0) for k in range(60)]
    assert met != [b.assign(k, "chat", 1) for k in range(60)]
    assert b.assign(5, "code", 0) == "four"
    assert {b.assign(k, "", 0) for k in range(60)} == {"one", "two", "three", "four"}
    with pytest.raises(UnknownNameError, match="Did you mean 'chat'"):
        b.assign(0, "chatt", 0)


def test_requests_of_a_recorded_run_meet_themselves() -> None:
    recorded = Behaviour({("request-7", "live"): text()}, {}, EXITS, is_recorded_run=True)
    assert recorded.assign(7, "anything", 3) == "request-7"
    assert recorded.text("request-7", "m:threshold") is recorded.texts["request-7", "live"]


def test_an_unknown_source_says_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="Known: m:full"):
        behaviour(m_full=text()).text("one", "m:greedy@4")


def test_exit_shares() -> None:
    b = behaviour(m_threshold=text(), m_full=text())
    assert b.exit_shares("m", "m:threshold", 0.8) == {2: 0.5, 4: 0.25, 6: 0.25}
    assert b.exit_shares("m", "m:threshold", 1.0) == {2: 0.0, 4: 0.0, 6: 1.0}
    assert b.exit_shares("m", "m:threshold", 0.0) == {2: 1.0, 4: 0.0, 6: 0.0}
    assert b.exit_shares("m", "m:greedy@2", 0.8) == {}


def test_perplexity_is_that_of_the_emitted_tokens() -> None:
    b = behaviour(m_threshold=text(), m_full=text())

    def expected(*confidences: float) -> float:
        return math.exp(-sum(math.log(c) for c in confidences) / len(confidences))

    assert b.perplexity("m", 4, "m:full", None) == pytest.approx(expected(0.1, 0.85, 0.6, 0.9), rel=1e-6)
    assert b.perplexity("m", 6, "m:threshold", 0.8) == pytest.approx(expected(0.9, 0.85, 0.7, 0.8), rel=1e-6)
    assert math.isnan(b.perplexity("m", 6, "m:greedy@2", None))
