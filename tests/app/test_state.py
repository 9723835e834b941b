"""Inputs and links: what a link says is taken over or explained, and the URL always says what differs."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")
from heliosim_app import state
from heliosim_app.inputs import SHARED
from heliosim_app.state import Input, parse, register, text_of

from tests.app.helpers import open_page

NUMBER = Input("x-number", "number", "Number", 20.0, low=0.5, high=100)
WHOLE = Input("x-whole", "whole", "Whole", 4, low=1, high=9)
CHOICE = Input("x-choice", "choice", "Choice", "a", ("a", "b"))
SEVERAL = Input("x-several", "several", "Several", ["a"], ("a", "b"))
TOGGLE = Input("x-toggle", "toggle", "Toggle", False)


@pytest.mark.parametrize(
    ("one", "value"), [(NUMBER, 33.25), (WHOLE, 7), (CHOICE, "b"), (SEVERAL, ["a", "b"]), (SEVERAL, []), (TOGGLE, True)]
)
def test_values_survive_a_link(one: Input, value: object) -> None:
    assert parse(one, text_of(one, value)) == value
    assert type(parse(one, text_of(one, value))) is type(value)


@pytest.mark.parametrize(
    ("one", "text", "problem"),
    [
        (NUMBER, "fast", "is no number"),
        (NUMBER, "nan", "is no number"),
        (NUMBER, "1e999", "is no number"),
        (NUMBER, "0.1", "is not between 0.5 and 100"),
        (WHOLE, "2.5", "is no whole number"),
        (CHOICE, "c", "is none of a, b"),
        (SEVERAL, "a,c", "names c, which is none of a, b"),
        (TOGGLE, "yes", "is neither true nor false"),
    ],
)
def test_nonsense_is_refused_in_words(one: Input, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse(one, text)


def test_one_key_means_one_input() -> None:
    register(SHARED[0])
    with pytest.raises(ValueError, match="two inputs"):
        register(Input(SHARED[0].key, "text", "Other", ""))


def test_defaults_are_values_a_link_may_have() -> None:
    for one in SHARED:
        assert parse(one, text_of(one, one.default)) == one.default, one.key


def test_a_link_restores_inputs_and_its_nonsense_is_said() -> None:
    app = open_page("plan", rate="12", seed="2.5", colour="red")
    assert not app.exception
    assert app.number_input(key="rate").value == 12
    assert app.number_input(key="seed").value == 0
    said = [one.value for one in app.warning]
    assert any("seed=2.5" in text and "is no whole number" in text for text in said)
    assert any("colour=red" in text for text in said)


def test_the_url_says_what_differs_from_the_defaults() -> None:
    app = open_page("plan", rate="12")
    app.number_input(key="ttft").set_value(250).run()
    assert dict(app.query_params) == {"rate": "12", "ttft": "250"}
    app.number_input(key="rate").set_value(20.0).run()
    assert "rate" not in app.query_params


def test_changes_stand_in_a_link_even_if_they_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "value", lambda key: state.INPUTS[key].default)
    register(*SHARED)
    assert state.query(rate=20.0) == {"rate": "20"}
    with pytest.raises(KeyError):
        state.query(colour="red")
