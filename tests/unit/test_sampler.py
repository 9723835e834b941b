"""Draws: what they follow, what they do not depend on, and what is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from scipy.stats import chisquare, kstest  # noqa: E402

from heliosim.engines.sampler import Sampler, uniforms  # noqa: E402
from heliosim.sampling import Sampling  # noqa: E402

LOGITS = torch.log(torch.tensor([0.5, 0.05, 0.3, 0.1, 0.05]))


def drawn(sampling: Sampling, count: int = 4000) -> np.ndarray:
    """Ids drawn from ``LOGITS`` at ``count`` positions of one request."""
    seeds = torch.full((count,), sampling.request_seed(3))
    return Sampler(sampling).choose(LOGITS.expand(count, -1), seeds, torch.arange(count)).ids.numpy()


def test_numbers_are_uniform_and_not_alike() -> None:
    seeds = torch.tensor([Sampling(temperature=1, seed=5).request_seed(i) for i in range(200)])
    grid = uniforms(seeds.repeat_interleave(50), torch.arange(50).repeat(200)).numpy()
    assert kstest(grid, "uniform").pvalue > 0.001
    assert grid.min() > 0
    assert grid.max() < 1
    table = grid.reshape(200, 50)
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 0.25, "positions go together"
    assert abs(np.corrcoef(table[0], table[1])[0, 1]) < 0.5, "requests go together"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    ids = drawn(Sampling(temperature=temperature, seed=1))
    shares = torch.softmax(LOGITS / temperature, -1).double().numpy()
    expected = shares / shares.sum() * len(ids)
    assert chisquare(np.bincount(ids, minlength=5), expected).pvalue > 0.001


@pytest.mark.parametrize(
    ("cut", "left"), [({"top_k": 2}, {0, 2}), ({"top_p": 0.79}, {0, 2}), ({"top_p": 0.81}, {0, 2, 3})]
)
def test_what_is_cut_is_never_drawn(cut: dict[str, float], left: set[int]) -> None:
    assert set(drawn(Sampling(temperature=1, seed=2, **cut)).tolist()) == left  # type: ignore[arg-type]


def test_the_likeliest_is_kept_however_small_the_share() -> None:
    assert set(drawn(Sampling(temperature=1, top_p=0.01), 100).tolist()) == {0}


def test_a_draw_says_its_own_probability_and_the_highest() -> None:
    chosen = Sampler(Sampling(temperature=3, seed=4)).choose(
        LOGITS.expand(64, -1), torch.zeros(64).long(), torch.arange(64)
    )
    assert torch.allclose(chosen.logprobs, LOGITS[chosen.ids], atol=1e-6)
    assert torch.allclose(chosen.tops, LOGITS[:1].expand(64), atol=1e-6)
    assert len(set(chosen.ids.tolist())) > 1


def test_greedy_needs_no_seed() -> None:
    chosen = Sampler().choose(LOGITS[None])
    assert chosen.ids.tolist() == [0]
    assert chosen.tops.tolist() == chosen.logprobs.tolist() == pytest.approx([float(np.log(0.5))])


@pytest.mark.parametrize("wrong", [{"top_p": 0.5}, {"seed": 3}, {"top_k": 0, "temperature": 1}, {"temperature": -1}])
def test_settings_without_effect_or_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Sampling(**wrong)  # type: ignore[arg-type]
