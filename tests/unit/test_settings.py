"""Settings of the what-if page and what the page Compare compares, without a page."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from heliosim_app.comparisons import ABLATIONS, Comparison, focus_system
from heliosim_app.question import Question
from heliosim_app.settings import FREE, Setting, depths_of, mix_text, parse_mix, tasks_of

from heliosim.errors import InputError

ASKED = Question(models="llama2-small", device="H100-80GB", rate_per_s=10)


def test_parameters_go_to_the_controllers_that_have_them() -> None:
    helios = Setting(ASKED, threshold=0.6, coverage=0.5, max_breaches=20, reassess_interval=80).scenario().controller
    assert (helios["threshold"], helios["coverage"]) == (0.6, 0.5)
    assert (helios["max_breaches"], helios["reassess_interval"]) == (20, 80)
    early = Setting(Question(**{**vars(ASKED), "system": "early exit llama2-7b"}), threshold=0.6)
    assert early.scenario().controller == {"kind": "early-exit", "model": "llama2-7b", "threshold": 0.6}
    vanilla = Setting(Question(**{**vars(ASKED), "system": "vanilla llama2-7b"}), threshold=0.6)
    assert "threshold" not in vanilla.scenario().controller


def test_a_fixed_depth_replaces_the_system() -> None:
    setting = Setting(ASKED, depth="llama2-7b@16", threshold=0.6)
    assert setting.kind == "fixed"
    assert setting.scenario().controller == {"kind": "fixed", "model": "llama2-7b", "depth": 16, "threshold": 0.6}
    assert depths_of(ASKED.profile(), ASKED.models_of())[:3] == (FREE, "llama2-2.7b@8", "llama2-2.7b@16")


def test_requests_are_shared_by_the_replications() -> None:
    assert Setting(ASKED, total=1000, replications=5).scenario().workload.requests == 200
    with pytest.raises(InputError, match="at least 100 requests"):
        Setting(ASKED, total=50, replications=5).scenario()


def test_a_mix_has_the_lengths_of_the_question() -> None:
    tasks = Setting(ASKED, mix="chat:3,code:1").scenario().workload.tasks
    assert [(t.task, t.share) for t in tasks] == [("chat", 3), ("code", 1)]
    assert len({repr(t.output_tokens) for t in tasks}) == 1
    assert len(Setting(ASKED, mix="code:2").scenario().workload.tasks) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [("chat", "task:weight"), ("chess:1", "unknown name"), ("chat:0", "no task has any weight"), ("", "task:weight")],
)
def test_bad_mixes_are_explained(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_mix(text, tasks_of(ASKED.profile()))


def test_mix_survives_a_link() -> None:
    assert parse_mix(mix_text({"chat": 3, "code": 0, "summarisation": 1.5}), tasks_of(ASKED.profile())) == {
        "chat": 3,
        "summarisation": 1.5,
    }


def test_a_comparison_has_all_systems_but_ablations() -> None:
    made = Comparison(ASKED)
    assert not set(made.names) & set(ABLATIONS)
    assert set(ABLATIONS) < set(made.known)
    assert made.baselines[0] == "early exit llama2-7b"
    scenarios = made.scenarios()
    assert {s.seed for s in scenarios.values()} == {ASKED.seed}
    assert len({s.workload.model_dump_json() for s in scenarios.values()}) == 1


def test_ablations_turn_one_mechanism_off() -> None:
    made = Comparison(ASKED, chosen=("HELIOS", "HELIOS without switching")).scenarios()
    whole, part = made["HELIOS"].controller, made["HELIOS without switching"].controller
    assert part == {**whole, "use_switch": False}


def test_names_hold_no_comma_since_links_part_them_so() -> None:
    assert not any("," in name for name in Comparison(ASKED).known)


def test_unknown_systems_are_refused() -> None:
    with pytest.raises(InputError, match="unknown name"):
        Comparison(ASKED, chosen=("HELIOS 2",)).scenarios()


def test_the_key_tells_comparisons_apart() -> None:
    keys = {
        Comparison(ASKED).key(),
        Comparison(ASKED, replications=4).key(),
        Comparison(ASKED, focus_per_s=3.0).key(),
        Comparison(Question(**{**vars(ASKED), "ttft_ms": 400.0})).key(),
        Comparison(ASKED).key("fleet", "HELIOS", 3),
    }
    assert len(keys) == 5
    assert Comparison(ASKED).key() == Comparison(ASKED).key()


def test_what_a_comparison_is_about() -> None:
    assert focus_system(("vanilla", "HELIOS"), "vanilla") == "HELIOS"
    assert focus_system(("vanilla", "early exit"), "vanilla") == "early exit"
    assert focus_system(("vanilla",), "vanilla") == "vanilla"
