"""Answer and Plan: they open answered, follow their inputs, and explain what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("streamlit")
from heliosim_app import wording
from heliosim_app.shipped import EXAMPLES, shipped_answer
from streamlit.testing.v1 import AppTest

from heliosim.errors import InputError
from heliosim.executors import open_executor
from heliosim.plan_report import judgement_json
from heliosim.probing import FleetJudge, Prober
from tests.app.helpers import open_page


def sentence(app: AppTest) -> str:
    """The sentence of an answer, as its HTML has it."""
    found = [one.body for one in app.get("html") if 'class="hs-sentence"' in one.body]
    return found[0] if found else ""


def test_the_answer_page_opens_answered() -> None:
    app = open_page("answer")
    assert not app.exception
    assert "A100-80GB with HELIOS offline over Llama2-2.7B + 7B" in sentence(app)
    assert not app.error


def test_an_example_fills_the_inputs_and_its_answer_is_there() -> None:
    app = open_page("answer")
    before = sentence(app)
    app.button(key="example-chat-early-exit").click().run()
    assert not app.exception
    assert app.selectbox(key="system").value == "early exit llama2-7b"
    assert sentence(app) != before
    assert dict(app.query_params) == {"system": "early exit llama2-7b"}


def test_another_workload_brings_its_lengths() -> None:
    app = open_page("plan")
    app.selectbox(key="load").set_value("code").run()
    assert app.query_params["output"] == "64"


def test_models_narrow_the_devices_and_systems() -> None:
    app = open_page("plan", models="opt-pair", plan_devices="H200-141GB")
    assert not app.exception
    assert "H200-141GB" in app.multiselect(key="plan_devices").options
    assert "vanilla opt-6.7b" in app.multiselect(key="plan_systems").options


def test_the_plan_page_opens_answered() -> None:
    app = open_page("plan")
    assert not app.exception
    assert "/h" in sentence(app)
    assert {one.value for one in app.subheader} >= {"Every candidate", "If the load is 20 % off"}


def test_a_new_plan_waits_for_its_button() -> None:
    app = open_page("plan", rate="7")
    assert not app.exception
    assert not sentence(app)
    assert app.button(key="plan-search").label == "Search the cheapest fleet"


@pytest.mark.parametrize("prices", ["H100-80GB:-3:4", "H100-80GB:cheap", "A100-80GB:2:900"])
def test_prices_that_make_no_sense_are_explained(prices: str) -> None:
    app = open_page("plan", prices=prices)
    assert not app.exception
    assert any("H100-80GB" in one.value or "A100-80GB" in one.value for one in app.error)


def test_an_edited_price_in_a_link_is_another_plan() -> None:
    app = open_page("plan", prices="H100-80GB:0.5:8")
    assert not app.exception
    assert not sentence(app)
    assert app.query_params["prices"] == "H100-80GB:0.5:8"


def test_no_limit_at_all_is_explained() -> None:
    app = open_page("answer", ttft="0", tpot="0")
    assert not app.exception
    assert any("nothing is asked of the fleet" in one.value for one in app.error)


def test_the_unexpected_is_explained_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from heliosim_app import asked

    def fail() -> None:
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(asked, "question", fail)
    app = open_page("answer")
    assert not app.exception
    assert any("ZeroDivisionError" in one.value and "report" in one.value for one in app.error)
    assert not any("Traceback" in one.value for one in app.error)


def test_what_a_user_can_correct_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from heliosim_app import asked

    def refuse() -> None:
        raise InputError("rate", 0, "is too low", "Raise it.")

    monkeypatch.setattr(asked, "question", refuse)
    app = open_page("answer")
    assert [one.value for one in app.error] == ["rate: is too low (value: 0). Raise it.".replace(":", "\\:")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_shipped_with_its_answer(name: str) -> None:
    answer = shipped_answer(EXAMPLES[name].question)
    assert answer is not None, "run  python -m heliosim_app.shipped"
    assert answer["answer"] == "feasible"
    said = wording.sentence(EXAMPLES[name].question, answer)
    assert f"{answer['winner']['count']} × {EXAMPLES[name].question.device}" in said
    assert "±" in said


@pytest.mark.parametrize("name", ["chat", "code"])
def test_a_shipped_answer_is_what_simulations_say(name: str, tmp_path: Path) -> None:
    question = EXAMPLES[name].question
    shipped = shipped_answer(question)
    assert shipped is not None
    plan = question.plan()
    with open_executor("local", 1) as executor:
        judge = FleetJudge(plan, Prober(plan.rules, executor, tmp_path, lambda what: None))
        count = shipped["winner"]["count"]
        found = judge.judge(plan.candidates[0], count, fresh=True)
    assert json.loads(json.dumps(judgement_json(found))) == shipped["verified_with_fresh_seeds"]
