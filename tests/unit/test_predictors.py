from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import kendalltau

from heliosim.predictors import BucketPredictor, LengthPredictor, Predictor, Priorities, RankPredictor
from heliosim.streams import stream
from heliosim.workload import WorkloadSpec, build_arrivals

LENGTHS = [int(n) for n in stream(1, "lengths").integers(1, 400, 3000)]
LIMITS = [400] * len(LENGTHS)


def told(predictor: Predictor, seed: int = 3) -> list[float]:
    return [p.tokens for p in predictor.predictions(LENGTHS, LIMITS, seed) or ()]


def tau_of(predicted: list[float]) -> float:
    return float(kendalltau(predicted, LENGTHS).statistic)


@pytest.mark.parametrize(("sigma", "bias"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.5)])
def test_lengths_are_off_by_the_stated_factor(sigma: float, bias: float) -> None:
    """Requests of 60 tokens or more, so that no prediction stops at one token."""
    predicted = told(LengthPredictor(sigma=sigma, bias=bias))
    logs = [math.log(p / n) for p, n in zip(predicted, LENGTHS, strict=True) if n >= 60]
    assert fmean(logs) == pytest.approx(math.log(bias), abs=0.06)
    assert stdev(logs) == pytest.approx(sigma, abs=0.03)


@pytest.mark.parametrize("tau", [-1.0, -0.4, 0.0, 0.3, 0.7, 1.0])
def test_ranks_agree_to_the_stated_tau(tau: float) -> None:
    predicted = told(RankPredictor(tau=tau))
    assert tau_of(predicted) == pytest.approx(tau, abs=0.04)
    assert sorted(predicted) == sorted(LENGTHS), "the distribution is the true one"


def test_buckets_are_right_as_often_as_stated() -> None:
    edges = (50, 100, 200, 400)
    predicted = told(BucketPredictor(edges=edges, accuracy=0.7))
    assert set(predicted) == {25.5, 75.5, 150.5, 300.5}
    true = np.searchsorted(edges, LENGTHS)
    said = np.searchsorted(edges, predicted)
    assert float(np.mean(true == said)) == pytest.approx(0.7, abs=0.03)
    assert int(np.abs(true - said).max()) == 1, "errors are buckets beside the right one"


def test_a_confusion_matrix_is_followed() -> None:
    confusion = ((0.5, 0.25, 0.25), (0.0, 1.0, 0.0), (0.1, 0.2, 0.7))
    edges = (100, 200, 400)
    predicted = np.searchsorted(edges, told(BucketPredictor(edges=edges, confusion=confusion)))
    true = np.searchsorted(edges, LENGTHS)
    for k, row in enumerate(confusion):
        seen = np.bincount(predicted[true == k], minlength=3) / np.count_nonzero(true == k)
        assert seen == pytest.approx(row, abs=0.06)


def test_later_predictions_are_closer_and_do_not_give_the_length_away() -> None:
    predictor = LengthPredictor(sigma=1.0, refine_every=20, refine_shrink=0.5)
    found = predictor.predictions([200] * 300, [400] * 300, 1)
    assert {len(p.later) for p in found} == {20}, "as many as max_tokens allows, whatever the length"
    errors = [stdev([math.log((p.total(g) - g) / (200 - g)) for p in found]) for g in (0, 20, 100)]
    assert errors == pytest.approx([1.0, 0.5, 1 / 32], rel=0.15)


@pytest.mark.parametrize(
    "predictor", [LengthPredictor(sigma=1.0, refine_every=50), BucketPredictor(edges=(99, 400), accuracy=0.5)]
)
def test_a_prediction_depends_on_its_place_alone(predictor: Predictor) -> None:
    whole = predictor.predictions(LENGTHS, LIMITS, 5)
    assert whole is not None
    assert predictor.predictions(LENGTHS[:40], LIMITS[:40], 5) == whole[:40]


def spec(**changes: Any) -> WorkloadSpec:
    task = {"task": "chat", "prompt_tokens": 10, "output_tokens": {"kind": "uniform", "low": 1, "high": 60}}
    base = {"requests": 400, "arrivals": {"kind": "poisson", "rate_per_s": 5.0}, "tasks": [task]}
    return WorkloadSpec.model_validate(base | changes)


def test_a_workload_tells_requests_their_class_and_prediction_and_moves_nothing_else() -> None:
    plain, full = (
        build_arrivals(s, 7)
        for s in (spec(), spec(predictor={"kind": "rank", "tau": 0.5}, priorities={"shares": [1, 3]}))
    )
    for a, b in zip(plain, full, strict=True):
        assert (a.content, a.request.arrival_s, a.request.max_tokens) == (
            b.content, b.request.arrival_s, b.request.max_tokens,
        )  # fmt: skip
        assert a.request.prediction is None
        assert b.request.predicted_tokens is not None
    classes = [a.request.priority for a in full]
    assert set(classes) == {0, 1}
    assert fmean(classes) == pytest.approx(0.75, abs=0.07)


def test_natural_lengths_cannot_be_predicted() -> None:
    task = {"task": "chat", "prompt_tokens": 10, "max_tokens": 20}
    with pytest.raises(ValidationError, match="natural lengths"):
        spec(tasks=[task], lengths="natural", predictor={"kind": "length", "sigma": 0.1})
    assert spec(tasks=[task], lengths="natural", predictor={"kind": "none"}).predictor is not None


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "bucket", "edges": [5, 5], "accuracy": 0.5},
        {"kind": "bucket", "edges": [5, 9]},
        {"kind": "bucket", "edges": [5, 9], "confusion": [[1.0, 0.0]]},
        {"kind": "bucket", "edges": [5, 9], "confusion": [[1.0, 0.0], [0.7, 0.7]]},
        {"kind": "rank", "tau": 1.5},
        {"kind": "oracle"},
    ],
)
def test_bad_predictors_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(predictor=bad)


def test_classes_by_share() -> None:
    assert Priorities(shares=(0, 1)).classes(5, 1) == [1] * 5
    with pytest.raises(ValidationError, match="sum"):
        Priorities(shares=(0.0, 0.0))
