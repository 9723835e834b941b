"""Fitted models of exits: chains recover known parameters, checks tell which one suffices, simulations can use them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from heliosim.behaviour_chains import Chain, Texts, fit_chain
from heliosim.behaviour_fit import CHAIN_KINDS, check_fits, fit_tasks, fitted_behaviour, state_codes, sufficient
from heliosim.behaviour_tokens import Tokens, tokens_of
from heliosim.errors import InputError
from heliosim.formats.profile import Profile
from heliosim.runs import run_live, run_simulated
from heliosim.scenario import Scenario
from heliosim.streams import stream
from tests.profiles import scenario, write_synthetic_profile
from tests.tokens import leaving

STICKY = np.array([[0.9, 0.05, 0.05], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]])
START = np.array([0.2, 0.5, 0.3])


def markov(step: np.ndarray, start: np.ndarray, texts: int, length: int, seed: int) -> list[list[int]]:
    """Texts of a chain, drawn one token at a time."""
    rng, found = stream(seed, "chain"), []
    for _ in range(texts):
        text = [int(rng.choice(3, p=start))]
        while len(text) < length:
            text.append(int(rng.choice(3, p=step[text[-1]])))
        found.append(text)
    return found


def as_texts(texts: list[list[int]]) -> Texts:
    number = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
    return Texts(np.concatenate([np.array(t) for t in texts]), number, len(texts), 3)


# --- chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_is_recovered() -> None:
    texts = markov(STICKY, START, 400, 40, 0)
    found = fit_chain("markov", as_texts(texts))
    assert found.classes == 1
    assert np.abs(found.step[0] - STICKY).max() < 0.02
    begun = np.bincount([t[0] for t in texts], minlength=3) / 400
    assert np.abs(found.start[0] - begun).max() < 0.003


def test_independent_tokens_are_their_shares() -> None:
    texts = as_texts([[0, 0, 1], [2]])
    found = fit_chain("iid", texts)
    assert found.start[0].tolist() == [0.5, 0.25, 0.25]
    assert (found.step[0] == found.start[0]).all()
    assert found.log_likelihood(texts) == pytest.approx(np.log(0.5 * 0.5 * 0.25 * 0.25))


def test_classes_of_requests_are_recovered_and_counted() -> None:
    """A third of the texts nearly always leave early, the others nearly never."""
    easy, hard = np.tile([0.8, 0.1, 0.1], (3, 1)), np.tile([0.1, 0.1, 0.8], (3, 1))
    texts = markov(easy, easy[0], 60, 40, 1) + markov(hard, hard[0], 120, 40, 2)
    found = fit_chain("markov-request", as_texts(texts))
    assert found.classes == 2
    assert found.weights.tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.02)
    assert np.abs(found.step[0] - easy).max() < 0.06
    assert np.abs(found.step[1] - hard).max() < 0.06
    belongs = found.shares(as_texts(texts))
    assert belongs[:60, 0].min() > 0.99
    assert belongs[60:, 1].min() > 0.99


def test_more_general_models_are_likelier_on_what_they_were_fitted_to() -> None:
    texts = as_texts(markov(STICKY, START, 30, 20, 3))
    likely = [fit_chain(kind, texts).log_likelihood(texts) for kind in CHAIN_KINDS]
    assert likely == sorted(likely)


def test_drawn_texts_have_the_chain_s_shares() -> None:
    chain = fit_chain("markov", as_texts(markov(STICKY, START, 400, 40, 0)))
    drawn = chain.draw(60, np.zeros(2000), stream(0, "draw"))
    assert drawn.shape == (2000, 60)
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (drawn[:, :-1].ravel(), drawn[:, 1:].ravel()), 1)
    assert np.abs(pairs / pairs.sum(axis=1, keepdims=True) - chain.step[0]).max() < 0.01


def test_a_class_follows_from_the_number_given() -> None:
    step = np.zeros((2, 3, 3))
    step[0, :, 0] = step[1, :, 2] = 1
    chain = Chain("markov-request", np.array([0.25, 0.75]), step[:, 0], step)
    assert chain.draw(2, np.array([0.1, 0.24, 0.26, 0.99]), stream(0, "x")).tolist() == [[0, 0]] * 2 + [[2, 2]] * 2


def test_no_tokens_no_chain() -> None:
    with pytest.raises(InputError, match="no tokens"):
        fit_chain("iid", Texts(np.zeros(0, int), np.zeros(0, int), 0, 1))


# --- which one suffices -----------------------------------------------------------------------------------------------


def independent(seed: int) -> Tokens:
    return leaving(stream(seed, "iid").choice(3, p=[0.5, 0.2, 0.3], size=(60, 40)).tolist())


def mixed(seed: int) -> Tokens:
    easy, hard = np.tile([0.85, 0.1, 0.05], (3, 1)), np.tile([0.1, 0.1, 0.8], (3, 1))
    return leaving(markov(easy, easy[0], 30, 40, seed) + markov(hard, hard[0], 30, 40, seed + 1))


@pytest.mark.parametrize(
    ("tokens", "enough"),
    [(independent(0), "iid"), (leaving(markov(STICKY, START, 60, 40, 5)), "markov"), (mixed(7), "markov-request")],
    ids=["iid", "markov", "markov-request"],
)
def test_the_check_names_the_simplest_model_that_suffices(tokens: Tokens, enough: str) -> None:
    checked = check_fits(tokens, "m", 0.5, draws=40)
    assert sufficient(checked) == enough
    assert set(checked["model"]) == set(CHAIN_KINDS)
    share = checked[(checked["model"] == "iid") & (checked["statistic"] == "share at 2")].iloc[0]
    assert share["recorded"] == pytest.approx(float(np.mean(tokens.fan("confidence", "m")[0] > 0.5)))
    assert share["low"] < share["fitted"] < share["high"]


def test_order_beyond_one_token_is_missed_and_said() -> None:
    """Exits with a period of three, as in lists: no chain of order 1 gives them back."""
    rng = stream(1, "period")
    texts = [[2 if (i + k) % 3 else 0 for i in range(42)] for k in rng.integers(0, 3, 60)]
    checked = check_fits(leaving(texts), "m", 0.5, draws=40)
    assert sufficient(checked) is None
    missed = checked[(checked["model"] == "markov") & ~checked["is_met"]]["statistic"].tolist()
    assert "lag 5 correlation" in missed


def test_states_tell_where_all_models_leave_and_whether_the_last_is_sure() -> None:
    assert state_codes(leaving([[0, 1, 2, 3]]), ["m"], 0.5).tolist() == [0, 1, 2, 3]


# --- in a simulation --------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return write_synthetic_profile(tmp_path / "profile")


@pytest.mark.parametrize("kind", CHAIN_KINDS)
def test_drawn_texts_are_made_of_recorded_tokens(profile: Profile, kind: str) -> None:
    models = list(profile.facts.models)
    made = fitted_behaviour(profile.behaviour, models, kind, 0.8, seed=1, texts_per_task=10)  # type: ignore[arg-type]
    again = fitted_behaviour(profile.behaviour, models, kind, 0.8, seed=1, texts_per_task=10)  # type: ignore[arg-type]
    assert {task: len(names) for task, names in made.sequences.items()} == dict.fromkeys(("chat", "code", "qa"), 10)
    assert len(made.texts) == 30 * len(profile.behaviour.sources)
    recorded = {tuple(row) for row in _rows(tokens_of(profile.behaviour))}
    drawn = _rows(tokens_of(made))
    assert {tuple(row) for row in drawn} <= recorded
    assert (drawn == _rows(tokens_of(again))).all()
    first = profile.behaviour.texts["chat-001", "small:full"]
    copy = made.texts["chat-001+2", "small:full"]
    assert (copy.tokens, copy.end, copy.prompt_tokens) == (first.tokens, first.end, first.prompt_tokens)


def _rows(tokens: Tokens) -> np.ndarray:
    return np.stack([tokens.columns[name] for name in sorted(tokens.columns) if name.startswith("confidence")], axis=1)


def test_a_scenario_names_its_exits(profile: Profile) -> None:
    plain = scenario(profile)
    fitted = scenario(profile, behaviour="markov")
    assert "behaviour" not in plain.to_yaml()
    assert plain.hash == Scenario.model_validate(plain.model_dump() | {"behaviour": "replay"}).hash != fitted.hash
    one, two = run_simulated(fitted, profile), run_simulated(fitted, profile)
    assert one.tokens.equals(two.tokens)
    assert one.info.behaviour == "markov"
    assert not one.tokens.equals(run_simulated(plain, profile).tokens)


@pytest.mark.parametrize("kind", ["iid", "markov-request"])
def test_single_steps_and_strides_are_the_same_run(profile: Profile, kind: str) -> None:
    asked = scenario(profile, behaviour=kind)
    strides, single = run_simulated(asked, profile), run_simulated(asked, profile, max_stride=1)
    for name in ("requests", "steps", "tokens", "events"):
        assert getattr(strides, name).equals(getattr(single, name)), name


def test_a_fit_is_made_once(profile: Profile) -> None:
    a = profile.fitted_behaviour("iid", ("small",), 0.8, 0)
    assert profile.fitted_behaviour("iid", ("small",), 0.8, 0) is a
    for seed in range(1, 6):
        profile.fitted_behaviour("iid", ("small",), 0.8, seed)
    assert profile.fitted_behaviour("iid", ("small",), 0.8, 0) is not a, "only the last few are kept"


def test_a_live_run_refuses_made_up_exits(profile: Profile) -> None:
    with pytest.raises(InputError, match="its models' own exits"):
        run_live(scenario(profile, behaviour="iid"), profile)


def test_tasks_are_fitted_apart(profile: Profile) -> None:
    tokens = tokens_of(profile.behaviour).of(sources=["small:full"])
    found = fit_tasks(tokens, "iid", 0.8, ["small"])
    assert list(found) == ["chat", "code", "qa"]
    assert sum(len(rows) for fitted in found.values() for rows in fitted.rows) == tokens.size
